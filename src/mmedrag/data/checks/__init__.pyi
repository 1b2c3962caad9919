from . import text as text
from .report import FINDINGS as FINDINGS
