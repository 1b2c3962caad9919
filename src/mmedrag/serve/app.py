"""The HTTP application: ``create_app(pipeline, settings) -> FastAPI``.

Place in the picture: Example → Pipeline → Trace, for whoever asks over HTTP. A route checks the
caller (:mod:`security`), reads the body (:mod:`uploads`), queues the request (:mod:`engine`) and
returns its evidence. Every refusal is one JSON shape with a reason.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mmedrag import __version__
from mmedrag.pipeline import NOTICE, Pipeline, guess_answer_type
from mmedrag.serve import openai, page, uploads
from mmedrag.serve.audit import Audit
from mmedrag.serve.decoder import Decoders
from mmedrag.serve.engine import COMPARE, NOISE, Action, Asked, Engine, data_url, forget
from mmedrag.serve.errors import Refused
from mmedrag.serve.metrics import Metrics
from mmedrag.serve.security import Keys, Rate, SecurityHeaders, same_site
from mmedrag.serve.settings import LOOPBACK, ServeSettings

log = logging.getLogger(__name__)
REFERENCES = ("selected", "none", "all")
NOISES = ("", "gaussian_clip", "additive", "blank", "shuffle_patches")
SHARED = ("references", "noise", "compare", "patient", "preview")
Answer = Callable[[Request], Awaitable[Response]]


def create_app(
    pipeline: Pipeline,
    settings: ServeSettings | None = None,
    keys: Keys | None = None,
    versions: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The service over ``pipeline``. Its parts start and stop with the application.

    Args:
        keys: who may call; none: everybody who reaches it (loopback only, see ``server``).
        versions: names of the parts, for answers and audit log; default: read off the pipeline.
    """
    settings, keys = settings or ServeSettings(), keys or Keys()
    forget(pipeline)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line per odd byte otherwise

    @asynccontextmanager
    async def parts(app: FastAPI) -> AsyncIterator[None]:
        audit = Audit(settings.audit) if settings.audit else None
        app.state.engine = Engine(pipeline, settings, audit, versions)
        app.state.decoders = Decoders(
            settings.decoders, settings.decode_timeout, settings.decoder_memory
        )
        try:
            yield
        finally:
            clean = await asyncio.to_thread(app.state.engine.stop)
            if not clean:
                log.warning("stopped before every request was answered")
            app.state.decoders.close()
            if audit:
                audit.close()

    app = FastAPI(
        title="mmedrag",
        version=__version__,
        description=NOTICE,
        lifespan=parts,
        docs_url=None,
        redoc_url=None,  # their pages load scripts from elsewhere
    )
    service = Service(app, pipeline, settings, keys)
    service.routes()
    page.routes(app, pipeline, settings, keys)
    app.add_middleware(SecurityHeaders)
    return app


