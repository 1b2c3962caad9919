"""Two-image, two-prompt DPO: L_pt of the paper, on an adapter.

Read ``loss`` (the equation) and ``settings``, then ``train``, which is the order of a tuning:

1. load: the model, and every pair encoded and checked for it (``encode``)
2. prepare: what never changes, computed once and kept on disk (``prepare``, ``cache``)
3. fit: batches of pairs (``collate``), log-probabilities of adapter and reference in one model
   (``policy``), loss and metrics on ``transformers.Trainer`` (``trainer``); folder, checkpoints and
   resume are ``runtime.training``, as of every training
4. write: adapter, card, log, training ids (``card``)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
