"""Command lines of the documentation, as they are printed. Not a test itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = "cli.md"  # usage lines that the commands' own help gives; test_cli_shape runs the help
PROGRAMS = "mmedrag python pip make docker curl sudo deepspeed torchrun accelerate"
STARTS = re.compile(rf"(?:{'|'.join(PROGRAMS.split())})(?= |$)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
PROMPT = r"^ *(\$ |ExecStart=/opt/mmedrag/bin/)?"
OPTIONAL = re.compile(r" \[([^]]+)\]")


@dataclass(frozen=True)
class Line:
    """A command line: its page below the repository, its block (lines of a block share files)."""

    page: str
    block: int
    text: str
    inline: bool  # in a sentence

    @property
    def names_a_command(self) -> bool:
        """A command's bare name, as a sentence mentions it."""
        return self.inline and re.fullmatch(r"mmedrag( [a-z]+){0,2}", self.text) is not None


def pages() -> list[Path]:
    recipes = ROOT / "src" / "mmedrag" / "recipes"
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "Dockerfile"]
    files += [*recipes.rglob("*.toml"), *recipes.rglob("*.yaml")]
    return sorted(file for file in files if file.name != GENERATED)


def documented() -> list[Line]:
    """Every command line of every page, in the page's order, usage notation spelled out."""
    found: dict[tuple[str, str], Line] = {}
    for page in pages():
        name = str(page.relative_to(ROOT))
        for number, (texts, inline) in enumerate(_blocks(page)):
            for one in (one for text in texts for one in spelled_out(text)):
                found.setdefault((name, one), Line(name, number, one, inline))
    return list(found.values())


def _blocks(page: Path) -> Iterator[tuple[list[str], bool]]:
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".md":
        comments = re.findall(r"^# +(.+)$", text, re.M)
        yield [_bare(line) for line in comments if STARTS.match(line)], False
        joined = text.replace("\\\n", " ")
        yield [" ".join(line.split()) for line in re.findall(r"^RUN .+", joined, re.M)], False
        started = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.+\])$", joined, re.M)
        yield (
            [" ".join(word for words in started for word in json.loads(words))][: len(started)],
            False,
        )
        return
    for language, block in FENCE.findall(text):
        if language in ("", "sh", "console"):
            lines = [re.sub(PROMPT, "", x) for x in block.replace("\\\n", " ").splitlines()]
            yield [_bare(line) for line in lines if STARTS.match(line)], False
    for inline in INLINE.findall(FENCE.sub("", text)):
        line = " ".join(inline.replace("\\|", "|").split())
        if STARTS.match(line):
            yield [line], True


def _bare(line: str) -> str:
    """Without its comment and the blanks before it."""
    return " ".join(re.sub(r"\s{2,}[#(].*$|\s+#.*$", "", line).split())


def spelled_out(line: str) -> list[str]:
    """``A... [--b] x|y`` is a line without and with each optional part, and for either word."""
    if line.startswith("RUN "):
        return [line]
    line = re.sub(r"(?<=\w)(\.\.\.|…)", "", line)
    parts = OPTIONAL.findall(line)
    plain = OPTIONAL.sub("", line)
    lines = [plain, *(f"{plain} {part}" for part in parts)]
    return [one for each in lines for one in _either(each)]


def _either(line: str) -> list[str]:
    words = line.split(" ")
    for at, word in enumerate(words):
        if "|" in word:
            return [
                one
                for choice in word.split("|")
                for one in _either(" ".join([*words[:at], choice, *words[at + 1 :]]))
            ]
    return [line]
