"""``ask`` leaves nothing of the picture it was asked about in the cache folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mmedrag import embedded
from mmedrag.cli.main import main
from mmedrag.pipeline import embedded as shipped

pytestmark = pytest.mark.skipif(
    "vlm" not in embedded.available(), reason="no answering model is embedded"
)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_ask_keeps_nothing_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmedrag.phantom import build_benchmark

    cache = tmp_path / "cache"
    monkeypatch.setenv("MMEDRAG_CACHE", str(cache))
    monkeypatch.setattr(shipped, "CORPUS", {"studies": 12, "seed": 5, "similarity": 0.9})
    build_benchmark(tmp_path / "asked", studies=2, seed=6, domains=["radiology"], workers=1)
    first, second = sorted((tmp_path / "asked" / "images").iterdir())[:2]
    main_of(["ask", str(first), "Is there cardiomegaly?", "--json"])
    assert '"references"' in capsys.readouterr().out
    filled = content(cache)  # the benchmark and its indexes, which the first call has built
    assert any(name.endswith(".emb") for name in filled)
    for picture in (first, second):
        main_of(["ask", str(picture), "Is there cardiomegaly?", "--json"])
        assert content(cache) == filled
        bare = picture.read_bytes()
        key = hashlib.sha256(b"image\0" + bare).digest()  # as an embedding would be named
        assert not any(key in data or bare in data for data in filled.values())


def main_of(words: list[str]) -> None:
    try:
        main(words)
    except SystemExit as done:
        assert not done.code
