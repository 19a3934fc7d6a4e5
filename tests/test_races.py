import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc.aio
import psycopg
import pytest
from calls import (
    Client,
    connected,
    consume_request,
    new_id,
    open_channel,
    refused,
    seconds,
    serving,
    token_row,
    verification_row,
    wrong,
)
from conftest import PostgresServer
from onetime.v1 import one_time_tokens_pb2 as ott

from service.cleanup import sweep_all
from service.config import Settings
from service.db import load_queries

CALLERS: Final = 200
GUESSES: Final = 60
MAX_ATTEMPTS: Final = 5
CHANNELS: Final = 4
"""To each of the two servers."""
TIMEOUT_S: Final = 60.0
HUNG_UP: Final = "(hung up)"
BUSY: Final = "DATABASE_UNAVAILABLE"
"""On a slow machine a caller of a burst may wait too long for a connection. Nothing has happened then."""

ROOT: Final = Path(__file__).parent.parent

Call: TypeAlias = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Replicas:
    """Two servers on one database, which all tests of this module share: each takes users of its own."""

    url: str
    targets: tuple[str, str]


@pytest.fixture(scope="module")
def replicas(
    postgres_18: PostgresServer, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Replicas]:
    """Two servers with room for all callers of a burst.

    At the end: none of the tests made a deadlock, of which callers would have been told DATABASE_UNAVAILABLE.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    room = {
        "argon2_queue": 2 * CALLERS,
        "call_timeout": "30s",
        "pool_size": 16,
        "keys_file": folders[0] / "keys",
        "sends_per_window": 1000,
        "sends_per_day": 1000,
    }
    with (
        postgres_18.database(template_url) as url,
        serving(url, folders[0], **room) as one,
        serving(url, folders[1], **room) as other,
    ):
        log_start = postgres_18.log.stat().st_size
        yield Replicas(url, (one, other))
        with postgres_18.log.open("rb") as log:
            log.seek(log_start)
            assert b"deadlock detected" not in log.read()


@pytest.fixture
async def clients(replicas: Replicas) -> AsyncIterator[list[Client]]:
    """Clients on connections of their own, to the two servers in turn."""
    async with AsyncExitStack() as stack, asyncio.timeout(TIMEOUT_S):
        channels = [
            await stack.enter_async_context(open_channel(target))
            for _ in range(CHANNELS)
            for target in replicas.targets
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        yield [Client(channel) for channel in channels]


# Many callers at once


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    word: str
    """OK, the reason of a refusal, or a status that has none."""
    answer: Any = None
    remaining: int | None = None
    """What a CODE_MISMATCH told."""


async def outcome(call: Call) -> Outcome:
    """Make a call, again if nothing happened, and tell how it ended."""
    while True:
        try:
            return Outcome("OK", await call())
        except grpc.aio.AioRpcError as error:
            refusal = await refused(_raised(error))
            word = refusal.reason or refusal.status.name
            if word != BUSY:
                return Outcome(word, remaining=refusal.attempts_remaining if word == "CODE_MISMATCH" else None)


async def _raised(error: Exception) -> None:
    raise error


async def at_once(calls: Sequence[Call], *, hang_up_within: float | None = None) -> list[Outcome]:
    """Make calls that are released together; with a span of seconds, each hangs up at a moment of its own in it."""
    barrier = asyncio.Barrier(len(calls) + 1)

    async def one(call: Call) -> Outcome:
        await barrier.wait()
        return await outcome(call)

    tasks = [asyncio.create_task(one(call)) for call in calls]
    async with asyncio.timeout(TIMEOUT_S):
        await barrier.wait()
        if hang_up_within is not None:
            loop = asyncio.get_running_loop()
            for number, task in enumerate(tasks):
                # Spread evenly, and in an order that has nothing to do with that of the calls.
                moment = hang_up_within * (number * 61 % len(tasks)) / len(tasks)
                loop.call_later(moment, task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    outcomes = []
    for end in ended:
        if isinstance(end, Outcome):
            outcomes.append(end)
        else:
            assert isinstance(end, asyncio.CancelledError), end
            outcomes.append(Outcome(HUNG_UP))
    return outcomes


async def until(true: Callable[[], object]) -> None:
    """Wait until something holds. The caller bounds the wait."""
    while not true():  # noqa: ASYNC110 - what it waits for is in other processes
        await asyncio.sleep(0.01)


def words(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Count how calls ended."""
    return Counter(each.word for each in outcomes)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of credential: how it is made and tried, and what is left of it."""

    name: str
    make: Callable[[Client], Awaitable[Any]]
    secret: Callable[[Any], str]
    spend: Callable[..., Awaitable[Any]]
    """Takes the client, what was made, a secret and a request_id."""
    losers: frozenset[str]
    """What those are told who come too late."""
    spent: Callable[[psycopg.Connection[Any], Any], bool]
    failed_attempts: Callable[[psycopg.Connection[Any], Any], int]

    def __str__(self) -> str:
        """Name the test."""
        return self.name


def _token_spent(database: psycopg.Connection[Any], issued: ott.IssueTokenResponse) -> bool:
    rows = database.execute("select from auth.one_time_tokens where id = %s", [issued.token.id])
    return rows.rowcount == 0


def _one_time(name: str, *, digits: int = 0, by_address: bool = False) -> Kind:
    async def make(client: Client) -> ott.IssueTokenResponse:
        return await client.issue(digits=digits, relates_to=f"{new_id()}@example.org")

    async def spend(client: Client, issued: ott.IssueTokenResponse, secret: str, request_id: str) -> ott.OneTimeToken:
        return await client.consume(issued, secret, by_address=by_address, request_id=request_id)

    return Kind(
        name,
        make,
        lambda issued: str(issued.secret),
        spend,
        # The attempts of those who are about to be right are charged until then.
        frozenset({"TOKEN_NOT_FOUND", "ATTEMPTS_EXHAUSTED"} if digits else {"TOKEN_NOT_FOUND"}),
        _token_spent,
        lambda database, issued: int(token_row(database, issued)["failed_attempts"]),
    )


LINK: Final = _one_time("link")
CODE_BY_USER: Final = _one_time("code by user", digits=6)
CODE_BY_ADDRESS: Final = _one_time("code by address", digits=6, by_address=True)
EMAIL_CODE: Final = Kind(
    "email code",
    lambda client: client.start(),
    lambda started: str(started.code),
    lambda client, started, code, request_id: client.verify(started, code, request_id=request_id),
    frozenset({"TOKEN_USED"}),
    lambda database, started: verification_row(database, started)["used_at"] is not None,
    lambda database, started: int(verification_row(database, started)["failed_attempts"]),
)

KINDS: Final = pytest.mark.parametrize("kind", [LINK, CODE_BY_USER, CODE_BY_ADDRESS, EMAIL_CODE], ids=str)
CODE_KINDS: Final = pytest.mark.parametrize("kind", [CODE_BY_USER, CODE_BY_ADDRESS, EMAIL_CODE], ids=str)


def name_of(number: int) -> str:
    """Return a request_id of its own for two of four callers, one of them on each server."""
    return new_id() if number % 4 < 2 else ""


def spending(kind: Kind, clients: Sequence[Client], made: object, *, callers: int) -> list[Call]:
    """Return calls that all spend one token."""
    secret = kind.secret(made)
    return [partial(kind.spend, clients[n % len(clients)], made, secret, name_of(n)) for n in range(callers)]


def guessing(kind: Kind, clients: Sequence[Client], made: object) -> list[Call]:
    """Return calls that each try another wrong code."""
    codes = [wrong(kind.secret(made), by=n + 1) for n in range(GUESSES)]
    return [partial(kind.spend, clients[n % len(clients)], made, code, name_of(n)) for n, code in enumerate(codes)]


# One success


@KINDS
async def test_one_of_many_callers_succeeds(replicas: Replicas, clients: list[Client], kind: Kind) -> None:
    """Of any number of callers who spend one token at once, on two servers, exactly one succeeds."""
    with connected(replicas.url) as database:
        for _ in range(3):
            made = await kind.make(clients[0])
            outcomes = await at_once(spending(kind, clients, made, callers=CALLERS))
            counts = words(outcomes)
            assert counts["OK"] == 1, counts
            assert counts.keys() - {"OK"} <= kind.losers, counts
            assert kind.spent(database, made)
            (late,) = await at_once(spending(kind, clients, made, callers=1))
            assert late.word in kind.losers


@KINDS
@pytest.mark.parametrize("span", [0.02, 0.1, 0.3])
async def test_no_second_success_when_callers_hang_up(
    replicas: Replicas, clients: list[Client], kind: Kind, span: float
) -> None:
    """Callers who hang up at any moment never make a second success possible: what was spent unheard stays spent."""
    made = await kind.make(clients[0])
    outcomes = await at_once(spending(kind, clients, made, callers=CALLERS // 2), hang_up_within=span)
    counts = words(outcomes)
    assert counts[HUNG_UP] > 0
    assert counts.keys() - {"OK", HUNG_UP} <= kind.losers, counts
    (late,) = spending(kind, clients, made, callers=1)
    async with asyncio.timeout(TIMEOUT_S):
        # Those who have hung up are still being served, and each has an attempt charged until it is found right.
        while (last := await outcome(late)).word == "ATTEMPTS_EXHAUSTED":  # noqa: ASYNC110 - by another process
            await asyncio.sleep(0.02)
    assert last.word == "OK" or last.word in kind.losers
    assert counts["OK"] + (last.word == "OK") <= 1
    with connected(replicas.url) as database:
        # Whoever was heard or not: in the end it is spent.
        assert kind.spent(database, made)


async def test_an_answer_says_what_the_row_said(clients: list[Client]) -> None:
    """Many tokens spent at once: each answer is that of its own token, never a neighbour's."""
    issued = await asyncio.gather(
        *(clients[n % len(clients)].issue(digits=n % 2 * 6, relates_to=f"{n}@example.org") for n in range(60))
    )
    outcomes = await at_once([partial(clients[n % len(clients)].consume, each) for n, each in enumerate(issued)])
    assert words(outcomes) == {"OK": 60}
    for each, spent in zip(issued, outcomes, strict=True):
        assert (spent.answer.id, spent.answer.user_id, spent.answer.relates_to) == (
            each.token.id,
            each.token.user_id,
            each.token.relates_to,
        )


