"""``mmedrag launch``: a training on several processes of this machine."""

from __future__ import annotations

import click

from mmedrag.runtime import launch


@click.command("launch")
@click.option("--processes", type=click.IntRange(1), required=True, help="One a GPU, or on CPUs.")
@click.option(
    "--strategy",
    type=click.Choice(launch.STRATEGIES),
    default="ddp",
    show_default=True,
    help="ddp: every process holds the whole model; fsdp, zero2, zero3 shard it (recipes/"
    "accelerate).",
)
@click.option("--cpu", is_flag=True, help="On CPUs (gloo) also where there are GPUs.")
@click.option("--json", "json_", is_flag=True, help="One JSON result on stdout.")
@click.argument("command", nargs=-1, required=True)
def noun(processes: int, strategy: str, cpu: bool, json_: bool, command: tuple[str, ...]) -> None:
    """Run `train …` on N processes: `mmedrag launch --processes 2 -- train dpo PAIRS …`.

    Without a GPU the processes meet on CPUs. What fails is said once, with the exit code of the
    process that failed first.
    """
    if command[0] != "train":
        raise click.UsageError(
            f"launch runs train commands, got {command[0]!r}; other work is divided by --shard i/n"
        )
    words = [*command, *(["--json"] if json_ and "--json" not in command else [])]
    raise SystemExit(launch.launch(words, processes, strategy, cpu))
