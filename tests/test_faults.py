import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import psycopg
import pytest
from calls import Client, connected, new_id, refused, token_row, wrong
from conftest import OnetimeServer, Serve, wait_until_serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onetime.v1 import one_time_tokens_pb2 as ott

from service.db import Database

RECOVERY_S: Final = 15.0
"""How long the service may take to be well again after a fault is over."""
TIMEOUT_S: Final = 60.0
MAX_ATTEMPTS: Final = 5

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


async def until(true: Callable[[], Awaitable[bool]], within: float) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(within):
        while not await true():  # noqa: ASYNC110 - what it waits for is in other processes
            await asyncio.sleep(0.05)


async def health(server: OnetimeServer) -> object:
    """Return what health says of the whole server."""
    async with server.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status


async def ended(call: Awaitable[object]) -> str:
    """Tell how a call ended: OK, the reason of a refusal, or a status that has none."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(dict(error.trailing_metadata() or ()).get("onetime-reason", error.code().name))
    return "OK"


# A PostgreSQL of the test's own

_HOST: Final = """
import sys
from pathlib import Path
from service.devdb import embedded_postgres

for _ in sys.stdin:
    with embedded_postgres(Path(sys.argv[1])) as url:
        print(url, flush=True)
        sys.stdin.readline()
    print("stopped", flush=True)
"""


class PrivatePostgres:
    """A PostgreSQL that a test may stop and break. A class because starting and stopping talk to one process.

    That process stands between the test and the server, since a process with gRPC in it had better not fork.
    """

    def __init__(self, host: asyncio.subprocess.Process, folder: Path) -> None:
        """Take the process that starts and stops the server."""
        self._host = host
        self._folder = folder
        self.url = ""

    async def start(self) -> None:
        """Start it, at the URL that it always has."""
        self.url = await self._tell()

    async def stop(self) -> None:
        """Stop it, in its fast way: sessions are ended."""
        assert await self._tell() == "stopped"

    async def _tell(self) -> str:
        assert self._host.stdin
        assert self._host.stdout
        async with asyncio.timeout(TIMEOUT_S):
            self._host.stdin.write(b"\n")
            await self._host.stdin.drain()
            return (await self._host.stdout.readline()).decode().strip()

    def processes(self) -> list[int]:
        """Return the ids of the server and all of its sessions."""
        postmaster = (self._folder / "postgres" / "postmaster.pid").read_text("utf-8").split()[0]
        children = Path("/proc", postmaster, "task", postmaster, "children").read_text("ascii").split()
        return [int(pid) for pid in (postmaster, *children)]

    def signal(self, number: int) -> None:
        """Send a signal to all of them."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@pytest.fixture
async def private_postgres() -> AsyncIterator[PrivatePostgres]:
    """A PostgreSQL that runs, of this test's own."""
    with tempfile.TemporaryDirectory(prefix="onetime-private-") as name:
        host = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _HOST, name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        postgres = PrivatePostgres(host, Path(name))
        try:
            await postgres.start()
            yield postgres
        finally:
            # At the end of its input it stops the server, and ends.
            await asyncio.wait_for(host.communicate(b""), TIMEOUT_S)
    assert host.returncode == 0


# Load


