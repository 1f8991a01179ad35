"""The README's way to add a field, made in a copy of the project: the field works, and all else still does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.service_process import ROOT, Client, Service, environment

README = (ROOT / "README.md").read_text()
[DIFF] = re.findall(r"^```diff\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)

TESTS = ("tasks", "conditions", "isolation", "errors", "answers", "concurrency", "properties", "hostile_requests")


def changed(file: Path, hunks: str) -> str:
    """Return the text of a file after the changes of a diff, each of which has to fit exactly one place."""
    text = file.read_text()
    for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE)[1:]:
        before, after = (
            "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in kept) for kept in (" -", " +")
        )
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("with-a-due-date")
    for name in ("service.py", "sql", "tests", "pyproject.toml", "Procfile", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name, hunks in re.findall(r"^--- a/.*\n\+\+\+ b/(.*)\n((?:.*\n)*?)(?=^--- |\Z)", DIFF, re.MULTILINE):
        (folder / name).write_text(changed(folder / name, hunks))
    yield folder
    shutil.rmtree(folder)


def test_it_takes_five_files() -> None:
    assert len(re.findall("^--- a/", DIFF, re.MULTILINE)) == 5


@pytest.fixture(scope="module")
def service(project: Path, new_database: Callable[[], str]) -> Iterator[Service]:
    service = Service(new_database(), folder=project)
    service.wait_until_ready()
    yield service
    service.remove()


def test_the_field_is_stored_changed_cleared_and_documented(service: Service, alice: Client) -> None:
    task = alice.create("Buy milk", due_date="2026-01-31")
    assert task["due_date"] == "2026-01-31"
    assert alice.create("Buy bread")["due_date"] is None
    path = f"/api/tasks/{task['id']}"
    assert alice.get(path).json() == task
    moved = alice.put(path, json={"due_date": "2026-02-28"}).json()
    assert moved == task | {"due_date": "2026-02-28", "updated_at": moved["updated_at"]}
    assert alice.put(path, json={"title": "Buy more milk"}).json()["due_date"] == "2026-02-28"
    assert alice.put(path, json={"due_date": None}).json()["due_date"] is None
    schemas = httpx.get(f"{service.url}/openapi.json").json()["components"]["schemas"]
    for name in ("Task", "NewTask", "TaskChanges"):
        assert schemas[name]["properties"]["due_date"]["type"] == ["string", "null"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "must be a string or null"),
        ("soon", "must look like 2026-01-31"),
        ("", "must not be blank"),
        ("2026-02-31", "is refused by the database"),
    ],
)
def test_a_wrong_value_is_told(alice: Client, value: object, message: str) -> None:
    response = alice.post("/api/tasks", json={"title": "Buy milk", "due_date": value})
    field = "body" if "database" in message else "due_date"
    assert (response.status_code, response.json()["errors"]) == (422, [{"field": field, "message": message}])
    assert alice.tasks() == []


@pytest.mark.long
def test_the_tests_of_the_api_pass(project: Path) -> None:
    files = [f"tests/test_{name}.py" for name in TESTS]
    # One test knows all the fields of a task, to see that there is no other; the mutants are of other statements.
    others = "not mutant and not returned_with_what_the_server_adds"
    command = [sys.executable, "-m", "pytest", "-q", "-k", others, *files]
    run = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]
