import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import grpc
import grpc.aio
import pytest
from calls import (
    ADDRESS,
    Client,
    Database,
    connected,
    consume_request,
    contents,
    ended,
    expire,
    new_id,
    open_channel,
    reason,
    refused,
    seconds,
    serving,
    token_row,
    until,
    verification_row,
    write_keys,
    wrong,
)
from conftest import PostgresServer, Serve
from google.protobuf.message import Message
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott

from service.crypto import new_key

T = TypeVar("T")

CALLS: Final = 50
"""Identical calls at once."""


@pytest.fixture(scope="module")
def migrated_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """One database for all tests of this module, each of which takes users of its own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def targets(migrated_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two servers with the same keys, which hash codes in different ways: either repeats what the other began."""
    folder = tmp_path_factory.mktemp("servers")
    with serving(migrated_url, folder) as one, serving(migrated_url, folder, code_hashing="hmac") as other:
        yield one, other


@pytest.fixture(params=["argon2id first", "hmac first"])
async def clients(request: pytest.FixtureRequest, targets: tuple[str, str]) -> AsyncIterator[tuple[Client, Client]]:
    """A client of each server: of the one that is called, and of the other, which gets the retry."""
    one, other = targets if request.param == "argon2id first" else reversed(targets)
    async with open_channel(one) as channel, open_channel(other) as other_channel:
        yield Client(channel), Client(other_channel)


@pytest.fixture
async def client(targets: tuple[str, str]) -> AsyncIterator[Client]:
    """A client of one server, for what is the same for both."""
    async with open_channel(targets[0]) as channel:
        yield Client(channel)


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


def receipts(database: Database, request_id: str) -> list[str]:
    """Return the rpcs that have a receipt of this id."""
    rows = database.execute("select rpc from onetime.receipts where request_id = %s order by rpc", [request_id])
    return [row["rpc"] for row in rows.fetchall()]