# Guesses


WAITING: Final = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
"""Sessions that wait for a lock."""


def lock_state(holder: psycopg.Connection[Any], kind: Kind, made: Any) -> None:  # noqa: ANN401 - each kind has its own
    """Lock the row that counts the guesses, until the holder's transaction ends."""
    states, row = (
        ("onetime.email_verification_states where id = %s", made.verification)
        if kind is EMAIL_CODE
        else ("onetime.one_time_token_states where token_id = %s", made.token)
    )
    assert holder.execute(f"select from {states} for update", [row.id]).rowcount == 1


@CODE_KINDS
async def test_guesses_at_once_are_bounded(replicas: Replicas, clients: list[Client], kind: Kind) -> None:
    """Of many wrong codes at once five are compared, each is told what is left, and then the right one is refused."""
    made = await kind.make(clients[0])
    outcomes = await at_once(guessing(kind, clients, made))
    assert words(outcomes) == {"CODE_MISMATCH": MAX_ATTEMPTS, "ATTEMPTS_EXHAUSTED": GUESSES - MAX_ATTEMPTS}
    assert sorted(each.remaining for each in outcomes if each.remaining is not None) == list(range(MAX_ATTEMPTS))
    with connected(replicas.url) as database:
        assert kind.failed_attempts(database, made) == MAX_ATTEMPTS
        (right,) = await at_once(spending(kind, clients, made, callers=1))
        assert right.word == "ATTEMPTS_EXHAUSTED"
        assert not kind.spent(database, made)


