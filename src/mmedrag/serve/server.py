"""Binding and running the application, and stopping it without losing what runs."""

from __future__ import annotations

import logging
import signal
import socket
from typing import Any

from mmedrag.records import UserError
from mmedrag.serve.security import Keys, may_bind
from mmedrag.serve.settings import ServeSettings

log = logging.getLogger(__name__)


def config(app: Any, settings: ServeSettings) -> Any:
    """The uvicorn configuration: no banner, no access log (it would hold addresses and paths),
    a bound on connections, and time to finish when asked to stop."""
    import uvicorn

    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        limit_concurrency=4 * settings.max_waiting + 64,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        lifespan="on",
    )


def may_listen(settings: ServeSettings) -> None:
    """Refuse an address that is taken or is not this machine's, before a model is loaded.

    Raises:
        UserError: with the system's reason.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        raise UserError(f"{where}: cannot listen there: {error.strerror or error}") from None


def serve(app: Any, settings: ServeSettings, keys: Keys) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs and return.

    Raises:
        UserError: another host than loopback without API keys.
    """
    import uvicorn

    may_bind(settings.host, keys)
    # uvicorn repeats the signal once it has stopped; being asked to stop is no failure
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config(app, settings)).run()
