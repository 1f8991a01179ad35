"""What the service holds and whom it keeps waiting while clients of ill will ask: `uv run tests/bench/attacks.py`.

Each attack goes to a service that has just been started, with a database of its own on one PostgreSQL. Memory is what
the process of the service has (RSS), before the attack and at its largest. Waits are those of another user, who asks
for one task, or for a short list, over and over. It takes some five minutes; --quick has a tenth of the tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import socket
import struct
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.postgres import Postgres, suspended
from tests.support.service_process import Service, token

FILL = """
    INSERT INTO task (user_id, title, description)
    SELECT %(user)s, %(title)s, %(description)s FROM generate_series(1, %(count)s)
"""
SMALL = ("a task", "Something to be done")
LARGE = ("t" * 200, "d" * 2000)
WIDE = ("a task", "€" * 2000)
EMOJI = ("🙂" * 200, "🙂" * 2000)
CONTROL = ("a task", "\x01" * 2000)  # each is six characters of JSON
LIST = "/api/tasks"
PATIENCE = 60.0  # seconds after which an attack is given up


class Memory:
    """The megabytes by which a process has grown at most since it was looked at first."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.before = self.peak = self.now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def now(self) -> int:
        rss: int = self.process.memory_info().rss
        return rss

    def watch(self) -> None:
        while not self.ended.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended.set()
        self.thread.join()

    def __str__(self) -> str:
        return f"+{(self.peak - self.before) / 1e6:.0f} MB"

    def wait_until_steady(self) -> None:
        """Wait until it has not grown for two seconds."""
        deadline = time.monotonic() + PATIENCE
        peak, since = self.peak, time.monotonic()
        while time.monotonic() < min(since + 2, deadline):
            time.sleep(0.05)
            if self.peak > peak:
                peak, since = self.peak, time.monotonic()


class Attack(NamedTuple):
    name: str
    goal: str
    carry_out: Callable[[Service, int], str]
    """Takes a service, and by what the numbers of tasks are to be divided; returns what was measured."""


def fill(service: Service, user: str, count: int, texts: tuple[str, str]) -> None:
    values = {"user": user, "count": count, "title": texts[0], "description": texts[1]}
    with psycopg.connect(service.database_url, autocommit=True) as connection:
        connection.execute(FILL, values)
        connection.execute("VACUUM ANALYZE task")


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request(path: str, user: str | None = None, *, method: str = "GET", key: str = "", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"Authorization: Bearer {token(user)}"] if user else []
    lines += [f"Idempotency-Key: {key}"] if key else []
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask(connection: socket.socket, content: bytes) -> bytes:
    """Send a request and return its answer, which must have a Content-Length and be a success."""
    connection.sendall(content)
    answer = connection.recv(65_536)
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 201 ")), answer
    missing = len(head) + 4 + int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(answer)
    while missing > 0:
        answer += (more := connection.recv(65_536))
        missing -= len(more)
    return answer


class Read(NamedTuple):
    """What was read of a long list."""

    first_byte: float  # seconds until it came
    tasks: int
    whole: bool


def read_list(port: int, user: str) -> Read:
    """Ask for a streamed list and count its tasks, without keeping them."""
    with connect(port) as connection:
        started = time.perf_counter()
        connection.sendall(request(LIST, user))
        rest, tasks, first_byte, whole = b"", 0, 0.0, False
        while not whole and (content := connection.recv(1_000_000)):
            first_byte = first_byte or time.perf_counter() - started
            content = rest + content
            tasks += content.count(b'{"id":')
            whole = content.endswith(b"0\r\n\r\n")  # the last chunk
            rest = content[-5:]  # less than what is counted
    return Read(first_byte, tasks, whole)


def waits(port: int, content: bytes, stop: Callable[[], bool]) -> list[float]:
    """Send a request over and over; return the milliseconds that each took."""
    times = []
    with connect(port) as connection:
        while not stop():
            started = time.perf_counter()
            ask(connection, content)
            times.append((time.perf_counter() - started) * 1000)
            time.sleep(0.001)
    return sorted(times)


