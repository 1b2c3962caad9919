"""The narrow protocols behind which every part of the pipeline can be replaced.

Place in the picture: each arrow. Nothing here imports torch; an implementation lives in the
module that owns its protocol's name table (``retrieval.encoders``, ``retrieval.stores``,
``answering.generators``, ``retrieval.select``), and ``resolve_object`` turns a name, or
``my_package.module:Class``, into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

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
    def logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        """Summed log-probability of each text as the answer to its request."""
        ...

    def count_tokens(self, prompt: Prompt, images: int = 1) -> int:
        """Length of the whole model input, image tokens included."""
        ...


class Rule(Protocol):
    def __call__(self, scores: Sequence[float], **params: Any) -> tuple[int, str]:
        """How many of the best-first scores to keep, and why the cut is there."""
        ...


Metric = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]


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