@CODE_KINDS
async def test_guesses_that_wait_together_share_the_last_attempt(
    replicas: Replicas, clients: list[Client], kind: Kind
) -> None:
    """Two servers wait for one token that has one attempt left: one compares its code, and the other sees the count."""
    for _ in range(5):  # by luck, the other one may come when the first has ended
        made = await kind.make(clients[0])
        first, other, *earlier = guessing(kind, clients, made)[: MAX_ATTEMPTS + 1]
        for guess in earlier:
            assert (await outcome(guess)).word == "CODE_MISMATCH"
        with connected(replicas.url) as database, connected(replicas.url) as holder:
            async with asyncio.timeout(TIMEOUT_S):
                with holder.transaction():
                    lock_state(holder, kind, made)
                    pair = asyncio.gather(outcome(first), outcome(other))
                    await until(lambda: database.execute(WAITING).rowcount == 2)
                assert words(await pair) == {"CODE_MISMATCH": 1, "ATTEMPTS_EXHAUSTED": 1}
            assert kind.failed_attempts(database, made) == MAX_ATTEMPTS


@CODE_KINDS
@pytest.mark.parametrize("span", [0.02, 0.1])
async def test_who_hangs_up_pays(replicas: Replicas, clients: list[Client], kind: Kind, span: float) -> None:
    """No guess is free for a caller who hangs up: the count never falls, and no verdict is heard that is not in it."""
    made = await kind.make(clients[0])
    done = asyncio.Event()
    counts = [0]

    async def watch() -> None:
        with connected(replicas.url) as database:
            while not done.is_set():
                counts.append(await asyncio.to_thread(kind.failed_attempts, database, made))
                await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    heard = words(await at_once(guessing(kind, clients, made), hang_up_within=span))
    with connected(replicas.url) as database:
        assert heard["CODE_MISMATCH"] <= kind.failed_attempts(database, made) <= MAX_ATTEMPTS
        # Those who are served though they have hung up, and those who come now, share what is left.
        heard += words(await at_once(guessing(kind, clients, made)))
        assert heard["CODE_MISMATCH"] <= MAX_ATTEMPTS
        assert kind.failed_attempts(database, made) == MAX_ATTEMPTS
    done.set()
    await watching
    assert counts == sorted(counts)
    assert heard.keys() <= {"CODE_MISMATCH", "ATTEMPTS_EXHAUSTED", HUNG_UP}
    (right,) = await at_once(spending(kind, clients, made, callers=1))
    assert right.word == "ATTEMPTS_EXHAUSTED"


