"""A real Better Auth server before the service, set up as the README says: sign up, get a token, have tasks."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from playwright.sync_api import BrowserContext, Request, Route

from tests.support.front_end import front_end
from tests.support.postgres import held_port
from tests.support.service_process import ROOT, Service, environment

SOURCE = ROOT / "tests" / "clients" / "better_auth"
PUBLIC_KEYS, SHARED_SECRET = (SOURCE / "auth.js").read_text(), (SOURCE / "auth_hs256.js").read_text()
TOKEN_SECRET = "the secret of the tokens, and of them alone"
FRONT_END = "http://localhost:5173"


def with_plugin(options: str) -> str:
    """Return the server of the sample with other options for the plugin."""
    assert "jwt()" in PUBLIC_KEYS
    return PUBLIC_KEYS.replace("jwt()", f"jwt({options})")


SERVERS = {
    "EdDSA": PUBLIC_KEYS,
    **{
        algorithm: with_plugin(f"{{ jwks: {{ keyPairConfig: {{ alg: '{algorithm}' }} }} }}")
        for algorithm in ("ES256", "ES512", "RS256", "PS256")
    },
    "HS256": SHARED_SECRET,
}


class BetterAuth:
    """A Better Auth server as a process of node, with its data in memory."""

    def __init__(self, auth: str, front_end: str = FRONT_END) -> None:
        if not shutil.which("node") or not (SOURCE / "node_modules").exists():
            pytest.skip("needs node, and `npm install --no-package-lock` in tests/clients/better_auth")
        self.folder = Path(tempfile.mkdtemp(prefix="tasks-better-auth-"))
        for file in SOURCE.glob("*.js*"):
            shutil.copy(file, self.folder)
        (self.folder / "node_modules").symlink_to(SOURCE / "node_modules")
        (self.folder / "auth.js").write_text(auth)
        port = held_port()
        self.url = f"http://localhost:{port}"
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["node", "server.js"],
                cwd=self.folder,
                env=environment(
                    PORT=str(port),
                    BETTER_AUTH_URL=self.url,
                    BETTER_AUTH_SECRET="the secret of the Better Auth server",
                    TOKEN_SECRET=TOKEN_SECRET,
                    FRONT_END=front_end,
                ),
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while "listening" not in (self.folder / "log").read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.folder / "log").read_text())
            time.sleep(0.05)

    def remove(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)


class Browser(httpx.Client):
    """A front end's connection to Better Auth, with the cookies that it is given."""

    def __init__(self, better_auth: BetterAuth) -> None:
        super().__init__(base_url=better_auth.url, headers={"Origin": FRONT_END}, timeout=30)

    def sign_up(self, name: str) -> str:
        """Sign up, which signs in too, and return the user's id."""
        body = {"name": name, "email": f"{name}@example.com", "password": "correct horse"}
        answer = self.post("/api/auth/sign-up/email", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["user"]["id"])

    def token(self) -> str:
        return str(self.get("/api/auth/token").json()["token"])


@pytest.fixture
def start_better_auth() -> Iterator[Callable[[str], BetterAuth]]:
    servers = []

    def start(auth: str) -> BetterAuth:
        servers.append(BetterAuth(auth))
        return servers[-1]

    yield start
    for server in servers:
        server.remove()


StartBetterAuth = Callable[[str], BetterAuth]
StartService = Callable[..., Service]


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("algorithm", SERVERS)
def test_a_user_signs_up_and_has_tasks(
    algorithm: str, start_better_auth: StartBetterAuth, start_service: StartService, database_url: str
) -> None:
    better_auth = start_better_auth(SERVERS[algorithm])
    settings = {"BETTER_AUTH_SECRET": TOKEN_SECRET} if algorithm == "HS256" else {"BETTER_AUTH_URL": better_auth.url}
    service = start_service(database_url, **{"BETTER_AUTH_SECRET": ""} | settings)
    tasks = f"{service.url}/api/tasks"
    for name in ("alice", "bob"):
        with Browser(better_auth) as browser:
            user_id, token = browser.sign_up(name), browser.token()
            assert jwt.get_unverified_header(token)["alg"] == algorithm
            created = httpx.post(tasks, headers=headers(token), json={"title": f"of {name}"})
            assert created.status_code == 201, created.text
            assert created.json()["user_id"] == user_id
            assert httpx.get(tasks, headers=headers(token)).json() == {"items": [created.json()]}


