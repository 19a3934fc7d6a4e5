import asyncio
import inspect
import json
import re
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, LiteralString
from urllib.parse import urlsplit

import pytest
from calls import (
    Client,
    Database,
    connected,
    expire,
    moment,
    new_id,
    open_channel,
    refused,
    seconds,
    serving,
    token_row,
    verification_row,
)
from conftest import PostgresServer, Serve, clean_environment
from psycopg import sql
from psycopg.rows import DictRow

from service.cleanup import sweep_all
from service.config import Settings
from service.crypto import new_email_token, new_row_id
from service.db import load_queries

SERVICE: Final = Path(__file__).parent.parent / "service"
TIMEOUT_S: Final = 30.0
LIBFAKETIME: Final = next(
    (
        path
        for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib")
        if (path := Path(folder, "faketime", "libfaketime.so.1")).exists()
    ),
    None,
)


# Expiry while a call waits


@dataclass(frozen=True, slots=True)
class Shared:
    """A server and its database, for tests that each take users of their own."""

    url: str
    target: str


@pytest.fixture(scope="module")
def shared(
    postgres_18: PostgresServer, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    """A server that the tests of this module share."""
    with postgres_18.database(template_url) as url, serving(url, tmp_path_factory.mktemp("server")) as target:
        yield Shared(url, target)


TOKEN: Final[LiteralString] = "select from auth.one_time_tokens where id = %s for update"
TOKEN_STATE: Final[LiteralString] = "select from onetime.one_time_token_states where token_id = %s for update"
VERIFICATION: Final[LiteralString] = "select from public.email_verification_tokens where id = %s for update"
VERIFICATION_STATE: Final[LiteralString] = "select from onetime.email_verification_states where id = %s for update"

REQUEST_ID: Final = new_id()
USER_ID: Final = new_id()
SECOND: Final = seconds(1)

Make = Callable[[Client], Awaitable[Any]]
Use = Callable[[Client, Any], Awaitable[Any]]

WAITING_CALLS: Final[Mapping[str, tuple[LiteralString, Make, Use]]] = {
    "consume a link": (TOKEN, lambda client: client.issue(ttl=SECOND), Client.consume),
    "consume a code, its state locked": (
        TOKEN_STATE,
        lambda client: client.issue(ttl=SECOND, digits=6),
        Client.consume,
    ),
    # Two seconds: unlike the others, it does not get as far as the lock if its token has expired before.
    "consume a code, its token locked": (
        TOKEN,
        lambda client: client.issue(ttl=seconds(2), digits=6),
        Client.consume,
    ),
    "check a code": (TOKEN_STATE, lambda client: client.issue(ttl=SECOND, digits=6), Client.check),
    "issue again": (
        TOKEN,
        lambda client: client.issue(USER_ID, ttl=SECOND, request_id=REQUEST_ID),
        lambda client, _: client.issue(USER_ID, ttl=SECOND, request_id=REQUEST_ID),
    ),
    "verify, the token locked": (VERIFICATION, lambda client: client.start(ttl=SECOND), Client.verify),
    "verify, the state locked": (VERIFICATION_STATE, lambda client: client.start(ttl=SECOND), Client.verify),
    "resend": (VERIFICATION, lambda client: client.start(ttl=SECOND), Client.resend),
    "mark as sent": (VERIFICATION, lambda client: client.start(ttl=SECOND), Client.mark_sent),
    "start again": (
        VERIFICATION,
        lambda client: client.start(USER_ID, ttl=SECOND, request_id=REQUEST_ID),
        lambda client, _: client.start(USER_ID, ttl=SECOND, request_id=REQUEST_ID),
    ),
}
"""What is locked, what makes the token, and the call that then waits for the lock."""


async def test_a_token_that_expires_while_its_call_waits_is_refused(shared: Shared) -> None:
    """A call that waits for a lock until its token has expired is refused: it is judged by the time after the wait."""
    reasons = await asyncio.gather(*(_reason_after_a_wait(shared, *case) for case in WAITING_CALLS.values()))
    assert dict(zip(WAITING_CALLS, reasons, strict=True)) == dict.fromkeys(WAITING_CALLS, "TOKEN_EXPIRED")


async def _reason_after_a_wait(shared: Shared, lock: LiteralString, make: Make, use: Use) -> str:
    """Hold a lock that a call waits for, until its token has expired; return what the call was told."""
    with connected(shared.url) as holder, connected(shared.url) as observer:
        async with open_channel(shared.target) as channel, asyncio.timeout(TIMEOUT_S):
            client = Client(channel)
            made = await make(client)
            row = made.token if hasattr(made, "token") else made.verification
            with holder.transaction():
                assert holder.execute(lock, [row.id]).rowcount == 1
                call = asyncio.ensure_future(refused(use(client, made)))
                held_up = "select from pg_stat_activity where %s = any (pg_blocking_pids(pid))"
                await _until(observer, held_up, holder.info.backend_pid)
                assert not call.done()
                expired = "select from (values (%s::timestamptz)) as t (at) where at <= clock_timestamp()"
                await _until(observer, expired, moment(row.expire_time))
            return (await call).reason


async def _until(database: Database, query: LiteralString, parameter: object) -> None:
    """Wait until a query finds something. The caller bounds the wait."""
    while not database.execute(query, [parameter]).rowcount:  # noqa: ASYNC110 - what it waits for is elsewhere
        await asyncio.sleep(0.02)


async def test_a_code_verified_too_late_stays_refused(shared: Shared) -> None:
    """A verification that expires between its lock and its use is refused, on a retry too, and is not used."""
    with connected(shared.url) as database:
        database.execute("""
            create function pg_temp.sleep() returns trigger language plpgsql as
            $$ begin perform pg_sleep(1.1); return null; end $$;
        """)
        async with open_channel(shared.target) as channel:
            client = Client(channel)
            started = await client.start(ttl=SECOND)
            request_id = new_id()
            # Before the statement looks at its first row.
            database.execute("""
                create trigger slow before update on public.email_verification_tokens
                for each statement execute function pg_temp.sleep()
            """)
            try:
                refusals = [await refused(client.verify(started, request_id=request_id)) for _ in range(2)]
            finally:
                database.execute("drop trigger slow on public.email_verification_tokens")
            assert [refusal.reason for refusal in refusals] == ["TOKEN_EXPIRED", "TOKEN_EXPIRED"]
            assert verification_row(database, started)["used_at"] is None


# The moment of expiry, at any time and in any zone


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection to a migrated database."""
    with connected(migrated_url) as connection:
        yield connection


def run_at(database: Database, instant: datetime, stem: str, name: str, **params: object) -> list[DictRow]:
    """Run a statement of the service as it would run at another time."""
    query = load_queries(stem)[name]
    assert "clock_timestamp()" in query
    clock = sql.SQL("timestamptz {}").format(sql.Literal(instant.isoformat())).as_string(database)
    rows = database.execute(query.replace("clock_timestamp()", clock), params).fetchall()
    # In UTC, since Python takes a time that a zone has twice for unequal to every time of another zone.
    return [{name: _in_utc(value) for name, value in row.items()} for row in rows]


def _in_utc(value: object) -> object:
    return value.astimezone(UTC) if isinstance(value, datetime) and value.tzinfo else value


INSTANTS: Final = {
    "UTC": datetime(2026, 7, 1, tzinfo=UTC),
    # The clocks go back at 06:00 UTC, and forward at 07:00 UTC.
    "America/New_York": datetime(2026, 11, 1, 5, 30, tzinfo=UTC),
    "US/Eastern": datetime(2026, 3, 8, 6, 30, tzinfo=UTC),
    # From one day's end into the next, far from UTC on both sides.
    "Asia/Tokyo": datetime(2026, 12, 31, 14, 59, 59, 999999, tzinfo=UTC),
    "America/Los_Angeles": datetime(2026, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
}
INSTANT: Final = timedelta(microseconds=1)


@pytest.mark.parametrize("ttl", [timedelta(hours=1), timedelta(hours=24)], ids=str)
@pytest.mark.parametrize("zone", INSTANTS)
def test_one_time_tokens_live_for_their_lifetime(database: Database, zone: str, ttl: timedelta) -> None:
    """Whatever the session's zone, and across a change of its clocks: live until its lifetime is over, and not then."""
    issued, expiry = INSTANTS[zone], INSTANTS[zone] + ttl
    database.execute("select set_config('timezone', %s, false)", [zone])
    ids, users = [uuid.uuid4() for _ in range(2)], [uuid.uuid4() for _ in range(2)]
    hashes = [f"otl1.k0.{ids[0]}", f"otc1.k0.{ids[1]}"]
    types = ["confirmation_token"] * 2
    rows = run_at(
        database,
        issued,
        "one_time_tokens",
        "issue_tokens",
        ids=ids,
        user_ids=users,
        token_types=types,
        token_hashes=hashes,
        relates_to=["a@example.org", "b@example.org"],
        ttls=[ttl.total_seconds()] * 2,
        callers=["tests"] * 2,
    )
    assert {(row["create_time"], row["update_time"]) for row in rows} == {(issued, issued)}
    stored = database.execute("select created_at, updated_at from auth.one_time_tokens").fetchall()
    assert all(set(row.values()) == {issued.replace(tzinfo=None)} for row in stored)

    presented = {"ords": [1, 2], "token_types": types, "token_hashes": hashes}
    unnamed = {"callers": ["tests"] * 2, "request_ids": [None] * 2}
    typed = {"ords": [1], "token_types": types[:1], "user_ids": users[1:], "relates_to": [None]}
    of_users = {"ords": [1, 2], "user_ids": users, "token_types": types}
    sweep = {"first": "(0,0)", "end": "(9,0)", "longest_ttl": timedelta(days=7).total_seconds()}
    for instant in (issued, expiry - INSTANT, expiry, expiry + INSTANT):
        live = instant < expiry
        with database.transaction(force_rollback=True):
            found = run_at(database, instant, "one_time_tokens", "find_links", **presented)
            assert [(row["expired"], row["expire_time"]) for row in found] == [(not live, expiry)] * 2
            (guessed,) = run_at(database, instant, "one_time_tokens", "lock_codes", **typed)
            assert guessed["expired"] is not live
            (pending,) = run_at(database, instant, "one_time_tokens", "find_codes", ids=ids[1:])
            assert pending["expired"] is not live
            listed = run_at(database, instant, "one_time_tokens", "list_tokens", user_ids=users)
            assert len(listed) == 2 * live
            refreshed = run_at(database, instant, "one_time_tokens", "refresh_tokens", ids=ids, token_hashes=hashes)
            assert [row["expired"] for row in refreshed] == [not live] * 2
        with database.transaction(force_rollback=True):
            spent = run_at(database, instant, "one_time_tokens", "consume_links", **presented, **unnamed)
            assert [row["expired"] for row in spent] == [not live] * 2
        with database.transaction(force_rollback=True):
            spent = run_at(database, instant, "one_time_tokens", "consume_codes", ids=ids, token_hashes=hashes)
            assert [row["expired"] for row in spent] == [not live] * 2
        with database.transaction(force_rollback=True):
            revoked = run_at(database, instant, "one_time_tokens", "revoke_tokens", **of_users)
            assert [row["revoked_count"] for row in revoked] == [live] * 2
        with database.transaction(force_rollback=True):
            (swept,) = run_at(database, instant, "cleanup", "sweep_one_time_tokens", **sweep)
            assert swept["removed"] == (0 if live else 2)


@pytest.mark.parametrize("ttl", [timedelta(minutes=15), timedelta(hours=24)], ids=str)
@pytest.mark.parametrize("zone", INSTANTS)
def test_verifications_live_for_their_lifetime(database: Database, zone: str, ttl: timedelta) -> None:
    """Whatever the session's zone, and across a change of its clocks: live until its lifetime is over, and not then."""
    started, expiry = INSTANTS[zone], INSTANTS[zone] + ttl
    database.execute("select set_config('timezone', %s, false)", [zone])
    user_id, row_id, token_hash = uuid.uuid4(), uuid.uuid4(), f"ev1.k0.{'0' * 128}"
    database.execute("insert into public.users (id) values (%s)", [user_id])
    (row,) = run_at(
        database,
        started,
        "email_verification",
        "start_verifications",
        ids=[row_id],
        user_ids=[user_id],
        token_hashes=[token_hash],
        sealed_codes=["123456"],
        ttls=[ttl.total_seconds()],
        callers=["tests"],
        deliveries=["return_code"],
    )
    assert (row["created_at"], row["expires_at"]) == (started, expiry)
    wanted = {"ords": [1], "callers": [None], "ids": [row_id], "token_hashes": [None]}
    sweep = {"first": "(0,0)", "end": "(9,0)", "retention": 86400}
    for instant in (started, expiry - INSTANT, expiry, expiry + INSTANT):
        live = instant < expiry
        for name in ("find_verifications", "lock_verifications"):
            (found,) = run_at(database, instant, "email_verification", name, **wanted)
            assert found["expired"] is not live
        with database.transaction(force_rollback=True):
            used = run_at(database, instant, "email_verification", "use_verifications", ids=[row_id])
            assert len(used) == live
        with database.transaction(force_rollback=True):
            (swept,) = run_at(database, instant, "cleanup", "sweep_email_verification_tokens", **sweep)
            assert swept["removed"] == (not live)


def _near(stamp: datetime) -> bool:
    return abs(stamp - datetime.now(UTC)) < timedelta(minutes=5)


async def _lifetimes_hold(client: Client, database: Database) -> None:
    """See that tokens are good for as long as they ought to be, by the clock of this machine."""
    for digits in (0, 6):
        issued = await client.issue(digits=digits)
        token = issued.token
        assert _near(moment(token.create_time))
        assert moment(token.expire_time) - moment(token.create_time) == timedelta(minutes=15)
        assert _near(token_row(database, issued)["created_at"].replace(tzinfo=UTC))
        assert [each.id for each in await client.list(token.user_id)] == [token.id]
        await client.check(issued)
        await client.consume(issued)
        late = await client.issue(digits=digits)
        expire(database, late)
        assert (await refused(client.consume(late))).reason == "TOKEN_EXPIRED"
    started = await client.start()
    verification = started.verification
    assert _near(moment(verification.create_time))
    assert moment(verification.expire_time) - moment(verification.create_time) == timedelta(minutes=15)
    used = await client.verify(started)
    assert _near(moment(used.use_time))
    late_start = await client.start()
    expire(database, late_start)
    assert (await refused(client.verify(late_start))).reason == "TOKEN_EXPIRED"


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
async def test_the_zone_of_a_database_changes_nothing(serve: Serve, migrated_url: str, zone: str) -> None:
    """A host's default zone, of the database and of the role, changes no lifetime; nor for the clean-up."""
    name = sql.Identifier(urlsplit(migrated_url).path.removeprefix("/"))
    with connected(migrated_url) as database:
        for subject in (sql.SQL("database {}"), sql.SQL("role current_user in database {}")):
            database.execute(sql.SQL("alter {} set timezone = {}").format(subject.format(name), zone))
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        with connected(migrated_url) as database:
            assert database.execute("show timezone").fetchone() == {"TimeZone": zone}
            client = Client(channel)
            await _lifetimes_hold(client, database)
            live, started = await client.issue(), await client.start()
            removed = await sweep_all(Settings(database_url=migrated_url), lambda *_: None)
            # Those that `_lifetimes_hold` has let expire.
            assert (removed["auth.one_time_tokens"], removed["public.email_verification_tokens"]) == (2, 1)
            await client.consume(live)
            await client.verify(started)


@pytest.mark.skipif(LIBFAKETIME is None, reason="libfaketime is not installed: apt-get install libfaketime")
@pytest.mark.parametrize("shift", ["+3h", "-3h"])
async def test_the_clock_of_the_service_changes_nothing(
    serve: Serve, migrated_url: str, monkeypatch: pytest.MonkeyPatch, shift: str
) -> None:
    """A service whose clock is hours wrong makes and judges tokens by the database's clock, and cleans up by it."""
    wrong_clock = {"LD_PRELOAD": str(LIBFAKETIME), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    for name, value in wrong_clock.items():
        monkeypatch.setenv(name, value)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        monkeypatch.undo()
        client = Client(channel)
        with connected(migrated_url) as database:
            await _lifetimes_hold(client, database)
        live, started = await client.issue(), await client.start()
        cleanup = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "cleanup"),
            env=clean_environment(database_url=migrated_url) | wrong_clock,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(TIMEOUT_S):
            assert await cleanup.wait() == 0
        await client.consume(live)
        await client.verify(started)
        stamps = [datetime.fromisoformat(json.loads(line)["time"]) for line in server.log.read_text().splitlines()]
    # Its own clock was wrong indeed.
    assert stamps
    assert not any(map(_near, stamps))


# Sources


def test_statements_ask_the_clock() -> None:
    """No statement on tokens takes the time of its transaction's or its own start, which is older than a wait.

    That a mail is due may be seen late: an index finds those, and they wait for nobody.
    """
    for stem in ("one_time_tokens", "email_verification", "outbox", "budgets", "receipts", "cleanup"):
        for name, text in load_queries(stem).items():
            bare = re.sub(r"--.*|\bdue_at <= statement_timestamp\(\)", "", text)
            stale = re.findall(
                r"\b(?:now|statement_timestamp|transaction_timestamp)\(|\bcurrent_(?:time|date)|\blocaltime", bare
            )
            assert not stale, f"{stem}.{name}"


def test_no_decision_is_made_by_the_clock_of_the_service() -> None:
    """Nobody asks for its time, but to write it into ids, the log or a mail to try, and to see if certificates hold."""
    asking = re.compile(r"\btime\.time\(|\bdatetime\.(?:now|utcnow|today|fromtimestamp)\(|\bdate\.today\(|\btime_ns\(")
    found = {path.stem for path in SERVICE.glob("*.py") if asking.search(path.read_text("utf-8"))}
    assert found <= {"logs", "cli", "crypto", "reload", "doctor"}
    # Of `crypto`, only the part on certificates, and new ids and tokens, of which nothing asks for the time.
    other = (SERVICE / "crypto.py").read_text("utf-8").partition("# Certificates")[0]
    assert asking.findall(other) == ["time_ns("]
    makers = [inspect.getsource(make) for make in (new_row_id, new_email_token)]
    assert [maker.count("_milliseconds()") for maker in makers] == [1, 1]
    # And where it is asked for itself.
    assert other.count("_milliseconds()") == len(makers) + 1