async def insist(make: Callable[[], Awaitable[T]]) -> T:
    """Make a call, and make it again while the database has more to do than it can: that is what the id is for."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await make()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise


async def at_once(clients: tuple[Client, Client], call: Callable[[Client], Awaitable[T]]) -> list[T]:
    """Make many identical calls at once, half of them to each server."""
    return await asyncio.gather(*(insist(lambda client=clients[n % 2]: call(client)) for n in range(CALLS)))  # type: ignore[misc]


# IssueToken


@pytest.mark.parametrize("digits", [0, 6])
async def test_repeated_issue_gives_its_token_a_fresh_secret(
    clients: tuple[Client, Client], database: Database, digits: int
) -> None:
    """Same id, same times, attempts kept, another secret; the lost one is worthless, and there is one token."""
    client, other = clients
    user, again = new_id(), new_id()
    first = await client.issue(user, digits=digits, ttl=seconds(100), request_id=again)
    if digits:
        assert await reason(client.check(first, wrong(first.secret))) == "CODE_MISMATCH"
        first.token.attempts_remaining = 4
    row = token_row(database, first)
    second = await other.issue(user, digits=digits, ttl=seconds(100), request_id=again)
    assert second.token == first.token
    assert await client.list(user) == [first.token]
    after = token_row(database, second)
    assert after["token_hash"] != row["token_hash"]
    assert {**after, "token_hash": ""} == {**row, "token_hash": ""}
    if second.secret != first.secret:
        assert await reason(client.check(first)) == ("CODE_MISMATCH" if digits else "TOKEN_NOT_FOUND")
    assert (await client.consume(second)).id == first.token.id


async def test_repeated_issue_never_replaces_what_came_after(clients: tuple[Client, Client]) -> None:
    """A late retry of a token that has been replaced is refused, and the newer token stays good."""
    client, other = clients
    user, again = new_id(), new_id()
    old = await client.issue(user, request_id=again)
    new = await client.issue(user, request_id=new_id())
    for each in clients:
        assert await reason(each.issue(user, request_id=again)) == "TOKEN_NOT_FOUND"
    assert await reason(client.consume(old)) == "TOKEN_NOT_FOUND"
    assert await other.consume(new) == new.token


@pytest.mark.parametrize("end", ["consumed", "revoked", "expired", "exhausted"])
async def test_repeated_issue_revives_nothing(clients: tuple[Client, Client], database: Database, end: str) -> None:
    """A retry whose token is over meanwhile tells so, and makes no other."""
    client, other = clients
    user, again = new_id(), new_id()
    issued = await client.issue(user, digits=6, request_id=again)
    if end == "consumed":
        await client.consume(issued)
    elif end == "revoked":
        await client.revoke(user)
    elif end == "expired":
        expire(database, issued)
    else:
        database.execute("update onetime.one_time_token_states set failed_attempts = 5 where user_id = %s", [user])
    before = contents(database)
    expected = {"expired": "TOKEN_EXPIRED", "exhausted": "ATTEMPTS_EXHAUSTED"}.get(end, "TOKEN_NOT_FOUND")
    for each in (other, client):
        assert await reason(each.issue(user, digits=6, request_id=again)) == expected
    assert contents(database) == before


@pytest.mark.parametrize("digits", [0, 6])
async def test_many_identical_issues_make_one_token(
    clients: tuple[Client, Client], database: Database, digits: int
) -> None:
    """Of many at once on two replicas, all are answered with the same token, and the last secret is the good one."""
    user, again = new_id(), new_id()
    answers = await at_once(clients, lambda client: client.issue(user, digits=digits, request_id=again))
    assert len({each.token.id for each in answers}) == len({str(each.token) for each in answers}) == 1
    assert len({each.secret for each in answers}) > 1
    assert receipts(database, again) == ["IssueToken"]
    rows = database.execute("select from auth.one_time_tokens where user_id = %s", [user]).fetchall()
    assert len(rows) == 1
    if not digits:
        good = [each for each in answers if await _is_good(clients[0].check(each))]
        assert len(good) == 1
        assert await clients[0].consume(good[0]) == answers[0].token


async def _is_good(call: Awaitable[object]) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return False
    return True


# ConsumeToken


@pytest.mark.parametrize("digits", [0, 6])
async def test_repeated_consume_gets_the_same_answer(
    clients: tuple[Client, Client], database: Database, digits: int
) -> None:
    """The same call gets its OK again, from any replica, also after the user has a new token; no other call gets it."""
    client, other = clients
    user, again = new_id(), new_id()
    issued = await client.issue(user, digits=digits)
    assert await client.consume(issued, request_id=again) == issued.token
    new = await client.issue(user, digits=digits)
    before = contents(database)["auth.one_time_tokens"]
    for each in (other, client, other):
        assert await each.consume(issued, request_id=again) == issued.token
    assert contents(database)["auth.one_time_tokens"] == before
    if issued.secret != new.secret:
        expected = "CODE_MISMATCH" if digits else "TOKEN_NOT_FOUND"
        assert await reason(client.consume(issued, request_id=new_id())) == expected
        assert await reason(client.consume(issued)) == expected
    assert (await client.consume(new)).id == new.token.id


async def test_repeated_wrong_code_is_charged_once(clients: tuple[Client, Client], database: Database) -> None:
    """The same wrong guess, however often it is sent, costs one attempt, and is answered as it was at first."""
    client, other = clients
    issued = await client.issue(digits=6)
    again = new_id()
    assert (await refused(client.consume(issued, wrong(issued.secret), request_id=again))).attempts_remaining == 4
    assert (await refused(client.consume(issued, wrong(issued.secret, by=2)))).attempts_remaining == 3
    for each in (other, client, other):
        refusal = await refused(each.consume(issued, wrong(issued.secret), request_id=again))
        assert (refusal.reason, refusal.attempts_remaining) == ("CODE_MISMATCH", 4)
    assert token_row(database, issued)["failed_attempts"] == 2
    assert (await client.consume(issued, request_id=new_id())).attempts_remaining == 3


@pytest.mark.parametrize("digits", [0, 6])
async def test_many_identical_consumes_are_one(clients: tuple[Client, Client], database: Database, digits: int) -> None:
    """Of many at once on two replicas, all are OK with the same answer, and so is a later one."""
    issued = await clients[0].issue(digits=digits)
    again = new_id()
    answers = await at_once(clients, lambda client: client.consume(issued, request_id=again))
    assert all(answer.id == issued.token.id for answer in answers)
    assert len({str(answer) for answer in answers}) == 1
    assert receipts(database, again) == ["ConsumeToken"]
    assert await clients[1].consume(issued, request_id=again) == answers[0]
    assert await reason(clients[1].consume(issued)) == "TOKEN_NOT_FOUND"


async def test_many_identical_wrong_codes_are_one(clients: tuple[Client, Client], database: Database) -> None:
    """Of many at once on two replicas, all are CODE_MISMATCH with the same number left, and one attempt is charged."""
    issued = await clients[0].issue(digits=6)
    code, again = wrong(issued.secret), new_id()

    async def guess(client: Client) -> tuple[str, int]:
        while True:
            refusal = await refused(client.consume(issued, code, request_id=again))
            if refusal.status is not grpc.StatusCode.UNAVAILABLE:
                return refusal.reason, refusal.attempts_remaining

    assert set(await at_once(clients, guess)) == {("CODE_MISMATCH", 4)}
    assert token_row(database, issued)["failed_attempts"] == 1


async def test_charge_of_a_call_that_died_is_not_charged_again(
    serve: Serve, migrated_url: str, database: Database
) -> None:
    """A process that is killed between charge and verdict leaves the charge; the retry is compared without another."""
    again = new_id()
    async with serve(migrated_url, drain_delay="0s") as survivor, survivor.channel() as channel:
        client = Client(channel)
        issued = await client.issue(digits=6)
        async with serve(migrated_url, drain_delay="0s") as victim, victim.channel() as other_channel:
            with connected(migrated_url) as other, other.transaction():
                # The code is found right, and the call waits to spend it.
                other.execute("lock table auth.one_time_tokens in share mode")
                call = asyncio.create_task(refused(Client(other_channel).consume(issued, request_id=again)))
                await until(lambda: _waits_for_a_lock(database))
                await victim.kill()
                assert (await call).status is grpc.StatusCode.UNAVAILABLE
        assert token_row(database, issued)["failed_attempts"] == 1
        assert await insist(lambda: client.consume(issued, request_id=again)) == issued.token
        assert await client.consume(issued, request_id=again) == issued.token
        # The code was right: the retry has given back what the first try was charged.
        budget = database.execute(
            "select failures, failures_in_a_row from onetime.budgets where user_id = %s", [issued.token.user_id]
        ).fetchall()
        assert budget == [{"failures": [], "failures_in_a_row": 0}]


def _waits_for_a_lock(database: Database) -> bool:
    rows = database.execute(
        "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    )
    return bool(rows.fetchall())


async def test_wrong_code_whose_verdict_was_lost(clients: tuple[Client, Client], database: Database) -> None:
    """A charge without a verdict is compared again when the call is repeated, and not charged again."""
    client, other = clients
    issued, again = await client.issue(digits=6), new_id()
    assert (await refused(client.consume(issued, wrong(issued.secret), request_id=again))).attempts_remaining == 4
    for _ in range(2):
        database.execute("update onetime.receipts set answer = null where request_id = %s", [again])
        refusal = await refused(other.consume(issued, wrong(issued.secret), request_id=again))
        assert (refusal.reason, refusal.attempts_remaining) == ("CODE_MISMATCH", 4)
    assert token_row(database, issued)["failed_attempts"] == 1


async def test_a_code_whose_receipt_becomes_anothers_is_not_spent(serve: Serve, migrated_url: str) -> None:
    """What would be told that its request_id is another call's has no effect, though others are settled with it."""
    request_ids = [new_id() for _ in range(6)]
    charged = "select from onetime.receipts where request_id = %s and answer is not null"
    take = "update onetime.receipts set fingerprint = 'of another' where request_id = %s"
    async with (
        serve(migrated_url, argon2_threads=1, argon2_memory_kib=19456, argon2_time_cost=10) as server,
        server.channel() as channel,
    ):
        client = Client(channel)
        issued = [await client.issue(digits=6) for _ in request_ids]
        with connected(migrated_url) as database:
            pairs = zip(issued, request_ids, strict=True)
            calls = [asyncio.create_task(ended(client.consume(each, request_id=again))) for each, again in pairs]
            await until(lambda: database.execute(charged, [request_ids[3]]).rowcount == 1)
            assert database.execute(take, [request_ids[3]]).rowcount == 1
            words = await asyncio.gather(*calls)
            assert words == ["OK", "OK", "OK", "REQUEST_ID_REUSED", "OK", "OK"]
            ids = [each.token.id for each in issued]
            left = database.execute(
                "select token_id::text as id from onetime.one_time_token_states where token_id = any (%s::uuid[])",
                [ids],
            ).fetchall()
            assert left == [{"id": issued[3].token.id}]
        await client.consume(issued[3])


