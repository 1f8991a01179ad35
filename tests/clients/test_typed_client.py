"""The README's typed client: generated from the real document, compiled strictly, and run through the whole API."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.support.front_end import front_end, with_urls, without_a_browser
from tests.support.readme import code
from tests.support.service_process import ROOT, Service, environment, new_user_id, token

SOURCE = ROOT / "tests" / "clients" / "typed_client"
INSTALL, GENERATE = code("npm install openapi-fetch").splitlines()

# Each mistake, and how the compiler's complaint of it begins.
WRONG = {
    "a status that there is not": (
        "client.GET('/api/tasks', { params: { query: { status: 'late' } } })",
        """TS2322: Type '"late"' is not assignable to type '"all" | "completed" | "pending" | """,
    ),
    "a task without a title": (
        "client.POST('/api/tasks', { body: {} })",
        "TS2322: Type '{}' is not assignable to type '{ title: string; ",
    ),
    "a task without a body": (
        "client.POST('/api/tasks', {})",
        "TS2345: Argument of type '{}' is not assignable to parameter of type '{ params?: ",
    ),
    "a title that is null": (
        "client.PUT('/api/tasks/{task_id}', { params: { path }, body: { title: null } })",
        "TS2322: Type 'null' is not assignable to type 'string'",
    ),
    "a field that a task has not": (
        "task.priority",
        "TS2339: Property 'priority' does not exist on type",
    ),
    "a description that may be null": ("task.description.length", "TS18047: 'task.description' is possibly 'null'"),
    "a path that there is not": (
        "client.GET('/api/todos', {})",
        """TS2345: Argument of type '"/api/todos"' is not assignable to parameter of type 'PathsWithMethod<""",
    ),
    "a method that a path has not": (
        "client.DELETE('/api/tasks', {})",
        """TS2345: Argument of type '"/api/tasks"' is not assignable to parameter of type '"/api/tasks/{task_id}"'""",
    ),
    "a path without its id": (
        "client.GET('/api/tasks/{task_id}', {})",
        "TS2345: Argument of type '{}' is not assignable to parameter of type '{ params: ",
    ),
    "an id that is no number": (
        "client.GET('/api/tasks/{task_id}', { params: { path: { task_id: 'seven' } } })",
        "TS2322: Type 'string' is not assignable to type 'number'",
    ),
    "data before a look at the error": ("answer.data.id", "TS18048: 'answer.data' is possibly 'undefined'"),
    "errors of what may be no 422": ("error.errors", "TS2339: Property 'errors' does not exist on type"),
}
BEFORE = """\
import { client, type Task } from './tasks.js'
const path = { task_id: 1 }
const answer = await client.GET('/api/tasks/{task_id}', { params: { path } })
const task: Task = answer.data!
const error = answer.error!
"""


def run(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def project(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A front end's project with the README's client, and the types that its command generates."""
    if not shutil.which("node") or not (SOURCE / "node_modules").exists():
        pytest.skip("needs node, and `npm install --no-package-lock` in tests/clients/typed_client")
    folder = tmp_path_factory.mktemp("typed-client")
    for file in SOURCE.glob("*.*"):
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(SOURCE / "node_modules")
    (folder / "api.js").write_text(front_end(service.url)["api.js"])
    (folder / "tasks.ts").write_text(with_urls((SOURCE / "tasks.ts").read_text(), service.url))
    generated = run(with_urls(GENERATE, service.url), folder)
    assert generated.returncode == 0, generated.stdout + generated.stderr
    return folder


def test_the_packages_of_the_readme_are_those_that_are_tested() -> None:
    manifest = json.loads((SOURCE / "package.json").read_text())
    tested = manifest["dependencies"] | manifest["devDependencies"]
    for package, _, major in re.findall(r" ([a-z][a-z-]+)(@(\d+))?(?= |$)", INSTALL.replace("npm install", "")):
        assert tested[package].startswith(major), package


def test_only_headers_have_an_unknown_type(project: Path) -> None:
    lines = (project / "schema.d.ts").read_text().splitlines()
    unknown = {line.strip() for line in lines if "unknown" in line}
    assert unknown == {"[name: string]: unknown;"}


def test_the_readmes_client_compiles_and_works_at_every_endpoint(project: Path, service: Service) -> None:
    compiled = run("npx tsc --strict", project)
    assert compiled.returncode == 0, compiled.stdout
    user_id = new_user_id()
    now = int(time.time())
    expired = token(user_id, iat=now - 7200, exp=now - 3600)
    before = len(service.log)
    (project / "browser.mjs").write_text(without_a_browser(expired, token(user_id)))
    walked = run("node --import ./browser.mjs build/walk.js", project)
    assert walked.returncode == 0, walked.stderr
    lines = re.findall(r'^method=(\S+) path="(\S+)" status=(\d+)', service.log[before:], re.MULTILINE)
    assert lines[:2] == [("POST", "/api/tasks", "401"), ("POST", "/api/tasks", "201")]
    asked = {f"{method} {re.sub('[0-9]+', '{task_id}', path)}" for method, path, _ in lines}
    paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
    assert asked == {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


@pytest.fixture(scope="module")
def complaints(project: Path) -> dict[str, str]:
    """What the compiler says of each mistake."""
    file = project / "wrong.ts"
    file.write_text(BEFORE + "".join(f"{statement}\n" for statement, _ in WRONG.values()))
    compiled = run("npx tsc --strict --noEmit", project)
    file.unlink()
    found = dict(re.findall(r"^wrong\.ts\((\d+),\d+\): error (.*)$", compiled.stdout, re.MULTILINE))
    first = BEFORE.count("\n") + 1
    lines = {name: found.pop(str(number), "") for number, name in enumerate(WRONG, first)}
    assert not found, compiled.stdout
    return lines


@pytest.mark.parametrize("mistake", WRONG)
def test_the_compiler_refuses_a_mistake(mistake: str, complaints: dict[str, str]) -> None:
    assert complaints[mistake].startswith(WRONG[mistake][1])
