"""A real Better Auth server before the service, set up as the README says: sign up, get a token, have tasks."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import jwt
import pytest
from playwright.sync_api import BrowserContext, Request, Route

from tests.support.postgres import free_port
from tests.support.service_process import ROOT, Service, environment

SOURCE = ROOT / "tests" / "clients" / "better_auth"
SECRET = "the secret of the Better Auth server"

_, PUBLIC_KEYS, FRONT_END, SHARED_SECRET = re.findall(
    r"^```js\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
)


def with_plugin(options: str) -> str:
    """Return the README's server with other options for the plugin."""
    assert "jwt()" in PUBLIC_KEYS
    return str(PUBLIC_KEYS.replace("jwt()", f"jwt({options})"))


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

    def __init__(self, auth: str) -> None:
        if not shutil.which("node") or not (SOURCE / "node_modules").exists():
            pytest.skip("needs node, and `npm install --no-package-lock` in tests/clients/better_auth")
        self.folder = Path(tempfile.mkdtemp(prefix="tasks-better-auth-"))
        for file in SOURCE.glob("*.js*"):
            shutil.copy(file, self.folder)
        (self.folder / "node_modules").symlink_to(SOURCE / "node_modules")
        (self.folder / "auth.js").write_text(auth)
        port = free_port()
        self.url = f"http://localhost:{port}"
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["node", "server.js"],
                cwd=self.folder,
                env=environment(PORT=str(port), BETTER_AUTH_URL=self.url, BETTER_AUTH_SECRET=SECRET),
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
        super().__init__(base_url=better_auth.url, headers={"Origin": better_auth.url}, timeout=30)

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
    settings = {"BETTER_AUTH_SECRET": SECRET} if algorithm == "HS256" else {"BETTER_AUTH_URL": better_auth.url}
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
    better_auth = start_better_auth(PUBLIC_KEYS)
    service = start_service(database_url, BETTER_AUTH_SECRET="", BETTER_AUTH_URL=better_auth.url)
    with Browser(better_auth) as browser:
        browser.sign_up("alice")
        before = browser.token()
        assert httpx.get(f"{service.url}/api/tasks", headers=headers(before)).status_code == 200
        httpx.post(f"{better_auth.url}/test/rotate")
        after = browser.token()
    assert jwt.get_unverified_header(before)["kid"] != jwt.get_unverified_header(after)["kid"]
    for token in (after, before):
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
    service = start_service(database_url, BETTER_AUTH_SECRET=SECRET, BETTER_AUTH_URL=better_auth.url)
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


def test_the_front_end_of_the_readme_works_in_a_browser(
    context: BrowserContext, start_better_auth: StartBetterAuth, start_service: StartService, database_url: str
) -> None:
    better_auth = start_better_auth(PUBLIC_KEYS)
    service = start_service(
        database_url, BETTER_AUTH_SECRET="", BETTER_AUTH_URL=better_auth.url, CORS_ORIGINS=better_auth.url
    )
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(f"{request.method} {request.url}"))
    page.goto(better_auth.url)
    constants = f"const AUTH_URL = '{better_auth.url}', API_URL = '{service.url}'\n"
    page.add_script_tag(type="module", content=f"{constants}{FRONT_END.replace('export ', '')}\nwindow.api = api")
    page.wait_for_function("window.api !== undefined")

    assert page.evaluate("api('/api/tasks').then(response => response.status)") == 401  # nobody is signed in
    sign_up = {"name": "alice", "email": "alice@example.com", "password": "correct horse"}
    page.evaluate(
        """async (body) => await fetch('/api/auth/sign-up/email', {
            method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) })""",
        sign_up,
    )
    create = """api('/api/tasks', { method: 'POST', headers: { 'Content-Type': 'application/json' },
                                    body: JSON.stringify({ title: 'Buy milk' }) }).then(response => response.json())"""
    assert page.evaluate(create)["title"] == "Buy milk"
    asked.clear()
    assert [task["title"] for task in page.evaluate("api('/api/tasks').then(r => r.json())")["items"]] == ["Buy milk"]
    assert f"GET {better_auth.url}/api/auth/token" not in asked, "a token is used more than once"

    expired: list[Request] = []

    def refuse_once(route: Route, request: Request) -> None:
        if expired or request.method == "OPTIONS":
            route.fallback()
        else:
            expired.append(request)
            route.fulfill(status=401, headers={"Access-Control-Allow-Origin": better_auth.url}, json={"detail": ""})

    page.route("**/api/tasks", refuse_once)
    assert page.evaluate("api('/api/tasks').then(response => response.status)") == 200
    assert f"GET {better_auth.url}/api/auth/token" in asked, "a token that has expired is replaced"