# StartEmailVerification


async def test_repeated_start_gives_its_verification_a_fresh_token(
    clients: tuple[Client, Client], database: Database
) -> None:
    """Same id, same times, same code, attempts kept, another token; the lost token is worthless."""
    client, other = clients
    user, again = new_id(), new_id()
    first = await client.start(user, ttl=seconds(100), request_id=again)
    assert await reason(client.verify(first, wrong(first.code))) == "CODE_MISMATCH"
    beside = await client.start(user)
    row = verification_row(database, first)
    second = await other.start(user, ttl=seconds(100), request_id=again)
    assert second.code == first.code
    assert second.email_verification_token != first.email_verification_token
    assert second.verification.attempts_remaining == 4
    for field in ("id", "user_id", "state", "code_sent", "create_time", "expire_time"):
        assert getattr(second.verification, field) == getattr(first.verification, field)
    after = verification_row(database, second)
    changed = {name for name in row if row[name] != after[name]}
    # The code is the same, sealed for another token: by chance, one in a million looks the same.
    assert changed - {"code"} == {"email_verification_token", "updated_at"}
    for call in (client.verify, client.resend):
        assert await reason(call(first)) == "TOKEN_NOT_FOUND"
    assert (await other.resend(second)).code == first.code
    assert (await other.verify(second)).id == first.verification.id
    assert (await client.verify(beside)).state == ev.STATE_USED


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("used_at = now()", "TOKEN_USED"),
        ("deleted_at = now()", "TOKEN_CANCELLED"),
        ("expires_at = now()", "TOKEN_EXPIRED"),
        ("", "ATTEMPTS_EXHAUSTED"),
    ],
)
async def test_repeated_start_revives_nothing(
    clients: tuple[Client, Client], database: Database, end: str, expected: str
) -> None:
    """A retry whose verification is over meanwhile tells how it ended, and makes no other."""
    user, again = new_id(), new_id()
    started = await clients[0].start(user, request_id=again)
    row_id = [started.verification.id]
    if end:
        database.execute(f"update public.email_verification_tokens set {end} where id = %s", row_id)
    else:
        database.execute("update onetime.email_verification_states set failed_attempts = 5 where id = %s", row_id)
    before = contents(database)
    for each in clients:
        assert await reason(each.start(user, request_id=again)) == expected
    assert contents(database) == before
    database.execute("delete from public.email_verification_tokens where id = %s", row_id)
    assert await reason(clients[1].start(user, request_id=again)) == "TOKEN_NOT_FOUND"


