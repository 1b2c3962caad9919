"""Every command line of the documentation, typed as it is printed, in the order of its page.

A page's block runs in a folder of its own, in which the names that the lines use (DATA, MODEL,
exams.csv, ...) are there (``docs_names``): little is replaced (:data:`WORDS`), and what is not run
is named with its reason (:data:`NOT_RUN`). A line that is new on a page is run, too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from docs_names import command, prepare
from docs_tools import Line, documented

pytestmark = pytest.mark.model
LINES = documented()

DEEPSPEED = "the package deepspeed; tests/e2e/test_cli_launch.py, where it is installed"
DOCKER = "a container engine; tests/unit/test_deploy_files.py checks the file"
EXTEND = "tests/unit/test_extend_page.py runs that page, whose modules it saves"
HOURS = "trains for hours; tests/model/test_training_rehearsal.py rehearses it"
HUB = "weights of a model hub; runs here with a local encoder, below"
INSTALLS = "a package index; tests/e2e/test_package_install.py installs, with every extra"
MEASURES = "minutes of measuring that write its page"
RELEASED = (
    "a clone of the released repository; tests/golden/test_repro_matrix.py, where there is one"
)
REAL_TEXT = "the extra real-text; tests/model/test_retrieval_projected.py, where it is installed"
SERVER = "a service that does not end; tests/e2e/test_serve_process.py starts and stops it"

REAL = "real pictures; tests/model/test_domain_real.py judges what it made"
FUSER = "runs over several seeds; tests/unit/test_evaluate_fusion.py types it"
MINUTES = "tens of minutes; tests/e2e/test_cli_sweep.py at a small size"

NOT_RUN = {  # "…": and so on
    "RUN python -m venv /opt/mmedrag": DOCKER,
    "RUN /opt/mmedrag/bin/pip install -c constraints.txt ${TORCH_INDEX…": DOCKER,
    'RUN /opt/mmedrag/bin/pip install -c constraints.txt ".[${EXTRAS}]"': DOCKER,
    "RUN groupadd --gid 10001 mmedrag …": DOCKER,
    "docker build -t mmedrag .": DOCKER,
    "docker build -t mmedrag:cuda --build-arg TORCH_INDEX= .": DOCKER,
    "docker build -t mmedrag --build-arg EXTRAS=serve,dicom,openai .": DOCKER,
    "docker run -d --name mmedrag …": DOCKER,
    "sudo chown 10001 keys": DOCKER,
    "deepspeed … train_dpo_2stages.py": "a line of the released repository",
    "pip install '.[train,clip]'": INSTALLS,
    "curl -F image=@film.dcm …": SERVER,
    "mmedrag serve start --host 0.0.0.0 …": SERVER,
    "mmedrag serve --system /etc/mmedrag/system.toml …": SERVER,
    "mmedrag data import notes:load FILMS DATA --set domain=radiology": EXTEND,
    "mmedrag index build DATA --domain radiology --retriever grid:Grid --out INDEX": EXTEND,
    "mmedrag run DATA --index INDEX --retriever grid:Grid …": EXTEND,
    "python lengths.py RUN": EXTEND,
    "mmedrag train retriever DATA --domain radiology --out R --set encoder=real:lite0 …": REAL_TEXT,
    "make demo": INSTALLS + "; the command runs below",
    "make test": INSTALLS,
    "make docs": "writes into the checkout; tests/unit/test_cli_docs.py",
    "make tiny": HOURS,
    "make meteor": "a package archive of the system",
    "python -m training.embedded": HOURS,
    "python -m training.embedded STAGE ...": HOURS,
    "python bench/gpu.py": "a GPU",
    "python bench/tuning.py": MEASURES,
    "python bench/regimes.py": MEASURES,
    "python bench/intervals.py --docs docs/evaluation.md": MEASURES,
    "python -m training.fusion …": FUSER,
    "mmedrag ablation DATA --system S.toml --out OUT --set ablation.attainable=…": FUSER,
    "python -m training.real_domain": REAL,
    "python -m training.real_domain --data DATA --out DIR": REAL,
    "mmedrag ablation DATA --system S.toml --out OUT --config recipe.toml": "an index and adapters "
    "of one's own; tests/e2e/test_ablation_rows.py runs a system and a recipe",
    "mmedrag sweep --out OUT": MINUTES,
    "mmedrag sweep --out OUT --studies 200 …": MINUTES,
    "python bench/reliability.py --docs docs/reliability.md": MEASURES,
    "python bench/reliability.py --full --docs docs/reliability.md": MEASURES,
    "pip install -c constraints.txt '.[serve,dicom]'": INSTALLS,
    "mmedrag serve": SERVER,
    "mmedrag serve --system system.toml --port 8080": SERVER,
    "mmedrag serve --host 0.0.0.0 --hosts mmedrag.example.org --audit audit.jsonl": SERVER,
    "mmedrag launch --processes 4 --strategy zero2 …": DEEPSPEED,
    "mmedrag launch --processes 4 --strategy zero3 …": DEEPSPEED,
    "mmedrag repro --check": RELEASED,
    "mmedrag repro --check --row ID": RELEASED,
}
WORDS = {  # placeholders, for what is in the folder
    "FORMAT": "released",
    "NAME": "radiology",
    "ENCODER": "R",
    "EPOCHS": "2",
    "ID": "rad-s1-p00001-0",
    "N": "2",
    "source=A": "source=phantom",
    "key=/safe/site.key": "key=site.key",
    "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": "R",
}
FEWER = ("--processes 4", "--processes 2")  # where there is no GPU
FILLED = {  # what a sentence leaves out
    "mmedrag ask --json": "mmedrag ask a.png 'Is there a pleural effusion?' --json",
    "mmedrag data check": "mmedrag data check DATA",
    "mmedrag data import manifest SRC DATA": "mmedrag data import manifest ROWS DATA",
    "mmedrag data import table … ALL/a": "mmedrag data import table exams.csv ALL/a "
    "--column text=seen",
    "mmedrag data import vqa … ALL/b": "mmedrag data import vqa vqa.jsonl ALL/b",
    "mmedrag launch --processes N -- train retriever …": "mmedrag launch --processes N -- "
    "train retriever DATA --domain radiology --out R",
    "mmedrag model merge": "mmedrag model merge M A0 OUT",
    "mmedrag pairs export --format released": "mmedrag pairs export PAIRS "
    "--format released --out OUT",
    "mmedrag retrieve --format released --views first": "mmedrag retrieve DATA --index I "
    "--retriever R --format released --views first --out FILE",
    "mmedrag run … --noise gaussian_clip": "mmedrag run DATA --system S.toml --out RUN "
    "--noise gaussian_clip",
    "mmedrag train dpo … --init-adapter A0 --reference base": "mmedrag train dpo PAIRS --model M "
    "--out A --init-adapter A0 --reference base",
    "mmedrag train dpo … --init-adapter A0 --reference init": "mmedrag train dpo PAIRS --model M "
    "--out A --init-adapter A0 --reference init",
}
RETRIEVER = "mmedrag train retriever DATA --domain radiology --out R"
LOCAL = " --set encoder=OPEN_CLIP"  # for the weights of the hub that the recipes name
SHORTER = {
    "mmedrag train retriever DATA --domain ophthalmology --out R": " --set epochs=2",
    f"{RETRIEVER} --set lr=1e-4": " --set epochs=2",
    f"{RETRIEVER} --config paper": f"{LOCAL} --set epochs=2",
    f"{RETRIEVER} --config released": f"{LOCAL} --set epochs=2",
    "mmedrag demo --full": " --studies 2",
}
EXIT = {  # so few pictures reach no such precision, and the file says so
    "mmedrag retriever calibrate I DATA --retriever R --precision 0.8 --out kept.toml": 1
}
SLOW = {
    "mmedrag demo --real DATA --out OUT",
    "mmedrag demo",
    "mmedrag demo --full",
    "mmedrag ablation DATA --system SYSTEM --out OUT",
    "mmedrag ablation DATA --system S.toml --out OUT",
    "python bench/gpu.py --rehearse",
}


def as_typed(line: Line) -> str:
    text = FILLED.get(line.text, line.text) + SHORTER.get(line.text, "")
    if line.names_a_command and line.text not in FILLED:
        text += " --help"
    return " ".join(WORDS.get(word, word) for word in text.replace(*FEWER).split(" "))


def reason(line: Line) -> str | None:
    """Why a line is not run; None where it is."""
    for text, why in NOT_RUN.items():
        if line.text == text or (text[-1] == "…" and line.text.startswith(text[:-1])):
            return None if line.names_a_command else why
    return None


def blocks(slow: bool) -> list[list[Line]]:
    """Lines to run together; a slow one alone."""
    found: dict[tuple[str, int], list[Line]] = {}
    for line in LINES:
        if reason(line) is None and (line.text in SLOW and not line.names_a_command) == slow:
            found.setdefault((line.page, line.block), []).append(line)
    return [[line] for lines in found.values() for line in lines] if slow else [*found.values()]


def name(lines: list[Line]) -> str:
    return f"{lines[0].page}:{lines[0].text}"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("names"))


@pytest.fixture
def folder(names: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(names, tmp_path / "folder", symlinks=True))


def typed(line: str, folder: Path) -> tuple[int, str]:
    """Exit code and all that a line prints, typed in a folder."""
    program, *words = shlex.split(line)
    if program == "mmedrag" and words[:1] != ["launch"]:
        with chdir(folder):
            return command(line)
    assert program in ("mmedrag", "python"), f"{program}: expected a reason in NOT_RUN"
    before = [sys.executable, *(["-m", "mmedrag"] if program == "mmedrag" else [])]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*before, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


WRITTEN = re.compile(r"--out (\S+)|data import \S+ \S+ (\S+)|\b(OUT)\b")


def failures(lines: list[Line], folder: Path) -> list[str]:
    """What the lines that do not end as they should were, and what they printed."""
    wrong = []
    for line in lines:
        text = as_typed(line)
        for out in map("".join, WRITTEN.findall(text)):  # an earlier line of the block wrote it
            if (there := folder / out).exists() or there.is_symlink():
                there.rename(folder / f"{out}-{len(list(folder.iterdir()))}")
        code, shown = typed(text, folder)
        broken = "Traceback" in shown or "internal error" in shown
        if code != EXIT.get(line.text, 0) or broken:
            wrong.append(f"{text}: exit {code}\n{shown[-3000:]}")
    return wrong


@pytest.mark.parametrize("lines", blocks(slow=False), ids=name)
def test_lines_run_as_printed(lines: list[Line], folder: Path) -> None:
    assert failures(lines, folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("lines", blocks(slow=True), ids=name)
def test_long_lines_run_as_printed(lines: list[Line], folder: Path) -> None:
    assert failures(lines, folder) == []


def test_what_is_listed_is_printed_somewhere() -> None:
    printed = [line.text for line in LINES]
    for table in (NOT_RUN, FILLED, SHORTER, EXIT, SLOW):
        for text in table:
            begins = text.removesuffix("…") if table is NOT_RUN else text
            assert any(line.startswith(begins) for line in printed), text
