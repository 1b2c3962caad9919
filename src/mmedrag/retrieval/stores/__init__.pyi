from . import folder as folder
from .folder import read_manifest as read_manifest
