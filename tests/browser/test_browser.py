"""What only a browser can tell: that the documentation pages work, and that a front end may call the service."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, expect

from tests.support.chromium import PUBLIC
from tests.support.postgres import held_port
from tests.support.service_process import Client, Service, token

# ReDoc's bundle has the address of its maker's logo built in, and no option to leave it out.
REDOC_LOGO = "https://cdn.redoc.ly/redoc/logo-mini-full.svg"


# --- The documentation pages -----------------------------------------------------------------------------------------


class Visit:
    """A page with what it asked for, what the policy kept it from asking for, and what it complained about."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page = context.new_page()
        self.origin = str(httpx.URL(url).join("/"))
        self.asked: list[str] = []
        self.blocked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", self.note_failure)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self.note_message)  # the violations of the policy are among these
        self.page.clock.install()
        self.page.goto(url)

    def let_a_minute_pass(self) -> None:
        """Let a page that collects what it sends, or asks once in a while, do so; its clock is put forward."""
        self.page.wait_for_load_state("networkidle")
        self.page.clock.run_for(60_000)
        self.page.wait_for_load_state("networkidle")

    def note_failure(self, request: Request) -> None:
        if request.failure == "csp":
            self.blocked.append(request.url)

    def note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    @property
    def asked_others(self) -> set[str]:
        """What the page has asked of other origins and was not kept from."""
        own = (self.origin, "data:", "blob:")
        return {url for url in self.asked if not url.startswith(own)} - set(self.blocked)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", PUBLIC)


@pytest.fixture
def docs(host: str, context: BrowserContext, service: Service) -> Visit:
    """/docs with its operations on the page."""
    visit = Visit(context, f"http://{host}:{service.port}/docs")
    expect(visit.page.locator(".opblock")).to_have_count(6)
    return visit


@pytest.fixture
def redoc(host: str, context: BrowserContext, service: Service) -> Visit:
    """/redoc with its operations on the page."""
    visit = Visit(context, f"http://{host}:{service.port}/redoc")
    expect(visit.page.get_by_text("/api/tasks/{task_id}/complete").first).to_be_visible()
    return visit


def authorize(page: Page, user_id: str | None) -> None:
    page.get_by_role("button", name="Authorize", exact=True).click()
    page.locator(".modal-ux input").fill(token(user_id))
    page.locator(".modal-ux button.authorize").click()
    page.locator(".modal-ux").get_by_role("button", name="Close").click()


def execute(page: Page, operation_id: str, body: str | None = None, **parameters: Any) -> tuple[int, Any]:
    """Try an operation out; return the status and the JSON that the page then shows."""
    operation = page.locator(f".opblock[id$='-{operation_id}']")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    for name, value in parameters.items():
        operation.get_by_placeholder(name).fill(str(value))
    if body is not None:
        operation.locator("textarea.body-param__text").fill(body)
    operation.get_by_role("button", name="Execute").click()
    answer = operation.locator(".live-responses-table tr.response")
    status = int(answer.locator(".response-col_status").inner_text().split()[0])
    return status, json.loads(answer.locator(".highlight-code code").inner_text())


@pytest.mark.parametrize("host", ["127.0.0.1", PUBLIC], indirect=True)
def test_a_task_is_created_and_listed_in_swagger_ui(docs: Visit, alice: Client, bob: Client) -> None:
    authorize(docs.page, alice.user_id)
    created = execute(docs.page, "create_task", '{"title": "Written in a browser 😀", "completed": true}')
    (task,) = alice.tasks()
    assert (task["title"], task["description"], task["completed"]) == ("Written in a browser 😀", None, True)
    assert created == (201, task)
    assert execute(docs.page, "list_tasks") == (200, {"items": [task]})
    assert bob.tasks() == []
    docs.let_a_minute_pass()
    assert (docs.asked_others, docs.blocked, docs.errors) == (set(), [], [])


