"""How soon the service serves: `uv run tests/bench/start.py`.

Medians, in seconds: what it takes to import service.py, and from the line of the Procfile to the first answer with a
user's tasks. And the memory of the process then, in MB.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.postgres import Postgres
from tests.support.service_process import ROOT, SECRET, Service, environment

STARTS = 11
IMPORT = "import time; started = time.perf_counter(); import service; print(time.perf_counter() - started)"


def seconds_to_import(database_url: str) -> float:
    variables = environment(DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET)
    command = [sys.executable, "-c", IMPORT]
    return float(subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True, text=True).stdout)


def start(database_url: str) -> tuple[float, float]:
    """Start the service and stop it; return the seconds until it answered, and its megabytes."""
    started = time.perf_counter()
    service = Service(database_url, wait=False)
    try:
        with service.client("somebody") as client:
            while time.perf_counter() < started + 30:
                try:
                    client.tasks()
                    seconds = time.perf_counter() - started
                    return seconds, service.memory
                except httpx.TransportError:
                    time.sleep(0.005)
        raise RuntimeError(f"the service did not answer:\n{service.log}")
    finally:
        service.remove()


def main() -> None:
    postgres = Postgres()
    try:
        url = postgres.url()
        seconds_to_import(url), start(url)  # so that what they import is compiled, and the table is there
        imports = [seconds_to_import(url) for _ in range(STARTS)]
        starts, sizes = zip(*(start(url) for _ in range(STARTS)), strict=True)
    finally:
        postgres.remove()
    print(f"import {statistics.median(imports):.2f} s, start to first answer {statistics.median(starts):.2f} s,"
          f" {statistics.median(sizes):.0f} MB; medians of {STARTS}")  # fmt: skip


if __name__ == "__main__":
    main()
