"""Databases that demand something."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import psycopg.sql
import pytest

from tests.support.postgres import Postgres
from tests.support.settings import HBA, SPECIAL


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    """A folder for the sockets of PostgreSQL, with a name that needs escaping in a URL."""
    folder = Path(tempfile.mkdtemp(prefix="tasks+test "))
    folder.chmod(0o777)  # PostgreSQL may run as another user
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres(sockets: Path) -> Iterator[Postgres]:
    """A server that demands a password of everybody but `postgres`.

    Its log has every statement, after the name of the database.
    """
    server = Postgres(
        listen_addresses="127.0.0.1,::1",
        unix_socket_directories=f'"{sockets}"',
        log_statement="all",
        log_line_prefix="%d: ",
    )
    try:
        (server.folder / "data" / "pg_hba.conf").write_text(HBA)
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute("SELECT pg_reload_conf()")
        yield server
    finally:
        server.remove()


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The name of an empty database on that server, which a role of the same name owns."""
    name = f"tasks_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
            psycopg.sql.Identifier(name), psycopg.sql.Literal(SPECIAL)
        ))  # fmt: skip
        admin.execute(f"CREATE DATABASE {name} OWNER {name}")
    return name
