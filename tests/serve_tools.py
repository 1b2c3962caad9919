"""For the service's tests and its bench: a live server, pictures, many clients.

Not a test itself. ``load`` is also what ``bench/reliability.py`` measures with.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from mmedrag.answering.generators.scripted import ScriptedGenerator
from mmedrag.images.alike import pixel_hash
from mmedrag.images.files import load_image
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.records.protocols import Request
from mmedrag.records.records import Domain, Example, Hit

Expect = Callable[[str, str, dict[str, Any]], bool]

# --- parts -------------------------------------------------------------------------------------


class Router:
    """A domain model: dark pictures are unknown, the others radiology."""

    labels = ("radiology",)
    notice = "This model knows drawn pictures only."

    def identify(self, images: Any) -> list[Domain]:
        found = []
        for views in images:
            mean = float(np.asarray(load_image(views[0])).mean())
            label = "unknown" if mean < 5 else "radiology"
            found.append(Domain(label=label, confidence=0.9, scores={"radiology": 0.9}))
        return found


class Shelf:
    """A searcher: always the same three reports, the last far behind."""

    texts = ("The heart is enlarged.", "No effusion is seen.", "A rib is broken.")

    def search(self, examples: list[Example], k: int) -> tuple[list[list[Hit]], list[int]]:
        hits = [
            Hit(id=f"ref-{i}", text=text, score=score, rank=i)
            for i, (text, score) in enumerate(zip(self.texts, (0.9, 0.88, 0.3), strict=True))
        ]
        return [list(hits) for _ in examples], [1 for _ in examples]


def echo(request: Request) -> str:
    """Says which picture it was given: the proof that no answers are mixed."""
    return f"Yes, {pixel_hash(load_image(request.images[0]))} {request.prompt.text}"


def make_pipeline(script: Any = echo, **parts: Any) -> Pipeline:
    parts = {"domain": Router(), "retrievers": {"radiology": Shelf()}, **parts}
    return Pipeline(generator=ScriptedGenerator(script=script), **parts)


def shipped_pipeline(folder: Path, studies: int = 16) -> tuple[Pipeline, str]:
    """The embedded system over a small index of its own, and its model's name.

    While no answering model is embedded, a random one of the same shape takes its place.
    """
    from mmedrag import embedded
    from mmedrag.answering.generators.random_model import random_llava
    from mmedrag.phantom.build import build_benchmark
    from mmedrag.pipeline import system
    from mmedrag.pipeline.embedded import DOMAINS
    from mmedrag.retrieval.index_build import build_index
    from mmedrag.runtime.data_folder import DataFolder

    data = folder / "data"
    build_benchmark(data, studies=studies, seed=77, workers=1)
    for domain in DOMAINS:
        build_index(
            [DataFolder(data)],
            folder / f"index-{domain}",
            domain,
            encoder=f"embedded:retriever-{domain}",
        )
    flags = system.Flags(index=[str(folder / f"index-{d}") for d in DOMAINS])
    if "vlm" not in embedded.available():
        texts = [row.text for row in DataFolder(data).corpus() if row.text]
        flags.model = str(random_llava(folder / "random-model", "embedded", corpus=texts))
    pipeline = system.build_pipeline(system.resolve_system(flags))
    assert pipeline.generator is not None
    return pipeline, pipeline.generator.name


def phantom_cases(data: Path, count: int) -> list[tuple[bytes, str, str]]:
    """(file, sha256 of its pixels, closed question): every domain, no two alike."""
    from mmedrag.runtime.data_folder import DataFolder

    rows = [e for e in DataFolder(data).examples() if e.answer_type == "closed" and e.question]
    found = {}
    for row in rows[:: max(1, len(rows) // (2 * count))]:
        path = row.images[0]
        sha = pixel_hash(load_image(path))
        found[sha, row.question] = (path.read_bytes(), sha, row.question)
    return list(found.values())[:count]


def same_as_alone(
    url: str, cases: list[tuple[bytes, str, str]]
) -> tuple[Expect, dict[tuple[str, str], float]]:
    """Ask each case alone; an expectation that a later answer has the same p(yes) and
    references, and the p(yes) found."""
    alone: dict[tuple[str, str], tuple[float, list[str]]] = {}
    for data, sha, question in cases:
        body = httpx.post(
            url + "/v1/ask",
            files={"image": ("a.png", data)},
            data={"question": question, "answer_type": "closed"},
            timeout=120,
        ).json()
        alone[sha, question] = (body["answer"]["p_yes"], [r["id"] for r in body["references"]])

    def expect(sha: str, question: str, body: dict[str, Any]) -> bool:
        p_yes, ids = alone[sha, question]
        near = abs(body["answer"]["p_yes"] - p_yes) < 1e-3  # batches differ in the last bits
        return near and [r["id"] for r in body["references"]] == ids

    return expect, {case: p for case, (p, _) in alone.items()}


# --- pictures ----------------------------------------------------------------------------------


def picture(seed: int, size: int = 48) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size + 8), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def dicom_bytes(side: int = 64, bits: int = 12, **changes: Any) -> bytes:
    """A 12-bit grey film with a bright disc and a name in its header."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    y, x = np.mgrid[:side, :side]
    disc = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 4) ** 2
    pixels = (np.where(disc, 0.9, 0.2) * (2**bits - 1)).astype(np.uint16)
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID = "1.2.826.0.1.3680043.8.1"
    found.PatientName, found.Modality = "Doe^Jane", "DX"
    found.Rows = found.Columns = side
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit = 16, bits, bits - 1
    found.PixelRepresentation = 0
    found.PixelData = pixels.tobytes()
    for name, value in changes.items():
        setattr(found, name, value)
    out = io.BytesIO()
    found.save_as(out, enforce_file_format=True)
    return out.getvalue()


