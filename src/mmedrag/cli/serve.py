"""``mmedrag serve``: HTTP API and web page over the same system as every other command."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, Call, DefaultGroup, command, with_system
from mmedrag.cli.options import options_of
from mmedrag.serve import ServeSettings


class Serve(DefaultGroup):
    """`mmedrag serve` alone starts the service."""

    default = "start"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or [self.default])


@click.group("serve", cls=Serve)
def noun() -> None:
    """HTTP API and web page: `mmedrag serve`; make API keys; check an audit log."""


@command("start", table="serve", settings=ServeSettings, group=noun)
@options_of(ServeSettings, "host", "port", "hosts", "audit")
@with_system
def start(call: Call) -> None:
    """Serve until interrupted; what runs is finished first.

    API keys: the file that MMEDRAG_API_KEYS names. Limits: --set serve.timeout=60, ...
    """
    needs("fastapi", "uvicorn", "python_multipart", "prometheus_client")
    from dataclasses import replace

    from mmedrag.pipeline import system
    from mmedrag.serve import (
        Audit,
        create_app,
        describe,
        load_keys,
        may_bind,
        may_listen,
        serve,
        weights,
    )

    settings = call.settings(ServeSettings)
    keys = load_keys()
    may_bind(settings.host, keys)  # before anything is loaded
    may_listen(settings)
    if settings.audit:
        Audit(settings.audit).close()
    parts = call.system(interactive=True)
    pipeline = system.build_pipeline(parts, seed=call.seed)
    if settings.min_confidence is None:
        settings = replace(settings, min_confidence=pipeline.min_confidence)
    versions = describe(pipeline, weights(parts))
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    click.echo(f"mmedrag serves on http://{shown}:{settings.port}", err=True)
    serve(create_app(pipeline, settings, keys, versions), settings, keys)


@command("key", table="serve", group=noun)
@click.argument("name")
@click.option("--file", type=FILE, envvar="MMEDRAG_API_KEYS", required=True, help="Key file.")
@click.option(
    "--scope",
    type=click.Choice(["read", "ask"]),
    multiple=True,
    default=["read", "ask"],
    show_default=True,
    help="Repeatable.",
)
def key(call: Call, name: str, file: Path, scope: tuple[str, ...]) -> None:
    """Make an API key and add its hash to the key file; the key itself is shown once."""
    needs("fastapi")
    from mmedrag.serve import new_key

    made = new_key(file, name, scope)
    call.finish({"name": name, "scopes": sorted(set(scope)), "key": made}, made)


@command("audit", table="serve", group=noun)
@click.argument("log", type=FILE)
def audit_(call: Call, log: Path) -> None:
    """Check that no line of an audit log was changed or taken out."""
    from mmedrag.serve import verify

    call.finish({"records": verify(log), "sound": True})


def needs(*modules: str) -> None:
    """Say which extra to install when one of its packages is missing."""
    from importlib.util import find_spec

    from mmedrag.records import UserError

    for module in modules:
        if find_spec(module) is None:
            raise UserError(
                f"mmedrag serve needs the package {module!r}; "
                "install it with: pip install 'mmedrag[serve]'"
            )
