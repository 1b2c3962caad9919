"""The narrow protocols behind which every part of the pipeline can be replaced.

Place in the picture: each arrow. Nothing here imports torch; an implementation lives in the
module that owns its protocol's name table (``encoders``, ``stores``, ``generators``,
``select``), and ``resolve_object`` turns a name, or ``my_package.module:Class``, into it. What only
some implementations can do is a protocol of its own, asked for by ``isinstance``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mmedrag.records.records import Answer, Domain, Hit, Noise, Prompt, UserError


@dataclass(frozen=True)
class Request:
    """One call to a generator: a rendered prompt with the images it speaks of.

    ``images`` are files; ``noise`` is applied by the generator at its own input resolution,
    so that the same degradation is seen whatever the file's size. ``closed`` asks for
    ``Answer.p_yes``.
    """

    prompt: Prompt
    images: tuple[Path, ...] = ()
    noise: Noise | None = None
    closed: bool = False
    max_new_tokens: int = 16


class DomainIdentifier(Protocol):
    @property
    def labels(self) -> Sequence[str]: ...

    def identify(self, images: Sequence[Sequence[Path]]) -> list[Domain]:
        """One result per example (its views are averaged); label may be "unknown"."""
        ...


class Encoder(Protocol):
    dim: int
    fingerprint: str  # sha256 over weights and preprocessing; another encoder is another string

    def images(self, images: Sequence[Path | Image.Image]) -> np.ndarray:
        """float32 [n, dim], rows of unit L2 norm."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim], rows of unit L2 norm. Long texts are windowed, never cut silently."""
        ...


class Store(Protocol):
    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None: ...
    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [q, k], row numbers int64 [q, k]); -1 where fewer than k exist."""
        ...

    def remove(self, ids: Iterable[str]) -> int: ...
    def count(self) -> int: ...


class Searcher(Protocol):
    """What the pipeline needs of a domain's retriever."""

    def search(self, examples: Sequence[Any], k: int) -> tuple[list[list[Hit]], list[int]]:
        """Per example: hits best first, and how many candidates were excluded as its own."""
        ...


class Generator(Protocol):
    name: str
    image_size: int
    context: int  # tokens

    def generate(self, requests: Sequence[Request]) -> list[Answer]: ...

    def count_tokens(self, prompt: Prompt, images: int = 1) -> int:
        """Length of the whole model input, image tokens included."""
        ...


class Rule(Protocol):
    def __call__(self, scores: Sequence[float], **params: Any) -> tuple[int, str]:
        """How many of the best-first scores to keep, and why the cut is there."""
        ...


# --- optional abilities: a part that has one is asked for it, another is left alone --------------


@runtime_checkable
class Adaptable(Protocol):
    """A generator that takes an adapter."""

    def with_adapter(self, adapter: str) -> Generator:
        """The same model with the adapter of this folder, weights shared."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """A generator to which pictures of different sizes are different numbers of tokens."""

    def count_request(self, request: Request) -> int:
        """Length of the whole model input, with this request's pictures as they are."""
        ...


@runtime_checkable
class Describable(Protocol):
    """A generator that says what it runs on."""

    def facts(self) -> dict[str, Any]:
        """``model``, ``device``, ``dtype``, ``batch_size``: kept in a run's ``config.json``."""
        ...


@runtime_checkable
class Shrinking(Protocol):
    """A generator that goes to smaller batches by itself when memory runs out."""

    backoffs: Sequence[Any]  # what it did so far


@runtime_checkable
class TextScorer(Protocol):
    """A generator that can score given texts."""

    def logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """Summed log-probability of each text as the answer to its request."""
        ...


@runtime_checkable
class Cautioned(Protocol):
    """A domain identifier whose readers have to know something (of the embedded one: that it
    knows drawn pictures only)."""

    notice: str | None


@runtime_checkable
class Preparing(Protocol):
    """An encoder that can prepare pictures outside of itself, in threads."""

    def prepare(self, picture: Image.Image) -> Any: ...


@runtime_checkable
class Reopenable(Protocol):
    """An encoder that knows the name it was opened by."""

    spec: str


@runtime_checkable
class Windowing(Protocol):
    """An encoder that counts the texts it had to cut into windows, or to cut off."""

    windowed: int
    truncated: int


@runtime_checkable
class Faulting(Protocol):
    """A searcher that says which queries it could not read."""

    errors: Mapping[str, str]  # example id → why, of the last search


@runtime_checkable
class Forgetting(Protocol):
    """A searcher that keeps embeddings of queries, and can be told not to."""

    def forget(self) -> None:
        """Drop what is known of queries so far, in memory; from now on nothing goes to disk."""
        ...


@runtime_checkable
class Encoding(Protocol):
    """A searcher that finds by an encoder."""

    encoder: Encoder


@runtime_checkable
class Indexed(Encoding, Protocol):
    """A searcher over an index, by an encoder."""

    index: Any


def resolve_object(
    name: str, table: Mapping[str, str], what: str, extra: Mapping[str, str] | None = None
) -> Any:
    """The object behind a short name of ``table`` or behind ``package.module:attribute``.

    Imports lazily. ``extra`` says which optional extra a module needs when it is missing.

    Raises:
        UserError: unknown name (the known ones are listed), or a missing package (with the
            extra to install).
    """
    target = table.get(name, name)
    module, _, attribute = target.partition(":")
    if not attribute:
        raise UserError(
            f"{what}: {name!r} is not known, expected one of {', '.join(sorted(table))}, "
            "or package.module:Class"
        )
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        hint = (extra or {}).get(error.name or "", "")
        how = f"; install it with: pip install 'mmedrag[{hint}]'" if hint else ""
        raise UserError(f"{what} {name!r} needs the package {error.name!r}{how}") from None
    except AttributeError:
        raise UserError(f"{what}: {module} has no {attribute!r}") from None
