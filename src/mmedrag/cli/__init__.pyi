from . import options as options
