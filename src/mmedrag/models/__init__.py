"""Checkpoints: reading them safely, converting LLaVA-Med layouts, loading with an adapter.

Read ``load`` (folder → model and processor), ``adapters`` (onto it), ``checkpoints`` (shards,
tensor by tensor), ``convert`` with ``llava_layout`` and ``llava_tensors``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