@CODE_KINDS
@pytest.mark.parametrize("right", [False, True], ids=["wrong", "right"])
async def test_a_call_goes_on_when_its_caller_hangs_up(
    replicas: Replicas, clients: list[Client], kind: Kind, *, right: bool
) -> None:
    """A guess that has arrived is counted, and a right code spent, though its caller hangs up in the middle."""
    made = await kind.make(clients[0])
    secret = kind.secret(made) if right else wrong(kind.secret(made))
    with connected(replicas.url) as database, connected(replicas.url) as holder:
        async with asyncio.timeout(TIMEOUT_S):
            with holder.transaction():
                lock_state(holder, kind, made)
                call = asyncio.ensure_future(kind.spend(clients[0], made, secret, ""))
                await until(lambda: database.execute(WAITING).rowcount)
                call.cancel()
                await asyncio.wait([call])
                # A call behind it on the same connection: the server knows by now.
                await clients[0].list(new_id())
            done = kind.spent if right else kind.failed_attempts
            await until(lambda: done(database, made))
    assert call.cancelled()


async def test_checking_and_consuming_share_one_count(replicas: Replicas, clients: list[Client]) -> None:
    """Wrong codes that arrive at once through both rpcs that compare them are counted together."""
    issued = await clients[0].issue(digits=6)
    outcomes = await at_once(
        [
            partial(
                clients[n % len(clients)].check if n % 3 else clients[n % len(clients)].consume,
                issued,
                wrong(issued.secret, by=n + 1),
            )
            for n in range(GUESSES)
        ]
    )
    assert words(outcomes) == {"CODE_MISMATCH": MAX_ATTEMPTS, "ATTEMPTS_EXHAUSTED": GUESSES - MAX_ATTEMPTS}
    with connected(replicas.url) as database:
        assert token_row(database, issued)["failed_attempts"] == MAX_ATTEMPTS


async def test_right_codes_at_once_cost_no_attempt(replicas: Replicas, clients: list[Client]) -> None:
    """A right code gives its charge back, also where many are checked at once."""
    issued = await clients[0].issue(digits=6)
    outcomes = await at_once([partial(clients[n % len(clients)].check, issued) for n in range(GUESSES)])
    counts = words(outcomes)
    # No more than five charges fit at any moment.
    assert counts.keys() <= {"OK", "ATTEMPTS_EXHAUSTED"}
    assert counts["OK"] >= MAX_ATTEMPTS
    with connected(replicas.url) as database:
        assert token_row(database, issued)["failed_attempts"] == 0


