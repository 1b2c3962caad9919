"""Settings of the service (recipe table ``[serve]``).

Secrets are not among them: the file of API keys is named by the environment variable
``MMEDRAG_API_KEYS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KEYS = "MMEDRAG_API_KEYS"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeSettings:
    """Limits in bytes, pixels and seconds.

    Attributes:
        host, port: where to listen; another host than loopback needs API keys.
        hosts: further names under which clients reach the service (the ``Host`` header).
        max_bytes: of a request's body. max_pixels: of one decoded image.
        max_images: views of one study. max_text: characters of a question.
        max_waiting: requests between header and answer; more are told to come back (429).
        batch: at most so many questions go through the pipeline together.
        linger: how long a batch waits for company.
        timeout: until an answer; body_timeout: until a request's body is there;
            decode_timeout: for one image; grace: for what runs, when stopping.
        rate, burst: requests a minute and at once, per key (or address); 0: unlimited.
        decoders: processes that decode uploaded images; decoder_memory: address space of each.
        min_confidence: under this max(p_yes, 1 - p_yes) a closed question is not answered;
            None: the threshold fitted for the model, as `mmedrag ask` has it.
        audit: file of the audit log; None: none is kept.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    max_bytes: int = 32 * 2**20
    max_pixels: int = 40_000_000
    max_images: int = 4
    max_text: int = 2_000
    max_waiting: int = 64
    batch: int = 16
    linger: float = 0.005
    timeout: float = 120.0
    body_timeout: float = 30.0
    decode_timeout: float = 20.0
    grace: float = 30.0
    rate: float = 600.0
    burst: int = 100
    decoders: int = 2
    decoder_memory: int = 4 * 2**30
    min_confidence: float | None = None
    audit: Path | None = None
    examples: bool = True
