"""Clients that repeat what they got no answer to have what they meant to have."""

from __future__ import annotations

import json
import random
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.conditions import MOVED_ON, Task, assert_created, if_match, path_of
from tests.support.errors import TASK_NOT_FOUND
from tests.support.front_end import front_end, without_a_browser
from tests.support.service_process import Client, Service, new_user_id, token

# --- A client that repeats what it got no answer to ------------------------------------------------------------------

FATES = {
    "passed on": 6,
    "request lost": 1,
    "request cut": 1,
    "answer lost": 1,
    "answer cut": 1,
    "not waited for": 1,
}
"""What becomes of a request on its way, and how often."""


class BadConnection:
    """A proxy for one client, in a thread of its own, that loses requests and answers, whole or in part, at random."""

    def __init__(self, service: Service, choices: random.Random) -> None:
        self.service, self.choices = service, choices
        self.fates: Counter[str] = Counter()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def __enter__(self) -> BadConnection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # which ends the wait for the next connection
        self.thread.join()
        self.listener.close()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self.carry(connection)

    def carry(self, connection: socket.socket) -> None:
        """Carry one request to the service and the answer back, or not."""
        request = read_request(connection)
        request = re.sub(rb"\r\nconnection: [^\r]*", b"\r\nConnection: close", request, count=1, flags=re.IGNORECASE)
        [fate] = self.choices.choices(list(FATES), list(FATES.values()))
        if fate == "not waited for" and b"\r\nif-match:" not in request.lower():
            fate = "answer lost"  # if it is made later than its repetition, a condition alone makes that harmless
        self.fates[fate] += 1
        if fate == "request lost":
            return
        with socket.create_connection(("127.0.0.1", self.service.port), timeout=30) as server:
            server.sendall(request[: self.choices.randrange(1, len(request))] if fate == "request cut" else request)
            if fate in ("request cut", "not waited for"):
                return
            answer = b"".join(iter(lambda: server.recv(65_536), b""))
        if fate != "answer lost":
            connection.sendall(answer[: self.choices.randrange(1, len(answer))] if fate == "answer cut" else answer)


