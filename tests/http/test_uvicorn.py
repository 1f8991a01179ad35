"""What the protocol takes from uvicorn is still there, and it keeps nothing of what is gone."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import re
import socket
import struct
import weakref
from typing import cast

import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service import HEAD_LINES, HttpProtocol
from tests.support.service_process import ROOT
from tests.support.waiting import wait_in_loop_until

# --- uvicorn ---------------------------------------------------------------------------------------------------------

OVERRIDDEN = {
    "connection_made", "connection_lost", "data_received", "on_message_begin", "on_header", "on_headers_complete",
    "on_body", "on_message_complete",
}  # fmt: skip
USED = {
    "self": {"parser", "loop", "transport", "cycle", "headers", "url", "_unset_keepalive_if_required"},
    "cycle": {"keep_alive", "response_complete", "response_started", "scope", "more_body", "message_event"},
}  # fmt: skip
"""What HttpProtocol takes from uvicorn."""


def test_uvicorn_still_has_all_that_the_protocol_takes_from_it() -> None:
    async def app(scope: object, receive: object, send: object) -> None: ...

    config = Config(app, log_config=None, http=HttpToolsProtocol)
    protocol = HttpToolsProtocol(config, ServerState(), {}, _loop=object())  # type: ignore[arg-type]  # it only keeps it
    protocol.scope = {}  # type: ignore[typeddict-item]  # as every one that a head sets
    missing = {name for name in OVERRIDDEN if name not in vars(HttpToolsProtocol)}
    set_later = set(re.findall(r"self\.(\w+)(?:: .+)? = ", inspect.getsource(HttpToolsProtocol.on_message_begin)))
    missing |= USED["self"] - vars(protocol).keys() - set_later - vars(HttpToolsProtocol).keys()
    missing |= USED["cycle"] - set(re.findall(r"self\.(\w+)", inspect.getsource(RequestResponseCycle.__init__)))
    assert missing == set()
    assert {400, 408, 431} <= STATUS_LINE.keys()
    # uvicorn takes the protocol for its transport, and the protocol waits for uvicorn to call all that it overrides.
    assert set(re.findall(r"self\.transport\.(\w+)", inspect.getsource(RequestResponseCycle))) == {
        "write", "close", "is_closing",
    }  # fmt: skip
    for method in ("shutdown", "connection_lost"):
        used = re.findall(r"self\.transport\.(\w+)", inspect.getsource(getattr(HttpToolsProtocol, method)))
        assert used == ["close"], method
    heads = inspect.getsource(HttpToolsProtocol.on_headers_complete)
    assert "transport=self.transport" in heads
    assert "self._start_asgi_task(self.cycle, app)" in heads


def test_the_protocol_takes_no_more_from_uvicorn_than_that() -> None:
    tree = ast.parse((ROOT / "service.py").read_text())
    (protocol,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "HttpProtocol")
    methods = {node.name for node in protocol.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert methods & vars(HttpToolsProtocol).keys() <= OVERRIDDEN
    taken: dict[str, set[str]] = {name: set() for name in USED}
    own = set(methods)
    for node in ast.walk(protocol):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        if name in taken:
            taken[name].add(node.attr)
        if name == "self" and isinstance(node.ctx, ast.Store) and node.attr not in USED["self"]:
            own.add(node.attr)
    taken["self"] -= own
    assert all(taken[name] <= USED[name] for name in USED), taken


@pytest.mark.parametrize("moment", ["in the middle of a head", "by a reset after its answer"])
def test_a_connection_that_is_lost_is_forgotten_at_once(moment: str) -> None:
    """Kept by a timer, each would hold the head that it has sent, for 15 or 95 seconds."""

    async def app(scope: object, receive: object, send: Send) -> None:
        await JSONResponse({})(cast(Scope, scope), cast(Receive, receive), send)

    async def check() -> None:
        config, state = Config(app, log_config=None, http=HttpProtocol), ServerState()
        config.load()
        server = await asyncio.get_running_loop().create_server(lambda: HttpProtocol(config, state, {}), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            await wait_in_loop_until(lambda: bool(state.connections))
            protocol = weakref.ref(next(iter(state.connections)))
            await wait_in_loop_until(lambda: cast(HttpProtocol, protocol()).arriving)
            if "answer" in moment:
                writer.write(b"\r\n")
                await reader.readuntil(b"\r\n\r\n{}")
                never = struct.pack("ii", 1, 0)  # what waits to be sent is not waited for
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, never)
            writer.close()
            await wait_in_loop_until(lambda: not state.connections)
            gc.collect()
            assert protocol() is None

    asyncio.run(check())


@pytest.mark.parametrize("start", ["GET / HTTP/1.1\r\n", "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"])
def test_of_thousands_of_lines_in_one_packet_only_the_first_are_kept(start: str) -> None:
    """The others would take 25 times the size in which they came."""

    async def app(scope: object, receive: object, send: object) -> None: ...

    async def check() -> None:
        config, protocols = Config(app, log_config=None, http=HttpProtocol), []
        config.load()

        def new_protocol() -> HttpProtocol:
            protocols.append(HttpProtocol(config, ServerState(), {}))
            return protocols[-1]

        async with await asyncio.get_running_loop().create_server(new_protocol, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(start.encode() + b"a:\r\n" * 15_000)
            await reader.read()
            writer.close()
        [protocol] = protocols
        assert len(protocol.headers) == HEAD_LINES + 1

    asyncio.run(check())
