"""What the README says is true: its commands run, its tables are complete, its messages are printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from sql.database import TIMEOUT
from tests.support.postgres import free_port
from tests.support.readme import AUDIT, HEROKU, INSTALL, README, RUN, TEST, TOUR, WATCH, blocks, sh
from tests.support.service_process import ROOT, SECRET, Client, Service, environment


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()[2:]  # type: ignore[index]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.fixture
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what is committed or would be, as a stranger has it after `git clone`."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for file in files:
        if (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.usefixtures("default_port")
def test_the_first_command_and_the_tour_work_as_pasted(clone: Path) -> None:
    if not shutil.which("uv") or not shutil.which("pip"):
        pytest.skip("pip or uv is not installed")
    output = clone / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            ["sh", "-c", RUN], cwd=clone, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        line = wait_for(lambda: re.search(r"curl -H .*/api/tasks$", output.read_text(), re.MULTILINE), output)
        wait_for(lambda: "Application startup complete" in output.read_text(), output)
        wait_for(lambda: httpx.get("http://127.0.0.1:8000/health").status_code == 200, output)
        assert json.loads(sh(str(line[0]), clone)) == {"items": []}  # type: ignore[index]
        export, *curls = TOUR.splitlines()
        answers = [sh(f"{export}\n{curl}", clone) for curl in curls]
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
    created, listed, completed, deleted = answers
    assert json.loads(created)["title"] == "Buy milk"
    assert json.loads(listed)["items"] == [json.loads(created)]
    assert json.loads(completed)["completed"] is True
    assert deleted == ""


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
    assert TEST.removeprefix("pip install uv && ").strip() in ci
    assert "uv run pytest -m long" in ci


def test_the_heroku_settings_are_ones_to_serve_with(database_url: str, start_service: Callable[..., Service]) -> None:
    line = next(line for line in HEROKU.splitlines() if "config:set" in line)
    settings = dict(re.findall(r'([A-Z_]+)="?([^"\n]*?)"?(?= [A-Z_]+=|$)', line))
    assert {"BETTER_AUTH_URL", "CORS_ORIGINS"} == settings.keys()
    url = database_url.replace("postgresql://", "postgres://")
    service = start_service(url, WEB_CONCURRENCY="2", **{"BETTER_AUTH_SECRET": ""} | settings)
    service.wait_until_ready()
    response = httpx.get(f"{service.url}/api/tasks", headers={"Origin": settings["CORS_ORIGINS"]})
    assert (response.status_code, response.json()) == (401, {"detail": "Not authenticated"})
    assert response.headers["access-control-allow-origin"] == settings["CORS_ORIGINS"]


@pytest.mark.long
def test_the_unit_runs_on_nothing_but_the_locked_requirements(clone: Path, database_url: str) -> None:
    sh(INSTALL, clone)
    [unit] = blocks("ini")
    command = str(re.search("^ExecStart=/srv/tasks/(.*)$", unit, re.MULTILINE)[1])  # type: ignore[index]
    port = free_port()
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


def test_the_fly_configuration_is_consistent() -> None:
    [text] = blocks("toml")
    fly = tomllib.loads(text)
    assert fly["env"]["PORT"] == str(fly["http_service"]["internal_port"])
    assert fly["deploy"]["release_command"] in (ROOT / "Procfile").read_text()


def test_every_setting_is_in_the_table_and_in_the_example() -> None:
    source = (ROOT / "service.py").read_text()
    read = set(re.findall(r'"([A-Z]+(?:_[A-Z]+)*)"', source.split("\n# --- Settings")[1].split("\n# --- ")[0]))
    listed = {name for row in table("Settings") for name in re.findall("`([A-Z_]+)`", row[0])}
    example = set(re.findall("^([A-Z_]+)=$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert listed == example == read


def test_every_default_is_the_real_one() -> None:
    defaults = {row[0].strip("`"): row[1].replace("`", "").replace(" ", "") for row in table("Settings")}
    source = (ROOT / "service.py").read_text()
    assert f'CORS_DEFAULT = "{defaults["CORS_ORIGINS"]}"' in source
    assert f'"HOST", "{defaults["HOST"]}"' in source
    for name in ("PORT", "DATABASE_POOL_SIZE", "WEB_CONCURRENCY"):
        assert f'"{name}", default={defaults[name]},' in source


def test_every_endpoint_is_in_the_table(service: Service) -> None:
    listed = set()
    for request, *_ in table("The API"):
        method, *paths = re.findall(r"(?:^`(GET|POST|PUT|PATCH|DELETE) |`?)(/[a-z./{}]*)", request.split("?")[0])
        listed |= {(method[0], path.replace("{id}", "{task_id}")) for _, path in (method, *paths)}
    paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    others = {("GET", path) for path in ("/health", "/health/ready", "/docs", "/redoc", "/openapi.json")}
    assert listed == documented | others


def test_the_log_line_is_a_real_one(alice: Client, service: Service) -> None:
    [line] = blocks("text")
    response = alice.patch(f"/api/tasks/{alice.create()['id']}/complete")
    real = service.log_line(response.headers["x-request-id"])
    assert [pair.split("=")[0] for pair in real.split()] == [pair.split("=")[0] for pair in line.split()]


def test_the_packages_to_watch_with_are_those_that_are_tested() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    [packages] = re.findall("^pip install (.*)$", WATCH, re.MULTILINE)
    assert packages.split() == [requirement.partition(">=")[0] for requirement in groups["opentelemetry"]]


@pytest.mark.parametrize("row", table("When something is wrong"), ids=lambda row: row[0].strip("`"))
def test_every_message_of_the_troubleshooting_table_is_in_the_program(row: list[str]) -> None:
    message = max(row[0].strip("`").removesuffix("32 characters").split("…"), key=len).strip()
    source = (ROOT / "service.py").read_text()
    others = {"status=503", "status=500", "CORS policy", "prepared statement", "address already in use"}
    assert message in re.sub(r'"\n\s+f?"', "", source) or any(text in row[0] for text in others)


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) == README.count(".py::")
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), name


def test_each_of_the_ten_points_of_owasp_has_a_test_or_does_not_apply() -> None:
    rows = table("Security")
    assert [row[0].split()[0] for row in rows] == [f"API{number}" for number in range(1, 11)]
    assert all(("::test_" in shown) != means.startswith("does not apply: ") for _, means, shown in rows)


def test_the_audit_reads_the_requirements_that_are_deployed() -> None:
    assert re.findall(r"-r (\S+)", AUDIT) == re.findall(r"-r (\S+)", INSTALL)


def test_every_link_leads_somewhere() -> None:
    sections = {f"#{heading.lower().replace(' ', '-')}" for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert target in sections or (ROOT / target).exists(), target


def test_every_fault_of_the_table_has_a_test_that_makes_its_line() -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    made = set(re.findall(r'figures\(\s*"([^"]+)"', tests))
    assert {row[0] for row in table("When something dies")} == made


def test_the_time_that_a_request_waits_is_the_real_one_and_less_than_a_router_s() -> None:
    assert f"a statement gets {TIMEOUT:.0f} seconds" in " ".join(README.split())
    assert TIMEOUT < 30


def test_the_limits_of_a_request_and_of_connections_are_the_real_ones() -> None:
    program = (ROOT / "service.py").read_text()
    assert "\nREQUEST_TIMEOUT = 15.0 " in program
    assert "\nHEAD_LIMIT = 65_536 " in program
    assert (
        "| 408, 431 | the request takes more than 15 seconds to arrive; its head has no end within 64 KiB |" in README
    )
    assert "\nWHOLE_LIST_TASKS, WHOLE_LIST_BYTES = 1000, 2**20 " in program
    assert "one of more than 1,000 tasks, or 1 MiB, is streamed" in README
