"""Mutated uploads for the service's tests and its bench, and what an independent reader says.

Not a test itself. Chance does not always break a file: a flipped bit in the pixels of a BMP is
another picture, not a bad upload. So each mutant is also read by Pillow, pydicom, numpy, or
Python's own JSON and mail parsers, without any code of the service. What they cannot read whole
has to be refused; what they can may be answered.
"""

from __future__ import annotations

import base64
import email
import email.policy
import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from serve_tools import dicom_bytes, encoded, picture

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")


@dataclass(frozen=True)
class Hostile:
    """One mutated request. ``readable``: an independent reader finds a whole upload in it."""

    name: str
    path: str
    content: bytes
    headers: dict[str, str]
    readable: bool = False


# --- mutations -----------------------------------------------------------------------------------


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three random injuries: flips, cuts, insertions, repeats, extreme numbers."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at, kind = int(rng.integers(0, max(1, len(out)))), int(rng.integers(0, 7))
        length = int(rng.integers(1, 64))
        if kind == 0:
            for i in rng.integers(0, max(1, len(out)), 8):
                if len(out):
                    out[int(i)] ^= int(rng.integers(1, 256))
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = rng.bytes(length)
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at : at + length] = out[at // 2 : at // 2 + length] * 2
        elif kind == 5:  # sizes and lengths live in the header
            head = int(rng.integers(0, min(64, max(1, len(out)))))
            out[head : head + 4] = b"\xff\xff\xff\x7f"
        else:
            out[at : at + length] = bytes(length)
    return bytes(out)


def mutants(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Mutated images (every format), DICOM files, JSON, multipart and chat bodies."""
    image = picture(1, 64)
    npz = io.BytesIO()
    np.savez(npz, slo_fundus=np.asarray(image))
    sources = {kind.lower(): encoded(image, kind) for kind in ("PNG", "JPEG", "TIFF", "BMP")}
    sources |= {"webp": encoded(image, "WEBP"), "npz": npz.getvalue(), "dicom": dicom_bytes(48)}
    url = "data:image/png;base64," + base64.b64encode(sources["png"]).decode()
    ask = json.dumps({"image": url, "question": "Is it so?", "compare": False}).encode()
    content = [
        {"type": "text", "text": "Is it so?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    chat = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    form, form_type = _form(sources["png"], "a.png")
    names = [*sources, "json", "chat", "multipart", "fields"]
    rng = np.random.default_rng(seed)
    is_json = {"content-type": "application/json"}
    for number in range(count):
        name = names[number % len(names)]
        label = f"{name}-{number}"
        if name in sources:
            data = damage(sources[name], rng)
            body, kind = _form(data, f"a.{'dcm' if name == 'dicom' else 'x'}")
            yield Hostile(label, "/v1/preview", body, {"content-type": kind}, judged(data, name))
        elif name == "json":
            body = damage(ask, rng)
            yield Hostile(label, "/v1/ask", body, is_json, _asks(body))
        elif name == "chat":
            body = damage(chat, rng)
            yield Hostile(label, "/v1/chat/completions", body, is_json, _chats(body))
        elif name == "multipart":
            body = damage(form, rng)
            kind = {"content-type": form_type}
            yield Hostile(label, "/v1/preview", body, kind, _posts(body, form_type))
        else:
            yield Hostile(label, "/v1/ask", *_odd_fields(url, rng))


def _form(data: bytes, filename: str) -> tuple[bytes, str]:
    made = httpx.Request("POST", "http://x/", files={"image": (filename, data)})
    return made.read(), made.headers["content-type"]


ODD: tuple[Any, ...] = (
    None,
    [],
    {},
    0,
    -1,
    1e400,
    "\ud800",
    "x" * 5000,
    "\0",
    True,
    [["a"]],
    {"a": {"b": 1}},
    "file:///etc/passwd",
    "http://127.0.0.1:1/x.png",
    "../../etc/passwd",
    "data:image/png;base64,",
    "data:text/html;base64,PGI+",
    "data:image/png;base64,####",
)


def _odd_fields(url: str, rng: np.random.Generator) -> tuple[bytes, dict[str, str], bool]:
    """Well-formed JSON with a value that mostly has no business there."""
    body: dict[str, Any] = {"image": url, "question": "Is it so?"}
    names = (
        "image",
        "question",
        "answer_type",
        "references",
        "noise",
        "compare",
        "patient",
        "path",
    )
    name, value = names[int(rng.integers(len(names)))], ODD[int(rng.integers(len(ODD)))]
    body[name] = value
    # a path is a strange question, and a strange name of a patient, but it is text
    words = isinstance(value, str) and value != "\ud800" and len(value) < 200
    fine = {
        "question": words and value != "\0",
        "patient": words or value is None,
        "compare": value is True,
        **{choice: value is None for choice in ("answer_type", "references", "noise")},
    }
    sent = json.dumps(body).encode()
    return sent, {"content-type": "application/json"}, fine.get(name, False)


# --- the independent reader ----------------------------------------------------------------------


def judged(data: bytes, kind: str = "") -> bool:
    """Whether Pillow, numpy or pydicom reads a whole picture from ``data``."""
    read: Callable[[bytes], Any] = {"npz": _array, "dicom": _dicom}.get(kind, _pillow)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(data)
    except Exception:  # whatever they raise: they cannot
        return False
    return True


def _pillow(data: bytes) -> None:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        opened.load()


def _array(data: bytes) -> None:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        Image.fromarray(arrays["slo_fundus"])


def _dicom(data: bytes) -> None:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    found = pydicom.dcmread(io.BytesIO(data))
    if "TransferSyntaxUID" not in found.file_meta:  # as in old files: by how its elements are read
        implicit, _ = found.original_encoding
        found.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        )
    assert found.pixel_array.size


def _shown(url: Any) -> bool:
    head, _, rest = url.partition(";base64,")
    return head.startswith("data:image/") and judged(base64.b64decode(rest, validate=True))


def _sound(read: Callable[[], bool]) -> bool:
    try:
        return read()
    except Exception:
        return False


def _asks(body: bytes) -> bool:
    def read() -> bool:
        found = json.loads(body)
        known = set(found) <= {"image", "question", "compare"}
        return known and bool(found["question"].strip()) and _shown(found["image"])

    return _sound(read)


def _chats(body: bytes) -> bool:
    def read() -> bool:
        (message,) = json.loads(body)["messages"]
        text, image = message["content"]
        asked = message["role"] == "user" and bool(text["text"].strip())
        return asked and _shown(image["image_url"]["url"])

    return _sound(read)


def _posts(body: bytes, kind: str) -> bool:
    def read() -> bool:
        head = b"Content-Type: " + kind.encode() + b"\r\n\r\n"
        mail = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        (part,) = mail.iter_parts()
        named = part.get_param("name", header="content-disposition") == "image"
        return not mail.defects and named and judged(part.get_payload(decode=True))

    return _sound(read)


# --- the attack ----------------------------------------------------------------------------------


@dataclass
class Attack:
    """What became of mutated requests. ``broken`` and ``swallowed`` should be empty.

    Attributes:
        refused: 4xx with a reason, by status.
        answered: 200, and an independent reader can read it too.
        swallowed: 200, although an independent reader cannot read it.
        strict: refused, although an independent reader can read it: name and reason.
        broken: 5xx, no reason, a hang.
    """

    refused: Counter[int] = field(default_factory=Counter)
    answered: list[str] = field(default_factory=list)
    swallowed: list[str] = field(default_factory=list)
    strict: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    slowest: float = 0.0


def attack(url: str, count: int, seed: int = 0, timeout: float = 30.0) -> Attack:
    found = Attack()
    with httpx.Client(timeout=timeout) as http:
        for hostile in mutants(count, seed):
            start = time.monotonic()
            try:
                answer = http.post(
                    url + hostile.path, content=hostile.content, headers=hostile.headers
                )
            except httpx.HTTPError as error:
                found.broken.append(f"{hostile.name}: {type(error).__name__}")
                continue
            found.slowest = max(found.slowest, time.monotonic() - start)
            if answer.status_code == 200:
                (found.answered if hostile.readable else found.swallowed).append(hostile.name)
                continue
            found.refused[answer.status_code] += 1
            reason = answer.json().get("error", {}).get("message") if answer.content else None
            if hostile.readable:
                found.strict.append(f"{hostile.name}: {reason}")
            if not 400 <= answer.status_code < 500 or not reason:
                found.broken.append(f"{hostile.name}: {answer.status_code} {answer.text[:200]}")
    return found