async def test_many_identical_starts_make_one_verification(clients: tuple[Client, Client], database: Database) -> None:
    """Of many at once on two replicas, all are answered with one verification and one code; one token is good."""
    user, again = new_id(), new_id()
    answers = await at_once(clients, lambda client: client.start(user, request_id=again))
    assert len({(each.verification.id, each.code) for each in answers}) == 1
    rows = database.execute("select from public.email_verification_tokens where user_id = %s", [user]).fetchall()
    assert len(rows) == 1
    good = [each for each in answers if await _is_good(clients[0].resend(each))]
    assert len(good) == 1
    assert (await clients[1].verify(good[0])).user_id == user


# VerifyCode


async def test_repeated_verify_gets_the_same_answer(clients: tuple[Client, Client]) -> None:
    """The same call gets its OK again, from any replica, and no other call does."""
    client, other = clients
    started, again = await client.start(), new_id()
    used = await client.verify(started, request_id=again)
    for each in (other, client, other):
        assert await each.verify(started, request_id=again) == used
    assert await reason(other.verify(started, request_id=new_id())) == "TOKEN_USED"
    assert await reason(other.verify(started)) == "TOKEN_USED"


async def test_repeated_wrong_email_code_is_charged_once(clients: tuple[Client, Client], database: Database) -> None:
    """The same wrong guess, however often it is sent, costs one attempt, and is answered as it was at first."""
    client, other = clients
    started, again = await client.start(), new_id()
    assert (await refused(client.verify(started, wrong(started.code), request_id=again))).attempts_remaining == 4
    assert (await refused(client.verify(started, wrong(started.code, by=2)))).attempts_remaining == 3
    for each in (other, client, other):
        refusal = await refused(each.verify(started, wrong(started.code), request_id=again))
        assert (refusal.reason, refusal.attempts_remaining) == ("CODE_MISMATCH", 4)
    assert verification_row(database, started)["failed_attempts"] == 2
    assert (await client.verify(started)).attempts_remaining == 3


