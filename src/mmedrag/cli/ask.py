"""``mmedrag ask``: one image, one question, one answer with its evidence."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, Call, command, with_system


@command("ask")
@click.argument("image", type=FILE)
@click.argument("question", required=False)
@click.option("--report", is_flag=True, help="Write the report instead of answering a question.")
@click.option("--view", "views", type=FILE, multiple=True, help="Further views of the study.")
@with_system
@click.option("--patient", help="References of this patient are left out.")
@click.option("--no-rag", is_flag=True, help="Answer without references.")
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    help="Abstain below; default: the threshold fitted for the model.",
)
def noun(
    call: Call,
    image: Path,
    question: str | None,
    report: bool,
    views: tuple[Path, ...],
    patient: str | None,
    no_rag: bool,
    min_confidence: float | None,
) -> None:
    """Answer QUESTION about IMAGE, with the references, why each was kept, and the confidence.

    No answer is given when the image's domain is unknown or the confidence is too low.
    """
    from mmedrag.pipeline import ask, build_pipeline
    from mmedrag.records import UserError

    if report == bool(question):
        raise UserError("expected either a QUESTION or --report")
    reply = ask(
        [image, *views],
        question,
        build_pipeline(
            call.system(not no_rag, interactive=True), references=not no_rag, seed=call.seed
        ),
        patient=patient,
        references="none" if no_rag else "selected",
        min_confidence=min_confidence,
    )
    call.finish(reply.to_dict(), str(reply))