@dataclass
class Load:
    """Callers that issue, consume and guess without pause, and remember what they were told."""

    client: Client
    issued: list[ott.IssueTokenResponse] = field(default_factory=list)
    """Acknowledged, and left alone."""
    spent: list[ott.IssueTokenResponse] = field(default_factory=list)
    """Consumed, and told so."""
    unsure: list[tuple[ott.IssueTokenResponse, str]] = field(default_factory=list)
    """Whose consumption, of this request_id, ended in an error."""
    guessed: list[tuple[ott.IssueTokenResponse, list[str]]] = field(default_factory=list)
    """With what was told of each wrong code."""
    ends: Counter[str] = field(default_factory=Counter)
    """How calls ended."""

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - of any call
        try:
            answer = await call()
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            reason = trailing.get("onetime-reason", "-")
            self.ends[f"{error.code().name} {reason!s}"] += 1
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # As clients do.
                await asyncio.sleep(0.02)
            return str(reason)
        self.ends["OK"] += 1
        return answer

    async def caller(self, number: int, done: asyncio.Event) -> None:
        """Make calls until it is enough."""
        digits = number % 2 * 6
        while not done.is_set():
            kept = await self._call(partial(self.client.issue, digits=digits))
            if not isinstance(kept, str):
                self.issued.append(kept)
            taken = await self._call(partial(self.client.issue, digits=digits))
            if isinstance(taken, str):
                continue
            if digits:
                codes = [wrong(taken.secret, by=n + 1) for n in range(3)]
                guesses = [await self._call(partial(self.client.consume, taken, code)) for code in codes]
                self.guessed.append((taken, guesses))
                continue
            request_id = new_id()
            end = await self._call(partial(self.client.consume, taken, request_id=request_id))
            if isinstance(end, str):
                self.unsure.append((taken, request_id))
            else:
                self.spent.append(taken)

    @contextlib.asynccontextmanager
    async def run(self, callers: int = 8) -> AsyncIterator[None]:
        """Keep the callers busy until the block ends."""
        done = asyncio.Event()
        tasks = [asyncio.create_task(self.caller(number, done)) for number in range(callers)]
        try:
            yield
        finally:
            done.set()
            await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT_S)

    async def some(self) -> None:
        """Wait until there is something of each kind to lose."""
        before = len(self.issued), len(self.spent), len(self.guessed)

        async def more() -> bool:
            now = len(self.issued), len(self.spent), len(self.guessed)
            return all(n >= b + 10 for n, b in zip(now, before, strict=True))

        await until(more, TIMEOUT_S)

    async def check(self, client: Client, url: str) -> None:
        """See, through a server that is well, that what was told holds, and that nothing happened twice."""

        async def gone(issued: ott.IssueTokenResponse) -> None:
            assert (await refused(client.consume(issued))).reason == "TOKEN_NOT_FOUND"

        async def found_out(issued: ott.IssueTokenResponse, request_id: str) -> None:
            # It took effect whole or not at all, and its repetition finds out, or does it now.
            assert (await client.consume(issued, request_id=request_id)).id == issued.token.id
            await gone(issued)

        async def good(issued: ott.IssueTokenResponse) -> None:
            assert (await client.consume(issued)).id == issued.token.id

        checks: list[Awaitable[None]] = [
            *map(gone, self.spent),
            *(found_out(issued, request_id) for issued, request_id in self.unsure),
            *map(good, self.issued),
        ]
        turns = asyncio.Semaphore(8)

        async def in_turn(check: Awaitable[None]) -> None:
            async with turns:
                await check

        await asyncio.gather(*map(in_turn, checks))
        with connected(url) as database:
            for issued, guesses in self.guessed:
                assert set(guesses) <= {"CODE_MISMATCH", "DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN", "-"}
                assert guesses.count("CODE_MISMATCH") <= token_row(database, issued)["failed_attempts"] <= 3


# PostgreSQL


