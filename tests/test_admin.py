"""AdminService: what operators and support do to a user as a whole."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Iterator

import pytest
from calls import (
    Client,
    Database,
    connected,
    contents,
    ended,
    expire,
    new_id,
    open_channel,
    reason,
    refused,
    serving,
    until,
    wrong,
)
from conftest import PostgresServer, Serve
from onetime.v1 import admin_pb2 as pb
from onetime.v1 import one_time_tokens_pb2 as ott
from onetime.v1.email_verification_pb2 import STATE_USED


@pytest.fixture(scope="module")
def migrated_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """One database for all tests of this module, each of which takes users of its own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def target(migrated_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for all tests of this module."""
    with serving(migrated_url, tmp_path_factory.mktemp("server")) as target:
        yield target


@pytest.fixture
async def client(target: str) -> AsyncIterator[Client]:
    """A client of the server."""
    async with open_channel(target) as channel:
        yield Client(channel)


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


def test_its_types_are_those_of_the_tokens() -> None:
    """The enum is told twice in the contract, since its files import none of each other."""
    assert dict(pb.UnlockSubjectRequest.TokenType.items()) == dict[str, int](ott.TokenType.items())


async def test_purge(client: Client, database: Database) -> None:
    """Everything of the user goes, so that the host can delete the user, and nothing of anybody else's."""
    before = contents(database)
    other = await client.issue(), await client.start()
    kept = dict(contents(database))
    user_id = new_id()
    issued = [
        await client.issue(user_id, ott.TOKEN_TYPE_RECOVERY, request_id=new_id()),
        await client.issue(user_id, ott.TOKEN_TYPE_PHONE_CHANGE, digits=6),
    ]
    started = [await client.start(user_id, request_id=new_id()) for _ in range(3)]
    await client.verify(started[0])
    await client.cancel(started[1])
    assert await reason(client.consume(issued[1], wrong(issued[1].secret))) == "CODE_MISMATCH"
    for each in (other[1], *started):
        database.execute(
            "insert into onetime.outbox (verification_id, message_id, sealed_address, locale, due_at)"
            " values (%s, gen_random_uuid(), 'k0.x', '', null)",
            [each.verification.id],
        )
    mails = contents(database)["onetime.outbox"]
    kept["onetime.outbox"] = [row for row in mails if str(row["verification_id"]) == other[1].verification.id]
    # Another system's rows of this user would keep the host from deleting the user, too.
    database.execute(
        "insert into public.email_verification_tokens (user_id, email_verification_token, code) values (%s, %s, '1')",
        [user_id, f"{user_id:x<128}"],
    )
    database.execute(
        "insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)"
        " values (gen_random_uuid(), %s, 'confirmation_token', 'theirs', '', now(), now())",
        [user_id],
    )
    answer = await client.admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id))
    assert (answer.one_time_tokens_count, answer.email_verifications_count) == (3, 4)
    database.execute("delete from public.users where id = %s", [user_id])
    after = contents(database)
    budgets = after["onetime.budgets"]
    assert {**after, "onetime.budgets": []} == {**kept, "onetime.budgets": []}
    assert {row["purpose"] for row in budgets if str(row["user_id"]) == user_id} == {
        "recovery_token",
        "phone_change_token",
        "email_verification",
    }
    for call in (client.consume(issued[0]), client.verify(started[2]), client.get(started[0])):
        assert await reason(call) == "TOKEN_NOT_FOUND"
    assert (await client.consume(other[0])).id == other[0].token.id
    assert (await client.verify(other[1])).state == STATE_USED
    assert len(before["public.users"]) + 1 == len(after["public.users"])
    again = await client.admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id))
    assert (again.one_time_tokens_count, again.email_verifications_count) == (0, 0)


