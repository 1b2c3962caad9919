"""An index in three calls: build, open, search.

Place in the picture: ``retriever[d].search`` for one's own scripts; over ``index_build``, ``index``
and ``search``, which the commands use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedrag.embedded import retriever_of
from mmedrag.records import Encoder, Example, Hit, UserError
from mmedrag.retrieval.index import IndexFolder
from mmedrag.retrieval.index_build import build_index
from mmedrag.retrieval.search import Retriever
from mmedrag.runtime import DataFolder

Source = str | Path | DataFolder


class Index(IndexFolder):
    """The references of data folders, encoded once, and what of them is nearest to a picture.

    Example::

        index = Index.build("data", "index-radiology", domain="radiology")
        for hit in index.search("chest.png", k=3):
            print(hit.score, hit.text)
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        super().__init__(path, manifest)
        self._encoder: Encoder | None = None  # an object that it was built with, without a name
        self._retriever: Retriever | None = None  # made by the first search

    @classmethod
    def build(
        cls,
        data: Source | Sequence[Source],
        out: str | Path,
        domain: str | None = None,
        encoder: str | Encoder | None = None,
        **options: Any,
    ) -> Index:
        """Encode the references of data folders into the index folder ``out``, and open it.

        Args:
            domain: whose references; None: of all domains.
            encoder: by default the one that ships for the domain.
            options: of :func:`mmedrag.retrieval.build_index`.

        Raises:
            UserError: no reference to index, or a folder that holds something else.
        """
        given = [data] if isinstance(data, (str, Path, DataFolder)) else data
        folders = [one if isinstance(one, DataFolder) else DataFolder(one) for one in given]
        build_index(folders, out, domain, encoder or retriever_of(domain), **options)
        index = cls.open(out)
        index._encoder = None if encoder is None or isinstance(encoder, str) else encoder
        return index

    def search(
        self, image: str | Path | Sequence[str | Path], k: int = 8, patient: str | None = None
    ) -> list[Hit]:
        """The ``k`` references nearest to a picture (or the views of a study), best first.

        References of ``patient``, and of the same or nearly the same picture, are left out. For
        many pictures, filters and other rules there is :func:`mmedrag.retrieval.open_retriever`.

        Raises:
            UserError: an unreadable picture, or the encoder is not there any more.
        """
        if self._retriever is None:
            encoder = self._encoder or self.encoder()
            self._retriever = Retriever(self, encoder)
        hits, _ = self._retriever.search([Example.of(image, patient=patient)], k)
        for reason in self._retriever.errors.values():
            raise UserError(reason)
        return hits[0]