async def test_postgresql_is_restarted_under_load(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """While PostgreSQL is down calls are UNAVAILABLE and health says so; then all is well, and nothing was lost."""
    async with serve(private_postgres.url, drain_delay="0s") as server, server.channel() as channel:
        load = Load(Client(channel))
        async with load.run():
            await load.some()
            await private_postgres.stop()

            async def told() -> bool:
                return await health(server) == NOT_SERVING

            await until(told, RECOVERY_S)
            await private_postgres.start()

            async def well() -> bool:
                return await health(server) == SERVING

            await until(well, RECOVERY_S)
            await load.some()
        unavailable = {f"UNAVAILABLE {reason}" for reason in ("DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN")}
        assert load.ends.keys() <= {"OK", "FAILED_PRECONDITION CODE_MISMATCH", *unavailable}
        assert load.ends["UNAVAILABLE DATABASE_UNAVAILABLE"] > 0
        await load.check(Client(channel), private_postgres.url)


async def test_a_restart_in_idle_times_goes_unnoticed(serve: Serve, migrated_url: str) -> None:
    """Calls that meet connections which PostgreSQL has closed meanwhile get new ones, and nobody hears of it."""
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        with connected(migrated_url) as database:
            for _ in range(3):
                issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
                started = [await client.start() for _ in range(4)]
                sessions = "from pg_stat_activity where datname = current_database() and application_name = 'onetime'"
                old = database.execute(f"select pid, pg_terminate_backend(pid) {sessions}").fetchall()
                pids = [row["pid"] for row in old]
                while database.execute(f"select {sessions} and pid = any(%s)", [pids]).rowcount:
                    pass
                calls = [
                    *(client.consume(each) for each in issued),
                    *(client.verify(each) for each in started),
                    *(client.issue() for _ in range(8)),
                    *(client.list(new_id()) for _ in range(4)),
                ]
                assert Counter(await asyncio.gather(*map(ended, calls))) == {"OK": len(calls)}


def test_the_pool_does_not_sleep_through_a_recovery() -> None:
    """Attempts to reconnect have pauses that double, so they start anew often: a database that is back is noticed."""
    database = Database("postgresql://nobody@127.0.0.1:1/none", pool_size=1)
    assert database.pool.reconnect_timeout <= RECOVERY_S / 4


async def test_postgresql_crashes(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """PostgreSQL crashes under load and recovers: what was acknowledged is there, and nothing is accepted twice."""
    async with serve(private_postgres.url, drain_delay="0s") as server, server.channel() as channel:
        load = Load(Client(channel))
        async with load.run():
            await load.some()
            os.kill(private_postgres.processes()[0], signal.SIGQUIT)
            await private_postgres.stop()
            await private_postgres.start()
            await wait_until_serving(server)
            await load.some()
        await load.check(Client(channel), private_postgres.url)


async def test_postgresql_is_frozen(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """While PostgreSQL hangs every call ends by the server's cap all the same; afterwards all is well."""
    async with (
        serve(private_postgres.url, drain_delay="0s", call_timeout="1s") as server,
        server.channel() as channel,
    ):
        client = Client(channel)
        issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
        private_postgres.signal(signal.SIGSTOP)
        try:
            calls = [*(client.consume(each) for each in issued), *(client.issue() for _ in range(8))]
            async with asyncio.timeout(RECOVERY_S):
                ends = Counter(await asyncio.gather(*map(ended, calls)))
            assert ends.keys() <= {"DEADLINE_EXCEEDED", "DATABASE_UNAVAILABLE"}

            async def told() -> bool:
                return await health(server) == NOT_SERVING

            await until(told, RECOVERY_S)
        finally:
            private_postgres.signal(signal.SIGCONT)
        async with asyncio.timeout(RECOVERY_S):
            await wait_until_serving(server)
        for each in issued:
            # Some calls went on, and nobody heard of it.
            assert await ended(client.consume(each)) in ("OK", "TOKEN_NOT_FOUND")
            assert await ended(client.consume(each)) == "TOKEN_NOT_FOUND"
        await client.consume(await client.issue())


# The service


async def test_the_service_is_killed_under_load(serve: Serve, migrated_url: str) -> None:
    """After a crash of the service nothing is accepted twice, guesses stay counted, and repetitions find out."""
    async with serve(migrated_url, drain_delay="0s") as other, other.channel() as other_channel:
        unsure = 0
        for _ in range(2):
            async with serve(migrated_url) as server, server.channel() as channel:
                load = Load(Client(channel))
                async with load.run(callers=16):
                    await load.some()
                    await server.kill()
            unsure += len(load.unsure)
            assert load.ends.keys() <= {"OK", "UNAVAILABLE -", "FAILED_PRECONDITION CODE_MISMATCH"}
            await load.check(Client(other_channel), migrated_url)
        # Some were killed in their middle.
        assert unsure > 0


async def test_the_service_is_stopped_under_load(serve: Serve, migrated_url: str) -> None:
    """After SIGTERM health says so, calls go on for the delay and under way for the grace, and it exits with 0."""
    async with serve(migrated_url, drain_delay="0s") as other, other.channel() as other_channel:
        async with serve(migrated_url, drain_delay="1s") as server, server.channel() as channel:
            load = Load(Client(channel))
            async with load.run(callers=16):
                await load.some()
                server.process.terminate()

                async def told() -> bool:
                    return await health(server) == NOT_SERVING

                await until(told, TIMEOUT_S)
                served = load.ends["OK"]

                async def go_on() -> bool:
                    return load.ends["OK"] > served

                await until(go_on, TIMEOUT_S)
                assert await asyncio.wait_for(server.process.wait(), TIMEOUT_S) == 0
        # Refused because it stops, and nothing else; gRPC cancels what had arrived, and had not been taken up yet.
        assert load.ends.keys() <= {"OK", "UNAVAILABLE -", "CANCELLED -", "FAILED_PRECONDITION CODE_MISMATCH"}
        await load.check(Client(other_channel), migrated_url)


async def test_a_call_under_way_ends_before_the_service_does(serve: Serve, migrated_url: str) -> None:
    """A call that waits when SIGTERM arrives gets its answer."""
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        issued = await client.issue()
        with connected(migrated_url) as holder, connected(migrated_url) as observer:
            with holder.transaction():
                holder.execute("select from auth.one_time_tokens where id = %s for update", [issued.token.id])
                call = asyncio.ensure_future(client.consume(issued))
                await until(partial(_somebody_waits, observer), TIMEOUT_S)
                server.process.terminate()
                await until(partial(_refuses, client), TIMEOUT_S)
                assert not call.done()
            assert (await call).id == issued.token.id
        assert await asyncio.wait_for(server.process.wait(), TIMEOUT_S) == 0


async def _somebody_waits(database: psycopg.Connection[Any]) -> bool:
    waiting = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    return database.execute(waiting).rowcount > 0


async def _refuses(client: Client) -> bool:
    return await ended(client.list(new_id())) == "UNAVAILABLE"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(serve: Serve, migrated_url: str, number: int) -> None:
    """The first signal waits for balancers and calls, however long; the second does not."""
    async with serve(migrated_url, drain_delay="5m", shutdown_grace="10m") as server:
        server.process.send_signal(number)

        async def told() -> bool:
            return await health(server) == NOT_SERVING

        await until(told, TIMEOUT_S)
        assert server.process.returncode is None
        server.process.send_signal(number)
        assert await asyncio.wait_for(server.process.wait(), RECOVERY_S) == 0


async def test_a_second_signal_does_not_wait_for_calls(serve: Serve, migrated_url: str) -> None:
    """The second signal ends calls under way too: each of them took effect whole or not at all."""
    async with serve(migrated_url, drain_delay="0s", shutdown_grace="10m", call_timeout="1m") as server:
        async with server.channel() as channel:
            client = Client(channel)
            issued = await client.issue()
            with (
                connected(migrated_url) as observer,
                connected(migrated_url) as holder,
                holder.transaction(),
            ):
                holder.execute("select from auth.one_time_tokens where id = %s for update", [issued.token.id])
                call = asyncio.ensure_future(ended(client.consume(issued)))
                await until(partial(_somebody_waits, observer), TIMEOUT_S)
                server.process.terminate()
                await until(partial(_refuses, client), TIMEOUT_S)
                server.process.terminate()
                assert await call in ("UNAVAILABLE", "CANCELLED")
        assert await asyncio.wait_for(server.process.wait(), RECOVERY_S) == 0
