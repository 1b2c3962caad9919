"""A request's body to checked fields: multipart or JSON, within limits, never a path or URL.

Place in the picture: the left edge of the service. Images come as file parts (``image``) or, in
JSON, as ``data:`` URLs; anything that names a file or a host is refused, not opened.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mmedrag.serve.decoder import BadImage, Decoded, Decoders
from mmedrag.serve.errors import Refused, bad
from mmedrag.serve.settings import ServeSettings

DATA_URL = re.compile(r"data:(?:image/[a-z0-9.+-]+|application/(?:dicom|octet-stream));base64,")
FIELDS = 16  # of one form
FLAGS = {"true": True, "1": True, "on": True, "false": False, "0": False, "": False}


@dataclass(frozen=True)
class Upload:
    """One image as it came. ``dicom``: its name or type says so."""

    data: bytes
    dicom: bool = False


@dataclass(frozen=True)
class Body:
    """Images and fields of a request."""

    images: tuple[Upload, ...]
    fields: Mapping[str, Any]


async def read_bytes(request: Request, settings: ServeSettings) -> bytes:
    """The whole body, unless it is too long or too slow."""
    limit = settings.max_bytes
    too_long = Refused(413, "too_large", f"body: at most {limit:,} bytes are taken")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long

    async def collect() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_long
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(collect(), settings.body_timeout)
    except TimeoutError:
        seconds = settings.body_timeout
        raise Refused(408, "too_slow", f"body: not complete within {seconds:g} s") from None
    except ClientDisconnect:
        raise bad("body: the client left before it was complete") from None


async def read_body(request: Request, settings: ServeSettings) -> Body:
    """Images and fields of a multipart or JSON request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        raise Refused(
            415, "content_type", "content-type: expected multipart/form-data or application/json"
        )
    data = await read_bytes(request, settings)
    if kind == "application/json":
        fields = parse_json(data)
        return Body(_json_images(fields.pop("image", None)), fields)
    return await _multipart(request, data, settings)


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object; deep nesting, NaN and other types are refused."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not allowed")

    try:
        found = json.loads(data, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise bad(f"body: not valid JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(found, dict):
        raise bad("body: expected a JSON object")
    return found


def data_url(value: Any, where: str) -> Upload:
    """The bytes inside a ``data:`` URL. No other kind of address is ever followed."""
    if not isinstance(value, str):
        raise bad(f"{where}: expected a data: URL")
    head = DATA_URL.match(value[:100].lower())
    if not head:
        raise bad(
            f"{where}: expected data:image/...;base64,... (paths and other URLs are never opened)"
        )
    try:
        data = base64.b64decode(value[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad(f"{where}: not valid base64") from None
    return Upload(data, "dicom" in head[0])


def _json_images(value: Any) -> tuple[Upload, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(data_url(item, f"image[{i}]") for i, item in enumerate(values))


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # nothing goes to disk; the body's length is limited before


async def _multipart(request: Request, data: bytes, settings: ServeSettings) -> Body:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield data
        yield b""

    try:
        form = await _InMemory(
            request.headers,
            stream(),
            max_files=settings.max_images,
            max_fields=FIELDS,
            max_part_size=8 * settings.max_text,
        ).parse()
    except MultiPartException as error:
        raise bad(f"multipart: {error.message}") from None
    except Exception as error:  # whatever the parser throws at hostile bytes is a bad request
        raise bad(f"multipart: cannot be read ({type(error).__name__})") from None
    images: list[Upload] = []
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, str):
            if name != "image":
                raise bad(f"{name[:40]!r}: no file is expected here, only in 'image'")
            dicom = (value.filename or "").lower().endswith((".dcm", ".dicom"))
            dicom = dicom or value.content_type == "application/dicom"
            images.append(Upload(await value.read(), dicom))
        elif name in fields:
            raise bad(f"{name[:40]!r}: given twice")
        else:
            fields[name] = value
    return Body(tuple(images), fields)


async def decode(
    decoders: Decoders, images: tuple[Upload, ...], settings: ServeSettings, preview: bool = False
) -> tuple[Decoded, ...]:
    """The pictures, each decoded in a process of its own.

    Raises:
        Refused: 400 none or too many; 413 too large; 422 not a sound image.
    """
    if not 1 <= len(images) <= settings.max_images:
        raise bad(f"image: got {len(images)}, expected 1 to {settings.max_images}")
    made = [
        asyncio.wrap_future(decoders.submit(image.data, image.dicom, settings.max_pixels, preview))
        for image in images
    ]
    try:
        return tuple(await asyncio.gather(*made))
    except BadImage as error:
        if error.large:
            raise Refused(413, "too_large", str(error)) from None
        raise Refused(422, "bad_image", str(error)) from None
    except OSError as error:
        raise Refused(503, "storage", f"decoder: {error.strerror}", 30) from None


# --- fields -------------------------------------------------------------------------------------


def only(fields: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse fields that nobody would read."""
    for name in fields:
        if name not in known:
            raise bad(f"{name[:40]!r}: unknown field, expected {', '.join(known)}")


def text(fields: Mapping[str, Any], name: str, limit: int, required: bool = False) -> str | None:
    """A text field without control characters; blank counts as missing."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise bad(f"{name}: expected text")
    value = value or ""
    if len(value) > limit:
        raise bad(f"{name}: {len(value):,} characters, at most {limit:,} are taken")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad(f"{name}: not valid Unicode") from None
    value = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", " ", value).strip()
    if required and not value:
        raise bad(f"{name}: missing or empty")
    return value or None


def choice(fields: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    """One of ``known``; the first is the default."""
    value = fields.get(name)
    if value is None or value == "":
        return known[0]
    if value not in known:
        raise bad(f"{name}: got {str(value)[:40]!r}, expected {' or '.join(known)}")
    return str(value)


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """true or false, as JSON or as a form has it."""
    value = fields.get(name, False)
    if isinstance(value, str):
        value = FLAGS.get(value)
    if not isinstance(value, bool):
        raise bad(f"{name}: expected true or false")
    return value
