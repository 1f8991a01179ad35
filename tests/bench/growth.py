"""What a request costs in a small table and in large ones: `uv run tests/bench/growth.py`.

CPU of the service and of PostgreSQL together, in microseconds a request, with 10 thousand, 1 million and 10 million
tasks of 20 a user. Then one user more gets 10 tasks and another 100,000, each with 10 that are pending: the CPU that a
list of these takes, and, of a service that has just started, the milliseconds until the first byte of all 100,000 comes
and the megabytes by which it grows at most. Needs wrk (of Debian), and for the largest table some 5 GB of disk and 5
minutes; --sizes takes other ones.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

import sql
from tests.bench.attacks import Memory, read_list
from tests.bench.load import Server, measure, serving, table, write_script
from tests.support.postgres import Postgres
from tests.support.service_process import procfile_line, token

FILL = """
    INSERT INTO task (user_id, title, description, completed, created_at, updated_at)
    SELECT 'user-' || user_number, 'task ' || n, 'To be done', n %% 2 = 0, now() - n * '1 min'::interval, now()
    FROM generate_series(1, 20) AS n, generate_series(0, %(users)s - 1) AS user_number
    ORDER BY n, user_number
"""
TEN = """
    INSERT INTO task (user_id, title, completed)
    SELECT 'ten', 'task ' || n, false FROM generate_series(1, 10) AS n
    UNION ALL
    SELECT 'ten of many', 'task ' || n, n % 10000 > 0 FROM generate_series(1, 100000) AS n
"""
LINES = ("one task", "list of 20", "toggle", "create")
PENDING = {"10 pending of 10": "ten", "10 pending of 100,000": "ten of many"}
FIRST_BYTE, MEMORY = "100,000 listed: ms to the first byte", "100,000 listed: MB more"


def write_pending_script(folder: Path, user_id: str) -> Path:
    """Write what wrk is to ask for: the pending tasks of a user."""
    script = folder / f"{user_id}.lua"
    headers = f'["Host"] = "localhost", ["Authorization"] = "Bearer {token(user_id)}"'
    call = f'wrk.format("GET", "/api/tasks?status=pending", {{{headers}}})'
    script.write_text(f"local call = {call}\nrequest = function() return call end\n")
    return script


def fill(postgres: Postgres, statement: str, **values: int) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(statement.encode(), values or None)
        connection.execute("VACUUM ANALYZE task")
        connection.execute("CHECKPOINT")  # or what has just been written is still on its way to the disk


def stream(server: Server, user_id: str) -> dict[str, float]:
    with Memory(server.process.pid) as memory:
        read = read_list(urlsplit(server.url).port or 0, user_id)
    assert read.whole
    assert read.tasks == 100_000
    return {FIRST_BYTE: read.first_byte * 1000, MEMORY: (memory.peak - memory.before) / 1e6}


def measure_size(postgres: Postgres, folder: Path, size: int, rounds: int, seconds: int) -> dict[str, list[float]]:
    """Return what was measured in each round, by its name."""
    found: dict[str, list[float]] = defaultdict(list)
    assert postgres.process
    server_of_tasks = psutil.Process(postgres.process.pid)

    def measure_lines(scripts: dict[str, Path], *, streamed: str = "") -> None:
        for number in range(rounds):
            print(f"{size:,} tasks, round {number + 1} of {rounds}: {', '.join(scripts)}", file=sys.stderr)
            with serving(f"env {procfile_line('web')}", postgres.url(), 1) as server:
                for name, value in stream(server, streamed).items() if streamed else ():
                    found[name].append(value)
                for line, script in scripts.items():
                    figures = measure(server, script, server_of_tasks, seconds)
                    found[line].append(figures.cpu + figures.postgres_cpu)

    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(sql.database.SCHEMA.encode())
    fill(postgres, FILL, users=size // 20)
    users = [f"user-{number}" for number in range(0, size // 20, max(size // 20_000, 1))][:1000]
    with psycopg.connect(postgres.url()) as connection:
        query = "SELECT user_id, min(id) FROM task WHERE user_id = ANY(%s) GROUP BY user_id"
        first_ids: dict[str, int] = dict(connection.execute(query, [users]).fetchall())
    measure_lines({line: write_script(folder, line, first_ids) for line in LINES})
    fill(postgres, TEN)
    pending = {name: write_pending_script(folder, user_id) for name, user_id in PENDING.items()}
    measure_lines(pending, streamed="ten of many")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000], help="in tasks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement")
    arguments = parser.parse_args()
    found: dict[int, dict[str, list[float]]] = {}
    for size in arguments.sizes:
        postgres = Postgres(shared_buffers="512MB")
        folder = Path(tempfile.mkdtemp(prefix="tasks-bench-"))
        try:
            found[size] = measure_size(postgres, folder, size, arguments.rounds, arguments.seconds)
        finally:
            postgres.remove()
            shutil.rmtree(folder)
    rows = [
        [name, *(f"{statistics.median(found[size][name]):.0f}" for size in arguments.sizes)]
        for name in (*LINES, *PENDING, FIRST_BYTE, MEMORY)
    ]
    print(table(["", *(f"{size:,} tasks" for size in arguments.sizes)], rows))


if __name__ == "__main__":
    main()
