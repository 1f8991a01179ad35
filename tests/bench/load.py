"""The requests per second that the service answers, and others beside it: `uv run tests/bench/load.py`.

One worker, 16 connections, 200,000 tasks of 10,000 users, and the tokens of 1,000 of them; wrk (of Debian) asks. Others
are named with the command that starts them, which finds DATABASE_URL, BETTER_AUTH_SECRET, PORT, WORKERS and POOL set:

    uv run tests/bench/load.py --other 'mine=/path/to/run.sh'

Each round starts each of them once, in turn; the figures are medians of the rounds. CPU is in microseconds a request:
that of the server, and that of PostgreSQL.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

import sql
from tests.postgres import Postgres, free_port
from tests.service_process import ROOT, SECRET, environment, procfile_line, token

FILL = """
    INSERT INTO task (user_id, title, description, completed, created_at, updated_at)
    SELECT user_id, 'task ' || n, 'Something to be done', n % 2 = 0, now() - n * '1 min'::interval, now()
    FROM generate_series(1, 20) AS n, (SELECT 'user-' || i AS user_id FROM generate_series(0, 9999) AS i) AS users
    UNION ALL
    SELECT 'busy', 'task ' || n, 'Something to be done', n % 2 = 0, now() - n * '1 min'::interval, now()
    FROM generate_series(1, 1000) AS n
"""
CREATE = ("POST", "/api/tasks", '{"title": "A new task", "description": "Something to be done"}')
MIX = ["one task"] * 7 + ["list of 20", "toggle", "create"]


class Figures(NamedTuple):
    requests: float
    p50: float
    p99: float
    cpu: float
    postgres_cpu: float
    memory: float


def write_script(folder: Path, line: str, first_ids: dict[str, int]) -> Path:
    """Write what wrk is to ask: a list of requests with a token each, over and over."""
    users = ["busy"] if line == "list of 1,000" else [f"user-{number}" for number in range(1000)]
    calls = []
    for number, user in enumerate(users):
        headers = f'["Authorization"] = "Bearer {token(user)}"'
        kind = MIX[number % len(MIX)] if line == "mix" else line
        path, body = "/api/tasks", "nil"
        method = {"toggle": "PATCH", "create": "POST"}.get(kind, "GET")
        if kind == "one task":
            path += f"/{first_ids[user]}"
        elif kind == "toggle":
            path += f"/{first_ids[user]}/complete"
        elif kind == "create":  # for others, so that the lists do not grow
            headers = (
                f'["Authorization"] = "Bearer {token(f"creator-{number}")}", ["Content-Type"] = "application/json"'
            )
            body = f"'{CREATE[2]}'"
        calls.append(f'wrk.format("{method}", "{path}", {{{headers}}}, {body})')
    script = folder / f"{line}.lua"
    script.write_text(
        "local calls, n = {" + ",\n".join(calls) + "}, 0\nrequest = function() n = n % #calls + 1 return calls[n] end\n"
    )
    return script


@contextmanager
def serving(command: str, url: str, workers: int) -> Iterator[tuple[str, psutil.Process]]:
    """Start a contestant; yield its URL and its process."""
    port = str(free_port())
    variables = {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET, "PORT": port, "CORS_ORIGINS": "http://localhost"}
    counts = {"WORKERS": str(workers), "WEB_CONCURRENCY": str(workers), "POOL": "16", "DATABASE_POOL_SIZE": "16"}
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=ROOT, env=environment(**variables, **counts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU that a process and its children have taken so far, those that have ended included."""
    total = sum(process.cpu_times()[2:4])
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            total += sum(each.cpu_times()[:2])
    return total


def measure(url: str, script: Path, server: psutil.Process, postgres: psutil.Process, seconds: int) -> Figures:
    def wrk(seconds: int) -> str:
        command = ["wrk", "-t1", "-c64", f"-d{seconds}", "--latency", "-s", str(script), url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    wrk(1)
    before, postgres_before = cpu_seconds(server), cpu_seconds(postgres)
    said = wrk(seconds)
    cpu, postgres_cpu = cpu_seconds(server) - before, cpu_seconds(postgres) - postgres_before
    if failed := re.search("Non-2xx or 3xx responses: .*|Socket errors: .*", said):
        print(f"  {script.stem}: {failed[0]}", file=sys.stderr)
    count = int(re.findall(r"(\d+) requests in", said)[0])
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    p50, p99 = (float(number) * units[unit] for number, unit in re.findall(r"(?:50|99)%\s+([\d.]+)(us|ms|s)", said))
    memory = max(each.memory_info().rss for each in [server, *server.children(recursive=True)]) / 1e6
    rate = float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0])
    return Figures(rate, p50, p99, cpu / count * 1e6, postgres_cpu / count * 1e6, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    contestants = {"this service": f"env {procfile_line('web')}"} | dict(each.split("=", 1) for each in arguments.other)
    found: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    lines = ("one task", "list of 20", "list of 1,000", "toggle", "create", "mix")
    postgres = Postgres(shared_buffers="512MB")
    folder = Path(tempfile.mkdtemp(prefix="tasks-bench-"))
    try:
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(sql.SCHEMA.encode())
            connection.execute(FILL.encode())
            connection.execute("VACUUM ANALYZE task")
            ids = connection.execute("SELECT user_id, min(id) FROM task GROUP BY user_id").fetchall()
            first_ids: dict[str, int] = dict(ids)
        scripts = {line: write_script(folder, line, first_ids) for line in lines}
        assert postgres.process
        for number in range(arguments.rounds):
            for name, command in contestants.items():
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr)
                with serving(command, postgres.url(), arguments.workers) as (url, server):
                    for line in lines:
                        figures = measure(
                            url, scripts[line], server, psutil.Process(postgres.process.pid), arguments.seconds
                        )
                        found[line, name].append(figures)
    finally:
        postgres.remove()
        shutil.rmtree(folder)

    print(f"{os.cpu_count()} CPUs, {arguments.workers} worker(s), medians of {arguments.rounds} rounds\n")
    print("| | | requests/s | p50, ms | p99, ms | CPU, µs | PostgreSQL, µs | MB |\n|---|---|---|---|---|---|---|---|")
    for (line, name), rounds in found.items():
        middle = Figures(*(statistics.median(values) for values in zip(*rounds, strict=True)))
        print(f"| {line} | {name} | {middle.requests:,.0f} | {middle.p50:.1f} | {middle.p99:.1f} | {middle.cpu:.0f}"
              f" | {middle.postgres_cpu:.0f} | {middle.memory:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
