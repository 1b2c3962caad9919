from . import gallery as gallery
from . import svg as svg
from . import tables as tables
from . import view as view
from .tables import LEADING as LEADING
from .tables import SECOND as SECOND
from .tables import beside as beside
from .write import write_report as write_report