def test_a_rotated_key_is_good_at_once_and_so_is_the_one_before(
    start_better_auth: StartBetterAuth, start_service: StartService, database_url: str
) -> None:
    better_auth = start_better_auth(with_plugin("{ jwks: { rotationInterval: 1 } }"))
    service = start_service(database_url, BETTER_AUTH_SECRET="", BETTER_AUTH_URL=better_auth.url)
    with Browser(better_auth) as browser:
        browser.sign_up("alice")
        tokens = [browser.token()]
        assert httpx.get(f"{service.url}/api/tasks", headers=headers(tokens[0])).status_code == 200
        time.sleep(1.1)  # the life of a key
        tokens.append(browser.token())
    assert len({jwt.get_unverified_header(token)["kid"] for token in tokens}) == 2
    for token in reversed(tokens):
        assert httpx.get(f"{service.url}/api/tasks", headers=headers(token)).status_code == 200


@pytest.mark.parametrize(
    ("plugin", "algorithm"),
    [("jwt()", "HS256"), ("jwt({ sessionCookieCache: true })", "EdDSA")],
    ids=["HS256", "EdDSA"],
)
def test_what_better_auth_keeps_in_cookies_is_no_token(
    plugin: str, algorithm: str, start_better_auth: StartBetterAuth, start_service: StartService, database_url: str
) -> None:
    cache = "session: { cookieCache: { enabled: true, strategy: 'jwt' } },\n  plugins:"
    better_auth = start_better_auth(PUBLIC_KEYS.replace("jwt()", plugin).replace("plugins:", cache))
    service = start_service(database_url, BETTER_AUTH_SECRET=TOKEN_SECRET, BETTER_AUTH_URL=better_auth.url)
    with Browser(better_auth) as browser:
        browser.sign_up("alice")
        assert httpx.get(f"{service.url}/api/tasks", headers=headers(browser.token())).status_code == 200
        cookies = dict(browser.cookies)
    assert {"better-auth.session_token", "better-auth.session_data"} <= cookies.keys()
    assert (
        jwt.get_unverified_header(cookies["better-auth.session_data"])["alg"] == ("HS256", "EdDSA")["Cache" in plugin]
    )
    for cookie in cookies.values():
        answer = httpx.get(f"{service.url}/api/tasks", headers=headers(cookie))
        assert (answer.status_code, answer.json()) == (401, {"detail": "Invalid token"})


# --- The front end, on a page of another origin than Better Auth and the service --------------------------------------

