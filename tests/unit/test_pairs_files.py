"""Pairs in other formats, released rows in with their faults, and the held-out rule on images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mmedrag.cli.pairs import noun
from mmedrag.data.formats.released_pairs import import_released
from mmedrag.images.alike import pixel_hash
from mmedrag.images.files import load_image
from mmedrag.images.noise import apply_noise
from mmedrag.preference.pairs.files import export_pairs, read_pairs, write_pairs
from mmedrag.preference.pairs.held_out import HeldOut, image_hashes
from mmedrag.records.pair_kinds import PairSet
from mmedrag.records.records import Example, Noise, Pair, Prompt, Side, Trace, UserError

NOISE = Noise(kind="gaussian_clip", seed=3)


def pair(kind: str, noise: Noise | None = None, root: Path | None = None, **sides) -> Pair:
    prompt = sides.get("prompt", Prompt(template="t", text="Refs: 1. x\nIs it there?"))
    return Pair(
        id=f"{kind}:e1",
        kind=kind,
        chosen=Side(prompt=prompt, image="images/a.png", text="yes"),
        rejected=Side(
            prompt=sides.get("other", prompt),
            image=sides.get("image", "images/a.png"),
            noise=noise,
            text="no",
        ),
        root=root,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data/images").mkdir(parents=True)
    for name, colour in (("a", (200, 10, 10)), ("b", (10, 200, 10))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"data/images/{name}.png")
    return tmp_path / "data"


# --- out ----------------------------------------------------------------------------------------


def test_released_rows(tmp_path: Path) -> None:
    raw = Prompt(
        template="released/x",
        style="raw",
        text="A chat. USER: <image>\nIs it there?\nPlease answer. ASSISTANT:",
    )
    other = Noise(kind="shuffle_patches", seed=1)
    pairs = [
        pair("resist"),
        pair("cross_modal", NOISE, prompt=raw),
        pair("stage1", other),
        pair("copy", image="images/b.png"),
    ]
    done = export_pairs(pairs, tmp_path, "released")
    rows = json.loads((tmp_path / "pairs.json").read_text())
    assert rows[0] == {
        "id": "resist:e1",
        "image": "images/a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nRefs: 1. x\nIs it there?"},
            {"from": "gpt", "value": "yes"},
        ],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nRefs: 1. x\nIs it there?"},
            {"from": "gpt", "value": "no"},
        ],
        "rejected_noised": 0,
    }
    assert rows[1]["conversations"][0]["value"] == "<image>\nIs it there?\nPlease answer."
    assert rows[1]["rejected_noised"] == 1
    assert [r["id"] for r in done["refused"]] == ["stage1:e1", "copy:e1"]
    assert done["rows"] == 2


def test_ms_swift_rows_with_drawn_noise(tmp_path: Path, data: Path) -> None:
    pairs = [pair("resist", root=data), pair("cross_modal", NOISE, root=data)]
    done = export_pairs(pairs, tmp_path / "out", "ms-swift", noise_size=24)
    rows = [json.loads(x) for x in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert rows[0]["images"] == rows[0]["rejected_images"] == ["images/a.png"]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "<image>Refs: 1. x\nIs it there?"},
        {"role": "assistant", "content": "yes"},
    ]
    assert rows[0]["rejected_messages"][1]["content"] == "no"
    drawn = data / rows[1]["rejected_images"][0]  # paths start from DATA
    expected = apply_noise(load_image(data / "images/a.png"), NOISE, 24)
    assert pixel_hash(load_image(drawn)) == pixel_hash(expected)
    assert done["noise_images"] == 1 and not done["refused"]


def test_trl_rows_only_where_both_sides_share_image_and_prompt(tmp_path: Path) -> None:
    different = Prompt(template="t", text="Is it there?")
    pairs = [pair("resist"), pair("cross_modal", NOISE), pair("copy", other=different)]
    done = export_pairs(pairs, tmp_path, "trl")
    (row,) = [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert row["images"] == ["images/a.png"]
    assert row["prompt"][0]["content"][0] == {"type": "image"}
    assert row["chosen"][0]["content"][0]["text"] == "yes"
    assert [r["reason"].split(",")[0] for r in done["refused"]] == [
        "the sides' images differ",
        "the sides' prompts differ",
    ]


def test_unknown_format_and_unknown_frame(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of released, ms-swift, trl"):
        export_pairs([], tmp_path, "llava")
    odd = Prompt(template="t", style="raw", text="no image place at all")
    assert export_pairs([pair("resist", prompt=odd)], tmp_path, "trl")["refused"]


# --- in -----------------------------------------------------------------------------------------


def row(image="x/1.png", noised=0, chosen="Yes", rejected="No", report=False, **changes) -> dict:
    ask = (
        "Write with 1 reference report(s): 1. r "
        if report
        else "q? [yes, no] 1 reference report(s)"
    )
    human = {"from": "human", "value": f"<image>\n{ask}"}
    found = {
        "id": "q1",
        "image": image,
        "conversations": [human, {"from": "gpt", "value": chosen}],
        "rejected_conversations": [human, {"from": "gpt", "value": rejected}],
        "rejected_noised": noised,
    }
    return {**found, **changes}


def imported(tmp_path: Path, rows: list, **options):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    found, faults = import_released(path, **options)
    return found, [(f.row, f.fault) for f in faults]


def test_round_trip(tmp_path: Path) -> None:
    rows = [row(noised=1, rejected="Yes", id=7), row(image="x/2.png", id="", image_root="/else")]
    found, _ = imported(tmp_path, rows)
    assert [p.kind for p in found.pairs] == ["cross_modal", "resist"]
    export_pairs(found.pairs, tmp_path / "out", "released")
    assert json.loads((tmp_path / "out/pairs.json").read_text()) == rows


def test_wrong_image_under_many_ids(tmp_path: Path) -> None:
    """The released fault (B1): a batch's first image stands under every id of the batch."""
    rows = [row(image="s/a1.png", report=True, noised=1, id=f"a{i}") for i in range(1, 5)]
    rows.append(row(image="s/b.png", report=True, noised=1, id="b"))
    _, faults = imported(tmp_path, rows)
    assert faults == [(2, "wrong_image"), (3, "wrong_image"), (4, "wrong_image")]