async def test_many_identical_verifies_are_one(clients: tuple[Client, Client], database: Database) -> None:
    """Of many at once on two replicas, all are OK with the same answer, and so is a later one."""
    started, again = await clients[0].start(), new_id()
    answers = await at_once(clients, lambda client: client.verify(started, request_id=again))
    assert len({str(answer) for answer in answers}) == 1
    assert answers[0].state == ev.STATE_USED
    assert receipts(database, again) == ["VerifyCode"]
    assert await clients[1].verify(started, request_id=again) == answers[0]


async def test_receipt_alone_is_no_proof(client: Client, database: Database) -> None:
    """A right code that came too late to use its row is TOKEN_EXPIRED, also when it is repeated; never OK."""
    started, again = await client.start(), new_id()
    await client.verify(started, request_id=again)
    # As if the row had expired between the comparison and the update.
    database.execute(
        "update public.email_verification_tokens set used_at = null, expires_at = now() where id = %s",
        [started.verification.id],
    )
    assert await reason(client.verify(started, request_id=again)) == "TOKEN_EXPIRED"


# ResendCode


async def test_repeated_resend_changes_nothing(clients: tuple[Client, Client], database: Database) -> None:
    """The same call gets the same code and the same answer, from any replica, many at once too."""
    started, again = await clients[0].start(), new_id()
    first = await clients[0].resend(started, request_id=again)
    assert first.code == started.code
    row = verification_row(database, started)
    answers = await at_once(clients, lambda client: client.resend(started, request_id=again))
    assert all(answer == first for answer in answers)
    assert verification_row(database, started) == row
    assert receipts(database, again) == ["ResendCode"]


async def test_repeated_resend_gets_its_answer_after_the_end_too(clients: tuple[Client, Client]) -> None:
    """A lost answer is had again even if the code was used meanwhile; a first try is refused then."""
    client, other = clients
    started, again = await client.start(), new_id()
    await client.resend(started, request_id=again)
    await client.verify(started)
    assert (await other.resend(started, request_id=again)).code == started.code
    assert await reason(other.resend(started, request_id=new_id())) == "TOKEN_USED"


# What all have in common


async def test_other_errors_are_tried_again(clients: tuple[Client, Client], database: Database) -> None:
    """Only OK and CODE_MISMATCH are kept: a call refused for another reason is a first try when it is repeated."""
    client, other = clients
    for issued in (await client.issue(), await client.issue(digits=6)):
        where, row = "where id = %s", [issued.token.id]
        again = new_id()
        database.execute(f"update auth.one_time_tokens set created_at = created_at - interval '1 day' {where}", row)
        assert await reason(client.consume(issued, request_id=again)) == "TOKEN_EXPIRED"
        database.execute(f"update auth.one_time_tokens set created_at = created_at + interval '1 day' {where}", row)
        move = "update onetime.one_time_token_states set token_id = %s where user_id = %s"
        database.execute(move, [new_id(), issued.token.user_id])
        assert await reason(client.consume(issued, request_id=again)) == "TOKEN_NOT_FOUND"
        database.execute(move, [issued.token.id, issued.token.user_id])
        assert receipts(database, again) == []
        assert await other.consume(issued, request_id=again) == issued.token

    started, again = await client.start(), new_id()
    verifications, states = "public.email_verification_tokens", "onetime.email_verification_states"
    for table, spoil, cure, verdict in (
        (verifications, "expires_at = now()", "expires_at = now() + interval '1 minute'", "TOKEN_EXPIRED"),
        (verifications, "deleted_at = now()", "deleted_at = null", "TOKEN_CANCELLED"),
        (states, "failed_attempts = 5", "failed_attempts = 0", "ATTEMPTS_EXHAUSTED"),
    ):
        database.execute(f"update {table} set {spoil} where id = %s", [started.verification.id])
        for call in (client.verify, client.resend):
            assert await reason(call(started, request_id=again)) == verdict
        database.execute(f"update {table} set {cure} where id = %s", [started.verification.id])
    assert await reason(client.verify(started, "12345", request_id=again)) == "INVALID_REQUEST"
    move, elsewhere = f"update {states} set id = %s where id = %s", new_id()
    database.execute(move, [elsewhere, started.verification.id])
    for call in (client.verify, client.resend):
        assert await reason(call(started, request_id=again)) == "TOKEN_NOT_FOUND"
    database.execute(move, [started.verification.id, elsewhere])
    assert receipts(database, again) == []
    assert (await other.verify(started, request_id=again)).state == ev.STATE_USED


