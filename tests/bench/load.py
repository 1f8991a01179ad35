"""The requests per second that the service answers, and others beside it.

    uv run --group bench tests/bench/load.py
    uv run --group bench tests/bench/load.py --workers 2 --other 'mine=/path/to/run.sh' --json speed.json

Each contestant in turn serves 200,000 tasks of 10,000 users with 16 connections to PostgreSQL, while wrk (of Debian)
asks on 16 and on 64 connections with the tokens of 1,000 of the users. This service runs by the line of its Procfile,
with everything on. Beside it: two floors (see floors.py), which serve one task only; the classic FastAPI and SQLModel
(see fastapi_sqlmodel.py), if the group `bench` is installed; and what --other names with the command that starts it,
which finds DATABASE_URL, BETTER_AUTH_SECRET, PORT, WORKERS and POOL set. --schema gives a contestant another table than
this service's: its own, as an earlier version of this service needs.

Each round runs every contestant once, on a fresh copy of its database; the figures are medians of the rounds. CPU is in
microseconds a request: that of the server, and that of PostgreSQL. Memory is that of the largest process. --json writes
all of it to a file, for chart.py and goals.py.

Mind which Python it runs with, and prints: one that pyenv has compiled without --enable-optimizations takes some 10 %
more CPU for this service than Debian's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
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
from urllib.parse import quote

import httpx
import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

import sql
from tests.support.postgres import Postgres, held_port
from tests.support.service_process import ROOT, SECRET, Client, environment, procfile_line, token

FILL = """
    INSERT INTO task (user_id, title, description, completed, created_at, updated_at)
    SELECT user_id, 'task ' || n, 'Something to be done', n % 2 = 0, now() - n * '1 min'::interval, now()
    FROM generate_series(1, 20) AS n, (SELECT 'user-' || i AS user_id FROM generate_series(0, 9999) AS i) AS users
    UNION ALL
    SELECT 'busy', 'task ' || n, 'Something to be done', n % 2 = 0, now() - n * '1 min'::interval, now()
    FROM generate_series(1, 1000) AS n
"""
CREATE = ("POST", "/api/tasks", '{"title": "A new task", "description": "Something to be done"}')
SERVICE = "this service"
FLOOR = "floor:"
LINES = ("one task", "list of 20", "list of 1,000", "toggle", "create", "mix")
MIX = ["one task"] * 7 + ["list of 20", "toggle", "create"]


class Figures(NamedTuple):
    requests: float
    p50: float
    p99: float
    cpu: float
    postgres_cpu: float
    memory: float  # MB


class Start(NamedTuple):
    """What is measured once a round."""

    seconds: float  # until a list was answered
    task_bytes: float  # what a task takes in the database, with its indexes


class Server(NamedTuple):
    url: str
    process: psutil.Process
    seconds: float  # from its start until it answered a list


def fill_databases(postgres: Postgres, schemas: dict[str, str]) -> dict[str, int]:
    """Fill a database for each schema, by its name; return the id of each user's first task, the same in all."""
    ids: dict[str, int] = {}
    for name, schema in schemas.items():
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        with psycopg.connect(postgres.url(quote(name)), autocommit=True) as connection:
            connection.execute(schema.encode())
            connection.execute(FILL.encode())
            connection.execute("VACUUM ANALYZE task")
            ids = dict(connection.execute("SELECT user_id, min(id) FROM task GROUP BY user_id").fetchall())
    return ids


def copy_database(postgres: Postgres, name: str) -> str:
    """Copy a database, so that nobody finds what others have written or indexed there; return the URL of the copy."""
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS copy WITH (FORCE)")
        connection.execute(f'CREATE DATABASE copy TEMPLATE "{name}"'.encode())
        connection.execute("CHECKPOINT")  # or what has just been written is still on its way to the disk
    return postgres.url("copy")


def task_bytes(database_url: str) -> float:
    """Return the bytes that a task takes, with its indexes."""
    with psycopg.connect(database_url) as connection:
        query = "SELECT pg_total_relation_size('task')::float8 / count(*) FROM task"
        return float(connection.execute(query).fetchall()[0][0])