class Service:
    """The routes of one application."""

    def __init__(
        self, app: FastAPI, pipeline: Pipeline, settings: ServeSettings, keys: Keys
    ) -> None:
        self.app, self.settings, self.keys = app, settings, keys
        self.model = pipeline.generator.name if pipeline.generator else "none"
        self.metrics = Metrics()
        self.rate = Rate(settings.rate, settings.burst)
        self.guesses = Rate(10, 10)  # wrong keys a minute, per address
        self.inside = 0  # requests between header and answer
        self.hosts = tuple(h.lower() for h in (*LOOPBACK, settings.host, *settings.hosts))

    @property
    def engine(self) -> Engine:
        return self.app.state.engine  # type: ignore[no-any-return]

    def routes(self) -> None:
        app = self.app
        app.middleware("http")(self._outside)
        app.exception_handler(HTTPException)(self._http_error)

        def post(path: str, answer: Answer, fields: tuple[str, ...], files: bool = True) -> None:
            app.post(path, response_class=JSONResponse, openapi_extra=_schema(fields, files))(
                answer
            )

        post("/v1/ask", self.ask, ("question", "answer_type", *SHARED))
        post("/v1/report", self.report, SHARED)
        post("/v1/retrieve", self.retrieve, ("patient",))
        post("/v1/preview", self.preview, ())
        post("/v1/chat/completions", self.chat, ("messages", "model", "mmedrag"), files=False)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model_by_name)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        app.get("/metrics", response_class=PlainTextResponse)(self.prometheus)

    # --- routes ---------------------------------------------------------------------------------

    async def ask(self, request: Request) -> Response:
        """Answer a question about an image."""
        who = self._admit(request, "ask")
        body = await uploads.read_body(request, self.settings)
        uploads.only(body.fields, ("question", "answer_type", *SHARED))
        asked = await self._asked("ask", body.images, body.fields, who)
        return JSONResponse(await self._answer(asked))

    async def report(self, request: Request) -> Response:
        """Write a report of an image."""
        who = self._admit(request, "ask")
        body = await uploads.read_body(request, self.settings)
        uploads.only(body.fields, SHARED)
        return JSONResponse(
            await self._answer(await self._asked("report", body.images, body.fields, who))
        )

    async def retrieve(self, request: Request) -> Response:
        """The domain and the references of an image, without answering."""
        who = self._admit(request, "read")
        body = await uploads.read_body(request, self.settings)
        uploads.only(body.fields, ("patient",))
        asked = await self._asked("retrieve", body.images, body.fields, who)
        found = await self._answer(asked)
        keep = (
            "id",
            "image",
            "domain",
            "references",
            "excluded",
            "selection",
            "notices",
            "versions",
            "batch",
        )
        return JSONResponse({name: found[name] for name in keep})

    async def preview(self, request: Request) -> Response:
        """The picture as it will be used, as a PNG: for what a browser cannot show (DICOM)."""
        self._admit(request, "read")
        body = await uploads.read_body(request, self.settings)
        uploads.only(body.fields, ())
        views = await uploads.decode(
            self.app.state.decoders, body.images, self.settings, preview=True
        )
        return JSONResponse(
            {
                "views": [
                    {
                        "sha256": v.sha256,
                        "width": v.width,
                        "height": v.height,
                        "kind": v.kind,
                        "png": data_url(v.preview or b""),
                    }
                    for v in views
                ]
            }
        )

    async def chat(self, request: Request) -> Response:
        """OpenAI-compatible: one question with image parts; evidence in the field `mmedrag`."""
        who = self._admit(request, "ask")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "content_type", "content-type: expected application/json")
        data = await uploads.read_bytes(request, self.settings)
        chat = openai.read(uploads.parse_json(data), self.model)
        task = uploads.choice(chat.extra, "task", ("vqa", "report"))
        fields = {**chat.extra, "question": chat.question} if task == "vqa" else dict(chat.extra)
        fields.pop("task", None)
        known = ("question", "answer_type", "references", "noise", "patient")
        uploads.only(fields, known)
        asked = await self._asked("chat", chat.images, fields, who, task)
        body, created = await self._answer(asked), int(time.time())
        if chat.stream:
            made = openai.chunks(body, chat, self.model, created)
            return StreamingResponse(made, media_type="text/event-stream")
        return JSONResponse(openai.completion(body, chat, self.model, created))

    async def models(self, request: Request) -> Response:
        """The one model behind this service."""
        self._admit(request, "read")
        return JSONResponse(openai.models(self.model))

    async def model_by_name(self, request: Request, name: str) -> Response:
        """That model, if it is the one behind this service."""
        self._admit(request, "read")
        openai.check_model(name, self.model)
        return JSONResponse(openai.models(self.model)["data"][0])

    async def healthz(self) -> Response:
        """Whether the process works at all."""
        alive = self.engine.batcher.alive or self.engine.batcher.stopping
        return JSONResponse({"ok": alive}, 200 if alive else 500)

    async def readyz(self) -> Response:
        """Whether requests can be answered now, and if not, why."""
        problems = self.engine.problems()
        return JSONResponse({"ready": not problems, "problems": problems}, 503 if problems else 200)

    async def prometheus(self, request: Request) -> Response:
        """Counters in the Prometheus text format."""
        self._admit(request, "read")
        engine = self.engine
        values = {
            "mmedrag_queue_depth": engine.batcher.depth,
            "mmedrag_batches_total": engine.batches,
            "mmedrag_answers_total": engine.answered,
            "mmedrag_failures_total": engine.failed,
            "mmedrag_decoders_replaced_total": self.app.state.decoders.replaced,
            "mmedrag_ready": float(not engine.problems()),
        }
        return PlainTextResponse(self.metrics.text(values), media_type="text/plain; version=0.0.4")

    # --- steps ----------------------------------------------------------------------------------

    def _admit(self, request: Request, scope: str) -> str:
        """The caller's name. Everything that can be refused before the body is read."""
        address = request.client.host if request.client else "-"
        try:
            who = self.keys.check(request.headers.get("authorization"), scope)
        except Refused as refused:
            if refused.status == 401 and request.headers.get("authorization"):
                self.guesses.take(address)
            raise
        self.rate.take(who if self.keys else address)
        return who

    async def _asked(
        self,
        action: Action,
        images: tuple[uploads.Upload, ...],
        fields: Mapping[str, Any],
        who: str,
        task: str = "vqa",
    ) -> Asked:
        """Check the fields, then decode the images."""
        limit, question, kind = self.settings.max_text, None, None
        if action == "ask" or (action == "chat" and task == "vqa"):
            question = uploads.text(fields, "question", limit, required=True)
            kind = uploads.choice(fields, "answer_type", ("auto", "closed", "open"))
            kind = guess_answer_type(question or "") if kind == "auto" else kind
        if action != "retrieve" and self.engine.pipeline.generator is None:
            raise Refused(503, "no_model", "this service has no model, only references")
        if uploads.flag(fields, "compare"):
            plans = tuple(COMPARE.items())
        else:
            used = uploads.choice(fields, "references", REFERENCES)
            noise = uploads.choice(fields, "noise", NOISES) or None
            plans = (("asked", (used, noise)),)
        patient = uploads.text(fields, "patient", 200)
        preview = uploads.flag(fields, "preview")
        views = await uploads.decode(self.app.state.decoders, images, self.settings)
        return Asked(action, views, plans, question, kind, patient, preview, who)  # type: ignore[arg-type]

    async def _answer(self, asked: Asked) -> dict[str, Any]:
        future = await asyncio.to_thread(self.engine.submit, asked)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.settings.timeout)
        except TimeoutError:
            seconds = self.settings.timeout
            raise Refused(504, "timeout", f"no answer within {seconds:g} s") from None

    async def _outside(self, request: Request, call_next: Any) -> Response:
        """Around every route: hosts, room, time and count; every failure in one shape."""
        start, status = time.perf_counter(), 500
        self.inside += 1
        try:
            try:
                same_site(dict(request.headers), self.hosts)
                if request.method == "POST" and self.inside > self.settings.max_waiting:
                    wait = self.engine.batcher.retry_after()
                    raise Refused(429, "busy", "too many requests are waiting", wait)
                response = await call_next(request)
            except Refused as refused:
                response = refusal(refused)
            except Exception as error:
                log.error("%s failed", request.url.path, exc_info=error)
                response = refusal(Refused(500, "internal", f"internal ({type(error).__name__})"))
            status = response.status_code
            return response
        finally:
            self.inside -= 1
            route = getattr(request.scope.get("route"), "path", "other")
            self.metrics.saw(route, status, time.perf_counter() - start)

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        """No such route, wrong method: in the shape of every other refusal."""
        made = refusal(Refused(error.status_code, "http", str(error.detail)))
        for name, value in (error.headers or {}).items():
            made.headers[name] = value
        return made