SIGN = """async ([url, body]) => {
    const headers = { 'Content-Type': 'application/json' }
    const options = { method: 'POST', credentials: 'include', headers, body: JSON.stringify(body) }
    return (await fetch(url, options)).status
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


class FrontEnd:
    """A page with the modules of the sample, and what it has asked for."""

    def __init__(self, context: BrowserContext, url: str, better_auth: BetterAuth) -> None:
        self.url, self.better_auth = url, better_auth
        self.page = context.new_page()
        self.asked: list[Request] = []
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.goto(url)

    def run(self, script: str) -> Any:
        """Run an expression with all that the modules export."""
        imports = "const { api, forgetToken } = await import('/api.js'), tasks = await import('/tasks.js')"
        return self.page.evaluate(f"async () => {{ {imports}; return await ({script}) }}")

    def titles(self) -> list[str]:
        answer = self.run("tasks.list()")
        assert answer["status"] == 200, answer
        return [task["title"] for task in answer["json"]["items"]]

    def sign(self, action: str, name: str = "") -> None:
        """Sign up, in or out; it is not told to the modules."""
        url = f"{self.better_auth.url}/api/auth/sign-{action}"
        body = {"name": name, "email": f"{name}@example.com", "password": "correct horse"} if name else {}
        assert self.page.evaluate(SIGN, [url, body]) == 200

    def asked_for(self, path: str) -> list[Request]:
        """Return the requests of a path since the last time, but for preflights."""
        found = [each for each in self.asked if each.url.endswith(path) and each.method != "OPTIONS"]
        self.asked.clear()
        return found


@pytest.fixture(scope="module")
def servers(
    new_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, BetterAuth]]:
    """The URL of a front end, and its Better Auth server; the service is a third one."""
    folder = tmp_path_factory.mktemp("front-end")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}"
        better_auth = BetterAuth(PUBLIC_KEYS, url)
        service = Service(new_database(), BETTER_AUTH_SECRET="", BETTER_AUTH_URL=better_auth.url, CORS_ORIGINS=url)
        service.wait_until_ready()
        for name, text in front_end(service.url, better_auth.url).items():
            (folder / name).write_text(text)
        yield url, better_auth
        service.remove()
        better_auth.remove()
        server.shutdown()


@pytest.fixture
def page(context: BrowserContext, servers: tuple[str, BetterAuth]) -> FrontEnd:
    return FrontEnd(context, *servers)


def test_a_user_of_the_front_end_has_tasks(page: FrontEnd) -> None:
    page.sign("up/email", "alice")
    created = page.run("tasks.create({ title: 'Buy milk' })")
    assert created["status"] == 201
    toggled = page.run(f"tasks.toggle({json.dumps(created['json'])})")
    assert (toggled["status"], toggled["json"]["completed"]) == (200, True)
    changed = page.run(f"tasks.change({json.dumps(toggled['json'])}, {{ title: 'Buy bread' }})")
    assert (changed["status"], changed["json"]["title"]) == (200, "Buy bread")
    assert page.titles() == ["Buy bread"]
    assert page.run("tasks.list('pending')")["json"] == {"items": []}
    assert page.run(f"tasks.remove({json.dumps(changed['json'])})") == {"status": 204, "json": ""}
    assert page.titles() == []


def test_the_front_end_asks_for_one_token_and_for_another_when_it_has_expired(page: FrontEnd) -> None:
    page.sign("up/email", "erin")
    assert page.run("Promise.all([tasks.list(), tasks.list(), tasks.list()])")
    assert page.titles() == []
    assert len(page.asked_for("/api/auth/token")) == 1
    expired: list[Request] = []

    def refuse_once(route: Route, request: Request) -> None:
        if expired or request.method == "OPTIONS":
            route.fallback()
        else:
            expired.append(request)
            route.fulfill(status=401, headers={"Access-Control-Allow-Origin": page.url}, json={"detail": ""})

    page.page.route("**/api/tasks", refuse_once)
    created = page.run("tasks.create({ title: 'Buy milk' })")
    assert (created["status"], page.titles()) == (201, ["Buy milk"])
    assert len(page.asked_for("/api/auth/token")) == 1


def test_a_front_end_without_a_user_sends_no_token(page: FrontEnd) -> None:
    answer = page.run("tasks.list()")
    assert (answer["status"], answer["json"]) == (401, {"detail": "Not authenticated"})
    [request] = page.asked_for("/api/tasks?status=all")
    assert "authorization" not in request.all_headers()
    page.sign("up/email", "frank")
    assert page.titles() == [], "that nobody was signed in is not remembered"


@pytest.mark.parametrize("how", ["forgetToken()", "dispatchEvent(new Event('focus'))"], ids=["told", "in another tab"])
def test_another_user_of_the_same_page_has_tasks_of_their_own(page: FrontEnd, how: str) -> None:
    names = [f"{name}-{how.count('focus')}" for name in ("carol", "dave")]
    for name in names:
        page.sign("up/email", name)
        page.run(how)
        assert page.titles() == []
        assert page.run(f"tasks.create({{ title: 'of {name}' }})")["status"] == 201
    for name in names:
        page.sign("in/email", name)
        page.run(how)
        assert page.titles() == [f"of {name}"]
    page.sign("out")
    page.run(how)
    assert page.run("tasks.list()")["json"] == {"detail": "Not authenticated"}


def test_a_better_auth_that_was_down_is_asked_again(page: FrontEnd) -> None:
    page.sign("up/email", "grace")
    page.page.route("**/api/auth/token", lambda route: route.abort())
    assert page.run("api('/api/tasks').catch(error => String(error))") == "TypeError: Failed to fetch"
    page.page.unroute("**/api/auth/token")
    page.page.route("**/api/auth/token", lambda route: route.fulfill(status=502), times=1)
    assert page.run("api('/api/tasks').catch(error => String(error))") == "Error: Better Auth answers 502"
    assert page.titles() == []
