"""Uploaded bytes to plain pixels, in a process of its own.

Place in the picture: the outer wall. Image and DICOM decoders are large C libraries; whatever a
hostile file does to them (endless loop, crash, memory) ends with the child process, which is
replaced, and with one line for the caller. The service itself never decodes uploaded bytes.
What comes back is a PPM (bare RGB pixels), its size and the hash of the pixels.

Protocol of the child, on stdin and stdout: a line of JSON, then as many bytes as it says.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PREVIEW = 512  # longest side of a preview
DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM transfer syntax: the whole data set zipped
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME", "TMPDIR")


class BadImage(Exception):
    """The upload cannot be used; ``large`` when it is only too large."""

    def __init__(self, message: str, large: bool = False) -> None:
        super().__init__(message)
        self.large = large


@dataclass(frozen=True)
class Decoded:
    """A decoded picture: PPM bytes, size, sha256 of the pixels, kind of file, PNG preview."""

    ppm: bytes
    width: int
    height: int
    sha256: str
    kind: str
    preview: bytes | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What an answer says of it."""
        return {name: getattr(self, name) for name in ("sha256", "width", "height", "kind")}


class Decoders:
    """``count`` child processes, replaced when they fail."""

    def __init__(self, count: int = 2, timeout: float = 20.0, memory: int = 4 * 2**30) -> None:
        self.timeout, self.memory = timeout, memory
        self.replaced = 0  # children that were killed or died
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mmedrag-decode")
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(self._start())

    def submit(self, data: bytes, dicom: bool, max_pixels: int, preview: bool) -> Future[Decoded]:
        return self._threads.submit(self.decode, data, dicom, max_pixels, preview)

    def decode(self, data: bytes, dicom: bool, max_pixels: int, preview: bool = False) -> Decoded:
        """Decode one file.

        Args:
            dicom: the file's name says that it is DICOM. max_pixels: more are refused unread.

        Raises:
            BadImage: it cannot be decoded, is too large, or its decoder crashed or hung.
        """
        child = self._idle.get()
        try:
            if child is None or child.poll() is not None:
                child = self._start()
            order = {"dicom": dicom, "max_pixels": max_pixels, "preview": preview}
            answer, payload = self._talk(child, order, data)
        except _Died as error:
            if child is not None:
                _end(child)
            child = None
            self.replaced += 1
            raise BadImage(str(error)) from None
        finally:
            self._idle.put(child)
        if "error" in answer:
            raise BadImage(answer["error"], answer["large"])
        cut = len(payload) - answer.pop("preview_bytes")
        return Decoded(payload[:cut], preview=payload[cut:] or None, **answer)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            child = self._idle.get()
            if child is not None:
                _end(child)

    def _start(self) -> subprocess.Popen[bytes]:
        own = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        own["PYTHONPATH"] = str(Path(__file__).parents[2])  # no secrets go along
        own |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "mmedrag.serve.decoder", str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=own,
            close_fds=True,
        )

    def _talk(
        self, child: subprocess.Popen[bytes], order: dict[str, Any], data: bytes
    ) -> tuple[dict[str, Any], bytes]:
        assert child.stdin is not None and child.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self.timeout, kill)
        timer.daemon = True
        timer.start()
        try:
            _send(child.stdin, order, data)
            return _receive(child.stdout)
        except (OSError, EOFError, ValueError):
            raise _Died(
                f"image: not decoded within {self.timeout:g} s"
                if late.is_set()
                else "image: its decoder failed on this file"
            ) from None
        finally:
            timer.cancel()


class _Died(Exception):
    pass


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a dead process
                pipe.close()


def _send(pipe: IO[bytes], head: dict[str, Any], payload: bytes) -> None:
    pipe.write(json.dumps({**head, "bytes": len(payload)}).encode() + b"\n")
    pipe.write(payload)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    line = pipe.readline(65536)
    if not line:
        raise EOFError
    head = json.loads(line)
    size = head.pop("bytes")
    payload = pipe.read(size)
    if len(payload) < size:
        raise EOFError
    return head, payload


# --- in the child ------------------------------------------------------------------------------


def look(data: bytes, dicom: bool, max_pixels: int) -> tuple[Any, str]:
    """The decoded picture and its kind; sizes are checked before pixels are.

    Raises:
        UserError: as ``images.decode_image``. BadImage: too large, or zipped DICOM.
    """
    from mmedrag.images import files as images

    def guard(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise BadImage(
                f"image: {width} x {height} pixels, at most {max_pixels:,} are taken", large=True
            )

    zipped = data[:4] == b"PK\x03\x04"
    if not zipped and (dicom or images.looks_like_dicom(data)):
        from mmedrag.images import dicom as files

        if DEFLATED in data:
            raise BadImage("image: deflated DICOM is not taken; send it in another syntax")
        dataset = files.read(data, "image")
        files.count_frames(dataset, "image")
        guard(int(dataset.Columns), int(dataset.Rows))
        picture = files.pictures(dataset, "image", [0])[0]
        guard(*picture.size)  # pixels that are not square were stretched
        return picture, "DICOM"
    if zipped:
        with contextlib.suppress(zipfile.BadZipFile, ValueError):  # decode_image says what is wrong
            sizes = [item.file_size for item in zipfile.ZipFile(io.BytesIO(data)).infolist()]
            if max(sizes, default=0) > 8 * max_pixels:
                raise BadImage(f"image: array of {max(sizes):,} bytes in NPZ", large=True)
        kind = "NPZ"
    else:
        kind = ""
        with contextlib.suppress(Exception):  # whatever it is, decode_image puts it in words
            kind, size = images.stated_size(data)
        if kind:
            guard(*size)
    picture = images.decode_image(data, "image")
    guard(*picture.size)
    return picture, kind


def answer(order: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """What the child sends back for one order."""
    from mmedrag.images import pixel_hash
    from mmedrag.records import UserError

    try:
        picture, kind = look(data, order["dicom"], order["max_pixels"])
        ppm = b"P6 %d %d 255\n" % picture.size + picture.tobytes()
        small = png(picture) if order["preview"] else b""
    except BadImage as error:
        return {"error": str(error), "large": error.large}, b""
    except UserError as error:
        return {"error": str(error), "large": False}, b""
    except MemoryError:
        return {"error": "image: decoding it takes too much memory", "large": True}, b""
    head = {"width": picture.width, "height": picture.height, "sha256": pixel_hash(picture)}
    return {**head, "kind": kind, "preview_bytes": len(small)}, ppm + small


def png(picture: Any, side: int = PREVIEW) -> bytes:
    """A PNG of at most ``side`` pixels a side."""
    small = picture.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "PNG", compress_level=3)
    return out.getvalue()


def main() -> None:
    """Serve orders until stdin ends."""
    import resource

    memory = int(sys.argv[1])
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, limit))
    import mmedrag.images  # noqa: F401 - before the first order, not during it

    # what C libraries print must not get between the answers
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            order, data = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            head, payload = answer(order, data)
        except Exception as error:
            head, payload = {"error": f"image: {type(error).__name__}", "large": False}, b""
        _send(out, head, payload)


if __name__ == "__main__":
    main()