def write_script(folder: Path, line: str, first_ids: dict[str, int]) -> Path:
    """Write what wrk is to ask: a list of requests with a token each, over and over."""
    users = ["busy"] if line == "list of 1,000" else [user for user in first_ids if user.startswith("user-")][:1000]
    calls = []
    for number, user in enumerate(users):
        headers = f'["Host"] = "localhost", ["Authorization"] = "Bearer {token(user)}"'
        kind = MIX[number % len(MIX)] if line == "mix" else line
        path, body = "/api/tasks", "nil"
        method = {"toggle": "PATCH", "create": "POST"}.get(kind, "GET")
        if kind == "one task":
            path += f"/{first_ids[user]}"
        elif kind == "toggle":
            path += f"/{first_ids[user]}/complete"
        elif kind == "create":  # for others, so that the lists do not grow
            headers = (
                headers.replace(token(user), token(f"creator-{number}")) + ', ["Content-Type"] = "application/json"'
            )
            body = f"'{CREATE[2]}'"
        calls.append(f'wrk.format("{method}", "{path}", {{{headers}}}, {body})')
    script = folder / f"{line}.lua"
    script.write_text(
        "local calls, n = {" + ",\n".join(calls) + "}, 0\nrequest = function() n = n % #calls + 1 return calls[n] end\n"
    )
    return script


@contextmanager
def serving(command: str, database_url: str, workers: int) -> Iterator[Server]:
    """Start a contestant; yield it when it has answered a list."""
    port = str(held_port())
    variables = {
        "DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "PORT": port, "CORS_ORIGINS": "http://localhost"
    }  # fmt: skip
    counts = {"WORKERS": str(workers), "WEB_CONCURRENCY": str(workers), "POOL": "16", "DATABASE_POOL_SIZE": "16"}
    started = time.monotonic()
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=ROOT, env=environment(**variables, **counts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with Client(f"http://127.0.0.1:{port}", "user-0") as client:
            while True:
                try:
                    client.get("/api/tasks").raise_for_status()
                    break
                except httpx.HTTPError:
                    if time.monotonic() > started + 60 or process.poll() is not None:
                        raise
                    time.sleep(0.005)
        yield Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid), time.monotonic() - started)
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


