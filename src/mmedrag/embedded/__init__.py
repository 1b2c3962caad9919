"""The weights of the small system that ships with the package, and where they lie.

Every folder is an ordinary Hugging Face one, loaded through the same code as a 7B checkpoint.
Weights, thresholds and calibrations come from ``data phantom`` alone (``make tiny`` rebuilds
them); on real images the answers mean nothing, and the system says so. One is of real pictures:
``domain-real`` (``training.real_domain``; its card names the sources).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