# --- a live server -----------------------------------------------------------------------------


@dataclass
class Live:
    url: str
    app: Any
    server: Any
    thread: threading.Thread

    def stop(self, wait: float = 20) -> None:
        self.server.should_exit = True
        self.thread.join(wait)


@contextmanager
def live(app: Any, settings: Any = None) -> Iterator[Live]:
    """The application behind a real socket on loopback."""
    import uvicorn

    from mmedrag.serve.server import config
    from mmedrag.serve.settings import ServeSettings

    chosen = config(app, settings or ServeSettings(port=0))
    chosen.port = 0
    server = uvicorn.Server(chosen)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    found = Live(f"http://127.0.0.1:{port}", app, server, thread)
    try:
        yield found
    finally:
        found.stop()


# --- many clients ------------------------------------------------------------------------------


@dataclass
class Load:
    """What a load saw. ``mixed`` and ``lost`` hold descriptions; both should be empty."""

    answered: int = 0
    waited: int = 0  # 429, came back later
    lost: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batches: Counter[int] = field(default_factory=Counter)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q)) if self.seconds else float("nan")


def echoed(sha256: str, question: str, body: dict[str, Any]) -> bool:
    """The scripted model's answer names the picture and repeats the question."""
    return sha256 in body["answer"]["text"] and question in body["answer"]["text"]


def load(
    url: str,
    seconds: float,
    clients: int = 50,
    expect: Expect = echoed,
    cases: list[tuple[bytes, str, str]] | None = None,
) -> Load:
    """``clients`` ask without pause for ``seconds``, and until each was answered once.

    Every answer is checked to be the asker's own.

    Args:
        cases: (file, sha256 of its pixels, question); default: each client draws its own.
    """
    found = Load()
    until = time.monotonic() + seconds

    async def one(number: int, http: httpx.AsyncClient) -> None:
        turn = answered = 0
        while time.monotonic() < until or not answered and time.monotonic() < until + 60:
            turn += 1
            if cases is None:
                image = picture(number * 100_000 + turn, 24)
                data, sha, question = encoded(image), pixel_hash(image), f"Is it {number}-{turn}?"
            else:
                data, sha, question = cases[(number * 7 + turn) % len(cases)]
            start = time.monotonic()
            try:
                answer = await http.post(
                    f"{url}/v1/ask",
                    files={"image": ("a.png", data)},
                    data={"question": question, "answer_type": "closed"},
                )
            except httpx.HTTPError as error:
                found.lost.append(f"{number}-{turn}: {type(error).__name__} {error}")
                continue
            if answer.status_code == 429:
                found.waited += 1
                await asyncio.sleep(min(float(answer.headers["retry-after"]), 2))
                continue
            if answer.status_code != 200:
                found.lost.append(f"{number}-{turn}: {answer.status_code} {answer.text[:200]}")
                continue
            body = answer.json()
            answered += 1
            found.answered += 1
            found.seconds.append(time.monotonic() - start)
            found.batches[body["batch"]["size"]] += 1
            own = body["image"]["sha256"] == sha and body["question"] == question
            if not own or not expect(sha, question, body):
                found.mixed.append(f"{number}-{turn}: {body['answer']['text'][:100]}")

    async def everyone() -> None:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            await asyncio.gather(*(one(number, http) for number in range(clients)))

    asyncio.run(everyone())
    return found


def write_keys(path: Path, **scopes: tuple[str, ...]) -> dict[str, str]:
    """A key file with one key per name; the keys."""
    from mmedrag.serve.security import new_key

    return {name: new_key(path, name, granted) for name, granted in scopes.items()}