def measure(server: Server, script: Path, postgres: psutil.Process, seconds: int, clients: int = 64) -> Figures:
    def wrk(seconds: int) -> str:
        options = [f"-c{clients}", f"-d{seconds}", "--timeout=60", "--latency", "-s", str(script)]
        command = ["wrk", "-t1", *options, server.url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def settle() -> None:
        """Wait until the server is done with what wrk has asked and did not wait for, or for half a minute."""
        before, deadline = -1.0, time.monotonic() + 30
        while (now := cpu_seconds(server.process)) > before + 0.02 and time.monotonic() < deadline:
            before = now
            time.sleep(0.2)

    wrk(1)
    for longer in (1, 4, 16):  # where nothing was answered in that time
        settle()
        before, postgres_before = cpu_seconds(server.process), cpu_seconds(postgres)
        said = wrk(seconds * longer)
        cpu, postgres_cpu = cpu_seconds(server.process) - before, cpu_seconds(postgres) - postgres_before
        if count := int(re.findall(r"(\d+) requests in", said)[0]):
            break
    else:
        raise RuntimeError(f"{script.stem}: nothing was answered in {seconds * longer} seconds")
    for failed in re.findall("Non-2xx or 3xx responses: .*|Socket errors: .*", said):
        print(f"  {script.stem}: {failed}", file=sys.stderr)
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    p50, p99 = (float(number) * units[unit] for number, unit in re.findall(r"(?:50|99)%\s+([\d.]+)(us|ms|s)", said))
    memory = max(each.memory_info().rss for each in [server.process, *server.process.children(recursive=True)]) / 1e6
    rate = float(re.findall(r"Requests/sec:\s+([\d.]+)", said)[0])
    return Figures(rate, p50, p99, cpu / count * 1e6, postgres_cpu / count * 1e6, memory)


def contestants(others: list[str]) -> dict[str, str]:
    """Return the command of each contestant by its name."""
    uvicorn = (
        f"{sys.executable} -m uvicorn --host 127.0.0.1 --port $PORT --workers $WORKERS"
        " --loop uvloop --http httptools --no-access-log --log-level warning"
    )
    commands = {
        SERVICE: f"env {procfile_line('web')}",
        f"{FLOOR} nothing": f"{uvicorn} tests.bench.floors:nothing",
        f"{FLOOR} one query": f"{uvicorn} tests.bench.floors:one_query",
    }
    if importlib.util.find_spec("sqlmodel"):
        commands["FastAPI + SQLModel"] = f"{uvicorn} tests.bench.fastapi_sqlmodel:app"
    commands |= dict(each.split("=", 1) for each in others)
    if "FastAPI + SQLModel" not in commands:
        print("FastAPI + SQLModel is left out: run this with `uv run --group bench`", file=sys.stderr)
    return commands


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def report(found: dict[tuple[int, str, str], Figures], starts: dict[str, Start]) -> str:
    rows = []
    for (clients, line, name), each in found.items():
        cells = [f"{each.requests:,.0f}", f"{each.p50:.1f}", f"{each.p99:.1f}", f"{each.cpu:.0f}"]
        cells += [f"{each.postgres_cpu:.0f}", f"{each.cpu + each.postgres_cpu:.0f}", f"{each.memory:.0f}"]
        rows.append([str(clients), line, name, *cells])
    head = ["clients", "", "", "requests/s", "p50, ms", "p99, ms", "CPU, µs", "PostgreSQL, µs", "both, µs", "MB"]
    once = [[name, f"{each.seconds:.2f}", f"{each.task_bytes:.0f}"] for name, each in starts.items()]
    return f"{table(head, rows)}\n\n{table(['', 'start to first list, s', 'bytes a task, with indexes'], once)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--schema", action="append", default=[], metavar="NAME=FILE", help="the table of a contestant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], help="connections of wrk")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=LINES, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    commands = contestants(arguments.other)
    files = dict(each.split("=", 1) for each in arguments.schema)
    schemas = {SERVICE: sql.database.SCHEMA} | {name: Path(file).read_text() for name, file in files.items()}
    if unknown := schemas.keys() - commands.keys():
        parser.error(f"--schema names no contestant: {', '.join(unknown)}")
    measured: dict[tuple[int, str, str], list[Figures]] = defaultdict(list)
    started: dict[str, list[Start]] = defaultdict(list)
    postgres = Postgres(shared_buffers="512MB")
    folder = Path(tempfile.mkdtemp(prefix="tasks-bench-"))
    try:
        first_ids = fill_databases(postgres, schemas)
        scripts = {line: write_script(folder, line, first_ids) for line in LINES}
        assert postgres.process
        server_of_tasks = psutil.Process(postgres.process.pid)
        for number in range(arguments.rounds):
            for name, command in commands.items():
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr)
                database_url = copy_database(postgres, name if name in schemas else SERVICE)
                with serving(command, database_url, arguments.workers) as server:
                    started[name].append(Start(server.seconds, task_bytes(database_url)))
                    for clients in arguments.clients:
                        for line in arguments.lines if not name.startswith(FLOOR) else ["one task"]:
                            figures = measure(server, scripts[line], server_of_tasks, arguments.seconds, clients)
                            measured[clients, line, name].append(figures)
    finally:
        postgres.remove()
        shutil.rmtree(folder)

    keys = sorted(measured, key=lambda key: (key[0], LINES.index(key[1])))
    found = {key: Figures(*map(statistics.median, zip(*measured[key], strict=True))) for key in keys}
    starts = {
        name: Start(*map(statistics.median, zip(*rounds, strict=True)))
        for name, rounds in started.items()
        if not name.startswith(FLOOR)
    }
    python = f"Python {platform.python_version()} ({sys.base_prefix})"
    conditions = f"{os.cpu_count()} CPUs, {python}, {arguments.workers} worker(s), medians of {arguments.rounds} rounds"
    print(f"{conditions}\n\n{report(found, starts)}")
    if arguments.json:
        lines = [
            {"clients": clients, "line": line, "name": name} | each._asdict()
            for (clients, line, name), each in found.items()
        ]
        once = [{"name": name} | each._asdict() for name, each in starts.items()]
        content = {"conditions": conditions, "starts": once, "figures": lines}
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