# All at once

HARMLESS: Final = frozenset(
    {
        "OK",
        "TOKEN_NOT_FOUND",
        "TOKEN_USED",
        "TOKEN_CANCELLED",
        "ATTEMPTS_EXHAUSTED",
        "CODE_MISMATCH",
        "TOO_MANY_FAILURES",
    }
)
"""How calls may end that get into each other's way."""


async def test_everything_at_once(replicas: Replicas, clients: list[Client]) -> None:
    """Right and wrong calls of every kind for one user, at once: nothing fails, and every rule holds of the rest."""
    with connected(replicas.url) as database:
        for _ in range(3):
            user_id = new_id()
            code, link = await asyncio.gather(
                clients[0].issue(user_id, digits=6), clients[0].issue(user_id, ott.TOKEN_TYPE_CONFIRMATION)
            )
            started = await clients[0].start(user_id)
            calls: dict[str, list[Call]] = defaultdict(list)
            for n in range(20):
                client = clients[n % len(clients)]
                calls["right"].append(partial(client.consume, code, request_id=name_of(n)))
                calls["link"].append(partial(client.consume, link, request_id=name_of(n)))
                calls["verify"].append(partial(client.verify, started, request_id=name_of(n)))
                guess = wrong(started.code, by=n + 1)
                calls["guess"].append(partial(client.verify, started, guess, request_id=name_of(n)))
                calls["resend"].append(partial(client.resend, started, request_id=name_of(n)))
                calls["rest"] += [
                    partial(client.consume, code, wrong(code.secret, by=n + 1), request_id=name_of(n)),
                    partial(client.check, code, wrong(code.secret, by=n % 2)),
                    partial(client.issue, user_id, digits=6, request_id=name_of(n)),
                    partial(client.issue, user_id, ott.TOKEN_TYPE_CONFIRMATION, request_id=name_of(n)),
                    partial(client.list, user_id),
                    partial(client.get, started),
                    partial(client.start, user_id, request_id=name_of(n)),
                ]
            calls["rest"] += [partial(clients[n].revoke, user_id) for n in range(4)]
            calls["rest"] += [partial(clients[n].mark_sent, started) for n in range(4)]
            calls["rest"] += [partial(clients[n].cancel, started) for n in range(2)]
            everything = [(name, call) for name, of_kind in calls.items() for call in of_kind]
            # In an order that has nothing to do with their kinds: 67 is prime.
            everything = [everything[n * 67 % len(everything)] for n in range(len(everything))]
            assert len(everything) % 67
            outcomes = await at_once([call for _, call in everything])
            by_name = {
                name: [end for (of, _), end in zip(everything, outcomes, strict=True) if of == name] for name in calls
            }

            assert words(outcomes).keys() <= HARMLESS, words(outcomes)
            for spent in ("right", "link", "verify"):
                assert words(by_name[spent])["OK"] <= 1
            assert {end.answer.id for end in by_name["right"] if end.answer} <= {code.token.id}
            assert {end.answer.code for end in by_name["resend"] if end.answer} <= {started.code}
            mismatches = words(by_name["guess"])["CODE_MISMATCH"]
            assert mismatches <= MAX_ATTEMPTS
            assert verification_row(database, started)["failed_attempts"] == mismatches
            rows = database.execute(
                "select t.id as token_id, s.token_id as of_state, s.failed_attempts"
                " from auth.one_time_tokens as t"
                " full join onetime.one_time_token_states as s using (user_id, token_type) where user_id = %s",
                [user_id],
            ).fetchall()
            # A token and its state come and go together.
            assert all(row["token_id"] == row["of_state"] for row in rows), rows
            assert all(0 <= row["failed_attempts"] <= MAX_ATTEMPTS for row in rows)


# Replacing


