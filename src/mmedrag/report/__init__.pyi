from . import gallery as gallery, svg as svg, tables as tables, view as view
from .tables import LEADING as LEADING, SECOND as SECOND, beside as beside
from .write import read_metrics as read_metrics, write_report as write_report
