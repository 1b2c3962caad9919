"""The index survives SIGKILL at any moment, finds every flipped byte, serves readers meanwhile.

The kills: a child process changes the index again and again (add, update, remove) and dies at
a random durable operation (write, fsync, rename, unlink), or at a random time. What reopens
must be exactly the state before or after the change that was under way.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mmedrag.records.records import UserError
from mmedrag.retrieval.embeddings import EmbeddingCache, embed_images, embed_texts, text_key
from mmedrag.retrieval.index import IndexFolder, verify_index
from mmedrag.retrieval.index_build import add_to_index, build_index, remove_from_index, update_index
from mmedrag.retrieval.search import open_retriever
from mmedrag.retrieval.stores import folder
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl
from retrieval_tools import ColourEncoder, make_data

STEPS = 9


def change(path: Path, step: int, data: Path) -> None:
    """The step-th change; every state after it is known from its number alone."""
    encoder = ColourEncoder()
    if step % 3 == 0:
        add_to_index(path, [DataFolder(data / f"add{step}")], encoder=encoder)
    elif step % 3 == 1:
        update_index(path, [DataFolder(data / f"update{step}")], encoder=encoder)
    else:
        remove_from_index(path, [f"s{n:04d}" for n in range(step, step + 3)])


def prepare(base: Path) -> None:
    start = make_data(base / "start", 30)
    build_index([start], base / "index", None, ColourEncoder())
    for step in range(STEPS):
        if step % 3 == 0:
            make_data(base / f"add{step}", 8, seed=step, first=100 + 10 * step)
        elif step % 3 == 1:
            changed = make_data(base / f"update{step}", 4, first=15)
            rows = changed.corpus()
            for row in rows:
                row.text = f"There is fracture {step}."
            write_jsonl(changed.path / "corpus.jsonl", rows)


def state(path: Path) -> dict[str, tuple[str, bytes]]:
    index = IndexFolder.open(path)
    texts, vectors = index.texts(range(len(index))), index.store.vectors()
    assert len(vectors) == len(index)
    return {i: (t, v.tobytes()) for i, t, v in zip(index.ids, texts, vectors, strict=True)}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, bytes]]]:
    """What the index holds before the first change and after each."""
    base = tmp_path_factory.mktemp("uninterrupted")
    prepare(base)
    seen = [state(base / "index")]
    for step in range(STEPS):
        change(base / "index", step, base)
        seen.append(state(base / "index"))
    return seen


CHILD = """
import os, random, signal, sys
from pathlib import Path
from test_retrieval_crash import STEPS, change
base, die_at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
if die_at:
    for name in ("fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    Path.unlink, Path.write_text = counted(Path.unlink), counted(Path.write_text)
log = os.open(base / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
print("ready", flush=True)
for step in range(STEPS):
    os.write(log, f"begin {step}\\n".encode())
    change(base / "index", step, base)
    os.write(log, f"end {step}\\n".encode())
print(calls, flush=True)
"""


def run_child(base: Path, die_at: int, after: float | None = None) -> int:
    """Start the child and let it die; returns its exit code."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(base), str(die_at)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    if after is not None:
        try:
            child.wait(after)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
    child.stdout.read()
    return child.wait(60)


def check_after_kill(base: Path, states: list[dict[str, tuple[str, bytes]]]) -> None:
    journal = (base / "journal").read_text().split("\n") if (base / "journal").exists() else [""]
    ended = sum(line.startswith("end") for line in journal)
    found = state(base / "index")
    assert found in (states[ended], states[min(ended + 1, STEPS)])
    findings = [f for f in verify_index(base / "index") if not f.startswith("cache/")]
    assert findings == []
    for step in range(ended, STEPS):  # the same commands again finish the work
        change(base / "index", step, base)
    assert state(base / "index") == states[-1]
    assert verify_index(base / "index") == []
    files = {p.name for p in (base / "index").iterdir() if p.is_file()}
    kept = set(folder.read_manifest(base / "index")["files"]) | {folder.MANIFEST, folder.LOCK}
    assert files == kept  # nothing of a killed writer is left


def kill_once(base: Path, seed: int) -> int:
    """How the writer ended: killed at a moment or a system call that the seed chooses."""
    dice = random.Random(seed)
    prepare(base)
    if seed % 3 == 2:
        return run_child(base, 0, after=dice.uniform(0.0, 1.0))
    return run_child(base, dice.randrange(1, 100))


@pytest.mark.parametrize("seed", range(5))
def test_kill(seed: int, tmp_path: Path, states: list[dict[str, tuple[str, bytes]]]) -> None:
    assert kill_once(tmp_path, seed) in (-signal.SIGKILL, 0)
    check_after_kill(tmp_path, states)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_many_kills(seed: int, tmp_path: Path, states: list[dict[str, tuple[str, bytes]]]) -> None:
    assert kill_once(tmp_path, seed) in (-signal.SIGKILL, 0)
    check_after_kill(tmp_path, states)


def test_a_killed_build_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Build dies while encoding; the same command reuses what was encoded, and no byte differs."""

    class Dying(ColourEncoder):
        def texts(self, texts):  # type: ignore[no-untyped-def]
            if self.encoded_texts >= 128:
                raise KeyboardInterrupt
            return super().texts(texts)

    data = make_data(tmp_path / "d", 300)
    build_index([data], tmp_path / "whole", None, ColourEncoder())
    with pytest.raises(KeyboardInterrupt):
        build_index([data], tmp_path / "killed", None, Dying())
    with pytest.raises(UserError, match="no index here"):
        IndexFolder.open(tmp_path / "killed")
    again = ColourEncoder()
    build_index([data], tmp_path / "killed", None, again)
    assert again.encoded_texts == 300 - 128
    for name in ("rows-000001.parquet", "vectors-000001.faiss"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- damage -----------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_file_is_found(tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 20)
    path = tmp_path / "index"
    build_index([data], path, None, ColourEncoder())
    retriever = open_retriever(path, ColourEncoder(), cache=path / "cache")
    retriever.search(data.examples(), 3)  # fills the query cache
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(files) == 6  # manifest, rows, vectors, cached texts, images, image hashes
    dice = random.Random(0)
    for file in files:
        sound = file.read_bytes()
        places = {0, len(sound) - 1, *(dice.randrange(len(sound)) for _ in range(25))}
        for at in sorted(places):
            broken = bytearray(sound)
            broken[at] ^= 1 << dice.randrange(8)
            file.write_bytes(broken)
            assert verify_index(path), f"{file.name}: byte {at} of {len(sound)}"
            if file.parent == path:
                with pytest.raises(folder.Damaged, match="build it again"):
                    IndexFolder.open(path)
            else:  # a damaged cache costs time, never an answer
                assert len(IndexFolder.open(path)) == 20
        file.write_bytes(sound)
    assert verify_index(path) == []


@pytest.mark.parametrize("name", ["rows-000001.parquet", "vectors-000001.faiss"])
def test_missing_and_cut_files(name: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 5)
    build_index([data], tmp_path / "i", None, ColourEncoder())
    whole = (tmp_path / "i" / name).read_bytes()
    (tmp_path / "i" / name).write_bytes(whole[:-1])
    with pytest.raises(folder.Damaged, match=rf"{name}: \d+ bytes, expected"):
        IndexFolder.open(tmp_path / "i")
    (tmp_path / "i" / name).unlink()
    with pytest.raises(folder.Damaged, match=f"{name}: missing"):
        IndexFolder.open(tmp_path / "i")
    build_index([data], tmp_path / "i", None, ColourEncoder())  # what the message says to do
    assert verify_index(tmp_path / "i") == []


def test_a_damaged_manifest_is_repaired_by_building(tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 5)
    build_index([data], tmp_path / "i", None, ColourEncoder())
    manifest = tmp_path / "i" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"count', '"kount').replace("24", "25"))
    with pytest.raises(folder.Damaged, match="checksum differs"):
        IndexFolder.open(tmp_path / "i")
    encoder = ColourEncoder()
    build_index([data], tmp_path / "i", None, encoder)
    assert encoder.encoded_texts == 0
    assert verify_index(tmp_path / "i") == []


def test_no_index_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index here"):
        IndexFolder.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[1, 2]")
    with pytest.raises(folder.Damaged):
        IndexFolder.open(tmp_path)


# --- cache ------------------------------------------------------------------------------------


def test_poisoned_entries_are_rejected_and_encoded_again(tmp_path: Path) -> None:
    encoder = ColourEncoder()
    texts = ["There is nodule.", "There is effusion.", "Normal."]
    cache = EmbeddingCache(tmp_path, encoder, "text")
    right = embed_texts(texts, encoder, cache)
    poison = np.zeros(3, cache.record)
    poison["key"] = [text_key(text) for text in texts]
    poison["vector"] = right
    poison["vector"][0] = np.nan
    poison["vector"][1] *= 3
    assert cache.path is not None
    cache.path.unlink()
    import struct
    import zlib

    payload = poison.tobytes()
    head = struct.pack("<II", 3, zlib.crc32(payload))
    frame = head + struct.pack("<I", zlib.crc32(head)) + payload
    cache.path.write_bytes(cache._header + frame)
    poisoned, again = EmbeddingCache(tmp_path, encoder, "text"), ColourEncoder()
    assert (len(poisoned), poisoned.rejected) == (1, 2)
    assert (embed_texts(texts, again, poisoned) == right).all()
    assert again.encoded_texts == 2


def test_a_torn_frame_is_cut_off(tmp_path: Path) -> None:
    encoder = ColourEncoder()
    cache = EmbeddingCache(tmp_path, encoder, "text")
    embed_texts(["There is nodule."], encoder, cache)
    assert cache.path is not None
    first = cache.path.stat().st_size
    embed_texts(["There is effusion."], encoder, cache)
    whole = cache.path.read_bytes()
    for cut in (first + 1, first + 11, first + 13, len(whole) - 1):
        cache.path.write_bytes(whole[:cut])
        torn = EmbeddingCache(tmp_path, encoder, "text")
        assert len(torn) == 1
        assert torn.problems()
        embed_texts(["There is effusion."], encoder, torn)
        assert cache.path.read_bytes() == whole


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    """Each sees its own view and appends; nothing that either wrote is lost."""
    encoder = ColourEncoder()
    a, b = (EmbeddingCache(tmp_path, encoder, "text") for _ in range(2))
    embed_texts(["There is nodule."], encoder, a)
    embed_texts(["There is effusion."], encoder, b)
    embed_texts(["Normal."], encoder, a)
    assert len(EmbeddingCache(tmp_path, encoder, "text")) == 3


def test_an_encoder_that_gives_nan_is_reported(tmp_path: Path) -> None:
    class Broken(ColourEncoder):
        def texts(self, texts):  # type: ignore[no-untyped-def]
            return super().texts(texts) * np.nan

    with pytest.raises(UserError, match="not finite"):
        embed_texts(["Normal."], Broken(), EmbeddingCache(tmp_path, Broken(), "text"))
    assert not list(tmp_path.iterdir())


def test_another_encoders_vectors_are_never_used(tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 3)
    paths = [r.images for r in data.corpus()]
    first, second = ColourEncoder("one"), ColourEncoder("two")
    embed_images(paths, first, EmbeddingCache(tmp_path / "c", first, "image"))
    embed_images(paths, second, EmbeddingCache(tmp_path / "c", second, "image"))
    assert second.encoded_images == 3


# --- readers and one writer -------------------------------------------------------------------


def test_readers_while_a_writer_commits(tmp_path: Path) -> None:
    start = make_data(tmp_path / "d", 30)
    path = tmp_path / "index"
    build_index([start], path, None, ColourEncoder())
    opened = open_retriever(path, ColourEncoder())
    before = opened.search(start.examples(), 5)
    done, failures, seen = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            try:
                index = IndexFolder.open(path)
                seen.add(index.manifest["generation"])
                assert len(index.texts(range(len(index)))) == len(index.store.vectors())
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(12):
        add_to_index(
            path, [make_data(tmp_path / f"d{n}", 2, n, first=100 + 2 * n)], encoder=ColourEncoder()
        )
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(seen) > 1
    assert opened.search(start.examples(), 5) == before  # its files are gone, its view is not
    assert IndexFolder.open(path).manifest["generation"] == 13


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 3)
    build_index([data], tmp_path / "i", None, ColourEncoder())
    with folder.writer(tmp_path / "i"):
        with pytest.raises(UserError, match="another process is writing"):
            add_to_index(tmp_path / "i", [data], encoder=ColourEncoder())
    assert add_to_index(tmp_path / "i", [data], encoder=ColourEncoder())["unchanged"] == 3
