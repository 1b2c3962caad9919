"""Journal, claims and hashes of run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from mmedrag.records.records import UserError
from mmedrag.runtime import run_folder
from mmedrag.runtime.files import sha256
from mmedrag.runtime.journal import Journal, append_line


def test_journal_replays_what_was_appended(tmp_path: Path) -> None:
    rows = {"a": '{"x": 1}', 'b\t"\n': '{"y": "é"}', "c": "{}"}
    journal = Journal(tmp_path / "j")
    journal.append(rows)
    journal.close()
    again = Journal(tmp_path / "j")
    again.write(tmp_path / "out", ["c", "a", 'b\t"\n'])
    again.close(remove=True)
    assert (tmp_path / "out").read_text() == '{}\n{"x": 1}\n{"y": "é"}\n'
    assert not (tmp_path / "j").exists()


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200))
def test_journal_cut_anywhere_loses_only_the_torn_row(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "j"
    journal = Journal(path)
    for number in range(6):
        journal.append({f"k{number}": json.dumps({"n": number})})
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    complete = whole[:cut].count(b"\n")
    journal = Journal(path)
    assert list(journal.where) == [f"k{n}" for n in range(complete)]
    missing = {f"k{n}": json.dumps({"n": n}) for n in range(complete, 6)}
    journal.append(missing)
    journal.write(path.with_name("out"), [f"k{n}" for n in range(6)])
    journal.close()
    assert path.with_name("out").read_text() == "".join(f'{{"n": {n}}}\n' for n in range(6))


def test_journal_drops_a_poisoned_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    for key in "abc":
        journal.append({key: json.dumps({"is": key})})
    journal.close()
    path.write_bytes(path.read_bytes().replace(b'"is": "b"', b'"is": "z"'))
    journal = Journal(path)
    assert list(journal.where) == ["a", "c"]
    journal.append({"b": '{"is": "b"}'})
    journal.write(tmp_path / "out", "abc")
    journal.close()
    assert [json.loads(x)["is"] for x in (tmp_path / "out").read_text().split("\n")[:3]] == [
        "a",
        "b",
        "c",
    ]


def test_journal_has_one_writer(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with pytest.raises(UserError, match="another process"):
        Journal(tmp_path / "j")
    journal.close()
    Journal(tmp_path / "j").close()


def test_claim_goes_on_only_with_the_same_call(tmp_path: Path) -> None:
    config = {"command": "run", "settings": {"limit": 3}, "inputs": {"a": "1"}, "environment": {}}
    assert run_folder.claim(tmp_path / "r", config) == config
    other = {**config, "environment": {"commit": "x"}}
    assert run_folder.claim(tmp_path / "r", other) == config  # keeps what it was begun with
    with pytest.raises(UserError, match="limit: 3 before, 4 now"):
        run_folder.claim(tmp_path / "r", {**config, "settings": {"limit": 4}})
    with pytest.raises(UserError, match="other inputs"):
        run_folder.claim(tmp_path / "r", {**config, "inputs": {"a": "2"}})


def test_claim_refuses_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and no run folder"):
        run_folder.claim(tmp_path, {"command": "run"})


def test_sha256_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = sha256(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, sha256(tmp_path)}) == 3
    with pytest.raises(UserError, match="cannot be read"):
        sha256(tmp_path / "none")


def test_append_line_ends_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text('{"torn": ')
    append_line(path, "{}")
    append_line(path, "{}")
    assert path.read_text() == '{"torn": \n{}\n{}\n'


def test_environment_names_versions() -> None:
    found = run_folder.environment()
    assert found["versions"]["numpy"]
    assert found["versions"]["mmedrag"]