async def test_other_content_is_refused(clients: tuple[Client, Client], database: Database) -> None:
    """A request_id that was used for another request is REQUEST_ID_REUSED, and changes nothing."""
    client, other = clients
    user, again = new_id(), new_id()
    issued = await client.issue(user, digits=6, request_id=again)
    started = await client.start(user, request_id=again)
    neighbour, stranger = await client.issue(digits=6), await client.start()
    await refused(client.consume(issued, wrong(issued.secret), request_id=again))
    await refused(client.verify(started, wrong(started.code), request_id=again))
    await client.resend(started, request_id=again)
    before = contents(database)
    for each in clients:
        verdicts = [
            await reason(each.issue(new_id(), digits=6, request_id=again)),
            await reason(each.issue(user, digits=7, request_id=again)),
            await reason(each.issue(user, digits=6, ttl=seconds(900), request_id=again)),
            await reason(each.issue(user, digits=6, relates_to="eve@example.org", request_id=again)),
            await reason(each.issue(user, ott.TOKEN_TYPE_CONFIRMATION, digits=6, request_id=again)),
            await reason(each.start(new_id(), request_id=again)),
            await reason(each.start(user, ttl=seconds(900), request_id=again)),
            await reason(each.consume(issued, request_id=again)),
            await reason(each.consume(issued, wrong(issued.secret), by_address=True, request_id=again)),
            await reason(each.consume(neighbour, request_id=again)),
            await reason(each.verify(started, request_id=again)),
            await reason(each.verify(stranger, request_id=again)),
            await reason(each.resend(stranger, request_id=again)),
        ]
        assert set(verdicts) == {"REQUEST_ID_REUSED"}
    assert contents(database) == before
    assert (await client.consume(issued)).attempts_remaining == 4
    assert (await other.verify(started)).attempts_remaining == 4


async def test_request_id_means_one_rpc(clients: tuple[Client, Client], database: Database) -> None:
    """The same request_id on another rpc is another call."""
    client, other = clients
    again = new_id()
    issued = await client.issue(digits=6, request_id=again)
    started = await other.start(request_id=again)
    assert (await other.resend(started, request_id=again)).code == started.code
    assert await other.consume(issued, request_id=again) == issued.token
    assert (await client.verify(started, request_id=again)).state == ev.STATE_USED
    rpcs = ["ConsumeToken", "IssueToken", "ResendCode", "StartEmailVerification", "VerifyCode"]
    assert receipts(database, again) == rpcs


async def test_request_id_is_the_same_in_either_case(clients: tuple[Client, Client]) -> None:
    """A UUID may be spelt in upper or lower case; it names the same call."""
    client, other = clients
    again = new_id()
    issued = await client.issue(request_id=again)
    assert (await other.issue(request_id=again.upper(), user_id=issued.token.user_id)).token.id == issued.token.id