async def test_purge_takes_what_is_replaced_meanwhile(client: Client, database: Database) -> None:
    """A token that is issued anew while PurgeUser waits for it goes too: an address of the user must not stay."""
    issued = await client.issue()
    user_id = issued.token.user_id
    with database.transaction():
        # As IssueToken does it.
        database.execute("select from onetime.budgets where user_id = %s for update", [user_id])
        database.execute("update auth.one_time_tokens set id = gen_random_uuid() where user_id = %s", [user_id])
        database.execute(
            "update onetime.one_time_token_states as s set token_id = t.id from auth.one_time_tokens as t"
            " where t.user_id = s.user_id and s.user_id = %s",
            [user_id],
        )
        purge = asyncio.ensure_future(client.admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id)))
        with connected(database.info.dsn) as observer:
            waiting = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            await until(lambda: bool(observer.execute(waiting).fetchall()))
    assert (await purge).one_time_tokens_count == 1
    for table in ("auth.one_time_tokens", "onetime.one_time_token_states"):
        assert database.execute(f"select from {table} where user_id = %s", [user_id]).rowcount == 0


async def test_purges_and_calls_at_once(client: Client, database: Database, postgres_18: PostgresServer) -> None:
    """PurgeUser among calls of every kind about the same user: nothing fails, and no two wait for each other."""
    start = postgres_18.log.stat().st_size
    for _ in range(8):
        user_id = new_id()
        code, link = await client.issue(user_id, digits=6), await client.issue(user_id, ott.TOKEN_TYPE_CONFIRMATION)
        started = await client.start(user_id)
        calls: list[Awaitable[object]] = []
        for number in range(5):
            calls += [
                client.consume(code, request_id=new_id()),
                client.consume(code, wrong(code.secret, by=number + 1), request_id=new_id()),
                client.consume(link, request_id=new_id()),
                client.verify(started, request_id=new_id()),
                client.verify(started, wrong(started.code), request_id=new_id()),
                client.admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id)),
                client.issue(user_id, digits=6, request_id=new_id()),
            ]
        ends = await asyncio.gather(*(ended(call) for call in calls))
        assert set(ends) <= {
            "OK",
            "TOKEN_NOT_FOUND",
            "TOKEN_USED",
            "CODE_MISMATCH",
            "ATTEMPTS_EXHAUSTED",
            "TOO_MANY_FAILURES",
            "TOO_MANY_SENDS",
        }
        await client.admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id))
        for table in ("auth.one_time_tokens", "onetime.one_time_token_states", "public.email_verification_tokens"):
            assert database.execute(f"select from {table} where user_id = %s", [user_id]).rowcount == 0
    with postgres_18.log.open("rb") as log:
        log.seek(start)
        assert b"deadlock detected" not in log.read()


async def test_purges_and_mails_at_once(serve: Serve, migrated_url: str, postgres_18: PostgresServer) -> None:
    """PurgeUser, calls, two couriers and their clean-ups on the same verifications: no two wait in a circle.

    The mail server is not there, so that couriers claim, fail and give up all the time.
    """
    start = postgres_18.log.stat().st_size
    settings = {"smtp_url": "smtp://127.0.0.1:1", "mail_tries": 2, "cleanup_probability": 1, "sends_per_window": 1000}
    async with (
        serve(migrated_url, **settings) as one,
        serve(migrated_url, **settings) as two,
        one.channel() as first,
        two.channel() as second,
    ):
        clients = [Client(first), Client(second)]
        for _ in range(6):
            user_id = new_id()
            started = [await clients[0].start_by_mail(user_id) for _ in range(3)]
            with connected(migrated_url) as database:
                # The clean-up has something to do too.
                expire(database, started[2])
            calls: list[Awaitable[object]] = []
            for client in clients * 2:
                for each in started:
                    calls += [client.resend(each), client.verify(each, "000000"), client.get(each)]
                calls += [client.start_by_mail(user_id), client.cancel(started[1])]
                calls += [client.admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id))]
            ends = await asyncio.gather(*(ended(call) for call in calls))
            assert set(ends) <= {
                *("OK", "TOKEN_NOT_FOUND", "TOKEN_USED", "TOKEN_CANCELLED", "TOKEN_EXPIRED", "CODE_MISMATCH"),
                *("ATTEMPTS_EXHAUSTED", "TOO_MANY_FAILURES", "TOO_MANY_SENDS"),
            }
            await clients[0].admin.PurgeUser(pb.PurgeUserRequest(user_id=user_id))
            with connected(migrated_url) as database:
                query = "select from onetime.outbox where verification_id = any (%s::uuid[])"
                ids = [each.verification.id for each in started]
                assert database.execute(query, [ids]).rowcount == 0
    with postgres_18.log.open("rb") as log:
        log.seek(start)
        assert b"deadlock detected" not in log.read()
    for server in (one, two):
        lines = [json.loads(line) for line in server.log.read_text("utf-8").splitlines()]
        # The control: couriers were at it.
        assert {line["event"] for line in lines if line["level"] == "WARNING"} == {"mail"}
        assert not [line for line in lines if line["level"] == "ERROR"]


