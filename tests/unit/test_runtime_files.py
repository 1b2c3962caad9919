"""Atomic writes and journals under a kill, a full disk and damage; hashes; files of before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from mmedrag.records import UserError
from mmedrag.runtime import (
    Journal,
    append_bytes,
    append_line,
    files,
    new_folder,
    open_log,
    part_of,
    replacing,
    sha256,
    sha256_of,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
    write_unsynced,
)

WRITERS = {
    "bytes": lambda path: write_bytes(path, b"new"),
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "rows": lambda path: write_jsonl(path, [{"new": 1}]),
    "unsynced": lambda path: write_unsynced(path, b"new"),
}


def no_room(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- atomic writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_replaces_and_leaves_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / "folder" / "file"
    WRITERS[kind](path)
    path.write_text("old")
    WRITERS[kind](path)
    assert b"new" in path.read_bytes()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    if call == "write":
        monkeypatch.setattr(files, "_open_part", lambda part: open("/dev/full", "wb"))
    elif (kind, call) == ("unsynced", "fsync"):
        pytest.skip("it does not call fsync")
    else:
        monkeypatch.setattr(os, call, no_room)
    with pytest.raises(UserError) as raised:
        WRITERS[kind](path)
    monkeypatch.undo()
    assert str(raised.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_block_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path) as out:
        out.write(b"half")
        (tmp_path / "absent").read_bytes()
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from mmedrag.runtime import replacing, new_folder
target, when = Path(sys.argv[1]), sys.argv[2]
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
if when in ("fsync", "replace"):
    setattr(os, when, die)
with replacing(target) as out:
    out.write(b"new" * 100000)
    if when == "middle":
        out.flush()
        die()
if when == "after":
    die()
"""


@pytest.mark.parametrize("when", ["middle", "fsync", "replace", "after"])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, when: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = subprocess.run([sys.executable, "-c", KILLED, str(path), when])
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"new" * 100000 if when == "after" else b"old")
    write_text(path, "later")  # what the kill left is in nobody's way
    assert path.read_text() == "later" and list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_disk_before_its_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        done.append(f"{Path(old).name} to {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(tmp_path / "file", "x")
    part = part_of(tmp_path / "file").name
    assert done == [part, f"{part} to file", tmp_path.name]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(out) as part:
        (part / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with new_folder(out) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match="exists already"), new_folder(out):
        pass


# --- hashes --------------------------------------------------------------------------------------


def test_hashes_are_those_that_stored_files_hold(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "b" / "c.bin").write_text("2")
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    assert sha256(tmp_path / "a.json") == one
    text = f"a.json\0{one}\nb/c.bin\0{two}\n"
    assert sha256(tmp_path) == hashlib.sha256(text.encode()).hexdigest()
    some = sha256_of(tmp_path, [tmp_path / "a.json"])
    assert some == hashlib.sha256(f"a.json\0{one}\n".encode()).hexdigest()


# --- journals ------------------------------------------------------------------------------------


def test_a_full_disk_takes_back_the_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"a": "1"})
    before, write = (tmp_path / "j").read_bytes(), os.write

    def full(handle: int, data: bytes) -> int:
        write(handle, bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"j: cannot be written: No space left on device$"):
        journal.append({"b": "2"})
    monkeypatch.undo()
    assert (tmp_path / "j").read_bytes() == before and "b" not in journal
    journal.append({"b": "2"})
    assert list(journal.rows("ba")) == [b"2", b"1"]


JOURNAL_KILLED = """
import os, signal, sys
from pathlib import Path
from mmedrag.runtime import Journal
journal, write, fsync = Journal(Path(sys.argv[1])), os.write, os.fsync
journal.append({"a": "1"})
def half(handle, data):
    write(handle, bytes(data)[:12])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
journal.append({"b": "2"})
"""


def test_a_kill_in_the_middle_of_a_line_costs_that_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    child = subprocess.run([sys.executable, "-c", JOURNAL_KILLED, str(path)])
    assert child.returncode == -signal.SIGKILL and not path.read_bytes().endswith(b"\n")
    journal = Journal(path)  # the lock went with the process
    assert list(journal.where) == ["a"] and journal.damaged == 1
    journal.append({"b": "2"})
    journal.close()
    assert list(Journal(path).rows("ab")) == [b"1", b"2"]


def test_shared_journals_take_each_others_lines(tmp_path: Path) -> None:
    one, two = (Journal(tmp_path / "j", shared=True) for _ in range(2))
    one.append({"a": "1"})
    two.append({"b": "2", "a": "3"})
    one.append({"c": "4"})
    two.replay()
    assert list(two.rows("abc")) == [b"3", b"2", b"4"]  # the last row of a key counts


def test_lines_of_the_form_before_still_count(tmp_path: Path) -> None:
    from mmedrag.preference.dpo.cache import Journal as Reference

    sound, wrong = (
        json.dumps([key, value, zlib.crc32(json.dumps([key, value]).encode()) + off]) + "\n"
        for key, value, off in (("a", -1.5, 0), ("b", -2.5, 1))
    )
    (tmp_path / "index-0.jsonl").write_text(sound + wrong + "7\n")
    journal = Reference(tmp_path, {})
    assert journal.entries == {"a": -1.5} and journal.damaged == 2
    journal.append([("c", -3.25)])
    assert Reference(tmp_path, {}).entries == {"a": -1.5, "c": -3.25}


def test_append_makes_the_name_of_a_new_file_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with open_log(tmp_path / "log") as handle:
        assert append_bytes(handle, b"one\n") == 0 and append_bytes(handle, b"two\n") == 4
    append_line(tmp_path / "log", "three")
    assert synced == ["log", tmp_path.name, "log", "log"]
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"