async def test_without_request_id_nothing_is_kept(client: Client, database: Database) -> None:
    """Calls without a request_id leave no receipt, and a second one is a second call."""
    before = contents(database)["onetime.receipts"]
    issued, started = await client.issue(digits=6), await client.start()
    for remaining in (4, 3):
        assert (await refused(client.consume(issued, wrong(issued.secret)))).attempts_remaining == remaining
        assert (await refused(client.verify(started, wrong(started.code)))).attempts_remaining == remaining
    await client.resend(started)
    await client.consume(issued)
    await client.verify(started)
    assert contents(database)["onetime.receipts"] == before


async def test_receipts_at_rest(client: Client, database: Database) -> None:
    """Receipts hold no secret, no code, no address and no plain digest of a request: only what our key opens."""
    again, address = new_id(), f"{new_id()}@example.org"
    issued = await client.issue(digits=10, relates_to=address, request_id=again)
    link = await client.issue(relates_to=address)
    started = await client.start(request_id=again)
    await refused(client.consume(issued, wrong(issued.secret), request_id=again))
    link_again = new_id()
    await client.consume(link, request_id=link_again)
    await client.resend(started, request_id=again)
    await client.verify(started, request_id=again)
    rows = database.execute(
        "select * from onetime.receipts where request_id = any(%s::uuid[])", [[again, link_again]]
    ).fetchall()
    assert len(rows) == 6
    secrets = [address, issued.secret, link.secret, started.email_verification_token, started.code]
    secrets += [wrong(issued.secret), ADDRESS, issued.token.user_id, started.verification.user_id]
    for row in rows:
        assert row["caller"] == "anonymous"
        assert re.fullmatch(r"[a-z0-9]{1,16}\.[A-Za-z0-9_-]{43}", row["fingerprint"])
        answer = row["answer"] or b""
        assert not answer or re.match(rb"[a-z0-9]{1,16}\.", answer)
        for secret in secrets:
            assert secret not in row["fingerprint"]
            assert secret.encode() not in answer
            assert secret.encode().hex() not in answer.hex()
    kept = {row["rpc"] for row in rows if row["answer"]}
    assert kept == {"ConsumeToken"}


def _is_digest_of(database: Database, fingerprint: str, message: Message) -> bool:
    row = database.execute(
        "select encode(sha256(%s), 'base64') as plain", [message.SerializeToString(deterministic=True)]
    ).fetchone()
    assert row is not None
    plain = str(row["plain"]).replace("+", "-").replace("/", "_").rstrip("=")
    return fingerprint.endswith(plain)


async def test_fingerprint_is_keyed(client: Client, database: Database) -> None:
    """Whoever can read the database cannot try codes against a receipt: its digest needs our key."""
    issued, again = await client.issue(digits=6), new_id()
    await refused(client.consume(issued, wrong(issued.secret), request_id=again))
    row = database.execute("select fingerprint from onetime.receipts where request_id = %s", [again]).fetchone()
    assert row is not None
    assert not _is_digest_of(
        database, row["fingerprint"], consume_request(issued, wrong(issued.secret), request_id=again)
    )


async def test_retry_over_a_rotation_of_keys(serve: Serve, migrated_url: str, keys_file: Path) -> None:
    """Behind a new key the old one still opens receipts; once it is retired, a retry is refused and has no effect."""
    old, new = new_key(), new_key()
    again, user = new_id(), new_id()
    write_keys(keys_file, old)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        link = await client.issue()
        code = await client.issue(user, digits=6, request_id=again)
        started = await client.start(user, request_id=again)
        answer = await client.consume(link, request_id=again)
        await refused(client.verify(started, wrong(started.code), request_id=again))
    write_keys(keys_file, new, old)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        assert await client.consume(link, request_id=again) == answer
        assert (await refused(client.verify(started, wrong(started.code), request_id=again))).attempts_remaining == 4
        second = await client.issue(user, digits=6, request_id=again)
        assert second.token == code.token
        restarted = await client.start(user, request_id=again)
        assert restarted.code == started.code
    write_keys(keys_file, new)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        assert await reason(client.issue(user, digits=6, request_id=again)) == "REQUEST_ID_REUSED"
        assert await reason(client.consume(link, request_id=again)) == "REQUEST_ID_REUSED"
        # Sealed and hashed anew by the retry, under the key that is left.
        assert await client.consume(second) == code.token
        assert (await client.verify(restarted)).id == started.verification.id
