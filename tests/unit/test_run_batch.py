"""The batch runner with a scripted generator: rows, chunks, shards, failures, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmedrag.answering.generators.scripted import ScriptedGenerator
from mmedrag.images.files import load_image
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.run import (
    RunSettings,
    choose,
    chunks,
    merge,
    parse_shard,
    run_conditions,
    run_examples,
)
from mmedrag.records import ConditionSpec
from mmedrag.records.protocols import Request
from mmedrag.records.records import Hit, UserError
from mmedrag.runtime.data_folder import DataFolder


class EchoSearcher:
    """Two hits that name the example they were asked for."""

    def search(self, examples: Any, k: int) -> tuple[list[list[Hit]], list[int]]:
        hits = [
            [
                Hit(id=f"{e.id}.{i}", text=f"near {e.id}", score=0.9 - i / 100, rank=i)
                for i in (0, 1)
            ]
            for e in examples
        ]
        return hits, [1] * len(hits)


def say(request: Request) -> str:
    return f"yes, {len(request.prompt.text)} {request.images[0].name}"


def pipeline(script: Any = say) -> Pipeline:
    return Pipeline(
        retrievers={"generic": EchoSearcher()},
        rule=None,
        generator=ScriptedGenerator("tester", script=script),
    )


def traces(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]


def test_run_writes_every_row_in_input_order(small_data: Path, tmp_path: Path) -> None:
    result = run_examples(pipeline(), DataFolder(small_data), tmp_path / "r", RunSettings(chunk=5))
    ids = [e.id for e in DataFolder(small_data).examples()]
    assert result == {"out": str(tmp_path / "r"), "rows": 36, "failed": 0}
    rows = traces(tmp_path / "r")
    assert [row["example_id"] for row in rows] == ids
    first = rows[0]
    assert first["condition"] == {"image": "clean", "noise": None, "references": "selected"}
    assert first["answer"]["label"] == "yes"
    assert first["excluded"] == 1
    assert first["prompt"]["references"] == ["s00-q0.0", "s00-q0.1"]
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "config.json",
        "finished.json",  # count and hash of the traces
        "timings.jsonl",
        "traces.jsonl",
    ]


def test_config_says_what_was_run_on_what(small_data: Path, tmp_path: Path) -> None:
    system = {"generator": {"kind": "scripted"}}
    run_examples(
        pipeline(),
        DataFolder(small_data),
        tmp_path / "r",
        RunSettings(),
        3,
        system,
        {"x": small_data},
    )
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["seeds"] == {"run": 3}
    assert config["system"] == system
    assert config["settings"]["run"]["references"] == "selected"
    assert set(config["inputs"]) > {"x", str(small_data / "examples.jsonl")}
    assert config["images"]["count"] == 12
    assert config["environment"]["versions"]["mmedrag"]


def test_same_bytes_whatever_the_chunk(small_data: Path, tmp_path: Path) -> None:
    made = []
    for size in (1, 4, 128):
        out = tmp_path / str(size)
        run_examples(
            pipeline(), DataFolder(small_data), out, RunSettings(chunk=size, references="shuffled")
        )
        made.append((out / "traces.jsonl").read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_finished_run_is_not_run_again(small_data: Path, tmp_path: Path) -> None:
    asked = pipeline()
    for _ in range(2):
        result = run_examples(asked, DataFolder(small_data), tmp_path / "r", RunSettings())
    assert result["rows"] == 36
    assert asked.generator.calls == 36  # type: ignore[union-attr]
    with pytest.raises(UserError, match="other settings"):
        run_examples(asked, DataFolder(small_data), tmp_path / "r", RunSettings(limit=2))


def test_images_stay_together(small_data: Path) -> None:
    rows = DataFolder(small_data).examples()
    cut = chunks(rows, 7)
    assert sorted(e.id for c in cut for e in c) == sorted(e.id for e in rows)
    assert all(len(c) <= 7 for c in cut)
    homes = [{str(e.image) for e in c} for c in cut]
    assert sum(len(h) for h in homes) == 12  # no image in two chunks
    assert [len(c) for c in chunks(rows[:3], 2)] == [2, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_shards_merge_into_the_unsplit_run(small_data: Path, tmp_path: Path, first: int) -> None:
    data = DataFolder(small_data)
    run_examples(pipeline(), data, tmp_path / "whole", RunSettings(chunk=4))
    parts = []
    for i in range(first, first + 3):
        parts.append(tmp_path / f"part{i}")
        run_examples(pipeline(), data, parts[-1], RunSettings(chunk=4, shard=f"{i}/3"))
    result = merge(parts[::-1], tmp_path / "merged")
    assert result["rows"] == 36
    for name in ("traces.jsonl", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_merge_refuses_what_is_no_whole(small_data: Path, tmp_path: Path) -> None:
    data = DataFolder(small_data)
    for i, seed in ((0, 0), (1, 9)):
        run_examples(
            pipeline(), data, tmp_path / f"{i}", RunSettings(chunk=4, shard=f"{i}/2"), seed
        )
    with pytest.raises(UserError, match="1 of 2 shards given, 1 is missing"):
        merge([tmp_path / "0"], tmp_path / "m")
    with pytest.raises(UserError, match="the same shard"):
        merge([tmp_path / "0", tmp_path / "0"], tmp_path / "m")
    with pytest.raises(UserError, match="other seeds"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("wrong", ["3/2", "1", "a/b", "0/0", "-1/2"])
def test_shard_is_checked(wrong: str) -> None:
    with pytest.raises(UserError, match="expected i/n"):
        parse_shard(wrong)


def test_a_failing_row_does_not_stop_the_others(small_data: Path, tmp_path: Path) -> None:
    def script(request: Request) -> str:
        if request.images[0].name == "s03.png":
            raise ValueError("cannot look at this one")
        return "no"

    result = run_examples(pipeline(script), DataFolder(small_data), tmp_path / "r", RunSettings())
    assert result["failed"] == 3
    rows = traces(tmp_path / "r")
    bad = [row for row in rows if "error" in row]
    assert {row["error"] for row in bad} == {"ValueError: cannot look at this one"}
    assert {row["example_id"][:3] for row in bad} == {"s03"}
    assert sum("answer" in row for row in rows) == 33


def test_unreadable_images_do_not_repeat_the_others(small_data: Path, tmp_path: Path) -> None:
    class Looking(ScriptedGenerator):
        def generate(self, requests: Any) -> Any:
            for request in requests:
                load_image(request.images[0])
            return super().generate(requests)

    for name in ("s03", "s07"):
        (small_data / "images" / f"{name}.png").write_bytes(b"torn")
    looking = pipeline()
    looking.generator = Looking("tester", script=say)
    result = run_examples(looking, DataFolder(small_data), tmp_path / "r", RunSettings())
    assert result["failed"] == 6
    assert looking.generator.calls == 30
    for row in traces(tmp_path / "r"):
        torn = row["image"][7:10] in ("s03", "s07")
        assert ("error" in row) == torn
        assert not torn or row["image"] in row["error"]


def test_out_of_memory_halves_and_is_recorded(small_data: Path, tmp_path: Path) -> None:
    class Small(ScriptedGenerator):
        sizes: list[int] = []

        def generate(self, requests: Any) -> Any:
            self.sizes.append(len(requests))
            if len(requests) > 6:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().generate(requests)

    small = pipeline()
    small.generator = Small("tester", script=say)
    run_examples(small, DataFolder(small_data), tmp_path / "r", RunSettings(chunk=24))
    run_examples(pipeline(), DataFolder(small_data), tmp_path / "plain", RunSettings(chunk=24))
    assert Small.sizes[:3] == [24, 12, 6]
    assert max(Small.sizes[3:]) <= 6
    times = [json.loads(x) for x in (tmp_path / "r" / "timings.jsonl").read_text().splitlines()]
    assert times[0]["out_of_memory"] == {"rows": 12, "now_at_most": 6}
    same = [(tmp_path / n / "traces.jsonl").read_bytes() for n in ("r", "plain")]
    assert same[0] == same[1]


def test_smaller_batches_of_the_generator_are_recorded(small_data: Path, tmp_path: Path) -> None:
    """A generator that helps itself raises nothing, so the run asks it."""

    class Careful(ScriptedGenerator):
        def generate(self, requests: Any) -> Any:
            self.backoffs = [{"from": 32, "to": 16}]
            return super().generate(requests)

    careful = pipeline()
    careful.generator = Careful("tester", script=say)
    run_examples(careful, DataFolder(small_data), tmp_path / "r", RunSettings(limit=2))
    (line,) = (tmp_path / "r" / "timings.jsonl").read_text().splitlines()
    assert json.loads(line)["batch_backoffs"] == [{"from": 32, "to": 16}]


def test_conditions_share_retrieval_and_differ_in_references(
    small_data: Path, tmp_path: Path
) -> None:
    plans = {
        "clean": ConditionSpec("none"),
        "refs": ConditionSpec("all"),
        "noise": ConditionSpec("none", "blank"),
        "swap": ConditionSpec("shuffled"),
        "own": ConditionSpec("own"),
    }
    out = tmp_path / "c"
    result = run_conditions(
        pipeline(), DataFolder(small_data), plans, out, RunSettings(task="vqa", limit=10)
    )
    assert result == {"rows": 50, "failed": 0}
    made = {name: traces(out / name) for name in plans}
    assert {tuple(t["example_id"] for t in rows) for rows in made.values()} == {
        tuple(t["example_id"] for t in made["clean"])
    }
    assert all(not t["hits"] and not t["prompt"]["references"] for t in made["clean"])
    assert all(t["hits"][0]["id"].startswith(t["example_id"]) for t in made["refs"])
    assert all(not t["hits"][0]["id"].startswith(t["example_id"][:3]) for t in made["swap"])
    assert all(t["prompt"]["references"] == [t["meta"]["study"]] for t in made["own"])
    assert all(t["condition"]["noise"]["kind"] == "blank" for t in made["noise"])


def test_rows_are_chosen(small_data: Path) -> None:
    rows = DataFolder(small_data).examples()
    assert [e.id for e in choose(rows, RunSettings(ids=("s01-r", "s00-q1")))] == ["s00-q1", "s01-r"]
    assert len(choose(rows, RunSettings(domain="radiology", task="report"))) == 6
    with pytest.raises(UserError, match="no example 'nope'"):
        choose(rows, RunSettings(ids=("nope",)))
    with pytest.raises(
        UserError, match=r"no example of split train.*6 of split test, report, domain radiology"
    ):
        choose(rows, RunSettings(split="train"))
