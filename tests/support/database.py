"""What somebody else does in the database of a service: statements, locks, and sessions that end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg

from tests.support.waiting import wait_until

UNAVAILABLE = {"detail": "The database is not available right now, try again soon"}
"""What the service answers without it."""
PASSWORD = "hunter2-of-the-tests"
OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection of a test, for which no time limit counts that it has set for those of the service."""
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("SET statement_timeout = 0")
    return connection


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Send one statement, or several in one transaction, and return the rows."""
    with connect(url) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def name_of(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


def url_as(role: str, url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}:{PASSWORD}@{parts.hostname}:{parts.port}").geturl()


@contextmanager
def locked(url: str, statement: str, *parameters: object) -> Iterator[None]:
    """Hold the locks that a statement takes."""
    with psycopg.connect(url) as connection:
        connection.execute(statement.encode(), parameters or None)
        yield
        connection.rollback()


def wait_for_backends(url: str, condition: str, count: int = 1, *, action: str = "pid") -> Any:
    """Wait until so many backends of others are in a condition; return what an action on the first of them returns."""
    statement = f"SELECT {action} {OTHERS} AND {condition}"
    found: list[tuple[Any, ...]] = []

    def are_there() -> bool:
        found[:] = execute(url, statement)
        return len(found) >= count

    wait_until(are_there, otherwise=lambda: f"{len(found)} backends have {condition}")
    return found[0][0]


def terminate(url: str, condition: str = "true") -> None:
    """Terminate the backends of everybody else in this database, and wait until they are gone."""
    execute(url, f"SELECT pg_terminate_backend(pid, 10000) {OTHERS} AND {condition}")
