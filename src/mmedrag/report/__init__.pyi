from . import gallery as gallery, svg as svg, tables as tables, view as view
from .similar import write_similar as write_similar
from .tables import LEADING as LEADING, SECOND as SECOND, beside as beside
from .write import write_report as write_report
