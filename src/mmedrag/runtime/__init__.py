"""What every command needs of the machine, once each: files, journal, run folder, settings.

Read ``files`` (atomic writes, hashes, JSON Lines), ``journal`` (an append-only log that survives a
kill), ``run_folder`` (what was run, on what, with which versions), ``data_folder`` (a DATA folder
of the contract), ``config`` (recipes and settings classes), then the small ones: ``draws`` (seeded
numbers), ``cache`` (the cache folder), ``progress``, ``model_card`` and ``trained`` (what stands
beside a trained model), ``memory``, ``torchvision_shim``; of every training: ``processes``,
``training`` (whose run it is, checkpoints, progress).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
