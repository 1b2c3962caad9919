"""The records that travel, and the protocols behind which every part can be replaced.

Read ``records`` (Example → Trace, Reference, Pair), ``protocols`` (what each arrow needs of its
part), ``answers`` (free text → yes, no, unclear), then the small vocabularies: ``vocabulary`` (the
words that fields and settings take, the error that users see), ``conditions``
(clean or noise, with or without references) and ``pair_kinds`` (which conditions each kind of
preference pair compares). Everything else in this package's dependants is built from these.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
