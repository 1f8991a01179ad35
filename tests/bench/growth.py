"""What a request costs in a small table and in large ones: `uv run tests/bench/growth.py`.

CPU of the service and of PostgreSQL together, in microseconds a request, with 10 thousand, 1 million and 10 million
tasks of 20 a user, and the list of a user's 10 pending tasks beside 100,000 completed ones. Needs wrk (of Debian), and
for the largest table some 5 GB of disk and 5 minutes; --sizes takes other ones.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

import sql
from tests.bench.load import measure, serving, write_script
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
PENDING = ("ten", "ten of many")


def write_list_script(folder: Path, user_id: str) -> Path:
    """Write what wrk is to ask for: the pending tasks of a user."""
    script = folder / f"{user_id}.lua"
    headers = f'["Host"] = "localhost", ["Authorization"] = "Bearer {token(user_id)}"'
    call = f'wrk.format("GET", "/api/tasks?status=pending", {{{headers}}})'
    script.write_text(f"local call = {call}\nrequest = function() return call end\n")
    return script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000], help="in tasks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement")
    arguments = parser.parse_args()
    costs: dict[tuple[str, int], list[float]] = defaultdict(list)
    for size in arguments.sizes:
        postgres = Postgres(shared_buffers="512MB")
        folder = Path(tempfile.mkdtemp(prefix="tasks-bench-"))
        try:
            with psycopg.connect(postgres.url(), autocommit=True) as connection:
                connection.execute(sql.SCHEMA.encode())
                connection.execute(FILL.encode(), {"users": size // 20})
                connection.execute(TEN.encode())
                connection.execute("VACUUM ANALYZE task")
                connection.execute("CHECKPOINT")  # or what has just been written is still on its way to the disk
                query = "SELECT user_id, min(id) FROM task WHERE user_id = ANY(%s) GROUP BY user_id"
                users = [f"user-{number}" for number in range(0, size // 20, max(size // 20_000, 1))][:1000]
                first_ids: dict[str, int] = dict(connection.execute(query, [users]).fetchall())
            scripts = {line: write_script(folder, line, first_ids) for line in LINES}
            scripts |= {user_id: write_list_script(folder, user_id) for user_id in PENDING}
            assert postgres.process
            server_of_tasks = psutil.Process(postgres.process.pid)
            for number in range(arguments.rounds):
                print(f"{size:,} tasks, round {number + 1} of {arguments.rounds}", file=sys.stderr)
                with serving(f"env {procfile_line('web')}", postgres.url(), 1) as (url, server):
                    for line, script in scripts.items():
                        figures = measure(url, script, server, server_of_tasks, arguments.seconds)
                        costs[line, size].append(figures.cpu + figures.postgres_cpu)
        finally:
            postgres.remove()
            shutil.rmtree(folder)

    print("| |", " | ".join(f"{size:,} tasks" for size in arguments.sizes), "|")
    print("|---|" + "---|" * len(arguments.sizes))
    names = dict(zip(PENDING, ("10 pending of 10", "10 pending of 100,000"), strict=True))
    for line in (*LINES, *PENDING):
        medians = [f"{statistics.median(costs[line, size]):.0f}" for size in arguments.sizes]
        print(f"| {names.get(line, line)} |", " | ".join(medians), "|")


if __name__ == "__main__":
    main()