@pytest.mark.long
def test_swagger_ui_fills_in_an_example_that_can_be_sent_as_it_is(docs: Visit, alice: Client) -> None:
    authorize(docs.page, alice.user_id)
    status, task = execute(docs.page, "create_task")
    assert (status, alice.tasks()) == (201, [task])
    assert execute(docs.page, "update_task", task_id=task["id"])[0] == 200
    assert execute(docs.page, "complete_task", task_id=task["id"])[0] == 200
    assert docs.errors == []


def test_swagger_ui_sends_what_makes_a_request_safe_to_repeat(docs: Visit, alice: Client) -> None:
    authorize(docs.page, alice.user_id)
    key = {"Idempotency-Key": "from-the-browser"}
    status, task = execute(docs.page, "create_task", '{"title": "once"}', **key)
    assert (status, alice.tasks()) == (201, [task])
    assert alice.post("/api/tasks", json={"title": "once"}, headers=key).json() == task
    changed = {"task_id": task["id"], "If-Match": f'"{task["updated_at"]}"'}
    status, task = execute(docs.page, "complete_task", "{}", **changed)
    assert (status, alice.tasks()) == (200, [task])
    assert execute(docs.page, "update_task", "{}", **changed)[0] == 412


def test_swagger_ui_shows_the_answer_to_a_request_without_a_token(docs: Visit) -> None:
    assert execute(docs.page, "list_tasks") == (401, {"detail": "Not authenticated"})


@pytest.mark.parametrize("host", ["127.0.0.1", PUBLIC], indirect=True)
def test_redoc_shows_an_operation(redoc: Visit) -> None:
    redoc.page.get_by_text("/api/tasks/{task_id}/complete").first.click()
    expect(redoc.page.get_by_role("heading", name="Toggle")).to_be_visible()
    expect(redoc.page.get_by_text("Two litres").first).to_be_visible()
    assert_asks_only_for_the_logo(redoc)


def test_the_search_of_redoc_finds_an_operation(redoc: Visit) -> None:
    redoc.page.get_by_text("Search").first.click()
    redoc.page.get_by_placeholder("Search").fill("newest")
    expect(redoc.page.get_by_text("List the caller's tasks, newest first")).to_be_visible()
    assert_asks_only_for_the_logo(redoc)


def assert_asks_only_for_the_logo(redoc: Visit) -> None:
    """And the policy keeps it from getting that."""
    redoc.let_a_minute_pass()
    assert redoc.asked_others == set()
    assert set(redoc.blocked) <= {REDOC_LOGO}
    assert [error for error in redoc.errors if REDOC_LOGO not in error] == []


@pytest.mark.long
@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_files_of_a_page_are_not_fetched_again(context: BrowserContext, service: Service, path: str) -> None:
    files, lines = [], []
    for _ in ("the first time", "the second time"):
        before = service.log
        visit = Visit(context, service.url + path)
        visit.page.wait_for_load_state("networkidle")
        files.append({url for url in visit.asked if "/docs/" in url})
        log = service.log.removeprefix(before).splitlines()
        lines.append([line for line in log if ' path="/docs/' in line and " status=304 " not in line])
    assert files[0] == files[1]
    assert (len(lines[0]), len(lines[1])) == (len(files[0]), 0)


@pytest.mark.parametrize("name", ["swagger_bundle.js", "swagger_style.css", "redoc.js"])
def test_a_file_of_a_page_may_be_cached(nobody: Client, name: str) -> None:
    response = nobody.get(f"/docs/{name}")
    assert (response.status_code, response.headers["cache-control"]) == (200, "public, max-age=86400")


# --- CORS: a front end on another origin ------------------------------------------------------------------------------

FETCH = """
async ([url, options]) => {
    try {
        const response = await fetch(url, options);
        return [response.status, Object.fromEntries(response.headers), await response.text()];
    } catch (error) {
        return [0, {}, String(error)];
    }
}
"""


Answer = tuple[int, dict[str, str], Any]


class FrontEnd:
    """A page on an origin of its own whose script calls a service."""

    def __init__(self, context: BrowserContext, origin: str) -> None:
        self.page = context.new_page()
        self.page.goto(origin)

    def fetch(self, method: str, url: str, **options: Any) -> Answer:
        """Return the status, the headers that the script can see, and the body; the status 0 for a refusal."""
        status, headers, text = self.page.evaluate(FETCH, [url, {"method": method} | options])
        return status, headers, json.loads(text) if headers.get("content-type") == "application/json" else text


