"""Binding and running the application, and stopping it without losing what runs."""

from __future__ import annotations

import logging
from typing import Any

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


def serve(app: Any, settings: ServeSettings, keys: Keys) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs.

    Raises:
        UserError: another host than loopback without API keys.
    """
    import uvicorn

    may_bind(settings.host, keys)
    uvicorn.Server(config(app, settings)).run()
