"""
The server: the page, and the calls that it makes.

It answers nobody but the page: a call needs the random token of the printed URL in a header, which no other
site can send without asking first, and is never allowed. The Host header must be known, so that a foreign
name that points here (DNS rebinding) is refused. Sizes, tokens and generations are bounded. No path comes
from a request.
"""

import codecs
import hmac
import json
import traceback
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from configurator import UserError, explain
from experiments.lab.report import plain
from explorer.edits import Edit

PAGE = Path(__file__).resolve().parent
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LARGEST = 2**17  # bytes of a request
GENERATIONS = 2  # at once
LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Text = Annotated[str, Field(max_length=20_000)]
Number = Annotated[int, Field(ge=0, le=10**6)]
Word = Annotated[int, Field(ge=0, le=10**9)] | Annotated[str, Field(min_length=1, max_length=100)]
Edits = Annotated[list[Edit], Field(max_length=8)]


class Ask(BaseModel):
    """A request: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Read(Ask):
    text: Text


class Place(Read):
    position: Number | None = None


class Lens(Place):
    signal: int | None = None


class Position(Place):
    layer: Number | None = None
    target: Word | None = None
    foil: Word | None = None
    dictionary: Literal["native", "rotated", "pca", "ica"] = "native"


class Signal(Ask):
    signal: int
    text: Text | None = None
    position: Number | None = None


class Token(Ask):
    word: Word


class Arithmetic(Ask):
    plus: Word
    minus: Word
    also: Word


class Edited(Place):
    target: Word | None = None
    foil: Word | None = None
    edits: Edits = []


class Price(Ask):
    edits: Edits


class Generate(Read):
    edits: Edits = []
    n: Annotated[int, Field(ge=1, le=200)] = 60
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.8
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Claims(Ask):
    run: Annotated[str, Field(max_length=200)] | None = None


ASKED = {
    "run": Ask,
    "read": Read,
    "lens": Lens,
    "position": Position,
    "signal": Signal,
    "strongest": Place,
    "token": Token,
    "arithmetic": Arithmetic,
    "edit": Edited,
    "price": Price,
    "claims": Claims,
}


def refusal(status, text):
    return JSONResponse({"error": text}, status)


class Guard:
    """Refuses what does not come from the page, and adds the headers of all answers."""

    def __init__(self, app, token, hosts):
        self.app = app
        self.token = token.encode()
        self.hosts = {host.encode() for host in hosts}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]  # one Response answers many requests
            await send(message)

        answer = self.fault(scope) or self.app
        await answer(scope, receive, with_headers)

    def fault(self, scope):
        """The refusal of a request, None if there is nothing wrong with it."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"")
        name, _, port = host.rpartition(b":")
        if (name if port.isdigit() else host) not in self.hosts:
            return refusal(403, "this host name is not allowed: see --allow_host")
        if not scope["path"].startswith("/api/"):
            return None
        if not hmac.compare_digest(headers.get(b"x-token", b""), self.token):
            return refusal(401, "the token is missing or old: open the URL that explore.py printed")
        if headers.get(b"content-type", b"").split(b";")[0] != b"application/json":
            return refusal(415, "a call is JSON")
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers or not length.isdigit():
            return refusal(411, "a call says its length")
        return refusal(413, f"a call has at most {LARGEST} bytes") if int(length) > LARGEST else None


def page_files():
    """{path of a URL: Response} of the page."""
    files = {f"/{path.name}": path for path in sorted(PAGE.iterdir()) if path.suffix in KINDS}
    files["/"] = files["/index.html"]
    return {url: Response(path.read_bytes(), media_type=KINDS[path.suffix]) for url, path in files.items()}


def make_app(explorer, token, hosts=LOCAL):
    """The ASGI application of an Explorer."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    running = set()  # generations

    for url, answer in page_files().items():
        app.add_route(url, lambda request, answer=answer: answer)

    def add(name, ask_type):
        def answer(ask: ask_type):
            return JSONResponse(plain(getattr(explorer, name)(**dict(ask))))

        app.post(f"/api/{name}")(answer)

    for name, ask_type in ASKED.items():
        add(name, ask_type)

    async def lines(ask):
        """The lines of a generation, JSON; it ends when the page goes away."""
        mark = object()
        running.add(mark)
        show = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(3)]
        tokens = explorer.continuations(**dict(ask))
        try:
            while (found := await run_in_threadpool(next, tokens, None)) is not None:
                way, token = found
                text = show[way].decode(explorer.model.tokenizer.token_bytes(token))
                yield json.dumps({"way": way, "text": text}) + "\n"
        except UserError as error:
            yield json.dumps({"error": str(error)}) + "\n"
        finally:
            running.discard(mark)
            tokens.close()

    @app.post("/api/generate")
    async def generate(ask: Generate):
        if len(running) >= GENERATIONS:
            return refusal(429, "two generations run already: stop one first")
        return StreamingResponse(lines(ask), media_type="application/x-ndjson")

    @app.exception_handler(UserError)
    def users_mistake(request, error):
        return refusal(422, str(error))

    @app.exception_handler(RequestValidationError)
    def not_a_call(request, error):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refusal(422, f"{where}: {first['msg']}")

    @app.exception_handler(Exception)
    def fault(request, error):
        traceback.print_exception(error)
        return refusal(500, explain(error) or "a fault of the program: its terminal says more")

    guard = Guard(app, token, hosts)
    guard.running = running
    return guard