@pytest.mark.parametrize("digits", [0, 6], ids=["link", "code"])
@pytest.mark.parametrize("already", [False, True], ids=["first", "replacing"])
async def test_the_last_of_many_issues_counts(
    replicas: Replicas, clients: list[Client], digits: int, *, already: bool
) -> None:
    """Of many tokens of one kind issued at once for one user, the last one is left, and good for its own address."""
    user_id = new_id()
    if already:
        await clients[0].issue(user_id, digits=digits)
    outcomes = await at_once(
        [
            partial(clients[n % len(clients)].issue, user_id, digits=digits, relates_to=f"{n}@example.org")
            for n in range(50)
        ]
    )
    assert words(outcomes) == {"OK": 50}
    with connected(replicas.url) as database:
        rows = database.execute(
            "select t.id, t.relates_to, s.token_id from auth.one_time_tokens as t"
            " full join onetime.one_time_token_states as s using (user_id, token_type) where user_id = %s",
            [user_id],
        ).fetchall()
    assert len(rows) == 1
    assert rows[0]["id"] == rows[0]["token_id"]
    issued = {each.answer.token.id: each.answer for each in outcomes}
    assert len(issued) == 50
    last = issued.pop(str(rows[0]["id"]))
    assert last.token.relates_to == rows[0]["relates_to"]
    # Links have no limit on guesses; of codes, a few tell as much.
    for replaced in list(issued.values())[: 3 if digits else None]:
        refusal = await outcome(partial(clients[0].consume, replaced))
        assert refusal.word == ("CODE_MISMATCH" if digits else "TOKEN_NOT_FOUND")
    spent = await clients[0].consume(last)
    assert (spent.id, spent.relates_to) == (last.token.id, last.token.relates_to)


@pytest.mark.parametrize("digits", [0, 6], ids=["link", "code"])
async def test_spending_the_old_token_spares_the_new_one(clients: list[Client], digits: int) -> None:
    """A token that is consumed while it is being replaced: whoever is first, the new one is good."""
    for _ in range(15):
        user_id = new_id()
        old = await clients[0].issue(user_id, digits=digits)
        *spent, replaced = await at_once(
            [*spending_token(clients, old, callers=4), partial(clients[5].issue, user_id, digits=digits)]
        )
        # A code that comes after the replacement is held against the new one.
        assert words(spent).keys() <= {"OK", "TOKEN_NOT_FOUND", *(["CODE_MISMATCH"] if digits else [])}
        assert words(spent)["OK"] <= 1
        assert replaced.word == "OK"
        assert (await clients[0].consume(replaced.answer)).id == replaced.answer.token.id


def spending_token(clients: Sequence[Client], issued: ott.IssueTokenResponse, callers: int) -> list[Call]:
    """Return calls that all consume one token."""
    request = consume_request(issued)
    return [partial(clients[n % len(clients)].tokens.ConsumeToken, request) for n in range(callers)]


@pytest.mark.parametrize("digits", [0, 6], ids=["link", "code"])
async def test_revoked_or_consumed(clients: list[Client], digits: int) -> None:
    """A token that is revoked and consumed at once was either the one or the other, and never both or neither."""
    for _ in range(20):
        issued = await clients[0].issue(digits=digits)
        revocations = [partial(clients[n].revoke, issued.token.user_id) for n in range(4)]
        outcomes = await at_once([*spending_token(clients, issued, callers=4), *revocations])
        spent, revoked = outcomes[:4], outcomes[4:]
        assert words(spent).keys() <= {"OK", "TOKEN_NOT_FOUND"}
        assert words(revoked) == {"OK": 4}
        assert words(spent)["OK"] + sum(each.answer for each in revoked) == 1


async def test_cancelled_or_used(clients: list[Client]) -> None:
    """A verification that is cancelled and verified at once was either the one or the other."""
    for _ in range(15):
        started = await clients[0].start()
        verifications = [partial(clients[n].verify, started) for n in range(4)]
        cancellations = [partial(clients[n].cancel, started) for n in range(4, 8)]
        outcomes = await at_once([*verifications, *cancellations])
        used, cancelled = words(outcomes[:4]), words(outcomes[4:])
        if used["OK"]:
            assert (used, cancelled) == ({"OK": 1, "TOKEN_USED": 3}, {"TOKEN_USED": 4})
        else:
            assert (used, cancelled) == ({"TOKEN_CANCELLED": 4}, {"OK": 4})