def test_questions_share_an_image_without_fault(tmp_path: Path) -> None:
    _, faults = imported(tmp_path, [row(id=str(i)) for i in range(3)])
    assert faults == []


def test_faults_of_a_row(tmp_path: Path) -> None:
    good = row()
    twice = {"from": "human", "value": "<image>\n<image>\nq?"}
    rows = [
        row(chosen="Yes", rejected="Yes"),
        row(chosen="It may be.", rejected="No"),
        row(id=""),
        row(image=["x/1.png", "x/2.png"]),
        row(rejected="Yes, it is"),
        row(chosen=""),
        {**good, "conversations": [twice, good["conversations"][1]]},
        row(image="/abs/1.png"),
    ]
    _, faults = imported(tmp_path, rows)
    assert set(faults) >= {
        (1, "identical_texts"),
        (2, "unclear_chosen"),
        (3, "no_id"),
        (4, "image_list"),
        (5, "polarity"),
        (6, "empty_text"),
        (7, "image_token"),
        (7, "prompts_differ"),
        (8, "image_path"),
    }


def test_broken_rows_do_not_stop_good_ones(tmp_path: Path) -> None:
    rows = [5, {}, row(conversations=[]), row(rejected_noised=2), row(image=None), row()]
    found, faults = imported(tmp_path, rows)
    assert faults == [(i, "schema") for i in range(1, 6)]
    assert len(found.pairs) == 1
    lines = tmp_path / "rows.jsonl"
    lines.write_text("{bad\n" + json.dumps(row()) + "\n")
    found, faults = import_released(lines)
    assert len(found.pairs) == 1 and faults[0].fault == "schema"
    (tmp_path / "x.json").write_text("[1,")
    assert "rows end here" in import_released(tmp_path / "x.json")[1][-1].detail
    (tmp_path / "y.json").write_text("5")
    with pytest.raises(UserError, match=r"y\.json: a single JSON value"):
        import_released(tmp_path / "y.json")
    with pytest.raises(UserError, match="cannot be read"):
        import_released(tmp_path / "none.json")


def test_kind_from_flag_references_and_order(tmp_path: Path) -> None:
    rows = [row(noised=1)]
    bare = {"from": "human", "value": "<image>\nq? [yes, no]"}
    plain = row(noised=1)
    plain["conversations"][0] = plain["rejected_conversations"][0] = bare
    rows.append(plain)
    rows += [row(image=f"i_{n}.png") for n in (2, 9, 10, 3, 4)]  # restarts after 10: natural order
    found, _ = imported(tmp_path, rows)
    kinds = ["cross_modal", "stage1", "resist", "resist", "resist", "copy", "copy"]
    assert [p.kind for p in found.pairs] == kinds
    assert found.counts["kind_unknown"] == 0
    found, _ = imported(tmp_path, rows, resist=1)
    assert [p.kind for p in found.pairs][2:] == ["resist"] + ["copy"] * 4
    unordered = [row(image=f"{n}.png") for n in (5, 2, 9, 1)]
    found, _ = imported(tmp_path, unordered)
    assert found.counts["kind_unknown"] == 4


