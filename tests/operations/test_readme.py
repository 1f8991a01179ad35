"""What the README says is true: its commands run, its tables are complete, its messages are printed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.support.copies import copy_committed
from tests.support.postgres import held_port
from tests.support.readme import README, code, sh, table
from tests.support.service_process import ROOT, SECRET, Client, Service, environment, procfile_line

# What any module of the program has, by its name.
MODULES = ["service", "sql", *(f"sql.{file.stem}" for file in (ROOT / "sql").glob("[a-z]*.py"))]
program = SimpleNamespace(**{name: it for each in MODULES for name, it in vars(importlib.import_module(each)).items()})


@pytest.fixture
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what is committed, as a stranger has it after `git clone`."""
    folder = copy_committed(tmp_path_factory.mktemp("clone"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("default_port")
def test_the_first_command_and_the_tour_work_as_pasted(clone: Path) -> None:
    if not shutil.which("uv") or not shutil.which("pip"):
        pytest.skip("pip or uv is not installed")
    output = clone / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            ["sh", "-c", code("pip install uv")],
            cwd=clone,
            env=environment(),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        line = wait_for(lambda: re.search(r"curl -H .*/api/tasks$", output.read_text(), re.MULTILINE), output)
        wait_for(lambda: "Application startup complete" in output.read_text(), output)
        wait_for(lambda: httpx.get("http://127.0.0.1:8000/health").status_code == 200, output)
        assert json.loads(sh(str(line[0]), clone)) == {"items": []}  # type: ignore[index]
        tours = [list(values_of(sh(code("API="), clone))) for _ in ("the first time", "the second time")]
        left = json.loads(sh(str(line[0]).replace("demo", "alice"), clone))  # type: ignore[index]
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
    for created, completed, absent, others in tours:
        assert (created["title"], created["user_id"], created["completed"]) == ("Buy milk", "alice", False)
        assert completed == created | {"completed": True, "updated_at": completed["updated_at"]}
        assert (absent, others) == ({"detail": "Task not found"}, {"items": []})
    assert left == {"items": []}


def values_of(text: str) -> Iterator[Any]:
    """Yield the JSON values that follow each other in a text."""
    while text := text.strip():
        value, end = json.JSONDecoder().raw_decode(text)
        yield value
        text = text[end:]


def wait_for(condition: Callable[[], object], output: Path, seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if result := condition():
                return result
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(output.read_text())


def test_ci_runs_the_test_commands() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"uv run pytest", f"uv run pytest {code('-m long')}"} <= {*ci}


def test_the_heroku_settings_are_ones_to_serve_with(database_url: str, start_service: Callable[..., Service]) -> None:
    settings = dict(re.findall(r"([A-Z_]+)=(\S+)", code("heroku config:set")))
    assert {"BETTER_AUTH_URL", "CORS_ORIGINS"} == settings.keys()
    url = database_url.replace("postgresql://", "postgres://")
    service = start_service(url, WEB_CONCURRENCY="2", **{"BETTER_AUTH_SECRET": ""} | settings)
    service.wait_until_ready()
    response = httpx.get(f"{service.url}/api/tasks", headers={"Origin": settings["CORS_ORIGINS"]})
    assert (response.status_code, response.json()) == (401, {"detail": "Not authenticated"})
    assert response.headers["access-control-allow-origin"] == settings["CORS_ORIGINS"]


@pytest.mark.long
def test_the_unit_runs_on_nothing_but_the_locked_requirements(clone: Path, database_url: str) -> None:
    sh(code("python3 -m venv"), clone)
    [command] = re.findall("^ExecStart=/srv/tasks/(.*)$", code("[Unit]"), re.MULTILINE)
    port = held_port()
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "PORT": str(port)}
    output = clone / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"], cwd=clone, env=environment(**variables), stdout=stream, stderr=stream
        )
    try:
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200, output, 30)
    finally:
        process.terminate()
        process.wait(30)


