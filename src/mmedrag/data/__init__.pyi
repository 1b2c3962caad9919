from . import ocr as ocr, splits as splits
from .checks.check import check as check
from .checks.counts import stats as stats
from .formats.released import export_released as export_released
from .importing import import_data as import_data