def for_seconds(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


def one_task(service: Service, user: str) -> bytes:
    """Return a request for a task of a user who has twenty."""
    fill(service, user, 20, SMALL)
    with service.client(user) as client:
        return request(f"{LIST}/{client.tasks()[0]['id']}", user)


def unread(service: Service, content: bytes, connections: int, *, read: int = 0) -> str:
    """Send something on many connections and read so many bytes of each; then others must still be served."""
    with contextlib.ExitStack() as stack, Memory(service.process.pid) as memory:
        for _ in range(connections):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", service.port))
            connection.sendall(content)
            left = read
            while left > 0:
                left -= len(connection.recv(65_536))
        memory.wait_until_steady()
        service.wait_until_ready(PATIENCE)
        return str(memory)


@contextlib.contextmanager
def elsewhere(function: Callable[..., object], *arguments: object) -> Iterator[Callable[[], bool]]:
    """Run a function in a process of its own, which takes no time of this one; yield whether it has ended."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=function, args=(*arguments, begun), daemon=True)
    process.start()
    assert begun.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    try:
        yield lambda: not process.is_alive() or time.monotonic() > deadline
    finally:
        process.terminate()
        process.join()


def read_lists(port: int, user: str, count: int, begun: threading.Event) -> None:
    threads = [threading.Thread(target=read_list, args=(port, user)) for _ in range(count)]
    begun.set()
    for thread in threads:
        thread.start()


def create_with_keys(port: int, user: str, connections: int, begun: threading.Event) -> None:
    """Create tasks with keys, each on its connection as fast as they are answered, until this process is ended."""
    bearer = request(LIST, user, method="POST", key="KEY", body=b'{"title": "a task"}')

    def create() -> None:
        with connect(port) as connection:
            while True:
                ask(connection, bearer.replace(b"KEY", uuid.uuid4().hex.encode()))
                begun.set()

    for _ in range(connections):
        threading.Thread(target=create, daemon=True).start()
    time.sleep(PATIENCE)


# --- The attacks -----------------------------------------------------------------------------------------------------


def unread_lists(service: Service, divisor: int) -> str:
    fill(service, "many", 10_000 // divisor, SMALL)
    return unread(service, request(LIST, "many"), 60)


def unread_emoji(service: Service, divisor: int) -> str:
    fill(service, "many", 3000 // divisor, EMOJI)
    return unread(service, request(LIST, "many"), 60)


def emoji_left_halfway(service: Service, divisor: int) -> str:
    fill(service, "many", 3000 // divisor, EMOJI)
    return unread(service, request(LIST, "many"), 60, read=4_000_000 // divisor)


def unread_control_characters(service: Service, divisor: int) -> str:
    fill(service, "many", 1000 // divisor, CONTROL)
    return unread(service, request(LIST, "many"), 60)


def broken_off_lists(service: Service, divisor: int) -> str:
    fill(service, "many", 3000 // divisor, WIDE)
    with Memory(service.process.pid) as memory:
        for _ in range(500 // divisor):
            with connect(service.port) as connection:
                connection.sendall(request(LIST, "many"))
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        service.wait_until_ready(PATIENCE)
        return str(memory)


def heads_of_lists(service: Service, divisor: int) -> str:
    fill(service, "many", 3000 // divisor, WIDE)
    return at_once(service, [(request(LIST, "many", method="HEAD"), b"")] * (500 // divisor))


def bodies_at_once(service: Service, divisor: int) -> str:
    body = b'{"title": "x", "unknown": [' + b",".join([b'{"":[]}'] * 8000) + b"]}"
    content = request(LIST, "many", method="POST", body=body)
    return at_once(service, [(content[:-1], content[-1:])] * (300 // divisor))


def at_once(service: Service, requests: list[tuple[bytes, bytes]]) -> str:
    """Send requests on connections of their own, all but an end first, and read the beginning of each answer."""
    with contextlib.ExitStack() as stack, Memory(service.process.pid) as memory:
        connections = [stack.enter_context(connect(service.port)) for _ in requests]
        for connection, (start, _) in zip(connections, requests, strict=True):
            connection.sendall(start)
        for connection, (_, end) in zip(connections, requests, strict=True):
            connection.sendall(end)
        for connection in connections:
            assert connection.recv(1000).startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 201 "))
        return str(memory)


def broken_off_heads(service: Service, divisor: int) -> str:
    fields = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(60))
    with Memory(service.process.pid) as memory:
        for _ in range(5000 // divisor):
            with connect(service.port) as connection:
                connection.sendall(b"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\n" + fields)
        service.wait_until_ready(PATIENCE)
        return str(memory)


def lines_at_once(service: Service, divisor: int) -> str:
    content = b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 16_000
    with contextlib.ExitStack() as stack, Memory(service.process.pid) as memory:
        connections = [stack.enter_context(connect(service.port)) for _ in range(300 // divisor)]
        for connection in connections:
            connection.sendall(content)
        for connection in connections:
            assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")
        return str(memory)


def parameters_at_once(service: Service, divisor: int) -> str:
    fill(service, "many", 1000, SMALL)
    query = "&".join(f"{number:x}" for number in range(13_000))
    return at_once(service, [(request(f"{LIST}?{query}", "many")[:-1], b"\n")] * (300 // divisor))


def lists_left_alone(service: Service, divisor: int) -> str:
    fill(service, "many", 8000, WIDE)
    fields = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 3000) for number in range(20))
    content = request(LIST, "many").removesuffix(b"\r\n") + fields + b"\r\n"
    open_connections: deque[socket.socket] = deque()
    with Memory(service.process.pid) as memory:
        for _ in range(6000 // divisor):
            open_connections.append(connect(service.port))
            open_connections[-1].sendall(content)
            if len(open_connections) == 20:
                with open_connections.popleft() as oldest:
                    oldest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        for connection in open_connections:
            connection.close()
        service.wait_until_ready(PATIENCE)
        return str(memory)


def left_in_a_hang(service: Service, divisor: int) -> str:
    """Ask while the database hangs, and hang up at once; then measure what others wait when it has come back."""
    fill(service, "many", 50, EMOJI)
    content = one_task(service, "another")
    checks, lists = request("/health/ready"), request(LIST, "many")
    with psycopg.connect(service.database_url) as database, Memory(service.process.pid) as memory:
        postmaster = psutil.Process(database.info.backend_pid).parent()
        assert postmaster
        with suspended([postmaster]), suspended(postmaster.children(recursive=True)):
            for number in range(10_000 // divisor):
                with connect(service.port) as connection:
                    connection.sendall(checks if number % 2 else lists)
        [longest, *_] = reversed(waits(service.port, content, for_seconds(1)))
        return f"{longest:.0f} ms, {memory}"


def unread_docs(service: Service, divisor: int) -> str:
    return unread(service, request("/docs/redoc.js") * 4, 200)


def large_lists(service: Service, divisor: int) -> str:
    fill(service, "many", 10_000 // divisor, LARGE)
    content = one_task(service, "another")
    with elsewhere(read_lists, service.port, "many", 4) as ended, Memory(service.process.pid) as memory:
        times = waits(service.port, content, ended)
    return f"{memory}, {times[-1]:.0f} ms"


def very_long_list(service: Service, divisor: int) -> str:
    count = 90_000 // divisor
    fill(service, "many", count, LARGE)
    with Memory(service.process.pid) as memory:
        read = read_list(service.port, "many")
    return f"{read.tasks:,} of {count:,}{'' if read.whole else ', and no end'}, {memory}"


def short_lists_beside_a_long_one(service: Service, divisor: int) -> str:
    fill(service, "many", 40_000 // divisor, SMALL)
    for number in range(31):
        fill(service, f"user-{number}", 20, SMALL)

    def longest(stop: Callable[[], bool]) -> float:
        found: list[float] = []

        def wait_for(number: int) -> None:
            found.append(waits(service.port, request(LIST, f"user-{number}"), stop)[-1])

        threads = [threading.Thread(target=wait_for, args=(number,)) for number in range(31)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(found)

    longest(for_seconds(1))  # opens the connections to the database
    alone = longest(for_seconds(3))
    with elsewhere(read_lists, service.port, "many", 1) as ended:
        beside = longest(ended)
    return f"{beside:.0f} ms, without it {alone:.0f} ms"


def creations_with_keys(service: Service, divisor: int) -> str:
    content = one_task(service, "another")
    alone = waits(service.port, content, for_seconds(3))
    with elsewhere(create_with_keys, service.port, "many", 200):
        beside = waits(service.port, content, for_seconds(5))
    return f"{beside[len(beside) * 95 // 100]:.1f} ms, without them {alone[len(alone) * 95 // 100]:.1f} ms"


def pipelined_requests(service: Service, divisor: int) -> str:
    one = request(LIST)
    with (
        Memory(service.process.pid) as memory,
        connect(service.port) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(one * (10_000_000 // len(one)))
        while connection.recv(65_536):
            pass
    answered = service.log.count(f'path="{LIST}" ')
    return f"{memory}, {answered} answered"


def streamed_list(service: Service, divisor: int) -> str:
    fill(service, "many", 100_000 // divisor, SMALL)
    with Memory(service.process.pid) as memory:
        read = read_list(service.port, "many")
    assert read.whole
    return f"{read.first_byte * 1000:.0f} ms, {memory}"


ATTACKS = [
    Attack("60 lists of 10,000 tasks that nobody reads", "at most +150 MB", unread_lists),
    Attack(
        "4 lists of 10,000 large tasks at once", "at most +60 MB, another's GET waits at most 150 ms", large_lists
    ),
    Attack("a list of 90,000 large tasks", "comes whole", very_long_list),
    Attack(
        "31 users' short lists while one of 40,000 is read", "their longest wait", short_lists_beside_a_long_one
    ),
    Attack("creations with keys on 200 connections of one user", "another's GET, p95", creations_with_keys),
    Attack(
        "60 lists of 1,000 tasks of 2,000 control characters that nobody reads", "at most +150 MB",
        unread_control_characters,
    ),
    Attack("60 lists of 3,000 tasks of emoji that nobody reads", "at most +150 MB", unread_emoji),
    Attack("60 lists of 3,000 tasks of emoji that are left after 4 MB", "at most +240 MB", emoji_left_halfway),
    Attack("500 lists of 3,000 large tasks, broken off one after the other", "at most +150 MB", broken_off_lists),
    Attack("5,000 heads of 60 KB, broken off one after the other", "at most +30 MB", broken_off_heads),
    Attack("300 heads of 16,000 lines, at once", "at most +30 MB", lines_at_once),
    Attack("300 lists with 13,000 parameters each, at once, by one user", "at most +100 MB", parameters_at_once),
    Attack("6,000 lists by one user on 20 connections, reset while they wait", "at most +60 MB", lists_left_alone),
    Attack(
        "10,000 lists and readiness checks, left while the database hangs",
        "at most +30 MB, another's GET waits at most a second afterwards", left_in_a_hang,
    ),
    Attack("500 HEADs of a list of 3,000 large tasks at once, by one user", "at most +150 MB", heads_of_lists),
    Attack("300 bodies of 64 KB of fields that nobody knows, at once", "at most +150 MB", bodies_at_once),
    Attack("200 connections that ask 4 times for /docs/redoc.js and read nothing", "at most +100 MB", unread_docs),
    Attack("10 MB of pipelined requests without a token", "at most +20 MB, one answered", pipelined_requests),
    Attack("a list of 100,000 tasks, streamed", "time to the first byte, memory", streamed_list),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tasks")
    parser.add_argument("--only", default="", help="those attacks whose name has this in it")
    arguments = parser.parse_args()
    print("| attack | goal | measured |\n|---|---|---|", flush=True)
    postgres = Postgres()
    try:
        for number, attack in enumerate(ATTACKS):
            if arguments.only not in attack.name:
                continue
            with psycopg.connect(postgres.url(), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE attack_{number}".encode())
            service = Service(postgres.url(f"attack_{number}"), wait=False)
            try:
                service.wait_until_ready()
                measured = attack.carry_out(service, 10 if arguments.quick else 1)
                print(f"| {attack.name} | {attack.goal} | {measured} |", flush=True)
            finally:
                service.remove()
    finally:
        postgres.remove()


if __name__ == "__main__":
    main()
