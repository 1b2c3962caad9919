"""The command line: one file per noun; each command parses, loads, calls, prints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