# One call, sent many times


async def test_one_issue_sent_many_times(replicas: Replicas, clients: list[Client]) -> None:
    """One IssueToken that arrives many times at once makes one token; the last secret that was given out is good."""
    for digits in (0, 6):
        user_id, request_id = new_id(), new_id()
        outcomes = await at_once(
            [partial(clients[n % len(clients)].issue, user_id, digits=digits, request_id=request_id) for n in range(20)]
        )
        assert words(outcomes) == {"OK": 20}
        assert len({each.answer.token.id for each in outcomes}) == 1
        assert len({each.answer.secret for each in outcomes}) == 20
        if not digits:
            good = [
                each.answer for each in outcomes if (await outcome(partial(clients[0].check, each.answer))).word == "OK"
            ]
            assert len(good) == 1
        with connected(replicas.url) as database:
            row = token_row(database, outcomes[0].answer)
            assert row["failed_attempts"] == 0


async def test_one_start_sent_many_times(replicas: Replicas, clients: list[Client]) -> None:
    """One StartEmailVerification that arrives many times at once makes one verification; its last token is good."""
    user_id, request_id = new_id(), new_id()
    outcomes = await at_once(
        [partial(clients[n % len(clients)].start, user_id, request_id=request_id) for n in range(20)]
    )
    assert words(outcomes) == {"OK": 20}
    assert len({each.answer.verification.id for each in outcomes}) == 1
    assert len({each.answer.code for each in outcomes}) == 1
    assert len({each.answer.email_verification_token for each in outcomes}) == 20
    with connected(replicas.url) as database:
        tables = (
            "public.email_verification_tokens where user_id = %s",
            "onetime.email_verification_states where id = %s",
        )
        for table, key in zip(tables, (user_id, outcomes[0].answer.verification.id), strict=True):
            assert database.execute(f"select from {table}", [key]).rowcount == 1
    verified = words([await outcome(partial(clients[0].verify, each.answer)) for each in outcomes])
    assert verified == {"OK": 1, "TOKEN_NOT_FOUND": 19}


@KINDS
async def test_one_right_guess_sent_many_times(clients: list[Client], kind: Kind) -> None:
    """One call that spends a token, arriving many times at once, gets one answer every time, and ever after."""
    for _ in range(3):
        made, request_id = await kind.make(clients[0]), new_id()
        calls = [partial(kind.spend, clients[n], made, kind.secret(made), request_id) for n in range(len(clients))]
        outcomes = await at_once(calls) + [await outcome(calls[0])]
        assert words(outcomes) == {"OK": len(clients) + 1}
        assert len({each.answer.SerializeToString(deterministic=True) for each in outcomes}) == 1


@CODE_KINDS
async def test_one_wrong_guess_sent_many_times(replicas: Replicas, clients: list[Client], kind: Kind) -> None:
    """One call with a wrong code, arriving many times at once, is counted once and gets one answer every time."""
    made, request_id = await kind.make(clients[0]), new_id()
    calls = [partial(kind.spend, clients[n], made, wrong(kind.secret(made)), request_id) for n in range(len(clients))]
    outcomes = await at_once(calls) + [await outcome(calls[0])]
    assert words(outcomes) == {"CODE_MISMATCH": len(clients) + 1}
    assert {each.remaining for each in outcomes} == {MAX_ATTEMPTS - 1}
    with connected(replicas.url) as database:
        assert kind.failed_attempts(database, made) == 1


# Clean-up


