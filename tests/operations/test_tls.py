"""TLS to the database."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from sql.database import Unavailable, connect, read_url
from tests.support.fixtures import StartService
from tests.support.postgres import Postgres, held_port
from tests.support.settings import (
    SPECIAL,
    assert_nothing_leaked,
    assert_waits,
    assert_works,
    client_addresses,
    secured_url,
    write_certificate,
)

# --- TLS -------------------------------------------------------------------------------------------------------------


class TlsProxy:
    """A port that speaks TLS for a PostgreSQL that cannot, with a self-signed certificate for localhost.

    `used` says of each connection so far whether the client asked for TLS.
    """

    SSL_REQUEST = struct.pack("!ii", 8, 80877103)

    def __init__(self, postgres: Postgres, folder: Path) -> None:
        self.certificate = folder / "server.crt"
        write_certificate(self.certificate, folder / "server.key")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.certificate, folder / "server.key")
        self.upstream_port = postgres.port
        self.used: set[bool] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.upstream_port)) as upstream:
            asks_for_tls = client.recv(8, socket.MSG_PEEK) == self.SSL_REQUEST
            self.used.add(asks_for_tls)
            if asks_for_tls:
                client.recv(8)
                client.sendall(b"S")
                client = self.context.wrap_socket(client, server_side=True)
            threading.Thread(target=forward, args=[upstream, client], daemon=True).start()
            forward(client, upstream)


def forward(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError), source, target:
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it


@pytest.fixture
def tls(postgres: Postgres, tmp_path: Path) -> Iterator[TlsProxy]:
    proxy = TlsProxy(postgres, tmp_path)
    with proxy.listener:
        yield proxy


@pytest.mark.parametrize(
    ("query", "encrypted"),
    [
        ("", True),
        ("?sslmode=disable", False),
        ("?sslmode=require&channel_binding=require", True),
        ("?sslmode=verify-ca&sslrootcert={certificate}", True),
        ("?sslmode=verify-full&sslrootcert={certificate}", True),
    ],
)
def test_sslmode_decides_on_tls(
    query: str, encrypted: bool, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    service = start_service(tls_url(tls, database, query.format(certificate=quote(str(tls.certificate)))))
    assert_works(service)
    assert tls.used == {encrypted}


@pytest.mark.parametrize("query", ["?sslmode=verify-full", "?sslmode=verify-ca&sslrootcert=system"])
def test_a_server_is_verified_by_what_the_system_trusts(
    query: str, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    assert_works(start_service(tls_url(tls, database, query), SSL_CERT_FILE=str(tls.certificate)))
    assert tls.used == {True}
    assert_waits(start_service(tls_url(tls, database, query), wait=False), "certificate verify failed")


@pytest.mark.parametrize("query", ["sslmode=require", "sslmode=verify-full&sslrootcert={certificate}"])
def test_a_server_without_tls_is_not_talked_to_where_tls_is_demanded(
    query: str, postgres: Postgres, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    url = f"{secured_url(postgres, database)}?{query.format(certificate=quote(str(tls.certificate)))}"
    assert_waits(start_service(url, wait=False), "rejected SSL upgrade")
    assert client_addresses(postgres, database) == set()


UNVERIFIABLE = {
    "another certificate": "localhost",
    "another name": "127.0.0.1",
}


@pytest.mark.parametrize("trouble", UNVERIFIABLE)
def test_a_server_that_cannot_be_verified_is_not_talked_to(
    trouble: str, postgres: Postgres, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    service = start_service(unverifiable_url(trouble, tls, database), wait=False)
    assert_waits(service, "certificate verify failed")
    assert client_addresses(postgres, database) == set()
    assert_nothing_leaked(service.log)


def unverifiable_url(trouble: str, tls: TlsProxy, database: str) -> str:
    certificate = tls.certificate
    if trouble == "another certificate":
        certificate = certificate.with_name("other.crt")
        write_certificate(certificate, certificate.with_name("other.key"))
    query = f"?sslmode=verify-full&sslrootcert={quote(str(certificate))}"
    return tls_url(tls, database, query).replace("localhost", UNVERIFIABLE[trouble])


def tls_url(tls: TlsProxy, database: str, query: str) -> str:
    return f"postgresql://{database}:{quote(SPECIAL, safe='')}@localhost:{tls.port}/{database}{query}"


def test_the_certificates_of_the_authorities_are_read_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 20 ms of the event loop, and in an outage each request tries to connect. They may be renewed."""
    hosts = f"127.0.0.1:{held_port()},127.0.0.1:{held_port()}"
    dsn = read_url(f"postgresql://user@{hosts}/tasks?sslmode=verify-full")["dsn"]
    read: list[object] = []
    load = ssl.SSLContext.load_verify_locations

    def count(context: ssl.SSLContext, **options: str) -> None:
        if not str(options["cafile"]).endswith(".crl"):  # asyncpg looks for a list of revoked ones too
            read.append(options["cafile"])
        load(context, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", count)
    for _ in range(3):
        with pytest.raises(Unavailable):
            asyncio.run(connect(dsn))
    assert len(read) <= 2  # a minute may end in between
    monkeypatch.setattr("sql.database.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 120))
    before = len(read)
    with pytest.raises(Unavailable):
        asyncio.run(connect(dsn))
    assert len(read) == before + 1
