"""Image-text encoders behind one protocol: unit vectors of pictures and of texts.

Read ``load`` (names and folders → encoder), ``base`` (towers → encoder, batches, fingerprint),
``hf`` and ``open_clip`` (the two layouts), ``windows`` (long texts).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
