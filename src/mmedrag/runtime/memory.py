"""Running out of memory: what it looks like on any device, and giving back what is not needed.

Place in the picture: around batches, which are halved and tried again when it happens.
"""

from __future__ import annotations

import sys


def ran_out(error: BaseException) -> bool:
    """Whether an exception of torch (any device) or Python means that memory ran out."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in said
        or "can't allocate memory" in said
    )


def empty_cache() -> None:
    """Hand memory that torch keeps for later back to the GPU; torch is not loaded for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
