"""Settings of the service (recipe table ``[serve]``).

Secrets are not among them: the file of API keys is named by the environment variable
``MMEDRAG_API_KEYS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmedrag.runtime import Settings, setting

KEYS = "MMEDRAG_API_KEYS"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeSettings(Settings):
    """Where to listen, and limits in bytes, pixels and seconds."""

    table = "serve"

    host: str = setting("127.0.0.1", "Where to listen; another than loopback needs API keys.")
    port: int = setting(8000, "Port to listen on; 0: a free one.", minimum=0, maximum=65535)
    hosts: tuple[str, ...] = setting(
        (), "Host names of clients' requests. Repeatable.", metavar="NAME"
    )
    max_bytes: int = setting(32 * 2**20, "Bytes of a request's body.", minimum=1)
    max_pixels: int = setting(40_000_000, "Pixels of one decoded image.", minimum=1)
    max_images: int = setting(4, "Views of one study.", minimum=1)
    max_text: int = setting(2_000, "Characters of a question.", minimum=1)
    max_waiting: int = setting(
        64, "Requests between header and answer; more are told to come back (429).", minimum=1
    )
    batch: int = setting(16, "Questions that go through the pipeline together, at most.", minimum=1)
    linger: float = setting(0.005, "Seconds that a batch waits for company.", minimum=0)
    timeout: float = setting(120.0, "Seconds until an answer.", above=0)
    body_timeout: float = setting(30.0, "Seconds until a request's body is there.", above=0)
    decode_timeout: float = setting(20.0, "Seconds for decoding one image.", above=0)
    grace: float = setting(30.0, "Seconds for what runs, when stopping.", minimum=0)
    rate: float = setting(
        600.0, "Requests a minute per key, else per address; 0: unlimited.", minimum=0
    )
    burst: int = setting(100, "Requests at once per key, else per address.", minimum=0)
    decoders: int = setting(2, "Processes that decode uploaded images.", minimum=1)
    decoder_memory: int = setting(4 * 2**30, "Address space of each of them in bytes.", minimum=1)
    min_confidence: float | None = setting(
        None,
        "Under this max(p_yes, 1 - p_yes) a closed question is not answered; by default the "
        "threshold fitted for the model, as `mmedrag ask` has it.",
        minimum=0,
        maximum=1,
    )
    audit: Path | None = setting(None, "Audit log to append to.", metavar="FILE")
    examples: bool = setting(True, "Show example pictures on the page.")
