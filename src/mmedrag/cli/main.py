"""``mmedrag``: finds the noun, runs the command, turns every failure into one line.

Nouns are loaded lazily, from one file each. ``UserError`` and unreadable input end with
exit code 2 and one line on stderr, never with a traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Any

import click

# noun (a file of this folder) → its line in `mmedrag --help`
NOUNS = {
    "demo": "the main job on the embedded system, with an HTML report",
    "ablation": "the same on your own system and data",
    "sweep": "accuracy against how good the references are",
    "data": "make, import, check and count data folders",
    "train": "domain model, retriever, adapter (RAG-PT)",
    "launch": "a training on several processes",
    "domain": "identify domains",
    "retriever": "measure a retriever against chance",
    "index": "build, change and inspect the index of a domain",
    "retrieve": "references of every example, without answering",
    "ask": "one image, one question, one answer with its evidence",
    "run": "answer every example of a data folder; merge shards",
    "pairs": "preference pairs: build, import, export",
    "model": "convert LLaVA-Med layouts, merge adapters",
    "eval": "run folders to metrics with intervals and controls",
    "report": "run folders to one HTML file",
    "repro": "re-derive published and own numbers",
    "serve": "HTTP API and web page",
}
NO_WORDS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # click 8.2; 8.1 exits itself


class Lazy(click.Group):
    """A group that imports a noun's file only when that noun is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in NOUNS:
            return None
        return import_module(f"mmedrag.cli.{name}").noun

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(NOUNS.items()))


@click.group(cls=Lazy, context_settings={"help_option_names": ["--help"]})
@click.version_option(package_name=None, version=import_module("mmedrag").__version__)
def cli() -> None:
    """Retrieval-augmented generation for medical vision-language models.

    Research software, not a medical device. `mmedrag demo` shows the whole of it.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `mmedrag` script."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # no bars of libraries in logs and files
        os.environ.setdefault("TQDM_DISABLE", "1")
    code = 0
    try:
        try:
            with cli.make_context("mmedrag", sys.argv[1:] if argv is None else argv) as root:
                cli.invoke(root)
        except click.exceptions.Exit as done:
            code = done.exit_code
        sys.stdout.flush()
    except NO_WORDS as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _tell(f"error: {_one_line(error.format_message())}{hint}")
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on where this one stopped", err=True)
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        from mmedrag.records import UserError

        expected = isinstance(error, (UserError, OSError))
        logging.getLogger("mmedrag").debug("traceback", exc_info=True)
        kind = "" if expected else f"internal error: {type(error).__name__}: "
        hint = "" if expected else " (--verbose shows where)"
        _tell(f"error: {kind}{_one_line(str(error))}{hint}")
        code = 2
    sys.exit(code)


def _tell(line: str) -> None:
    from mmedrag.runtime import launch

    if not launch.report(line):
        click.echo(line, err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
