"""How long a start holds up the writers of a large table: `uv run tests/bench/schema.py`.

A million tasks, and one client that writes all the time while the schema is applied as at a start: to a table of
version 1.0, to that of the FastAPI + SQLModel backend, and where nothing is left to do.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import asyncpg

sys.path.insert(0, str(Path(__file__).parents[2]))

import sql
from sql.database import Connection, apply_schema, connect
from tests.support.postgres import Postgres
from tests.support.service_process import ROOT

FILL = """
    INSERT INTO task (user_id, title, completed, created_at, updated_at)
    SELECT 'user-' || n % 10000, 'task ' || n, n % 2 = 0, now(), now() FROM generate_series(1, {tasks}) AS n
"""
WRITE = "UPDATE task SET completed = NOT completed WHERE user_id = 'user-1' AND id = 1"

BEFORE = {
    "is that of version 1.0": [(ROOT / "tests" / "support" / "version_1_0.sql").read_text(), FILL],
    "has everything": [sql.database.SCHEMA, FILL],
    "is the FastAPI + SQLModel backend's": [
        """
        CREATE TABLE task (
            id SERIAL PRIMARY KEY, user_id VARCHAR(255) NOT NULL, title VARCHAR(200) NOT NULL,
            description VARCHAR(2000), completed BOOLEAN NOT NULL, created_at TIMESTAMP NOT NULL,
            updated_at TIMESTAMP NOT NULL
        );
        CREATE INDEX ix_task_user_id ON task (user_id);
        """,
        FILL,
    ],
}


async def longest_wait(connection: asyncpg.Connection, done: asyncio.Event) -> float:
    """Write until it is done; return the seconds of the write that took longest."""
    longest = 0.0
    while not done.is_set():
        started = time.perf_counter()
        await connection.execute(WRITE)
        longest = max(longest, time.perf_counter() - started)
    return longest


async def measure(url: str, statements: list[str], tasks: int) -> tuple[float, float]:
    """Return the seconds that the schema takes, and that a write has to wait for it at most."""
    connection, writer = await asyncpg.connect(url), await asyncpg.connect(url)
    await connection.execute("DROP TABLE IF EXISTS task")
    for statement in statements:
        await connection.execute(statement.replace("{tasks}", str(tasks)))
    await connection.execute("VACUUM ANALYZE task")
    done = asyncio.Event()
    writing = asyncio.create_task(longest_wait(writer, done))
    await asyncio.sleep(0.5)
    started = time.perf_counter()
    async with asyncpg.create_pool(url, connect=connect, connection_class=Connection, min_size=0) as pool:
        await apply_schema(pool)
    took = time.perf_counter() - started
    done.set()
    waited = await writing
    await connection.close()
    await writer.close()
    return took, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    tasks = parser.parse_args().tasks
    postgres = Postgres()
    try:
        print(f"{f'a table of {tasks:,} tasks that …':<40}{'applied in, s':>15}{'a write waits, s':>18}")
        for name, statements in BEFORE.items():
            took, waited = asyncio.run(measure(postgres.url(), statements, tasks))
            print(f"{name:<40}{took:>15.3f}{waited:>18.3f}")
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()