class Page200(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def web_server(port: int) -> Iterator[None]:
    """Serve an empty page at every path of 127.0.0.1, which the browser calls localhost too."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Page200)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def front_end_port() -> Iterator[int]:
    port = held_port()
    with web_server(port):
        yield port


@pytest.fixture(scope="module")
def allowing(front_end_port: int, new_database: Callable[[], str]) -> Iterator[Service]:
    """A service that allows the origin of the front end, and whose database has a bug for one title."""
    service = Service(new_database(), CORS_ORIGINS=f"https://app.example.com,http://localhost:{front_end_port}")
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'a secret' USING ERRCODE = 'internal_error';
        END $$;
        CREATE TRIGGER fail BEFORE INSERT ON task FOR EACH ROW WHEN (NEW.title = 'bug') EXECUTE FUNCTION fail();
    """)
    yield service
    service.remove()


@pytest.fixture
def front_end(context: BrowserContext, front_end_port: int) -> FrontEnd:
    return FrontEnd(context, f"http://localhost:{front_end_port}")


@pytest.fixture
def stranger(context: BrowserContext, front_end_port: int) -> FrontEnd:
    """The same page on an origin that the service does not allow."""
    return FrontEnd(context, f"http://127.0.0.1:{front_end_port}")


def signed_in(user_id: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user_id)}", "Content-Type": "application/json"} | headers


@pytest.mark.parametrize("credentials", ["omit", "same-origin", "include"])
def test_a_front_end_may_do_all_that_a_client_can(allowing: Service, front_end: FrontEnd, credentials: str) -> None:
    url, owner = f"{allowing.url}/api/tasks", f"alice-{credentials}"
    options = {"credentials": credentials, "headers": signed_in(owner)}

    _, _, bobs = front_end.fetch("POST", url, headers=signed_in("bob"), body='{"title": "not hers"}')
    status, headers, task = front_end.fetch("POST", url, body='{"title": "from a front end"}', **options)
    assert (status, headers["location"], task["user_id"]) == (201, f"/api/tasks/{task['id']}", owner)
    status, _, changed = front_end.fetch("PUT", f"{url}/{task['id']}", body='{"description": "changed"}', **options)
    assert (status, changed["description"]) == (200, "changed")
    status, _, completed = front_end.fetch("PATCH", f"{url}/{task['id']}/complete", **options)
    assert (status, completed["completed"]) == (200, True)
    assert front_end.fetch("GET", f"{url}/{task['id']}", **options)[::2] == (200, completed)
    assert front_end.fetch("GET", f"{url}?status=completed", **options)[::2] == (200, {"items": [completed]})
    assert front_end.fetch("DELETE", f"{url}/{task['id']}", **options)[::2] == (204, "")
    assert front_end.fetch("GET", url, **options)[::2] == (200, {"items": []})
    assert bobs in front_end.fetch("GET", url, headers=signed_in("bob"))[2]["items"]


def test_a_front_end_is_answered_in_place_at_a_trailing_slash(allowing: Service, front_end: FrontEnd) -> None:
    """A browser follows no redirect of a preflight."""
    url = f"{allowing.url}/api/tasks/"
    assert front_end.fetch("GET", url, redirect="error", headers=signed_in("carol"))[::2] == (200, {"items": []})
    created = front_end.fetch("POST", url, redirect="error", headers=signed_in("carol"), body='{"title": "a task"}')
    assert created[0] == 201


