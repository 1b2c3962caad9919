"""The web page: plain HTML, style sheet and script of this package, over the same API.

Place in the picture: beside the API, never around it. Nothing is loaded from elsewhere and no
text of an answer is ever put into the page as markup. Example pictures are drawn from the
benchmark when first asked for.
"""

from __future__ import annotations

import asyncio
import io
from functools import lru_cache
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from mmedrag.pipeline import NOTICE, Pipeline, notices
from mmedrag.serve.errors import Refused
from mmedrag.serve.security import Keys
from mmedrag.serve.settings import ServeSettings

FILES = {"page.css": "text/css", "page.js": "text/javascript", "batch.js": "text/javascript"}
DOMAINS = ("radiology", "ophthalmology", "pathology")
EACH, SEED = 2, 31  # example pictures of each domain; no training or index used this seed


def routes(app: FastAPI, pipeline: Pipeline, settings: ServeSettings, keys: Keys) -> None:
    """Add the page, its files and the examples. None of them shows anything of a user's."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(_static("index.html"), media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in FILES:
            raise Refused(404, "http", "Not Found")
        return Response(_static(name), media_type=FILES[name])

    @app.get("/page-settings", include_in_schema=False)
    async def page_settings() -> Response:
        return JSONResponse(
            {
                "notices": [NOTICE, *notices(pipeline)],
                "needs_key": bool(keys),
                "max_bytes": settings.max_bytes,
                "max_text": settings.max_text,
                "model": pipeline.generator.name if pipeline.generator else None,
                "domains": sorted(pipeline.retrievers),
            }
        )

    @app.get("/examples", include_in_schema=False)
    async def examples() -> Response:
        made = await asyncio.to_thread(drawn) if settings.examples else ()
        return JSONResponse({"examples": [about for about, _ in made]})

    @app.get("/examples/{number}.png", include_in_schema=False)
    async def example(number: int) -> Response:
        made = await asyncio.to_thread(drawn) if settings.examples else ()
        if not 0 <= number < len(made):
            raise Refused(404, "http", "Not Found")
        return Response(made[number][1], media_type="image/png")


@lru_cache(maxsize=1)
def drawn() -> tuple[tuple[dict[str, Any], bytes], ...]:
    """(description with a question and its true answer, PNG) of the example pictures."""
    from PIL import Image

    from mmedrag.phantom import Canvas, Knobs, load_domain, picture, questions_of, studies

    knobs = Knobs()
    made: list[tuple[dict[str, Any], bytes]] = []
    canvas = Canvas(knobs.size)
    for name in DOMAINS:
        domain = load_domain(name)
        for study in list(studies(domain, 3 * EACH, SEED, knobs))[::3][:EACH]:
            asked = next(q for q in questions_of(domain, study, knobs, None) if q.closed)
            out = io.BytesIO()
            Image.fromarray(picture(domain, study, canvas, knobs)).save(out, "PNG")
            about = {
                "url": f"/examples/{len(made)}.png",
                "name": f"{name} {study.id.rpartition('-p')[2]}",
                "domain": name,
                "question": asked.text,
                "truth": asked.answer,
            }
            made.append((about, out.getvalue()))
    return tuple(made)


@lru_cache(maxsize=8)
def _static(name: str) -> bytes:
    return (files("mmedrag.serve") / "static" / name).read_bytes()