async def test_clean_up_races_with_use(replicas: Replicas, clients: list[Client]) -> None:
    """Tokens that expire while they are spent and swept away are spent once at most, and never after their time."""
    made: list[tuple[Kind, Any]] = []
    for kind in (LINK, CODE_BY_USER, EMAIL_CODE):
        makers: Sequence[Awaitable[Any]] = [
            clients[n % len(clients)].start(ttl=seconds(2))
            if kind is EMAIL_CODE
            else clients[n % len(clients)].issue(ttl=seconds(2), digits=6 if kind is CODE_BY_USER else 0)
            for n in range(20)
        ]
        made += [(kind, each) for each in await asyncio.gather(*makers)]

    async def spend(kind: Kind, token: Any, caller: int, early: float) -> tuple[datetime, Outcome]:  # noqa: ANN401 - of either service
        expiry = (token.verification if kind is EMAIL_CODE else token.token).expire_time.ToDatetime(tzinfo=UTC)
        wait = (expiry - datetime.now(UTC)).total_seconds() + (caller - 2) * 0.015 - early
        await asyncio.sleep(max(wait, 0))
        started = datetime.now(UTC)
        client = clients[caller % len(clients)]
        end = await outcome(partial(kind.spend, client, token, kind.secret(token), ""))
        assert started < expiry or end.word != "OK", "it was accepted after its time"
        return started, end

    settings = Settings(database_url=replicas.url)
    done = asyncio.Event()

    async def sweep() -> int:
        runs = 0
        while not done.is_set():
            await sweep_all(settings, lambda *_: None)
            runs += 1
        return runs

    async with asyncio.timeout(TIMEOUT_S):
        sweeps = [asyncio.create_task(sweep()) for _ in range(3)]
        # Some tokens are asked for earlier: on a slow machine all calls at the very end would come too late.
        ends = await asyncio.gather(
            *(
                asyncio.gather(*(spend(kind, token, caller, number % 5 * 0.1) for caller in range(6)))
                for number, (kind, token) in enumerate(made)
            )
        )
        done.set()
        assert all(await asyncio.gather(*sweeps))
        await sweep_all(settings, lambda *_: None)

    allowed = {"OK", "TOKEN_EXPIRED"}
    with connected(replicas.url) as database:
        for (kind, token), of_token in zip(made, ends, strict=True):
            counts = words([end for _, end in of_token])
            # Cleaned away, each of them is unknown.
            assert counts.keys() <= allowed | kind.losers | {"TOKEN_NOT_FOUND"}, counts
            assert counts["OK"] <= 1
            if kind is EMAIL_CODE:
                used = "select used_at from public.email_verification_tokens where id = %s"
                rows = database.execute(used, [token.verification.id]).fetchall()
                # A used one is kept for its retention.
                assert len(rows) == counts["OK"]
                assert all(row["used_at"] for row in rows)
            else:
                assert kind.spent(database, token)
                states = "select from onetime.one_time_token_states where token_id = %s"
                assert database.execute(states, [token.token.id]).rowcount == 0
    # The test is worth something only if it met the moment: some came in time, and some did not.
    total = words([end for of_token in ends for _, end in of_token])
    assert total["OK"] > 0
    assert total["TOKEN_EXPIRED"] + total["TOKEN_NOT_FOUND"] > 0


# Architecture


def _sources() -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in (ROOT / "service").glob("*.py")}


def test_each_way_to_spend_stands_in_one_place() -> None:
    """Every statement that spends tokens is run from one place, so that no second path with its own race can grow."""
    for stem in ("one_time_tokens", "email_verification"):
        spending_statements = [name for name in load_queries(stem) if name.startswith(("consume_", "use_"))]
        assert spending_statements
        for name in spending_statements:
            places = {module: text.count(f'"{name}"') for module, text in _sources().items() if name in text}
            assert places == {stem: 1}, name


def test_nothing_else_spends() -> None:
    """Only the statements that are known to delete or use tokens do, and all of them ask for the row's own state."""
    stems = [path.stem for path in (ROOT / "service" / "sql").glob("*.sql")]
    statements = {name: text for stem in stems for name, text in load_queries(stem).items()}
    deleting = {name for name, text in statements.items() if "delete from auth.one_time_tokens" in text}
    assert deleting == {"consume_links", "consume_codes", "revoke_tokens", "sweep_one_time_tokens", "purge_tokens"}
    using = {name for name, text in statements.items() if re.search(r"set[^;]*\bused_at =", text)}
    assert using == {"use_verifications"}
    assert (
        "case when t.used_at is null and t.deleted_at is null then t.expires_at > clock_timestamp() end"
        in statements["use_verifications"]
    )
    removing = {name for name, text in statements.items() if "delete from public.email_verification_tokens" in text}
    assert removing == {"sweep_email_verification_tokens", "purge_verifications"}