def test_systemd_has_nothing_to_say_of_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "tasks.service"
    unit.write_text(code("[Unit]").replace("/srv/tasks/.venv/bin/python", sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_systemd_waits_for_longer_than_a_stop_takes_and_takes_its_status_for_a_success() -> None:
    [seconds] = re.findall("^TimeoutStopSec=([0-9]+)$", code("[Unit]"), re.MULTILINE)
    assert int(seconds) > program.SHUTDOWN_GRACE + program.SHUTDOWN_TIMEOUT
    assert f"\nSuccessExitStatus={128 + signal.SIGTERM}\n" in code("[Unit]")


def test_the_fly_configuration_is_consistent() -> None:
    [cell] = [cell for platform, cell in table("platform") if platform == "Fly"]
    fly = tomllib.loads("\n".join(re.findall(r"`([\w.]+ = [^`]+)`", cell)))
    assert fly["env"]["PORT"] == str(fly["http_service"]["internal_port"])
    assert fly["deploy"]["release_command"] in (ROOT / "Procfile").read_text()


def test_the_platforms_run_the_lines_of_the_procfile_and_ask_for_paths_that_there_are() -> None:
    lines = {procfile_line(process_type) for process_type in ("release", "web")}
    answered = {request.split("`")[1].removeprefix("GET ") for request, *_ in table("request")}
    for platform in ("Render", "Railway"):
        [cell] = [cell for name, cell in table("platform") if name == platform]
        assert set(re.findall("command `([^`]* -m service[^`]*)`", cell)) == lines
        assert set(re.findall("path `([^`]+)`", cell)) <= answered


def test_ten_machines_open_as_many_connections_as_it_says() -> None:
    [pool] = [row[1].strip("`") for row in table("variable") if row[0] == "`DATABASE_POOL_SIZE`"]
    assert f"ten machines with one worker open up to {10 * int(pool)}." in README


def test_what_better_auth_takes_from_the_environment_is_told() -> None:
    sources = (ROOT / "tests" / "clients" / "better_auth").glob("*.js")
    taken = {name for file in sources for name in re.findall(r"process\.env\.([A-Z_]+)", file.read_text())}
    assert len(taken) > 2
    assert all(re.search(rf"[` ]{name}[`=]", README) for name in taken), taken


def test_every_setting_is_in_the_table_and_in_the_example() -> None:
    source = (ROOT / "service.py").read_text()
    read = set(re.findall(r'"([A-Z]+(?:_[A-Z]+)*)"', source.split("\n# --- Settings")[1].split("\n# --- ")[0]))
    listed = {name for row in table("variable") for name in re.findall("`([A-Z_]+)`", row[0])}
    example = set(re.findall("^([A-Z_]+)=$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert listed == example == read


def test_every_default_is_the_real_one() -> None:
    defaults = {row[0].strip("`"): row[1].replace("`", "").replace(" ", "") for row in table("variable")}
    source = (ROOT / "service.py").read_text()
    assert f'CORS_DEFAULT = "{defaults["CORS_ORIGINS"]}"' in source
    assert f'"HOST", "{defaults["HOST"]}"' in source
    for name in ("PORT", "DATABASE_POOL_SIZE", "WEB_CONCURRENCY"):
        assert f'"{name}", default={defaults[name]},' in source


def test_every_endpoint_is_in_the_table(service: Service) -> None:
    listed = set()
    for request, *_ in table("request"):
        method, *paths = re.findall(r"(?:^`(GET|POST|PUT|PATCH|DELETE) |`?)(/[a-z./{}]*)", request.split("?")[0])
        listed |= {(method[0], path.replace("{id}", "{task_id}")) for _, path in (method, *paths)}
    paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    others = {("GET", path) for path in ("/", "/health", "/health/ready", "/docs", "/redoc", "/openapi.json")}
    assert listed == documented | others


def test_the_log_line_is_a_real_one(alice: Client, service: Service) -> None:
    line = code("method=")
    response = alice.patch(f"/api/tasks/{alice.create()['id']}/complete")
    real = service.log_line(response.headers["x-request-id"])
    assert [pair.split("=")[0] for pair in real.split()] == [pair.split("=")[0] for pair in line.split()]


def test_the_packages_to_watch_with_are_those_that_are_tested() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    [packages] = re.findall("^pip install (.*)$", code("pip install opentelemetry"), re.MULTILINE)
    assert packages.split() == [requirement.partition(">=")[0] for requirement in groups["opentelemetry"]]


@pytest.mark.parametrize("row", table("it prints"), ids=lambda row: row[0].strip("`"))
def test_every_message_of_the_troubleshooting_table_is_in_the_program(row: list[str]) -> None:
    message = max(row[0].strip("`").split("…"), key=len).strip()
    source = "".join(file.read_text() for file in [ROOT / "service.py", *(ROOT / "sql").glob("*.py")])
    others = {"status=503", "status=500", "CORS policy", "prepared statement"}
    assert message in re.sub(r'"\n\s+f?"', "", source) or any(text in row[0] for text in others)


def test_every_test_that_is_named_exists() -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 20
    for name in named:
        assert f"\ndef {name}(" in tests, name


def test_each_of_the_ten_points_of_owasp_has_a_test_or_does_not_apply() -> None:
    rows = table("point")
    assert [row[0].split()[0] for row in rows] == [f"API{number}" for number in range(1, 11)]
    assert all(("`test_" in shown) != means.startswith("does not apply: ") for _, means, shown in rows)


def test_the_audit_reads_the_requirements_that_are_deployed() -> None:
    installed = re.findall(r"-r (\S+)", code("python3 -m venv"))
    assert re.findall(r"-r (\S+)", code("uvx pip-audit")) == installed == ["requirements.txt"]


def test_every_link_leads_somewhere() -> None:
    sections = {f"#{heading.lower().replace(' ', '-')}" for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert target in sections or (ROOT / target).exists(), target


def test_every_fault_of_the_table_has_a_test_that_makes_its_line() -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    made = set(re.findall(r'figures\(\s*"([^"]+)"', tests))
    assert {row[0] for row in table("fault")} == made


LIMITS = {  # the words of the README, and whether they are true
    "| title | 1 to 200 characters": [program.FIELDS["title"]["maxLength"] == 200],
    "| description | 2,000 characters": [program.FIELDS["description"]["maxLength"] == 2000],
    "`sub` | 255 characters | 401 |": [
        program.storable_user_id("a" * 255) and not program.storable_user_id("a" * 256),
    ],
    "| 64 KiB | 413 |": [program.BODY_LIMIT == 64 * 1024],
    "| 64 KiB and 200 lines | 431 |": [program.HEAD_LIMIT == 64 * 1024, program.HEAD_LINES == 200],
    "| arrival of a request, from its first byte on | 15 s |": [program.REQUEST_TIMEOUT == 15],
    "8 s with all waits and second tries, and 2 s to cancel": [program.CALL_TIMEOUT == 8, program.RELEASE_TIMEOUT == 2],
    "| 2 of each user; of lists with 50 tasks or more, 3 in all |": [
        program.LISTS_PER_USER == 2,
        program.LONG_LISTS_AT_ONCE == 3,
        program.FIRST_PAGE == 50,
    ],
    "1,000 tasks and 1 MiB": [(program.WHOLE_LIST_TASKS, program.WHOLE_LIST_BYTES + 2) == (1000, 2**20)],
    "| 5 minutes, by Linux;": [program.UNREAD_TIMEOUT == 300_000],
    "| 95 s, longer than": [program.KEEP_ALIVE == 95],
    "20 s, and 5 s to close the database connections": [program.SHUTDOWN_GRACE == 20, program.SHUTDOWN_TIMEOUT == 5],
    "every 2 minutes, and for a token with an unknown key, at most every 2 seconds": [
        program.KEYS_REFRESH == 120,
        program.KEYS_PAUSE == 2,
    ],
    "Clocks may differ by 30 seconds": [program.LEEWAY == 30],
    "A statement waits 50 ms for a lock": [program.LOCK_TIMEOUT == "50ms"],
    "as text, 32 characters or more": [program.SECRET_LENGTH == 32],
}


@pytest.mark.parametrize("words", LIMITS)
def test_a_limit_that_the_readme_tells_is_that_of_the_program(words: str) -> None:
    assert words in README
    assert all(LIMITS[words])


def test_a_request_is_answered_before_a_router_gives_up() -> None:
    assert program.CALL_TIMEOUT + program.RELEASE_TIMEOUT < 30