async def test_unlock(client: Client, database: Database) -> None:
    """Wrong codes and sends are forgotten, of that user and that purpose only."""
    user_id = new_id()
    issued, started = await client.issue(), await client.start()
    for token_type in (ott.TOKEN_TYPE_RECOVERY, ott.TOKEN_TYPE_REAUTHENTICATION):
        for _ in range(5):
            issued = await client.issue(user_id, token_type, digits=6)
            for _ in range(2):
                assert await reason(client.check(issued, wrong(issued.secret))) == "CODE_MISMATCH"
        assert await reason(client.check(issued)) == "TOO_MANY_FAILURES"
        assert await reason(client.issue(user_id, token_type)) == "TOO_MANY_SENDS"
    for _ in range(5):
        started = await client.start(user_id)
        for _ in range(2):
            assert await reason(client.verify(started, wrong(started.code))) == "CODE_MISMATCH"
    assert await reason(client.verify(started)) == "TOO_MANY_FAILURES"

    request = pb.UnlockSubjectRequest(user_id=user_id, token_type=pb.UnlockSubjectRequest.TOKEN_TYPE_REAUTHENTICATION)
    assert (await client.admin.UnlockSubject(request)).forgotten_failures_count == 10
    assert (await client.check(issued)).user_id == user_id
    await client.issue(user_id, ott.TOKEN_TYPE_REAUTHENTICATION)
    assert await reason(client.issue(user_id, ott.TOKEN_TYPE_RECOVERY)) == "TOO_MANY_SENDS"
    assert await reason(client.verify(started)) == "TOO_MANY_FAILURES"

    request = pb.UnlockSubjectRequest(user_id=user_id, email_verification=pb.EmailVerificationPurpose())
    assert (await client.admin.UnlockSubject(request)).forgotten_failures_count == 10
    assert (await client.verify(started)).state == STATE_USED
    assert (await client.admin.UnlockSubject(request)).forgotten_failures_count == 0
    # The rows stay, as long as tokens may live that were issued under them.
    rows = database.execute("select cardinality(sends) as sends from onetime.budgets where user_id = %s", [user_id])
    assert sorted(row["sends"] for row in rows) == [1, 2, 5]


async def test_unlock_does_not_refill_a_token(client: Client) -> None:
    """A token on which too many wrong codes were tried stays refused."""
    issued = await client.issue(digits=6)
    for _ in range(5):
        await refused(client.consume(issued, wrong(issued.secret)))
    await client.admin.UnlockSubject(
        pb.UnlockSubjectRequest(user_id=issued.token.user_id, token_type=pb.UnlockSubjectRequest.TOKEN_TYPE_RECOVERY)
    )
    assert await reason(client.consume(issued)) == "ATTEMPTS_EXHAUSTED"


async def test_bad_requests(client: Client, database: Database) -> None:
    """Every fault is told, and nothing changes."""
    await client.start((await client.issue()).token.user_id)
    before = contents(database)
    refusal = await refused(client.admin.PurgeUser(pb.PurgeUserRequest(user_id="ada")))
    assert refusal.violations.keys() == {"user_id"}
    refusal = await refused(client.admin.UnlockSubject(pb.UnlockSubjectRequest()))
    assert refusal.violations.keys() == {"user_id", "purpose"}
    request = pb.UnlockSubjectRequest(user_id=new_id(), token_type=pb.UnlockSubjectRequest.TOKEN_TYPE_UNSPECIFIED)
    assert (await refused(client.admin.UnlockSubject(request))).violations.keys() == {"token_type"}
    assert contents(database) == before
