"""Limits for each user and purpose: what is counted, how exactly, and what gives nothing back."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from calls import Client, Database, connected, ended, new_id, open_channel, reason, refused, serving, until, wrong
from conftest import PostgresServer, Serve
from hypothesis import example, given
from hypothesis import strategies as st
from onetime.v1 import one_time_tokens_pb2 as ott
from onetime.v1.email_verification_pb2 import STATE_USED

from service import budgets
from service.cleanup import sweep_all
from service.config import Settings
from service.errors import TooManyFailures, TooManySends

ROOT: Final = Path(__file__).parent.parent
DAY: Final = timedelta(days=1)
MINUTE: Final = timedelta(minutes=1)
NOW: Final = datetime(2026, 3, 8, 6, 30, tzinfo=UTC)
DEFAULTS: Final = Settings()


@pytest.fixture(scope="module")
def migrated_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """One database for all tests of this module, each of which takes users of its own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def targets(migrated_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two servers with the limits that are the default."""
    folder = tmp_path_factory.mktemp("servers")
    with (
        serving(migrated_url, folder, send_interval=None) as one,
        serving(migrated_url, folder, send_interval=None) as other,
    ):
        yield one, other


@pytest.fixture
async def clients(targets: tuple[str, str]) -> AsyncIterator[tuple[Client, Client]]:
    """A client of each server."""
    async with open_channel(targets[0]) as one, open_channel(targets[1]) as other:
        yield Client(one), Client(other)


@pytest.fixture
def client(clients: tuple[Client, Client]) -> Client:
    """A client of one of the servers."""
    return clients[0]


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


def pass_time(database: Database, user_id: str, time: timedelta) -> None:
    """Make all that is counted for a user so much older, which is as if so much time had passed."""
    database.execute(
        """
        update onetime.budgets set
          failures = array(select f - %(time)s from unnest(failures) as f order by f),
          sends = array(select s - %(time)s from unnest(sends) as s order by s)
        where user_id = %(user_id)s
        """,
        {"time": time, "user_id": user_id},
    )
    database.execute(
        "update onetime.email_verification_states as s set last_sent_at = last_sent_at - %(time)s"
        " from public.email_verification_tokens as t where t.id = s.id and t.user_id = %(user_id)s",
        {"time": time, "user_id": user_id},
    )


def counted(database: Database, user_id: str, purpose: str) -> tuple[int, int, int]:
    """Return the failures, those in a row, and the sends of a budget."""
    row = database.execute(
        "select cardinality(failures) as failures, failures_in_a_row, cardinality(sends) as sends"
        " from onetime.budgets where user_id = %s and purpose = %s",
        [user_id, purpose],
    ).fetchone()
    return (0, 0, 0) if row is None else (row["failures"], row["failures_in_a_row"], row["sends"])


# The rules, on their own


def naive_wait(times: Sequence[datetime], limit: int, window: timedelta) -> float:
    """Return for how many seconds a window is full, by counting."""
    ends = [time + window for time in times if time > NOW - window]
    return (sorted(ends)[len(ends) - limit] - NOW).total_seconds() if len(ends) >= limit else 0


past = st.lists(st.integers(0, 200_000), max_size=60).map(
    lambda ages: [NOW - timedelta(seconds=age) for age in sorted(ages, reverse=True)]
)


def waited(refuse: Callable[[Settings, Mapping[str, Any]], None], **row: object) -> float:
    """Return for how many seconds something is refused; 0 if it is not."""
    try:
        refuse(DEFAULTS, {"now": NOW, **row})
    except (TooManyFailures, TooManySends) as refusal:
        return refusal.retry_after.total_seconds() if refusal.retry_after else 0
    return 0


@given(past)
@example([NOW - MINUTE] * 10)  # just full, one after the other: chance hardly ever makes these
@example([NOW - 20 * MINUTE] * 50)
@example([NOW - MINUTE] * 5)
@example([NOW - 20 * MINUTE] * 20)
def test_windows_slide(times: list[datetime]) -> None:
    """Refused exactly while one of the windows is full, for as long as the fuller one is."""
    full = max(naive_wait(times, 10, 15 * MINUTE), naive_wait(times, 50, DAY))
    assert waited(budgets.refuse_failures, failures=times, failures_in_a_row=0) == full
    full = max(naive_wait(times, 5, 10 * MINUTE), naive_wait(times, 20, DAY))
    assert waited(budgets.refuse_sends, sends=times) == full


@pytest.mark.parametrize(
    ("in_a_row", "days"), [(99, 0), (100, 1), (101, 2), (102, 4), (103, 7), (104, 7), (10_000_000, 7)]
)
def test_a_run_stops_for_a_day_and_doubles_to_a_week(in_a_row: int, days: int) -> None:
    """From the hundredth wrong code in a row on, each one stops the subject, for longer each time."""
    for since in (timedelta(), timedelta(hours=5), timedelta(days=2), timedelta(days=7)):
        expected = max(days * DAY - since, timedelta()).total_seconds()
        assert waited(budgets.refuse_failures, failures=[NOW - since], failures_in_a_row=in_a_row) == expected


def test_a_moment_is_told_as_a_second() -> None:
    """RetryInfo never tells a caller to come too early."""
    assert waited(budgets.refuse_sends, sends=[NOW - 10 * MINUTE + timedelta(microseconds=1)] * 5) == 1


def test_a_new_subject_is_free() -> None:
    """Where there is no row yet, nothing is refused."""
    assert waited(budgets.refuse_failures, failures=None, failures_in_a_row=None) == 0
    assert waited(budgets.refuse_sends, sends=None) == 0


def test_no_two_charges_have_one_name() -> None:
    """Where the clock stands still, or has gone back, a charge is still later than the one before it."""
    assert budgets.name_of_charge({"failures": None, "now": NOW}) == NOW
    assert budgets.name_of_charge({"failures": [NOW - DAY], "now": NOW}) == NOW
    for ahead in (timedelta(), timedelta(hours=1)):
        named = budgets.name_of_charge({"failures": [NOW - DAY, NOW + ahead], "now": NOW})
        assert named == NOW + ahead + timedelta(microseconds=1)


def greedy_guesses(*, owner_is_right_each_day: bool) -> int:
    """Return how many wrong codes somebody gets compared in a year who tries whenever the limits allow it."""
    guesses, in_a_row, today = 0, 0, 0
    failures: list[datetime] = []
    now = NOW
    while now < NOW + 365 * DAY:
        row = {"failures": failures[-50:], "failures_in_a_row": in_a_row, "now": now}
        wait = waited(budgets.refuse_failures, **row)
        if wait:
            now += timedelta(seconds=wait)
            if owner_is_right_each_day and (now - NOW).days > today:
                today, in_a_row = (now - NOW).days, 0
            continue
        guesses, in_a_row = guesses + 1, in_a_row + 1
        failures.append(now)
    return guesses


def test_the_odds_that_the_documentation_tells() -> None:
    """The figures in docs/security.md are those of the limits by default."""
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    told = re.findall(r"^\| ([^|]+?) +\| (\d+) \| ([\d.]+) % \|$", text, re.MULTILINE)
    guesses = {who: int(count) for who, count, _ in told}
    assert sorted(guesses.values()) == sorted(
        [
            DEFAULTS.max_attempts,
            DEFAULTS.failures_per_day,
            greedy_guesses(owner_is_right_each_day=False),
            greedy_guesses(owner_is_right_each_day=True),
        ]
    )
    for _, count, percent in told:
        assert float(percent) == float(f"{100 * (1 - (1 - 1e-6) ** int(count)):.3g}")


# Guesses at codes of one-time tokens


async def guess_codes(clients: Sequence[Client], user_id: str, count: int) -> list[str]:
    """Try so many wrong codes, on as many tokens as that takes, by all the servers in turn; return the reasons."""
    reasons: list[str] = []
    turns = itertools.cycle(clients)
    issued: ott.IssueTokenResponse | None = None
    for number in range(count):
        client = next(turns)
        if number % 5 == 0:
            issued = await client.issue(user_id, digits=6)
        assert issued is not None
        call = client.check if number % 2 else client.consume
        reasons.append(await reason(call(issued, wrong(issued.secret, by=number + 1))))
    return reasons


async def test_ten_in_a_quarter_of_an_hour(clients: tuple[Client, Client], database: Database) -> None:
    """The eleventh wrong code is not compared, nor is the right one; other types and links work on."""
    client, _ = clients
    user_id = new_id()
    assert await guess_codes(clients, user_id, 10) == ["CODE_MISMATCH"] * 10
    issued = await client.issue(user_id, digits=6)
    for call in (client.consume, client.check):
        for secret in (issued.secret, wrong(issued.secret)):
            refusal = await refused(call(issued, secret))
            assert refusal.reason == "TOO_MANY_FAILURES"
            assert refusal.retry_after is not None
            assert timedelta(minutes=14) < refusal.retry_after <= timedelta(minutes=15)
    assert counted(database, user_id, "recovery_token") == (10, 10, 3)

    link = await client.issue(user_id)
    assert (await client.consume(link)).user_id == user_id
    other = await client.issue(user_id, ott.TOKEN_TYPE_PHONE_CHANGE, digits=6)
    assert (await client.consume(other)).user_id == user_id
    started = await client.start(user_id)
    assert (await client.verify(started)).state == STATE_USED

    # Of the ten, the first must be out of the window.
    pass_time(database, user_id, 15 * MINUTE - timedelta(seconds=5))
    issued = await client.issue(user_id, digits=6)
    assert await reason(client.consume(issued)) == "TOO_MANY_FAILURES"
    pass_time(database, user_id, timedelta(seconds=6))
    assert (await client.consume(issued)).user_id == user_id


async def test_fifty_in_a_day_over_tokens_restarts_and_replicas(
    serve: Serve, postgres_18: PostgresServer, template_url: str
) -> None:
    """The fifty-first wrong code in a day is not compared, whatever was issued, restarted and cleaned up between."""
    user_id = new_id()
    with postgres_18.database(template_url) as url, connected(url) as database:
        for rounds in (2, 3):
            async with serve(url) as one, serve(url) as other, one.channel() as first, other.channel() as second:
                for _ in range(rounds):
                    assert await guess_codes([Client(first), Client(second)], user_id, 10) == ["CODE_MISMATCH"] * 10
                    await sweep_all(Settings(database_url=url), lambda _, __: None)
                    pass_time(database, user_id, 16 * MINUTE)
        async with serve(url) as one, one.channel() as channel:
            client = Client(channel)
            issued = await client.issue(user_id, digits=6)
            refusal = await refused(client.consume(issued, wrong(issued.secret)))
            assert refusal.reason == "TOO_MANY_FAILURES"
            # The first of the fifty was made 80 minutes ago, as the test has it.
            assert refusal.retry_after is not None
            assert timedelta(hours=22) < refusal.retry_after < timedelta(hours=23)
            assert await reason(client.consume(issued)) == "TOO_MANY_FAILURES"
            assert counted(database, user_id, "recovery_token")[:2] == (50, 50)
            assert (await client.consume(await client.issue(user_id))).user_id == user_id
            pass_time(database, user_id, DAY)
            issued = await client.issue(user_id, digits=6)
            assert await reason(client.consume(issued, wrong(issued.secret))) == "CODE_MISMATCH"
            assert (await client.consume(issued)).user_id == user_id
            # That one, and those of the last day: the right code has ended the run.
            assert counted(database, user_id, "recovery_token")[1] == 0


async def test_a_hundred_in_a_row(client: Client, database: Database) -> None:
    """The hundredth stops the subject for a day, the next one for two; a right code ends the run, and links go on."""
    user_id = new_id()
    issued = await client.issue(user_id, digits=6)
    assert await reason(client.consume(issued, wrong(issued.secret))) == "CODE_MISMATCH"
    database.execute("update onetime.budgets set failures_in_a_row = 99 where user_id = %s", [user_id])
    assert await reason(client.consume(issued, wrong(issued.secret))) == "CODE_MISMATCH"
    for stop in (DAY, 2 * DAY, 4 * DAY, 7 * DAY, 7 * DAY):
        issued = await client.issue(user_id, digits=6)
        refusal = await refused(client.consume(issued))
        assert refusal.reason == "TOO_MANY_FAILURES"
        assert refusal.retry_after is not None
        assert stop - MINUTE < refusal.retry_after <= stop
        assert (await client.consume(await client.issue(user_id))).user_id == user_id
        pass_time(database, user_id, stop)
        issued = await client.issue(user_id, digits=6)
        assert await reason(client.check(issued, wrong(issued.secret))) == "CODE_MISMATCH"
    pass_time(database, user_id, 7 * DAY)
    issued = await client.issue(user_id, digits=6)
    assert (await client.check(issued)).user_id == user_id
    assert await reason(client.check(issued, wrong(issued.secret))) == "CODE_MISMATCH"
    assert counted(database, user_id, "recovery_token")[1] == 1
    assert (await client.consume(issued)).user_id == user_id


async def test_right_codes_cost_nothing(client: Client, database: Database) -> None:
    """However often a right code is checked, nothing is counted."""
    issued = await client.issue(digits=6)
    for _ in range(30):
        await client.check(issued)
    await client.consume(issued, request_id=new_id())
    assert counted(database, issued.token.user_id, "recovery_token") == (0, 0, 1)


async def test_guesses_at_once_at_one_subject(clients: tuple[Client, Client], database: Database) -> None:
    """Of 60 wrong codes at once, at two servers, with request_ids and without, five are compared; then five more."""
    user_id = new_id()
    for compared in (5, 5, 0):
        issued = await clients[0].issue(user_id, digits=6)
        calls = [
            clients[number % 2].consume(
                issued, wrong(issued.secret, by=number + 1), request_id=new_id() if number % 3 else ""
            )
            for number in range(60)
        ]
        reasons = await asyncio.gather(*map(reason, calls))
        assert reasons.count("CODE_MISMATCH") == compared
        assert set(reasons) <= {"CODE_MISMATCH", "ATTEMPTS_EXHAUSTED", "TOO_MANY_FAILURES"}
    assert counted(database, user_id, "recovery_token")[:2] == (10, 10)


async def test_guesses_at_nobody_lock_nobody(client: Client, database: Database) -> None:
    """A thousand guesses at no token leave a user of that address, and that user, unhindered."""
    user_id, address = new_id(), f"{new_id()}@example.org"
    # A link is no code.
    link = await client.issue(user_id, relates_to=address)

    async def guess(number: int) -> str:
        credential = ott.CodeCredential(code=f"{number:06d}")
        if number % 2:
            credential.user_id = user_id
        else:
            credential.relates_to = address
        request = ott.ConsumeTokenRequest(token_type=ott.TOKEN_TYPE_RECOVERY, code=credential)
        return await reason(client.tokens.ConsumeToken(request))

    for first in range(0, 1000, 50):
        reasons = await asyncio.gather(*(guess(number) for number in range(first, first + 50)))
        assert set(reasons) == {"TOKEN_NOT_FOUND"}
    assert counted(database, user_id, "recovery_token") == (0, 0, 1)
    assert (await client.consume(link)).user_id == user_id
    issued = await client.issue(user_id, digits=6, relates_to=address)
    assert (await client.consume(issued, by_address=True)).user_id == user_id


# Guesses at codes of email verifications


async def test_email_codes_of_one_user(clients: tuple[Client, Client], database: Database) -> None:
    """Over several verifications and resends of one user, ten wrong codes are compared, of 100 that come at once."""
    client, _ = clients
    user_id = new_id()
    started = [await client.start(user_id) for _ in range(4)]
    pass_time(database, user_id, 2 * MINUTE)
    await client.resend(started[0])
    calls = [clients[n % 2].verify(started[n % 4], wrong(started[n % 4].code, by=n + 1)) for n in range(100)]
    reasons = await asyncio.gather(*map(reason, calls))
    assert reasons.count("CODE_MISMATCH") == 10
    assert set(reasons) <= {"CODE_MISMATCH", "ATTEMPTS_EXHAUSTED", "TOO_MANY_FAILURES"}
    assert counted(database, user_id, "email_verification")[:2] == (10, 10)
    # Of 20 attempts ten are left, so one verification has three at least.
    left = {number: (await client.get(each)).attempts_remaining for number, each in enumerate(started)}
    fresh = started[max(left, key=left.__getitem__)]
    assert await reason(client.verify(fresh)) == "TOO_MANY_FAILURES"
    # Another user is not touched, nor this user's tokens.
    assert (await client.verify(await client.start())).state == STATE_USED
    assert (await client.consume(await client.issue(user_id, digits=6))).user_id == user_id

    pass_time(database, user_id, 15 * MINUTE)
    assert await reason(client.verify(fresh, wrong(fresh.code))) == "CODE_MISMATCH"
    assert counted(database, user_id, "email_verification")[:2] == (11, 11)
    assert (await client.verify(fresh)).state == STATE_USED
    assert counted(database, user_id, "email_verification")[:2] == (11, 0)


# Sends


async def test_five_in_ten_minutes(client: Client, database: Database) -> None:
    """The sixth token is refused with the time to come again; nothing changes: the fifth holds."""
    user_id = new_id()
    issued = [await client.issue(user_id, digits=6 if number % 2 else 0) for number in range(5)]
    for digits in (0, 6):
        refusal = await refused(client.issue(user_id, digits=digits, request_id=new_id()))
        assert refusal.reason == "TOO_MANY_SENDS"
        assert refusal.retry_after is not None
        assert timedelta(minutes=9) < refusal.retry_after <= timedelta(minutes=10)
    assert counted(database, user_id, "recovery_token") == (0, 0, 5)
    assert await client.list(user_id) == [issued[-1].token]
    # Another purpose of the same user.
    await client.issue(user_id, ott.TOKEN_TYPE_CONFIRMATION)
    await client.start(user_id)
    pass_time(database, user_id, 10 * MINUTE)
    assert (await client.consume(issued[-1])).user_id == user_id
    await client.issue(user_id)


async def test_twenty_in_a_day(client: Client, database: Database) -> None:
    """The twenty-first in a day is refused, however they are spread."""
    user_id = new_id()
    for _ in range(4):
        for _ in range(5):
            await client.issue(user_id)
        pass_time(database, user_id, 11 * MINUTE)
    refusal = await refused(client.issue(user_id))
    assert refusal.reason == "TOO_MANY_SENDS"
    assert refusal.retry_after is not None
    assert timedelta(hours=23) < refusal.retry_after < timedelta(hours=23, minutes=20)
    pass_time(database, user_id, DAY)
    await client.issue(user_id)


async def test_sends_at_once(clients: tuple[Client, Client], database: Database) -> None:
    """Of 100 tokens and of 100 verifications at once for a new user, at two servers, five of each are made."""

    def issue(user_id: str, number: int) -> Awaitable[object]:
        return clients[number % 2].issue(user_id, request_id=new_id() if number % 3 else "")

    def start(user_id: str, number: int) -> Awaitable[object]:
        return clients[number % 2].start(user_id, request_id=new_id() if number % 3 else "")

    for call, purpose in ((issue, "recovery_token"), (start, "email_verification")):
        user_id = new_id()
        answers = await asyncio.gather(*(call(user_id, n) for n in range(100)), return_exceptions=True)
        refusals = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(refusals) == 95
        assert {await reason(_raise(refusal)) for refusal in refusals} == {"TOO_MANY_SENDS"}
        assert counted(database, user_id, purpose) == (0, 0, 5)


async def _raise(error: BaseException) -> None:
    raise error


async def test_a_send_that_waits_counts_those_before_it(client: Client, database: Database) -> None:
    """A call that waits for the budget sees what was sent meanwhile: of two at once there is no sixth."""
    user_id = new_id()
    for call, purpose in ((client.issue, "recovery_token"), (client.start, "email_verification")):
        for _ in range(4):
            await call(user_id)
        with database.transaction():
            # As another server does it: it locks first, and counts then.
            of_subject = "where user_id = %s and purpose = %s"
            database.execute(f"select from onetime.budgets {of_subject} for update", [user_id, purpose])
            waiting = asyncio.ensure_future(ended(call(user_id)))
            with connected(database.info.dsn) as observer:
                await until(lambda observer=observer: _waits_for_a_lock(observer))  # type: ignore[misc]
            fifth = f"update onetime.budgets set sends = sends || clock_timestamp() {of_subject}"
            assert database.execute(fifth, [user_id, purpose]).rowcount == 1
        assert await waiting == "TOO_MANY_SENDS"
        assert counted(database, user_id, purpose) == (0, 0, 5)


async def test_resends(client: Client, database: Database) -> None:
    """A minute between two sends of one verification, and each counts; a retry of a resend does not."""
    user_id = new_id()
    started = await client.start(user_id)
    refusal = await refused(client.resend(started))
    assert refusal.reason == "TOO_SOON"
    assert refusal.retry_after is not None
    assert timedelta(seconds=50) < refusal.retry_after <= MINUTE
    assert counted(database, user_id, "email_verification")[2] == 1
    again = new_id()
    assert await reason(client.resend(started, request_id=again)) == "TOO_SOON"
    pass_time(database, user_id, MINUTE)
    assert (await client.resend(started, request_id=again)).code == started.code
    assert (await client.resend(started, request_id=again)).code == started.code
    assert counted(database, user_id, "email_verification")[2] == 2
    assert await reason(client.resend(started)) == "TOO_SOON"
    # Another one of the same user need not wait, but counts.
    other = await client.start(user_id)
    for _ in range(2):
        pass_time(database, user_id, MINUTE)
        await client.resend(other)
    pass_time(database, user_id, MINUTE)
    assert await reason(client.resend(started)) == "TOO_MANY_SENDS"
    assert await reason(client.start(user_id)) == "TOO_MANY_SENDS"
    assert (await client.verify(started)).state == STATE_USED


async def test_resends_at_once(clients: tuple[Client, Client], database: Database) -> None:
    """Of 50 resends at once, at two servers, one is let through."""
    started = await clients[0].start()
    pass_time(database, started.verification.user_id, MINUTE)
    answers = await asyncio.gather(
        *(clients[number % 2].resend(started) for number in range(50)), return_exceptions=True
    )
    assert sum(not isinstance(answer, BaseException) for answer in answers) == 1
    assert counted(database, started.verification.user_id, "email_verification")[2] == 2


async def test_retries_are_not_counted(client: Client, database: Database) -> None:
    """A call that is repeated with its request_id is one send."""
    user_id, again = new_id(), new_id()
    issued = [await client.issue(user_id, digits=6, request_id=again) for _ in range(10)][-1]
    started = [await client.start(user_id, request_id=again) for _ in range(10)][-1]
    assert counted(database, user_id, "recovery_token")[2] == counted(database, user_id, "email_verification")[2] == 1
    for _ in range(10):
        assert await reason(client.consume(issued, wrong(issued.secret), request_id=again)) == "CODE_MISMATCH"
        assert await reason(client.verify(started, wrong(started.code), request_id=again)) == "CODE_MISMATCH"
    assert counted(database, user_id, "recovery_token")[0] == counted(database, user_id, "email_verification")[0] == 1


# Clean-up


async def test_clean_up_takes_only_what_bounds_nothing(postgres_18: PostgresServer, template_url: str) -> None:
    """Budgets stay while anything in them counts: a send for as long as a token may live, a run for a year."""
    kept, gone = "kept", "gone"
    rows = [
        (kept, [], 0, [DAY - MINUTE]),
        (kept, [], 0, [DAY + timedelta(seconds=5)]),
        (gone, [], 0, [DAY + MINUTE]),
        (kept, [DAY - MINUTE], 0, []),
        (gone, [DAY + MINUTE], 0, [2 * DAY]),
        (kept, [30 * DAY], 1, []),
        (kept, [364 * DAY], 3, []),
        (gone, [367 * DAY], 99, []),
        (gone, [], 0, []),
        (kept, [9 * DAY, MINUTE], 0, [9 * DAY]),
    ]
    with postgres_18.database(template_url) as url, connected(url) as database:
        for number, (fate, failures, in_a_row, sends) in enumerate(rows):
            database.execute(
                "insert into onetime.budgets (user_id, purpose, failures, failures_in_a_row, sends) values"
                " (gen_random_uuid(), %s, array(select clock_timestamp() - f from unnest(%s::interval[]) as f), %s,"
                " array(select clock_timestamp() - s from unnest(%s::interval[]) as s))",
                [f"{fate} {number}", failures, in_a_row, sends],
            )
        removed = await sweep_all(Settings(database_url=url), lambda _, __: None)
        left = [row["purpose"] for row in database.execute("select purpose from onetime.budgets order by purpose")]
        assert left == [f"{fate} {number}" for number, (fate, *_) in enumerate(rows) if fate == kept]
        assert removed["onetime.budgets"] == len(rows) - len(left)
        # A token that may live for a week keeps its budget as long.
        week = Settings(database_url=url, email_verification_max_ttl=7 * DAY)
        database.execute(
            "update onetime.budgets set sends = array[clock_timestamp() - interval '6 d'], failures = '{}'"
        )
        database.execute("update onetime.budgets set failures_in_a_row = 0")
        assert (await sweep_all(week, lambda _, __: None))["onetime.budgets"] == 0
        assert (await sweep_all(Settings(database_url=url), lambda _, __: None))["onetime.budgets"] == len(left)


async def test_a_budget_that_is_cleaned_away_while_it_is_asked_for(client: Client, database: Database) -> None:
    """A clean-up that removes an old budget as a call comes for it: the call makes a new one."""
    user_id = new_id()
    for call, purpose in ((client.issue, "recovery_token"), (client.start, "email_verification")):
        await call(user_id)
        with database.transaction():
            # As the clean-up does it: it locks first, and deletes then.
            of_subject = "from onetime.budgets where user_id = %s and purpose = %s"
            database.execute(f"select {of_subject} for update", [user_id, purpose])
            waiting = asyncio.ensure_future(call(user_id))
            with connected(database.info.dsn) as observer:
                await until(lambda observer=observer: _waits_for_a_lock(observer))  # type: ignore[misc]
            assert database.execute(f"delete {of_subject}", [user_id, purpose]).rowcount == 1
        await waiting
        assert counted(database, user_id, purpose) == (0, 0, 1)


def _waits_for_a_lock(database: Database) -> bool:
    return bool(
        database.execute(
            "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        ).fetchall()
    )