@pytest.mark.parametrize("credentials", ["omit", "include"])
@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "answer"),
    [
        ("GET", "/api/tasks", {}, None, 401, {"detail": "Not authenticated"}),
        ("GET", "/api/tasks", {"Authorization": "Bearer nonsense"}, None, 401, {"detail": "Invalid token"}),
        ("GET", "/api/tasks/9007199254740993", signed_in("dave"), None, 404, {"detail": "Task not found"}),
        ("GET", "/nowhere", {}, None, 404, {"detail": "Not Found"}),
        ("PUT", "/api/tasks", signed_in("dave"), "{}", 405, {"detail": "Method Not Allowed"}),
        (
            "POST",
            "/api/tasks",
            signed_in("dave"),
            '{"title": ""}',
            422,
            {"detail": "title must not be blank", "errors": [{"field": "title", "message": "must not be blank"}]},
        ),
        ("POST", "/api/tasks", signed_in("dave"), '{"title": "bug"}', 500, {"detail": "Internal Server Error"}),
    ],
    ids=["no token", "wrong token", "no task", "no path", "no method", "invalid", "bug"],
)
def test_a_front_end_can_read_every_error(
    allowing: Service,
    front_end: FrontEnd,
    method: str,
    path: str,
    headers: dict[str, str],
    body: str | None,
    status: int,
    answer: Any,
    credentials: str,
) -> None:
    options = {"headers": headers | {"X-Request-ID": "from-a-browser"}, "credentials": credentials}
    response = front_end.fetch(method, allowing.url + path, **options | ({"body": body} if body else {}))
    assert (response[0], response[1]["x-request-id"], response[2]) == (status, "from-a-browser", answer)
    assert allowing.sql("SELECT FROM task WHERE user_id = 'dave'") == []


@pytest.mark.long
def test_a_front_end_can_read_when_to_come_back(front_end_port: int, front_end: FrontEnd, start_service: Any) -> None:
    origin = f"http://localhost:{front_end_port}"
    service = start_service(f"postgresql://postgres@127.0.0.1:{held_port()}/tasks", CORS_ORIGINS=origin)
    status, headers, body = front_end.fetch("GET", f"{service.url}/api/tasks", headers=signed_in("alice"))
    assert (status, headers["retry-after"]) == (503, "2")
    assert body == {"detail": "The database is not available right now, try again soon"}


def test_the_script_sees_the_headers_that_are_exposed(allowing: Service, front_end: FrontEnd) -> None:
    options = {"headers": signed_in("erin", **{"X-Request-ID": "my-own.id_1"}), "body": '{"title": "a task"}'}
    _, headers, task = front_end.fetch("POST", f"{allowing.url}/api/tasks", **options)
    assert (headers["location"], headers["x-request-id"]) == (f"/api/tasks/{task['id']}", "my-own.id_1")


@pytest.mark.parametrize("credentials", ["omit", "include"])
def test_the_browser_gives_a_foreign_origin_nothing(allowing: Service, stranger: FrontEnd, credentials: str) -> None:
    options = {"credentials": credentials, "headers": signed_in("frank")}
    refused: Answer = (0, {}, "TypeError: Failed to fetch")
    url = f"{allowing.url}/api/tasks"
    with allowing.client("frank") as frank:
        task = frank.create()
    assert stranger.fetch("GET", url, **options) == refused
    assert stranger.fetch("POST", url, body='{"title": "forged"}', **options) == refused
    assert stranger.fetch("PUT", f"{url}/{task['id']}", body='{"title": "forged"}', **options) == refused
    assert stranger.fetch("PATCH", f"{url}/{task['id']}/complete", **options) == refused
    assert stranger.fetch("DELETE", f"{url}/{task['id']}", **options) == refused
    assert stranger.fetch("GET", f"{allowing.url}/health", credentials=credentials) == refused
    rows = allowing.sql("SELECT title, completed FROM task WHERE user_id = 'frank' AND id = %s", task["id"])
    assert rows == [("a task", False)]
    assert allowing.sql("SELECT FROM task WHERE title = 'forged'") == []


def test_a_front_end_on_port_3000_needs_no_setting(context: BrowserContext, service: Service, alice: Client) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 3000)) == 0:
            pytest.skip("port 3000 is taken")
    with web_server(3000):
        options = {"credentials": "include", "headers": signed_in(str(alice.user_id))}
        for host in ("localhost", "127.0.0.1"):
            answer = FrontEnd(context, f"http://{host}:3000").fetch("GET", f"{service.url}/api/tasks", **options)
            assert answer[::2] == (200, {"items": []})
