"""Pixels: reading any picture file safely, degrading it, and telling whether two are alike.

Read ``files`` (path → RGB), ``pixels`` (limits, scaling to 8 bits, square pixels), ``deep`` (PNG,
PPM and TIFF beyond 8 bits), ``dicom`` over ``tones`` (stored values as they are shown), ``noise``
(x* = I(x), drawn at model resolution), ``strip`` (copies without metadata), ``alike`` (hashes of
pixels and of appearance).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
