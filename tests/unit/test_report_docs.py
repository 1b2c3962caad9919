"""docs/evaluation.md and docs/from-the-paper.md say what the code does."""

import ast
import json
import re
from pathlib import Path

import pytest

from mmedrag.cli.docs import first_line
from mmedrag.evaluation.metrics.questions import CONTRACT_NAMES
from mmedrag.evaluation.metrics.text import signatures
from mmedrag.evaluation.reliance import DENOMINATORS

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[2] / "repro/results/latest.json"


def test_every_metric_and_control_is_defined():
    text = (DOCS / "evaluation.md").read_text()
    for name in (*CONTRACT_NAMES, *DENOMINATORS):
        shown = re.sub(r"_[2-4]$", "_1", name) if name.startswith("bleu") else name
        assert f"`{shown}`" in text, name
    source = (DOCS.parent / "src/mmedrag/evaluation/controls.py").read_text().split('"""')[1]
    rows = [row.split("|")[1] for row in source.splitlines() if row.startswith("| ")][2:]
    names = [name.strip() for row in rows for name in row.split(",")]
    assert len(names) > 10
    for name in names:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", ["evaluation.md", "from-the-paper.md"])
def test_commands_exist(page):
    """Every ``mmedrag noun [verb]`` of the page is in the generated command reference."""
    known = set(re.findall(r"^#+ (mmedrag [\w -]+)$", (DOCS / "cli.md").read_text(), re.M))
    said = re.findall(r"mmedrag ([a-z]+)(?: ([a-z]+))?", (DOCS / page).read_text())
    nouns = {k.split()[1] for k in known}
    for noun, verb in said:
        assert noun in nouns, noun
        verbs = {k.split()[2] for k in known if k.split()[1] == noun and len(k.split()) > 2}
        if verbs and verb and noun not in ("run", "pairs"):  # these take DATA without a verb
            assert verb in verbs, f"{noun} {verb}"


def test_printed_controls_are_those_that_were_measured():
    """The table of controls shows the recorded values of the reproduction matrix."""
    text = (DOCS / "evaluation.md").read_text()
    known = {name: row["measured"] for name, row in json.loads(RESULTS.read_text()).items()}
    for control in ("copied", "shuffled", "constant"):
        line = next(
            row
            for row in text.splitlines()
            if row.startswith(("| copied top", "| shuffled ref", "| one constant"))
            and control[:4] in row
        )
        for column, data in enumerate(("iu", "mimic", "harvard")):
            cell = line.split("|")[2 + column]
            parts = [
                f"{known[f'{control}-{data}-{m}']:.1f}" for m in ("bleu-1", "bleu-avg", "rouge-l")
            ]
            assert cell.strip() == " / ".join(parts)
    prior = next(row for row in text.splitlines() if row.startswith("| question prior"))
    assert f"{known['question-prior-iu']:.1f}" in prior
    assert f"{known['question-prior-harvard']:.1f}" in prior


def test_functions_of_the_method_page_exist():
    """Every `package.module.function` (or `….Class.method`) of docs/method.md is defined there."""
    dotted = re.findall(r"`((?:\w+\.)+\w+)`", (DOCS / "method.md").read_text())
    dotted = [name for name in dotted if name != "package.module.function" and "=" not in name]
    assert len(dotted) > 30
    for name in dotted:
        parts, inside = name.split("."), DOCS.parent / "src/mmedrag"
        while (inside / parts[0]).is_dir():
            inside /= parts.pop(0)
        nodes = ast.parse((inside / f"{parts.pop(0)}.py").read_text()).body
        for part in parts:
            found = [node for node in nodes if _called(node) == part]
            assert found, name
            nodes = getattr(found[0], "body", [])


def _called(node):
    if isinstance(node, ast.AnnAssign):
        return node.target.id
    return getattr(node, "name", None)


def test_signatures_name_their_libraries():
    found = signatures()
    assert {"bleu_n", "bleu_nltk_n", "rouge", "meteor"} == set(found)
    assert all("version:" in said for said in found.values())


def test_files_of_the_architecture_page_exist():
    """Hand-written paths of docs/architecture.md, relative to the package or the repository."""
    written = (DOCS / "architecture.md").read_text().partition("## File map")[0]
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", written))
    assert len(named) > 15
    for name in named:
        assert (DOCS.parent / "src/mmedrag" / name).exists() or (DOCS.parent / name).exists(), name


def test_a_module_without_a_sentence_is_named(tmp_path):
    module = tmp_path / "m.py"
    module.write_text('"""One thought that goes\non."""\n')
    with pytest.raises(LookupError, match="m.py: the docstring's first line is no sentence"):
        first_line(module)


def test_labels_of_differences_are_defined():
    """Code and tests say `B2 of docs/differences.md`; that page has to say what B2 is."""
    page = (DOCS / "differences.md").read_text()
    root, labels = DOCS.parent, set()
    for tree in ("src", "tests", "bench", "training"):
        for path in (root / tree).rglob("*.py"):
            for place in re.finditer(r"differences\.md", path.read_text()):
                near = path.read_text()[max(0, place.start() - 120) : place.end() + 120]
                labels |= set(re.findall(r"\b[ABDRT][1-9]\d?\b", near))
    assert {"B2", "B9", "R1", "A1"} <= labels
    for label in labels:
        assert f"**{label}**" in page or f"({label})" in page, label
