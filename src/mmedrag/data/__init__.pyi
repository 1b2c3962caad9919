from . import ocr as ocr, splits as splits
from .importing import (
    check as check,
    export_released as export_released,
    import_data as import_data,
    stats as stats,
)
