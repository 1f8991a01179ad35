"""The requests per second that the service answers, and others beside it.

    uv run --group bench tests/bench/load.py
    uv run --group bench tests/bench/load.py --workers 2 --other 'mine=/path/to/run.sh'

Each contestant in turn serves 200,000 tasks of 10,000 users from the same PostgreSQL, with 16 connections to it, while
wrk (of Debian) asks on 16 and on 64 connections with the tokens of 1,000 of the users. This service runs by the line of
its Procfile, with everything on. Beside it: two floors (see floors.py), which serve one task only; the classic FastAPI
and SQLModel (see fastapi_sqlmodel.py), if the group `bench` is installed; and what --other names with the command that
starts it, which finds DATABASE_URL, BETTER_AUTH_SECRET, PORT, WORKERS and POOL set. --schema gives one of those a
database of its own with another table, as an earlier version of this service needs.

Mind which Python it runs with, and prints: one that pyenv has compiled without --enable-optimizations takes some 10 %
more CPU for this service than Debian's.

Each round runs every contestant once; the figures are medians of the rounds. CPU is in microseconds a request: that of
the server, and that of PostgreSQL. Memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from tests.support.postgres import Postgres, free_port
from tests.support.service_process import ROOT, SECRET, environment, procfile_line, token

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
    memory: float


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


def measure(
    url: str, script: Path, server: psutil.Process, postgres: psutil.Process, seconds: int, clients: int = 64
) -> Figures:
    def wrk(seconds: int) -> str:
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--timeout=60", "--latency", "-s", str(script), url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def settle() -> None:
        """Wait until the server is done with what wrk has asked and did not wait for, or for half a minute."""
        before, deadline = -1.0, time.monotonic() + 30
        while (now := cpu_seconds(server)) > before + 0.02 and time.monotonic() < deadline:
            before = now
            time.sleep(0.2)

    wrk(1)
    for longer in (1, 4, 16):  # where nothing was answered in that time
        settle()
        before, postgres_before = cpu_seconds(server), cpu_seconds(postgres)
        said = wrk(seconds * longer)
        cpu, postgres_cpu = cpu_seconds(server) - before, cpu_seconds(postgres) - postgres_before
        if count := int(re.findall(r"(\d+) requests in", said)[0]):
            break
    else:
        raise RuntimeError(f"{script.stem}: nothing was answered in {seconds * longer} seconds")
    for failed in re.findall("Non-2xx or 3xx responses: .*|Socket errors: .*", said):
        print(f"  {script.stem}: {failed}", file=sys.stderr)
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    p50, p99 = (float(number) * units[unit] for number, unit in re.findall(r"(?:50|99)%\s+([\d.]+)(us|ms|s)", said))
    memory = max(each.memory_info().rss for each in [server, *server.children(recursive=True)]) / 1e6
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
    else:
        print("FastAPI + SQLModel is left out: run this with `uv run --group bench`", file=sys.stderr)
    return commands | dict(each.split("=", 1) for each in others)


def chart(found: dict[tuple[str, str], Figures]) -> str:
    """Return the requests per second as a picture in SVG: a group of bars for each line."""
    names = list(dict.fromkeys(name for _, name in found if not name.startswith(FLOOR)))
    shades = ["#0b6e4f", "#7c8ba1", "#a3afc0", "#b9c2cf", "#cdd4dd", "#dde2e8", "#e9ecf0"]
    bar, left, width = 14, 110, 760
    parts, y = [], 8
    for line in dict.fromkeys(line for line, name in found if not name.startswith(FLOOR)):
        parts.append(f'<text x="{left - 8}" y="{y + bar * len(names) / 2 + 4}" text-anchor="end">{line}</text>')
        most = max(found[line, name].requests for name in names)
        for name, shade in zip(names, shades * 9, strict=False):
            figures = found[line, name]
            length = figures.requests / most * (width - left - 250)
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.0f}" height="{bar - 2}" fill="{shade}"/>')
            label = f"{figures.requests:,.0f}  {name}"
            parts.append(f'<text x="{left + length + 6:.0f}" y="{y + bar - 4}">{label}</text>')
            y += bar
        y += 10
    style = "font: 11px sans-serif; background: white"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" style="{style}">'
    return "\n".join([head, "<title>Requests per second</title>", *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], help="connections of wrk")
    parser.add_argument(
        "--schema", action="append", default=[], metavar="NAME=FILE", help="the table of another server"
    )
    parser.add_argument("--lines", nargs="+", choices=LINES, default=LINES, help="what to measure")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the requests per second as a picture in SVG")
    arguments = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    commands = contestants(arguments.other)
    schemas = {SERVICE: sql.SCHEMA} | {
        name: Path(file).read_text() for name, _, file in (each.partition("=") for each in arguments.schema)
    }
    rounds: dict[tuple[int, str, str], list[Figures]] = defaultdict(list)
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
                database = postgres.url(quote(name if name in schemas else SERVICE))
                with serving(command, database, arguments.workers) as (url, server):
                    for clients in arguments.clients:
                        for line in arguments.lines if not name.startswith(FLOOR) else ["one task"]:
                            script = scripts[line]
                            figures = measure(url, script, server, server_of_tasks, arguments.seconds, clients)
                            rounds[clients, line, name].append(figures)
    finally:
        postgres.remove()
        shutil.rmtree(folder)

    found = {
        key: Figures(*(statistics.median(values) for values in zip(*rounds[key], strict=True)))
        for key in sorted(rounds, key=lambda key: (key[0], LINES.index(key[1])))
    }
    python = f"Python {platform.python_version()} ({sys.base_prefix})"
    print(f"{os.cpu_count()} CPUs, {python}, {arguments.workers} worker(s), medians of {arguments.rounds} rounds\n")
    print("| clients | | | requests/s | p50, ms | p99, ms | CPU, µs | PostgreSQL, µs | both, µs | MB |")
    print("|---" * 10 + "|")
    for (clients, line, name), each in found.items():
        cells = [f"{each.requests:,.0f}", f"{each.p50:.1f}", f"{each.p99:.1f}", f"{each.cpu:.0f}"]
        cells += [f"{each.postgres_cpu:.0f}", f"{each.cpu + each.postgres_cpu:.0f}", f"{each.memory:.0f}"]
        print("|", " | ".join([str(clients), line, name, *cells]), "|")
    if arguments.chart:
        most = max(arguments.clients)
        of_most = {(line, name): each for (clients, line, name), each in found.items() if clients == most}
        arguments.chart.write_text(chart(of_most))


if __name__ == "__main__":
    main()