def read_request(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        if not (more := connection.recv(65_536)):
            raise ConnectionError
        request += more
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        if not (more := connection.recv(65_536)):
            raise ConnectionError
        body += more
    return head + b"\r\n\r\n" + body


class Persistent:
    """A client that repeats each request until it has an answer, and the tasks that it means to have."""

    def __init__(self, user_id: str, connection: BadConnection, choices: random.Random) -> None:
        self.client = Client(connection.url, user_id, headers={"Connection": "close"})
        self.choices = choices
        self.tasks: dict[int, Task] = {}
        self.outcomes: Counter[str] = Counter()

    def send(self, method: str, path: str, body: object, headers: dict[str, str]) -> tuple[httpx.Response, bool]:
        """Return the answer, and whether an earlier try may have been made."""
        for cuts in range(100):
            with suppress(httpx.TransportError):
                return self.client.request(method, path, json=body, headers=headers), cuts > 0
        raise AssertionError("no answer to a hundred tries")

    def live(self, operations: int) -> None:
        for _ in range(operations):
            task = self.choices.choice([None, *self.tasks.values()][:8])
            conditional = self.choices.random() < 0.5
            completed = self.choices.random() < 0.5
            match self.choices.randrange(5) if task else 0:
                case 0:
                    self.create(completed)
                case _ if task is None:
                    raise AssertionError
                case 1:
                    wanted: Task = {"title": self.text(), "description": self.choices.choice([None, self.text()])}
                    self.change(task, "PUT", "", wanted, wanted, if_match(task) if conditional else {})
                case 2:
                    wanted = {"completed": completed}
                    self.change(task, "PATCH", "/complete", wanted, wanted, if_match(task) if conditional else {})
                case 3:
                    wanted = {"completed": not task["completed"]}
                    self.change(task, "PATCH", "/complete", None, wanted, if_match(task))
                case 4:
                    self.delete(task, if_match(task) if conditional else {})

    def text(self) -> str:
        return f"text {self.choices.randrange(10**9)}"

    def create(self, completed: bool) -> None:
        fields = {"title": self.text(), "completed": completed}
        key = f"{self.choices.getrandbits(128):x}"
        response, _ = self.send("POST", "/api/tasks", fields, {"Idempotency-Key": key})
        task = assert_created(response)
        assert task == task | fields | {"user_id": self.client.user_id, "description": None}
        assert task["id"] not in self.tasks
        self.tasks[task["id"]] = task

    def change(self, task: Task, method: str, action: str, body: object, wanted: Task, headers: dict[str, str]) -> None:
        response, repeated = self.send(method, path_of(task) + action, body, headers)
        if response.status_code == 412:
            assert (response.json(), repeated, headers) == (MOVED_ON, True, if_match(task))
            self.outcomes["412"] += 1
            response, _ = self.send("GET", path_of(task), None, {})
        assert response.status_code == 200
        changed = response.json()
        assert changed == task | wanted | {"updated_at": changed["updated_at"]}
        assert changed["updated_at"] > task["updated_at"]
        self.tasks[task["id"]] = changed

    def delete(self, task: Task, headers: dict[str, str]) -> None:
        response, repeated = self.send("DELETE", path_of(task), None, headers)
        if response.status_code == 404:
            assert (response.json(), repeated) == (TASK_NOT_FOUND, True)
            self.outcomes["404"] += 1
        else:
            assert response.status_code == 204
        del self.tasks[task["id"]]


@pytest.mark.parametrize("operations", [2_000, pytest.param(6_000, marks=pytest.mark.long)])
def test_a_client_that_repeats_its_writes_has_what_it_meant_to_have(three_processes: Service, operations: int) -> None:
    """Four clients of each of two users, each with tasks of its own."""
    users = [new_user_id(), new_user_id()]
    with ExitStack() as stack:
        connections, clients = [], []
        for seed in range(8):
            connection = stack.enter_context(BadConnection(three_processes, random.Random(seed)))
            connections.append(connection)
            clients.append(Persistent(users[seed % 2], connection, random.Random(-seed)))
            stack.enter_context(clients[-1].client)
        with ThreadPoolExecutor(len(clients)) as threads:
            list(threads.map(lambda client: client.live(operations // len(clients)), clients))

    for user_id in users:
        meant = [task for client in clients if client.client.user_id == user_id for task in client.tasks.values()]
        meant.sort(key=lambda task: (task["created_at"], task["id"]), reverse=True)
        with three_processes.client(user_id) as client:
            assert client.tasks() == meant
    fates = sum((connection.fates for connection in connections), Counter())
    outcomes = sum((client.outcomes for client in clients), Counter())
    assert fates.keys() == FATES.keys()
    assert outcomes.keys() == {"404", "412"}, "no write was made whose answer was lost"
    assert fates.total() > operations * 1.3


MEANT = """
    import './browser.mjs'
    const { change, create, list, remove, toggle } = await import('./tasks.js')
    const now = globalThis.setTimeout
    globalThis.setTimeout = (callback, milliseconds) => now(callback, milliseconds / 100)
    const tasks = []
    for (let number = 0; number < 60; number++) {
      const { status, json: task } = await create({ title: `task ${number}` })
      if (status !== 201) throw new Error(status)
      if (number % 4 === 0) await remove(task)
      else if (number % 4 === 1) tasks.push((await change(task, { description: `of ${number}` })).json)
      else if (number % 4 === 2) tasks.push((await toggle(task)).json)
      else tasks.push(task)
    }
    const lists = [await list(), await list('pending'), await list('completed')]
    console.log(JSON.stringify([tasks, ...lists.map(({ json }) => json.items)]))
"""


@pytest.mark.parametrize("seed", range(3))
def test_the_client_of_the_readme_has_what_it_meant_to_have(
    service: Service, alice: Client, seed: int, tmp_path: Path
) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    with BadConnection(service, random.Random(seed)) as connection:
        modules = {"browser.mjs": without_a_browser(token(alice.user_id)), "main.mjs": MEANT}
        for name, text in (modules | front_end(connection.url) | {"package.json": '{"type": "module"}'}).items():
            (tmp_path / name).write_text(text)
        command = ["node", "main.mjs"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    meant, listed, pending, completed = json.loads(ran.stdout)
    assert len(meant) == 45
    for task in meant:
        del task["updated_at"]  # a change that was made twice has moved it on
    found = [{name: value for name, value in task.items() if name != "updated_at"} for task in alice.tasks()]
    assert found == meant[::-1]
    assert [task["completed"] for task in found].count(True) == 15
    assert [listed, pending, completed] == [alice.tasks(), alice.tasks("pending"), alice.tasks("completed")]
    assert connection.fates.total() > connection.fates["passed on"] > 0
