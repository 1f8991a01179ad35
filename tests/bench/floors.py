"""What is under every service in Python on uvicorn: an answer of nothing, and an answer of one query."""

from __future__ import annotations

import os
from typing import Any

import asyncpg
import orjson
from starlette.types import Receive, Scope, Send

import sql

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}

pool: asyncpg.Pool


async def answer(send: Send, body: bytes) -> None:
    headers = [*START["headers"], (b"content-length", str(len(body)).encode())]  # type: ignore[misc]
    await send(START | {"headers": headers})
    await send({"type": "http.response.body", "body": body})


async def keep(connection: object) -> None:
    """Leave a connection as it is."""


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once."""
    if scope["type"] == "http":
        await answer(send, b"{}")


async def one_query(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what one statement brings, by a pool that does not reset its connections: no routing, no token, no log."""
    global pool
    if scope["type"] == "lifespan":
        size: Any = int(os.environ["POOL"])
        await receive()
        pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=size, max_size=size, reset=keep)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await pool.close()
        await send({"type": "lifespan.shutdown.complete"})
    elif not scope["path"][-1].isdigit():
        await answer(send, b"{}")
    else:
        task = await pool.fetchrow(sql.GET_TASK, "user-7", 0, int(scope["path"].rpartition("/")[2]))
        await answer(send, orjson.dumps(dict(task or {})))