def refusal(refused: Refused) -> JSONResponse:
    headers = refused.headers
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refused.body(), refused.status, headers)


def _schema(fields: tuple[str, ...], files: bool) -> dict[str, Any]:
    """The request body in the OpenAPI document (bodies are read by hand, within limits)."""
    values = {
        "compare": {"type": "boolean", "description": "four conditions side by side"},
        "preview": {"type": "boolean", "description": "also return what the model saw, as PNG"},
        "references": {"enum": list(REFERENCES)},
        "noise": {"enum": list(NOISES), "description": f"the comparison uses {NOISE}"},
        "answer_type": {"enum": ["auto", "closed", "open"]},
        "messages": {"type": "array", "items": {"type": "object"}},
        "mmedrag": {"type": "object"},
    }
    properties: dict[str, Any] = {name: values.get(name, {"type": "string"}) for name in fields}
    if not files:
        schema = {"type": "object", "properties": properties, "required": ["messages"]}
        return {"requestBody": {"content": {"application/json": {"schema": schema}}}}
    binary = {"type": "array", "items": {"type": "string", "format": "binary"}}
    encoded = {"type": "array", "items": {"type": "string", "description": "data: URL"}}
    content = {
        kind: {
            "schema": {
                "type": "object",
                "properties": {"image": image, **properties},
                "required": ["image"],
                "additionalProperties": False,
            }
        }
        for kind, image in (("multipart/form-data", binary), ("application/json", encoded))
    }
    return {"requestBody": {"content": content, "required": True}}
