"""Databases in trouble, and the answers then."""

from __future__ import annotations

from typing import Any

import psycopg

UNAVAILABLE = {"detail": "The database is not available right now, try again soon"}


def connect(url: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(url, autocommit=True)


def execute(url: str, statement: str) -> list[tuple[Any, ...]]:
    with connect(url) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []
