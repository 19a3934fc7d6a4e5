import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import grpc
import grpc.aio
import psycopg
import pytest
from calls import Client, connected, consume_request, ended, new_id, reason, refused, token_row, verification_row, wrong
from conftest import OnetimeServer, PostgresServer, Serve, wait_until_serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onetime.v1 import one_time_tokens_pb2 as ott
from proxy import Proxy
from psycopg import sql

from service.call import Call, current_call
from service.db import Database
from service.devdb import wheel_programs

RECOVERY_S: Final = 15.0
"""How long the service may take to be well again after a fault is over."""
CALL_S: Final = 5.0
"""The server's cap on a call."""
MARGIN_S: Final = 3.0
"""What a call may take beyond that, on a machine that does more than this."""
TIMEOUT_S: Final = 60.0

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
        self.folder = folder
        self.url = ""

    async def start(self) -> None:
        """Start it, at the URL that it always has."""
        self.url = await self._tell()
        assert self.url, "it did not start"

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
        postmaster = (self.folder / "postgres" / "postmaster.pid").read_text("utf-8").split()[0]
        children = Path("/proc", postmaster, "task", postmaster, "children").read_text("ascii").split()
        return [int(pid) for pid in (postmaster, *children)]

    def signal(self, number: int) -> None:
        """Send a signal to all of them."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.asynccontextmanager
async def postgres_in(folder: Path) -> AsyncIterator[PrivatePostgres]:
    """Run PostgreSQL in a folder."""
    host = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOST, folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    postgres = PrivatePostgres(host, folder)
    try:
        await postgres.start()
        yield postgres
    finally:
        # At the end of its input it stops the server, and ends.
        await asyncio.wait_for(host.communicate(b""), TIMEOUT_S)
    assert host.returncode == 0


@pytest.fixture
async def private_postgres() -> AsyncIterator[PrivatePostgres]:
    """A PostgreSQL that runs, of this test's own."""
    with tempfile.TemporaryDirectory(prefix="onetime-private-") as name:
        async with postgres_in(Path(name)) as postgres:
            yield postgres


