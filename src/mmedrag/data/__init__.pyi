from . import ocr as ocr
from . import splits as splits
from .importing import check as check
from .importing import export_released as export_released
from .importing import import_data as import_data
from .importing import stats as stats