def brought(tmp_path: Path, rows: list, *words: str, code: int = 0, name: str = "rows.jsonl"):
    """What `pairs import` makes of rows, and what it says."""
    path, out = tmp_path / name, tmp_path / "brought"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ["import", str(path), "--out", str(out), "--json", *words]
    done = CliRunner().invoke(noun, call)
    assert done.exit_code == code, (done.output, done.exception)
    return read_pairs(out), json.loads(done.stdout)


@pytest.mark.parametrize("format", ["ms-swift", "trl"])
def test_what_pairs_export_writes_is_read_again(tmp_path: Path, data: Path, format: str) -> None:
    other = Prompt(template="t", text="Is it there?")
    pairs = [pair("resist", root=data), pair("unaided", root=data, prompt=other)]
    if format == "ms-swift":
        pairs += [pair("cross_modal", NOISE, root=data), pair("copy", root=data, other=other)]
        references = Prompt(template="t", text="Reference reports of similar cases:\n1. x\nIs it?")
        pairs += [pair("stage1", NOISE, root=data, prompt=references)]
    pairs = [p.model_copy(update={"id": f"{p.id}-{n}"}) for n, p in enumerate(pairs)]
    export_pairs(pairs, tmp_path / "out", format, noise_size=24)
    rows = [json.loads(x) for x in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    found, said = brought(tmp_path / "out", rows, "--images", str(data))
    assert said["faults"] == [] and len(found) == len(pairs)
    for was, now in zip(pairs, found, strict=True):
        for old, new in ((was.chosen, now.chosen), (was.rejected, now.rejected)):
            assert (new.text, new.prompt.text) == (old.text, old.prompt.text)
            picture = load_image(now.root / new.image)
            clean = load_image(data / "images/a.png")
            expected = clean if old.noise is None else apply_noise(clean, old.noise, 24)
            assert pixel_hash(picture) == pixel_hash(expected)
    if format == "ms-swift":
        assert [p.kind for p in found[2:]] == ["stage1", "unaided", "cross_modal"]


def said(text, speaker="assistant"):
    return [{"role": speaker, "content": text}]


def test_rows_of_other_trainers(tmp_path: Path, data: Path) -> None:
    part = [{"type": "image"}, {"type": "text", "text": "Is it?"}]
    inside = [{"type": "image", "image": "images/a.png"}, {"type": "text", "text": "Is it?"}]
    yes, no = said([{"type": "text", "text": "Yes."}]), said([{"type": "text", "text": "No."}])
    ask, one = said("<image>Is it?", "user"), {"images": ["images/a.png"]}
    rows = [
        {"prompt": said(part, "user"), "chosen": yes, "rejected": no, **one},
        {"prompt": said(inside, "user"), "chosen": yes, "rejected": no},
        {"chosen": ask + yes, "rejected": ask + no, **one},
        {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", **one},
        {"question": "Is it?", "chosen": "Yes.", "rejected": "No.", "image": "images/a.png"},
        {"messages": ask + said("Yes."), "rejected_response": "No.", **one},
        {"messages": ask + said("Yes."), "rejected_messages": ask + said("No."), **one},
        {
            "conversations": [{"from": "human", "value": "<image>Is it?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
            "images": [str(data / "images/a.png")],
        },
        {"query": "<image>Is it?", "response": "Yes.", "rejected_response": "No.", **one},
        {"instruction": "<image>Is it?", "input": "", "chosen": "Yes.", "rejected": "No.", **one},
        {"prompt": "<img><IMG_CONTEXT></img>Is it?", "chosen": "Yes.", "rejected": "No.", **one},
    ]
    found, _ = brought(tmp_path, rows, "--images", str(data))
    assert [p.id for p in found] == [f"unaided:row{n}" for n in range(1, len(rows) + 1)]
    for one_pair in found:
        for side, answer in ((one_pair.chosen, "Yes."), (one_pair.rejected, "No.")):
            assert (side.prompt.text, side.text, side.image) == ("Is it?", answer, "images/a.png")


def test_pairs_whose_pictures_alone_differ(tmp_path: Path, data: Path) -> None:
    row = {"messages": said("<image>Is it?", "user") + said("Yes."), "images": ["images/a.png"]}
    path = tmp_path / "rows.json"  # one object, with a byte order mark
    path.write_text("\ufeff" + json.dumps(row | {"rejected_images": ["images/b.png"]}, indent=1))
    out = tmp_path / "out"
    call = ["import", str(path), "--out", str(out), "--images", str(data)]
    assert CliRunner().invoke(noun, call).exit_code == 0
    (found,) = read_pairs(out)
    assert (found.kind, found.chosen.text, found.rejected.text) == ("stage1", "Yes.", "Yes.")
    assert (found.chosen.image, found.rejected.image) == ("images/a.png", "images/b.png")


def test_faults_of_other_trainers_rows(tmp_path: Path, data: Path) -> None:
    good = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No.", "images": ["images/a.png"]}
    talk = said("Is it?", "user") + said("Yes.")
    rows = [
        good,
        {**good, "images": []},
        {**good, "images": ["../../etc/passwd"]},
        {**good, "images": ["/etc/hostname"]},
        {**good, "images": ["images/none.png"]},
        {**good, "rejected": "Yes."},
        {**good, "chosen": "nan"},
        {**good, "prompt": said("Be brief.", "system") + said("Is it?", "user")},
        {**good, "prompt": talk + said("Sure?", "user")},
        row(),
    ]
    found, told = brought(tmp_path, rows, "--images", str(data), code=1)
    assert [int(p.id.rpartition("row")[2]) for p in found] == [1, 5, 6, 7, 8]
    faults = [
        line.split(": ")[0].rpartition(":")[2] + line.split(": ")[1] for line in told["faults"]
    ]
    assert faults == [
        *("2schema", "3schema", "4schema", "5image_missing", "6identical_texts", "7empty_text"),
        *("8system_turn", "8system_turn", "9schema", "10schema"),
    ]
    (tmp_path / "empty.jsonl").write_text("")
    call = ["import", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "o")]
    assert "empty, expected rows" in str(CliRunner().invoke(noun, call).exception)
    assert not (tmp_path / "o").exists()


# --- native folder and held-out images ------------------------------------------------------------


def test_native_folder(tmp_path: Path, data: Path) -> None:
    write_pairs(PairSet([pair("resist")], {"n": 1}), tmp_path / "p", data, {"mode": "paper"})
    config = json.loads((tmp_path / "p/config.json").read_text())
    assert config == {"data": "../data", "settings": {"mode": "paper"}, "counts": {"n": 1}}
    (back,) = read_pairs(tmp_path / "p")
    assert (back.root / back.chosen.image).resolve() == (data / "images/a.png").resolve()
    assert read_pairs(tmp_path / "p", data="/x")[0].root == Path("/x")
    file = tmp_path / "p/pairs.jsonl"
    file.write_text(file.read_text() * 2)
    with pytest.raises(UserError, match=r"pairs.jsonl:2: id: 'resist:e1' stands twice"):
        read_pairs(tmp_path / "p")
    (tmp_path / "p/config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json"):
        read_pairs(tmp_path / "p")


def test_held_out_images(tmp_path: Path, data: Path) -> None:
    """A pair's picture is recognised by its pixels, also in another container."""
    Image.open(data / "images/a.png").save(data / "images/copy.bmp")
    of_bytes, of_pixels = image_hashes(data / "images/a.png")
    ids = tmp_path / "ids"
    ids.mkdir()
    line = {"id": "c1", "patient": None, "sha256": of_pixels}
    (ids / "train_ids.jsonl").write_text(json.dumps(line) + "\n")
    held = HeldOut().add_trained(ids)
    seen = [Trace(example_id=n, task="vqa", image=f"images/{n}") for n in ("copy.bmp", "b.png")]
    assert [held.violation(t, data) for t in seen] == ["retriever_image", None]
    test = Example(id="t", task="report", image="images/b.png", split="test", patient="p9")
    test.root = data
    held.add_test([test])
    assert held.violation(seen[1], data) == "test_image"
    same = Trace(example_id="z", task="vqa", image="images/none.png", patient="p9")
    assert held.violation(same, data) == "test_patient"
    assert held.violation(same.model_copy(update={"patient": None}), data) is None
    (ids / "train_ids.jsonl").write_text("{oops\n")
    with pytest.raises(UserError, match=r"train_ids.jsonl:1: not JSON"):
        HeldOut().add_trained(ids)
    with pytest.raises(UserError, match="cannot be read"):
        HeldOut().add_trained(tmp_path / "nothing")