@contextlib.asynccontextmanager
async def standby_of(primary: PrivatePostgres) -> AsyncIterator[PrivatePostgres]:
    """Run a standby, which confirms every commit of the primary."""
    with tempfile.TemporaryDirectory(prefix="onetime-standby-") as name:
        folder = Path(name)
        copy = await asyncio.create_subprocess_exec(
            *(wheel_programs() / "pg_basebackup", "--write-recovery-conf", "--checkpoint=fast"),
            *("--dbname", primary.url, "--pgdata", folder / "postgres"),
        )
        assert await copy.wait() == 0
        (folder / "postgres" / ".s.PGSQL.5432.lock").unlink()
        owner = (primary.folder / "postgres").stat()
        for path in (folder / "postgres", *(folder / "postgres").rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        async with postgres_in(folder) as standby:
            change(primary.url, "synchronous_standby_names = '*'")
            yield standby


def change(url: str, setting: str) -> None:
    """Change a setting of a running PostgreSQL."""
    with connected(url) as database:
        # Whatever it is that was changed before.
        database.execute("set default_transaction_read_only = off")
        database.execute("set synchronous_commit = local")
        database.execute(f"alter system set {setting}")
        database.execute("select pg_reload_conf()")


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
    slowest: float = 0
    """How long the slowest took."""

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - of any call
        began = time.monotonic()
        try:
            answer = await call()
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            reason = trailing.get("onetime-reason", "-")
            self.ends[f"{error.code().name} {reason!s}"] += 1
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                # As clients do.
                began += 0.02
                await asyncio.sleep(0.02)
            return str(reason)
        finally:
            self.slowest = max(self.slowest, time.monotonic() - began)
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
        assert self.slowest <= CALL_S + MARGIN_S

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
                # Their sockets are closed when they end. They leave the view a little earlier.
                await until(partial(_all_gone, [row["pid"] for row in old]), TIMEOUT_S)
                calls = [
                    *(client.consume(each) for each in issued),
                    *(client.verify(each) for each in started),
                    *(client.issue() for _ in range(8)),
                    *(client.list(new_id()) for _ in range(4)),
                ]
                assert Counter(await asyncio.gather(*map(ended, calls))) == {"OK": len(calls)}


async def _all_gone(processes: Sequence[int]) -> bool:
    return not any(map(_runs, processes))


def _runs(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_the_pool_does_not_sleep_through_a_recovery() -> None:
    """Attempts to reconnect have pauses that double, so they start anew often: a database that is back is noticed."""
    database = Database("postgresql://nobody@127.0.0.1:1/none", pool_size=1)
    assert database.pool.reconnect_timeout <= RECOVERY_S / 4


@pytest.mark.parametrize("who", ["the postmaster", "all"])
async def test_postgresql_crashes(serve: Serve, private_postgres: PrivatePostgres, who: str) -> None:
    """PostgreSQL crashes under load and recovers: what was acknowledged is there, and nothing is accepted twice."""
    async with serve(private_postgres.url) as server, server.channel() as channel:
        load = Load(Client(channel))
        async with load.run():
            await load.some()
            if who == "all":
                private_postgres.signal(signal.SIGKILL)
            else:
                os.kill(private_postgres.processes()[0], signal.SIGQUIT)
            await private_postgres.stop()
            await private_postgres.start()
            async with asyncio.timeout(RECOVERY_S):
                await wait_until_serving(server)
            await load.some()
        await load.check(Client(channel), private_postgres.url)


async def test_postgresql_is_frozen(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """While PostgreSQL hangs every call ends by the server's cap all the same; afterwards all is well."""
    async with serve(private_postgres.url, call_timeout="1s") as server, server.channel() as channel:
        client = Client(channel)
        issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
        private_postgres.signal(signal.SIGSTOP)
        try:
            await _all_end_in_time(client, issued)

            async def told() -> bool:
                return await health(server) == NOT_SERVING

            await until(told, RECOVERY_S)
        finally:
            private_postgres.signal(signal.SIGCONT)
        async with asyncio.timeout(RECOVERY_S):
            await wait_until_serving(server)
        await _none_counts_twice(client, issued)


async def _all_end_in_time(client: Client, issued: Sequence[ott.IssueTokenResponse]) -> None:
    """Consume tokens, and issue others, where the database does not answer, from a server whose cap is 1 s."""
    began = time.monotonic()
    calls = [*(client.consume(each) for each in issued), *(client.issue() for _ in range(8))]
    ends = Counter(await asyncio.gather(*map(ended, calls)))
    assert time.monotonic() - began < 1 + MARGIN_S
    # Those whose COMMIT was sent are in doubt.
    assert ends.keys() <= {"DEADLINE_EXCEEDED", "DATABASE_UNAVAILABLE", "OUTCOME_UNKNOWN"}
    assert ends["OUTCOME_UNKNOWN"] > 0


async def _none_counts_twice(client: Client, issued: Sequence[ott.IssueTokenResponse]) -> None:
    """See that each was consumed by a call whose end nobody heard, or is good for one use still."""
    for each in issued:
        assert await ended(client.consume(each)) in ("OK", "TOKEN_NOT_FOUND")
        assert await ended(client.consume(each)) == "TOKEN_NOT_FOUND"
    await client.consume(await client.issue())


# The connection to PostgreSQL


@pytest.fixture
async def proxy(migrated_url: str) -> AsyncIterator[Proxy]:
    """A proxy before `migrated_url`."""
    one = Proxy(migrated_url)
    async with one.run():
        yield one


def losing(proxy: Proxy, when: str, skip: int = 0) -> contextlib.AbstractContextManager[None]:
    """Lose a connection before or after a COMMIT."""
    return proxy.losing_before_commit(skip) if when == "before" else proxy.losing_after_commit(skip)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_connection_is_lost_around_commit(serve: Serve, migrated_url: str, proxy: Proxy, when: str) -> None:
    """Nobody knows whether the call took effect, and is told so; its repetition finds out, or does it now, once."""
    done = when == "after"
    async with serve(proxy.url) as server, server.channel() as channel:
        client = Client(channel)
        with connected(migrated_url) as database:

            def tokens(user: str) -> int:
                return database.execute("select from auth.one_time_tokens where user_id = %s", [user]).rowcount

            request_id, user = new_id(), new_id()
            with losing(proxy, when):
                assert await reason(client.issue(user, request_id=request_id)) == "OUTCOME_UNKNOWN"
            assert tokens(user) == done
            link = await client.issue(user, request_id=request_id)
            assert tokens(user) == 1

            request_id = new_id()
            with losing(proxy, when):
                assert await reason(client.consume(link, request_id=request_id)) == "OUTCOME_UNKNOWN"
            assert tokens(user) == (not done)
            assert (await client.consume(link, request_id=request_id)).id == link.token.id
            assert await reason(client.consume(link)) == "TOKEN_NOT_FOUND"

            code, request_id = await client.issue(user, digits=6), new_id()
            with losing(proxy, when):
                # The first COMMIT is that of the charge.
                call = client.consume(code, wrong(code.secret), request_id=request_id)
                assert await reason(call) == "OUTCOME_UNKNOWN"
            assert token_row(database, code)["failed_attempts"] == done
            for _ in range(2):
                mismatch = await refused(client.consume(code, wrong(code.secret), request_id=request_id))
                assert mismatch.reason == "CODE_MISMATCH"
                assert mismatch.attempts_remaining == 4
            assert token_row(database, code)["failed_attempts"] == 1

            request_id = new_id()
            with losing(proxy, when, skip=1):
                assert await reason(client.consume(code, request_id=request_id)) == "OUTCOME_UNKNOWN"
            assert tokens(user) == (not done)
            assert (await client.consume(code, request_id=request_id)).id == code.token.id
            assert await reason(client.consume(code)) == "TOKEN_NOT_FOUND"

            started, request_id = await client.start(user), new_id()
            with losing(proxy, when):
                assert await reason(client.verify(started, request_id=request_id)) == "OUTCOME_UNKNOWN"
            assert (verification_row(database, started)["used_at"] is not None) == done
            assert (await client.verify(started, request_id=request_id)).id == started.verification.id
            assert await reason(client.verify(started)) == "TOKEN_USED"


async def test_a_connection_is_lost_before_there_is_anything_to_commit(serve: Serve, proxy: Proxy) -> None:
    """The work is done again on another connection, and nobody hears of it."""
    async with serve(proxy.url) as server, server.channel() as channel:
        client = Client(channel)
        issued = await client.issue()
        with proxy.losing_before(b"onetime.receipts"):
            await client.consume(issued, request_id=new_id())


async def test_connections_that_swallow_everything(serve: Serve, proxy: Proxy) -> None:
    """Calls end by the server's cap; new connections take the place of the dead ones, which nobody closes."""
    async with serve(proxy.url, call_timeout="1s") as server, server.channel() as channel:
        client = Client(channel)
        issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
        with proxy.swallowing(new_ones=True):
            await _all_end_in_time(client, issued)

            async def told() -> bool:
                return await health(server) == NOT_SERVING

            await until(told, RECOVERY_S)
        async with asyncio.timeout(RECOVERY_S):
            await wait_until_serving(server)
        await _none_counts_twice(client, issued)

        issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
        with proxy.swallowing(new_ones=False):
            await _all_end_in_time(client, issued)

            async def served() -> bool:
                return await ended(client.issue()) == "OK"

            await until(served, RECOVERY_S)
            await _none_counts_twice(client, issued)


async def test_every_connection_is_in_use(serve: Serve, migrated_url: str) -> None:
    """Calls wait for a connection for a while, and are then told that nothing happened: which is true."""
    async with serve(migrated_url, pool_size=2) as server, server.channel() as channel:
        client = Client(channel)
        issued = [await client.issue(digits=n % 2 * 6) for n in range(10)]
        with connected(migrated_url) as database:
            with database.transaction():
                database.execute("lock table auth.one_time_tokens")
                began = time.monotonic()
                ends = Counter(await asyncio.gather(*(ended(client.consume(each)) for each in issued)))
                assert ends == {"DATABASE_UNAVAILABLE": 10}
                assert time.monotonic() - began < CALL_S + MARGIN_S
            for each in issued:
                assert token_row(database, each)["failed_attempts"] == 0
                await client.consume(each)


# A PostgreSQL that does not write, or not safely


async def test_a_primary_takes_no_writes_for_a_while(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """Nothing happens, and nobody is left in doubt; health says so; then all is well."""
    async with serve(private_postgres.url) as server, server.channel() as channel:
        client = Client(channel)
        issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
        change(private_postgres.url, "default_transaction_read_only = on")
        ends = Counter(await asyncio.gather(*(ended(client.consume(each)) for each in issued)))
        assert ends == {"DATABASE_UNAVAILABLE": 8}

        async def told() -> bool:
            return await health(server) == NOT_SERVING

        await until(told, RECOVERY_S)
        change(private_postgres.url, "default_transaction_read_only = off")
        async with asyncio.timeout(RECOVERY_S):
            await wait_until_serving(server)
        for each in issued:
            await client.consume(each)


async def test_a_primary_dies_and_its_standby_takes_over(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """With a standby that confirms every commit, what was acknowledged holds, and nothing is accepted twice."""
    async with (
        standby_of(private_postgres) as standby,
        serve(one_or_other(private_postgres, standby)) as server,
        server.channel() as channel,
    ):
        load = Load(Client(channel))
        async with load.run():
            await load.some()
            private_postgres.signal(signal.SIGKILL)
            promote(standby)
            async with asyncio.timeout(RECOVERY_S):
                await wait_until_serving(server)
            await load.some()
        await load.check(Client(channel), standby.url)


async def test_a_primary_is_demoted_in_idle_times(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """The next calls meet connections to a server that takes no writes, and get others; health looks for them too."""
    async with (
        standby_of(private_postgres) as standby,
        serve(one_or_other(private_postgres, standby)) as server,
        server.channel() as channel,
    ):
        client = Client(channel)
        issued = [await client.issue(digits=n % 2 * 6) for n in range(8)]
        change(private_postgres.url, "default_transaction_read_only = on")
        promote(standby)
        ends = Counter(await asyncio.gather(*(ended(client.consume(each)) for each in issued)))
        assert ends == {"OK": 8}
        assert await health(server) == SERVING

        # And back, while no calls come: a balancer sends none to where health is bad.
        change(standby.url, "default_transaction_read_only = on")

        async def told() -> bool:
            return await health(server) == NOT_SERVING

        await until(told, RECOVERY_S)
        change(private_postgres.url, "default_transaction_read_only = off")
        async with asyncio.timeout(RECOVERY_S):
            await wait_until_serving(server)


def one_or_other(one: PrivatePostgres, other: PrivatePostgres) -> str:
    """Return the URL of whichever of two servers takes writes."""
    url = urlsplit(one.url)
    hosts = [urlsplit(each.url).query.removeprefix("host=").removesuffix("&port=5432") for each in (one, other)]
    return urlunsplit(url._replace(query=f"host={','.join(hosts)}&port=5432"))


def promote(standby: PrivatePostgres) -> None:
    """Make a standby the primary, which waits for nobody's confirmation."""
    with connected(standby.url) as database:
        database.execute("select pg_promote()")
    change(standby.url, "synchronous_standby_names = ''")


async def test_a_synchronous_standby_is_gone(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """COMMIT waits for ever, and PostgreSQL sets it no limit: we do. Nobody knows what may be lost with the primary."""
    async with serve(private_postgres.url, call_timeout="30s") as server, server.channel() as channel:
        client = Client(channel)
        issued, request_id = await client.issue(), new_id()
        change(private_postgres.url, "synchronous_standby_names = 'nosuch'")
        began = time.monotonic()
        # More than there are connections: none is lost, so that those who waited get their turn and the same answer.
        calls = [client.consume(issued, request_id=request_id), *(client.issue() for _ in range(7))]
        assert Counter(await asyncio.gather(*map(ended, calls))) == {"OUTCOME_UNKNOWN": 8}
        assert time.monotonic() - began < CALL_S + MARGIN_S
        with connected(private_postgres.url) as database:
            call = asyncio.ensure_future(ended(client.issue()))

            async def cancelled() -> bool:
                cancel = "select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'"
                return database.execute(cancel).rowcount > 0

            # Somebody else may cancel a COMMIT. PostgreSQL then says that it is done, and warns.
            await until(cancelled, TIMEOUT_S)
            assert await call == "OUTCOME_UNKNOWN"
        change(private_postgres.url, "synchronous_standby_names = ''")
        assert (await client.consume(issued, request_id=request_id)).id == issued.token.id
        assert await reason(client.consume(issued)) == "TOKEN_NOT_FOUND"


async def test_the_cap_ends_a_call_whose_commit_is_under_way(serve: Serve, private_postgres: PrivatePostgres) -> None:
    """It is told that nobody knows, not that it came too late: that would be read as "nothing happened"."""
    async with serve(private_postgres.url, call_timeout="1s") as server, server.channel() as channel:
        client = Client(channel)
        change(private_postgres.url, "synchronous_standby_names = 'nosuch'")
        request_id = new_id()
        assert await reason(client.issue(request_id=request_id)) == "OUTCOME_UNKNOWN"
        change(private_postgres.url, "synchronous_standby_names = ''")


async def test_the_disk_is_full(serve: Serve, postgres_18: PostgresServer, small_disk: Path, migrated_url: str) -> None:
    """Nothing is written and nothing is lost; what needs no room goes on; then all is well."""
    with psycopg.connect(postgres_18.url, autocommit=True) as connection:
        names = sql.Identifier(urlsplit(migrated_url).path[1:]), sql.Identifier(small_disk.name)
        connection.execute(sql.SQL("alter database {} set tablespace {}").format(*names))
    async with serve(migrated_url) as server, server.channel() as channel:
        client = Client(channel)
        issued = [await client.issue() for _ in range(20)]
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while file.write(b"\0" * 4096):
                file.flush()
        ends: Counter[str] = Counter()
        while ends["DATABASE_UNAVAILABLE"] < 5:
            # Until the room within the tables is used up.
            call = asyncio.ensure_future(client.issue())
            end = await ended(call)
            ends[end] += 1
            issued += [call.result()] if end == "OK" else []
        assert ends.keys() <= {"OK", "DATABASE_UNAVAILABLE"}
        assert await client.check(issued[0]) == issued[0].token
        filler.unlink()
        await client.issue()
        for each in issued:
            await client.consume(each)


@pytest.fixture
def small_disk(postgres_18: PostgresServer) -> Iterator[Path]:
    """A disk of 48 MiB that is a tablespace of its name. It takes root; without that the test is skipped."""
    with tempfile.TemporaryDirectory(prefix="onetime-disk-") as name:
        disk = Path(name)
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        try:
            owner = (postgres_18.log.parent / "postgres").stat()
            os.chown(disk, owner.st_uid, owner.st_gid)
            tablespace = sql.Identifier(disk.name)
            with psycopg.connect(postgres_18.url, autocommit=True) as connection:
                create = sql.SQL("create tablespace {} location {}").format(tablespace, sql.Literal(name))
                connection.execute(create)
                yield disk
                # The database on it has been dropped by now.
                connection.execute(sql.SQL("drop tablespace {}").format(tablespace))
        finally:
            subprocess.run(["umount", disk], check=True, capture_output=True)


# Callers who hang up


async def test_what_was_decided_unheard_is_on_record(serve: Serve, migrated_url: str) -> None:
    """A caller who hangs up cannot undo the call, and cannot keep its outcome out of the log."""
    async with serve(migrated_url) as server, server.channel() as channel:
        client = Client(channel)
        link, code = await client.issue(), await client.issue(digits=6)
        with connected(migrated_url) as observer, connected(migrated_url) as holder:
            with holder.transaction():
                holder.execute("lock table auth.one_time_tokens")
                calls: list[Awaitable[object]] = [
                    client.tokens.ConsumeToken(consume_request(link), timeout=0.3),
                    client.tokens.ConsumeToken(consume_request(code, wrong(code.secret)), timeout=0.3),
                    # It decides nothing.
                    client.tokens.ListTokens(ott.ListTokensRequest(user_id=link.token.user_id), timeout=0.3),
                ]
                # Whoever is quicker tells: gRPC's client, or the server, which has sent COMMIT with the statement.
                ends = await asyncio.gather(*map(ended, calls))
                assert set(ends) <= {"DEADLINE_EXCEEDED", "OUTCOME_UNKNOWN"}
                assert not _unheard(server)
            await until(partial(_nobody_works, observer), TIMEOUT_S)

            async def written() -> bool:
                return len(_unheard(server)) == 2

            await until(written, TIMEOUT_S)
        assert await reason(client.consume(link)) == "TOKEN_NOT_FOUND"
        outcomes = {line["outcome"] for line in _unheard(server)}
        assert outcomes == {"OK", "CODE_MISMATCH"}
        heard = {line["call_id"] for line in _audited(server) if "heard" not in line}
        for line in _unheard(server):
            assert (line["service"], line["method"]) == ("onetime.v1.OneTimeTokenService", "ConsumeToken")
            assert (line["level"], line["logger"], line["caller"]) == ("INFO", "service.db", "anonymous")
            # The line of the call itself tells that it ended in time.
            assert line["call_id"] in heard


async def test_what_a_write_starts_belongs_to_no_call(migrated_url: str) -> None:
    """A clean-up in doubt, say, must not put the call in doubt in whose passing it was started."""
    seen: list[tuple[Call | None, int]] = []

    def after_write(writes: int) -> None:
        seen.append((current_call.get(None), writes))

    database = Database(migrated_url, pool_size=1, after_write=after_write)
    await database.open()
    current_call.set(Call("service", "method", "id"))
    await database.run(lambda transaction: transaction.commit())
    await database.close()
    assert seen == [(None, 1)]


def _audited(server: OnetimeServer) -> list[dict[str, Any]]:
    lines = map(json.loads, server.log.read_text("utf-8").splitlines())
    return [line for line in lines if line["event"] == "audit"]


def _unheard(server: OnetimeServer) -> list[dict[str, Any]]:
    return [line for line in _audited(server) if line.get("heard") is False]


async def _nobody_works(database: psycopg.Connection[Any]) -> bool:
    working = (
        "select from pg_stat_activity where datname = current_database() and state <> 'idle' and"
        " application_name = 'onetime'"
    )
    return database.execute(working).rowcount == 0


# The service


async def test_the_service_is_killed_under_load(serve: Serve, migrated_url: str) -> None:
    """After a crash of the service nothing is accepted twice, guesses stay counted, and repetitions find out."""
    async with serve(migrated_url, drain_delay="0s") as other, other.channel() as other_channel:
        unsure, rounds = 0, 0
        while rounds < 2 or (unsure == 0 and rounds < 10):
            async with serve(migrated_url) as server, server.channel() as channel:
                load = Load(Client(channel))
                async with load.run(callers=16):
                    await load.some()
                    # At another moment each time: calls that are decided together are in step.
                    await asyncio.sleep(0.005 * rounds)
                    await server.kill()
            unsure += len(load.unsure)
            rounds += 1
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
    # With a deadline: gRPC loses a call that arrives at the very moment of the stop (grpcio 1.85.1), and ends it with
    # the grace. A bare server of a few lines does so too, in one or two stops of a hundred.
    request = ott.ListTokensRequest(user_id=new_id())
    return await ended(client.tokens.ListTokens(request, timeout=CALL_S)) == "UNAVAILABLE"


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
