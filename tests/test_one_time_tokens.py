import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from calls import (
    ADDRESS,
    LABELS,
    Client,
    Database,
    clock,
    connected,
    consume_request,
    contents,
    ended,
    expire,
    memory_limited,
    moment,
    new_id,
    open_channel,
    reason,
    refused,
    seconds,
    serving,
    time_zone,
    token_row,
    until,
    write_keys,
    wrong,
)
from conftest import PostgresServer, Serve
from google.protobuf.duration_pb2 import Duration
from onetime.v1 import one_time_tokens_pb2 as pb
from onetime.v1.one_time_tokens_pb2 import (
    TOKEN_TYPE_CONFIRMATION,
    TOKEN_TYPE_EMAIL_CHANGE_CURRENT,
    TOKEN_TYPE_EMAIL_CHANGE_NEW,
    TOKEN_TYPE_PHONE_CHANGE,
    TOKEN_TYPE_REAUTHENTICATION,
    TOKEN_TYPE_RECOVERY,
    CheckTokenRequest,
    CodeCredential,
    ConsumeTokenRequest,
    IssueTokenRequest,
    ListTokensRequest,
    RevokeTokensRequest,
)

from service.crypto import new_key

TYPES: Final = tuple(LABELS)
USER_ONLY_TYPES: Final = (TOKEN_TYPE_EMAIL_CHANGE_NEW, TOKEN_TYPE_PHONE_CHANGE)
HASHINGS: Final = ("argon2id", "hmac")

AT_REST: Final = {
    "link": r"otl1\.[a-z0-9]{1,16}\.[A-Za-z0-9_-]{43}",
    "argon2id": r"otc1\.[a-z0-9]{1,16}\.\$argon2id\$v=19\$m=64,t=1,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}",
    "hmac": r"oth1\.[a-z0-9]{1,16}\.[A-Za-z0-9_-]{43}",
}


@pytest.fixture(scope="module")
def migrated_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """One database for all tests of this module, each of which takes users of its own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def targets(migrated_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Two servers with the same keys, by their `code_hashing`."""
    folder = tmp_path_factory.mktemp("servers")
    with (
        serving(migrated_url, folder, code_hashing="argon2id") as argon2id,
        serving(migrated_url, folder, code_hashing="hmac") as hmac,
    ):
        yield {"argon2id": argon2id, "hmac": hmac}


@pytest.fixture
async def client(targets: dict[str, str]) -> AsyncIterator[Client]:
    """A client of the server that hashes codes with Argon2."""
    async with open_channel(targets["argon2id"]) as channel:
        yield Client(channel)


@pytest.fixture
async def hmac_client(targets: dict[str, str]) -> AsyncIterator[Client]:
    """A client of the server that hashes codes without Argon2."""
    async with open_channel(targets["hmac"]) as channel:
        yield Client(channel)


@pytest.fixture(params=HASHINGS)
def coder(request: pytest.FixtureRequest, client: Client, hmac_client: Client) -> Client:
    """A client of each in turn, for what concerns codes: they behave alike."""
    return client if request.param == "argon2id" else hmac_client


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


def set_attempts(database: Database, issued: pb.IssueTokenResponse, failed: int) -> None:
    """Set how many wrong codes a token has seen."""
    done = database.execute(
        "update onetime.one_time_token_states set failed_attempts = %s where token_id = %s", [failed, issued.token.id]
    )
    assert done.rowcount == 1


# Links


async def test_link_is_issued_checked_and_consumed_once(client: Client, database: Database) -> None:
    """A link's secret opens what was issued, as often as it is only looked at, and once where it is spent."""
    user = new_id()
    issued = await client.issue(user, TOKEN_TYPE_CONFIRMATION, relates_to="  Ada@Example.ORG ")
    assert re.fullmatch("[A-Za-z0-9_-]{43}", issued.secret)
    assert (issued.token.user_id, issued.token.relates_to) == (user, ADDRESS)
    assert issued.token.token_type == TOKEN_TYPE_CONFIRMATION
    assert not issued.token.HasField("attempts_remaining")
    for _ in range(3):
        assert await client.check(issued) == issued.token
    assert await client.consume(issued) == issued.token
    assert await reason(client.consume(issued)) == "TOKEN_NOT_FOUND"
    assert await reason(client.check(issued)) == "TOKEN_NOT_FOUND"
    for table in ("auth.one_time_tokens", "onetime.one_time_token_states"):
        assert not database.execute(f"select from {table} where user_id = %s", [user]).fetchall()


async def test_link_at_rest(client: Client, database: Database) -> None:
    """A link's row holds the documented format, its times in UTC, and nothing from which the secret can be had."""
    issued = await client.issue(ttl=seconds(90.5))
    row = token_row(database, issued)
    assert re.fullmatch(AT_REST["link"], row["token_hash"])
    assert issued.secret not in str(contents(database))
    assert (str(row["user_id"]), row["token_type"], row["relates_to"]) == (
        issued.token.user_id,
        "recovery_token",
        ADDRESS,
    )
    assert (row["ttl"], row["failed_attempts"], row["caller"]) == (timedelta(seconds=90.5), 0, "anonymous")
    assert row["created_at"].replace(tzinfo=UTC) == moment(issued.token.create_time)
    assert row["updated_at"].replace(tzinfo=UTC) == moment(issued.token.update_time)
    assert moment(issued.token.expire_time) - moment(issued.token.create_time) == timedelta(seconds=90.5)


async def test_expired_link(client: Client, database: Database) -> None:
    """From its last moment on a link is TOKEN_EXPIRED, and TOKEN_NOT_FOUND once it is cleaned away."""
    issued = await client.issue()
    expire(database, issued)
    assert await reason(client.check(issued)) == "TOKEN_EXPIRED"
    assert await reason(client.consume(issued)) == "TOKEN_EXPIRED"
    database.execute("delete from auth.one_time_tokens where id = %s", [issued.token.id])
    assert await reason(client.check(issued)) == "TOKEN_NOT_FOUND"
    assert await reason(client.consume(issued)) == "TOKEN_NOT_FOUND"


async def test_unknown_link(client: Client) -> None:
    """A secret that was never issued is TOKEN_NOT_FOUND."""
    issued = await client.issue()
    assert await reason(client.consume(issued, "A" * 43)) == "TOKEN_NOT_FOUND"
    assert await reason(client.check(issued, issued.secret[::-1])) == "TOKEN_NOT_FOUND"
    assert await client.consume(issued) == issued.token


# Codes


@pytest.mark.parametrize("digits", [0, 6, 7, 8, 9, 10])
async def test_code_is_issued_checked_and_consumed_once(coder: Client, digits: int) -> None:
    """A code of the length asked for, six by default, is good for one use; to look at it costs no attempt."""
    request = IssueTokenRequest(
        user_id=new_id(),
        token_type=TOKEN_TYPE_PHONE_CHANGE,
        relates_to="+49 30 901820",
        secret_format=pb.SECRET_FORMAT_CODE,
        code_length=digits,
    )
    issued = await coder.tokens.IssueToken(request)
    assert re.fullmatch("[0-9]+", issued.secret)
    assert len(issued.secret) == (digits or 6)
    assert issued.token.attempts_remaining == 5
    for _ in range(6):
        assert await coder.check(issued) == issued.token
    assert await coder.consume(issued) == issued.token
    assert await reason(coder.consume(issued)) == "TOKEN_NOT_FOUND"
    assert await reason(coder.check(issued)) == "TOKEN_NOT_FOUND"


@pytest.mark.parametrize("hashing", HASHINGS)
async def test_code_at_rest(hashing: str, client: Client, hmac_client: Client, database: Database) -> None:
    """A code's row holds the documented format, and the code is nowhere in the database."""
    issued = await (client if hashing == "argon2id" else hmac_client).issue(digits=10)
    assert re.fullmatch(AT_REST[hashing], token_row(database, issued)["token_hash"])
    assert issued.secret not in str(contents(database))


async def test_code_is_checked_the_way_it_was_made(client: Client, hmac_client: Client) -> None:
    """A change of `code_hashing` leaves the codes before it as good, and as bad, as they were."""
    for maker, other in ((client, hmac_client), (hmac_client, client)):
        issued = await maker.issue(digits=6)
        assert (await refused(other.consume(issued, wrong(issued.secret)))).attempts_remaining == 4
        assert (await other.check(issued)).attempts_remaining == 4
        assert (await other.consume(issued)).id == issued.token.id


async def test_wrong_codes_are_counted_and_then_none_is_compared(coder: Client, database: Database) -> None:
    """CheckToken and ConsumeToken count alike; the fifth wrong code is CODE_MISMATCH with none left, then all end."""
    issued = await coder.issue(digits=6)
    for remaining, call in zip([4, 3, 2, 1, 0], itertools.cycle([coder.check, coder.consume]), strict=False):
        refusal = await refused(call(issued, wrong(issued.secret, by=remaining + 1)))
        assert (refusal.reason, refusal.attempts_remaining) == ("CODE_MISMATCH", remaining)
        assert token_row(database, issued)["failed_attempts"] == 5 - remaining
        (listed,) = await coder.list(issued.token.user_id)
        assert listed.attempts_remaining == remaining
        if remaining:
            # The right code costs nothing, and restores nothing.
            assert (await coder.check(issued)).attempts_remaining == remaining
    for secret in (wrong(issued.secret), issued.secret):
        assert await reason(coder.check(issued, secret)) == "ATTEMPTS_EXHAUSTED"
        assert await reason(coder.consume(issued, secret)) == "ATTEMPTS_EXHAUSTED"
    assert token_row(database, issued)["failed_attempts"] == 5


async def test_max_attempts_is_a_setting(serve: Serve, migrated_url: str) -> None:
    """With `max_attempts` of 1, the first wrong code is the last."""
    async with serve(migrated_url, max_attempts=1, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        issued = await client.issue(digits=6)
        assert issued.token.attempts_remaining == 1
        assert (await refused(client.consume(issued, wrong(issued.secret)))).attempts_remaining == 0
        assert await reason(client.consume(issued)) == "ATTEMPTS_EXHAUSTED"


async def test_order_of_judgement(coder: Client, database: Database) -> None:
    """Not found, then expired, then exhausted, and only then compared; nothing but a comparison is charged."""
    issued = await coder.issue(digits=6)
    where, row = "where id = %s", [issued.token.id]
    for secret in (issued.secret, wrong(issued.secret)):
        for failed in (0, 5):
            set_attempts(database, issued, failed)
            database.execute(f"update auth.one_time_tokens set created_at = created_at - interval '1 day' {where}", row)
            assert await reason(coder.check(issued, secret)) == "TOKEN_EXPIRED"
            assert await reason(coder.consume(issued, secret)) == "TOKEN_EXPIRED"
            database.execute(f"update auth.one_time_tokens set created_at = created_at + interval '1 day' {where}", row)
            assert token_row(database, issued)["failed_attempts"] == failed
        assert await reason(coder.consume(issued, secret)) == "ATTEMPTS_EXHAUSTED"
    database.execute("delete from auth.one_time_tokens where id = %s", [issued.token.id])
    assert await reason(coder.consume(issued)) == "TOKEN_NOT_FOUND"


async def test_code_of_nobody(coder: Client, database: Database) -> None:
    """Nobody's code is TOKEN_NOT_FOUND however often it is tried, and leaves no trace."""
    unknown = pb.IssueTokenResponse(
        token=pb.OneTimeToken(user_id=new_id(), token_type=TOKEN_TYPE_RECOVERY, relates_to="nobody@example.org")
    )
    unknown.token.attempts_remaining = 5
    before = contents(database)
    for by_address in (False, True):
        for _ in range(6):
            assert await reason(coder.consume(unknown, "000000", by_address=by_address)) == "TOKEN_NOT_FOUND"
            assert await reason(coder.check(unknown, "000000", by_address=by_address)) == "TOKEN_NOT_FOUND"
    assert contents(database) == before


async def test_code_tried_on_a_link(coder: Client, database: Database) -> None:
    """A link has no code: a code tried on it is TOKEN_NOT_FOUND, costs nothing, and the link stays good."""
    link = await coder.issue(relates_to=f"{new_id()}@example.org")
    for subject in ({"user_id": link.token.user_id}, {"relates_to": link.token.relates_to}):
        code = CodeCredential(code="123456", **subject)
        for _ in range(6):
            request = ConsumeTokenRequest(token_type=TOKEN_TYPE_RECOVERY, code=code)
            assert await reason(coder.tokens.ConsumeToken(request)) == "TOKEN_NOT_FOUND"
    assert token_row(database, link)["failed_attempts"] == 0
    assert await coder.consume(link) == link.token


# Lifetimes


@pytest.mark.parametrize(
    ("token_type", "lifetime", "ceiling"),
    [
        (TOKEN_TYPE_CONFIRMATION, 3600, 86400),
        (TOKEN_TYPE_REAUTHENTICATION, 300, 300),
        (TOKEN_TYPE_RECOVERY, 900, 900),
        (TOKEN_TYPE_EMAIL_CHANGE_NEW, 900, 900),
        (TOKEN_TYPE_EMAIL_CHANGE_CURRENT, 900, 900),
        (TOKEN_TYPE_PHONE_CHANGE, 300, 300),
    ],
)
async def test_lifetime_of_each_type(
    client: Client, database: Database, token_type: pb.TokenType.ValueType, lifetime: int, ceiling: int
) -> None:
    """A token lives as its type does, or as it was asked for up to the type's ceiling, by the database's clock."""
    for ttl, expected in (
        (None, lifetime),
        (seconds(ceiling), ceiling),
        (seconds(1), 1),
        (seconds(2.000001), 2.000001),
    ):
        before = clock(database)
        issued = await client.issue(token_type=token_type, ttl=ttl)
        after = clock(database)
        assert before <= moment(issued.token.create_time) <= after
        assert moment(issued.token.expire_time) - moment(issued.token.create_time) == timedelta(seconds=expected)
    refusal = await refused(client.issue(token_type=token_type, ttl=Duration(seconds=ceiling, nanos=1)))
    assert set(refusal.violations) == {"ttl"}


async def test_last_moment(coder: Client, database: Database) -> None:
    """A token of which seconds are left is good; the moment it has none, it is not."""
    link, code = await coder.issue(), await coder.issue(digits=6)
    for issued in (link, code):
        database.execute(
            "update auth.one_time_tokens set created_at = clock_timestamp() at time zone 'utc' - interval '14m30s'"
            " where id = %s",
            [issued.token.id],
        )
        token = await coder.check(issued)
        assert timedelta() < moment(token.expire_time) - clock(database) <= timedelta(seconds=30)
        expire(database, issued)
        assert await reason(coder.check(issued)) == "TOKEN_EXPIRED"


@pytest.mark.parametrize("digits", [0, 6])
async def test_token_that_expires_while_it_waits_for_a_lock(
    coder: Client, database: Database, migrated_url: str, digits: int
) -> None:
    """Expiry is held against the clock after the wait for the row's lock, not against a transaction's start."""
    issued = await coder.issue(digits=digits)
    database.execute(
        "update auth.one_time_tokens set created_at = clock_timestamp() at time zone 'utc' - interval '14m59.4s'"
        " where id = %s",
        [issued.token.id],
    )
    with connected(migrated_url) as other, other.transaction():
        other.execute("select from auth.one_time_tokens where id = %s for update", [issued.token.id])
        call = asyncio.create_task(reason(coder.consume(issued)))
        await until(lambda: _expired(database, issued))
    assert await call == "TOKEN_EXPIRED"


async def test_a_link_that_is_spent_while_it_is_waited_for(
    client: Client, database: Database, migrated_url: str
) -> None:
    """Whoever waits for the row of a link finds nothing, once the one before has deleted it."""
    issued = await client.issue()
    with connected(migrated_url) as other, other.transaction():
        assert other.execute("delete from auth.one_time_tokens where id = %s", [issued.token.id]).rowcount == 1
        call = asyncio.create_task(ended(client.consume(issued)))
        await until(lambda: database.execute(_WAITING).rowcount > 0)
    assert await call == "TOKEN_NOT_FOUND"


_WAITING: Final = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


def _expired(database: Database, issued: pb.IssueTokenResponse) -> bool:
    row = token_row(database, issued)
    return bool(row["created_at"].replace(tzinfo=UTC) + row["ttl"] <= clock(database))


# Purposes


async def test_link_is_good_for_its_type_only(client: Client, database: Database) -> None:
    """Of all pairs of types, a link is accepted where they are the same, and nothing else even looks at it."""
    user = new_id()
    links = {token_type: await client.issue(user, token_type) for token_type in TYPES}
    before = contents(database)
    for issued_as, presented_as in itertools.permutations(TYPES, 2):
        secret = links[issued_as].secret
        for call in (client.check, client.consume):
            assert await reason(call(links[presented_as], secret)) == "TOKEN_NOT_FOUND"
    assert contents(database) == before
    for issued in links.values():
        assert await client.consume(issued) == issued.token


async def test_code_is_good_for_its_type_only(coder: Client, database: Database) -> None:
    """Of all pairs of types, a code is accepted where they are the same; elsewhere it is a wrong guess, no more."""
    user = new_id()
    codes = {token_type: await coder.issue(user, token_type, digits=10) for token_type in TYPES}
    for number, (issued_as, presented_as) in enumerate(itertools.permutations(TYPES, 2)):
        call = (coder.check, coder.consume)[number % 2]
        assert await reason(call(codes[presented_as], codes[issued_as].secret)) == "CODE_MISMATCH"
    for issued in codes.values():
        # Each has seen the codes of the five others.
        assert token_row(database, issued)["failed_attempts"] == 5
        set_attempts(database, issued, 0)
        assert await coder.consume(issued) == issued.token


async def test_code_is_good_for_its_user_only(coder: Client) -> None:
    """Of all pairs of users with one address, a code is accepted where they are the same."""
    codes = [await coder.issue(digits=10) for _ in range(3)]
    for issued, presented in itertools.permutations(codes, 2):
        assert await reason(coder.consume(presented, issued.secret)) == "CODE_MISMATCH"
    for issued in codes:
        assert (await coder.consume(issued)).user_id == issued.token.user_id


async def test_code_is_good_for_its_address_only(coder: Client) -> None:
    """Of all pairs of addresses, a code is accepted where they are the same."""
    codes = [await coder.issue(digits=10, relates_to=f"{new_id()}@example.org") for _ in range(3)]
    for issued, presented in itertools.permutations(codes, 2):
        assert await reason(coder.consume(presented, issued.secret, by_address=True)) == "CODE_MISMATCH"
    for issued in codes:
        assert (await coder.consume(issued, by_address=True)).relates_to == issued.token.relates_to


async def test_code_is_good_in_its_length_only(coder: Client) -> None:
    """Neither a code's beginning nor its end nor the code with zeros around it is the code."""
    issued = await coder.issue(digits=8)
    others = (issued.secret[:6], issued.secret[2:], issued.secret[:7], "0" + issued.secret, issued.secret + "0")
    for other, remaining in zip(others, (4, 3, 2, 1, 0), strict=True):
        assert (await refused(coder.consume(issued, other))).attempts_remaining == remaining


async def test_subject_and_purpose_come_from_the_row(coder: Client, database: Database) -> None:
    """A code's hash holds its type, user and address: copied to another row, or its row altered, it is worthless."""
    user, address = new_id(), f"{new_id()}@example.org"
    issued = await coder.issue(user, TOKEN_TYPE_RECOVERY, digits=10, relates_to=address)
    others = [
        await coder.issue(user, TOKEN_TYPE_CONFIRMATION, digits=10, relates_to=address),
        await coder.issue(new_id(), TOKEN_TYPE_RECOVERY, digits=10, relates_to=address),
    ]
    for other in others:
        database.execute(
            "update auth.one_time_tokens as t set token_hash = o.token_hash from auth.one_time_tokens as o"
            " where t.id = %s and o.id = %s",
            [other.token.id, issued.token.id],
        )
        assert await reason(coder.consume(other, issued.secret)) == "CODE_MISMATCH"
    move = "update auth.one_time_tokens set relates_to = %s where id = %s"
    database.execute(move, ["eve@example.net", issued.token.id])
    assert await reason(coder.consume(issued)) == "CODE_MISMATCH"
    database.execute(move, [address, issued.token.id])
    assert (await coder.consume(issued)).relates_to == address


async def test_link_hash_holds_its_type(client: Client, database: Database) -> None:
    """A link's hash, copied to a row of another type, is worth nothing there."""
    user = new_id()
    recovery, confirmation = await client.issue(user), await client.issue(user, TOKEN_TYPE_CONFIRMATION)
    database.execute(
        "update auth.one_time_tokens as t set token_hash = o.token_hash from auth.one_time_tokens as o"
        " where t.id = %s and o.id = %s",
        [recovery.token.id, confirmation.token.id],
    )
    assert await reason(client.consume(recovery, confirmation.secret)) == "TOKEN_NOT_FOUND"
    assert await client.consume(confirmation) == confirmation.token


# Replacing


@pytest.mark.parametrize("digits", [(0, 0), (6, 6), (0, 6), (6, 0)], ids=str)
async def test_new_token_replaces_the_old_one_of_its_type(
    coder: Client, database: Database, digits: tuple[int, int]
) -> None:
    """The new one has a new id, new times and all attempts; the old secret is refused; other types stay."""
    user = new_id()
    beside = await coder.issue(user, TOKEN_TYPE_CONFIRMATION)
    old = await coder.issue(user, digits=digits[0])
    if digits[0]:
        await refused(coder.consume(old, wrong(old.secret)))
    new = await coder.issue(user, digits=digits[1], relates_to="lovelace@example.org")
    assert new.token.id != old.token.id
    assert moment(new.token.create_time) > moment(old.token.create_time)
    assert token_row(database, new)["failed_attempts"] == 0
    # A code of the old one is a guess at the new one, if that is a code.
    expected = "CODE_MISMATCH" if all(digits) and old.secret != new.secret else "TOKEN_NOT_FOUND"
    assert await reason(coder.consume(old)) == expected
    assert (await coder.consume(new)).relates_to == "lovelace@example.org"
    assert await coder.consume(beside) == beside.token


async def test_exhausted_code_is_cured_by_a_new_one(coder: Client, database: Database) -> None:
    """After too many wrong codes, a new code is accepted."""
    issued = await coder.issue(digits=6)
    set_attempts(database, issued, 5)
    assert await reason(coder.consume(issued)) == "ATTEMPTS_EXHAUSTED"
    new = await coder.issue(issued.token.user_id, digits=6)
    assert (await coder.consume(new)).attempts_remaining == 5


# The address as the subject


async def test_address_means_its_newest_live_code(coder: Client, database: Database) -> None:
    """By an address, the newest live code of that type is meant, and only that one is tried."""
    address = f"{new_id()}@example.org"
    first, second, third = [await coder.issue(digits=10, relates_to=address) for _ in range(3)]
    # Neither a newer link nor a newer code of another type comes into it.
    await coder.issue(relates_to=address)
    await coder.issue(token_type=TOKEN_TYPE_CONFIRMATION, digits=10, relates_to=address)

    assert await reason(coder.consume(first, by_address=True)) == "CODE_MISMATCH"
    assert token_row(database, third)["failed_attempts"] == 1
    assert token_row(database, first)["failed_attempts"] == token_row(database, second)["failed_attempts"] == 0
    assert (await coder.consume(third, by_address=True)).id == third.token.id

    # The newest one left is dead, and passed over.
    database.execute("update onetime.one_time_token_states set ttl = '0' where token_id = %s", [second.token.id])
    assert (await coder.check(first, by_address=True)).id == first.token.id
    expire(database, first)
    assert await reason(coder.check(first, by_address=True)) == "TOKEN_EXPIRED"
    assert await reason(coder.consume(second, by_address=True)) == "TOKEN_EXPIRED"


async def test_address_in_any_writing(coder: Client) -> None:
    """The subject is brought to the form that is stored, and what is returned is what is stored."""
    issued = await coder.issue(digits=6, relates_to="\u00c9va.K\u030a@Example.org")
    assert issued.token.relates_to == "\u00e9va.k\u030a@example.org"
    request = consume_request(issued, by_address=True)
    request.code.relates_to = " E\u0301VA.k\u030a@EXAMPLE.ORG\n"
    token = (await coder.tokens.ConsumeToken(request)).token
    assert token.relates_to == "\u00e9va.k\u030a@example.org"
    assert token.user_id == issued.token.user_id


# Listing and revoking


async def test_live_tokens_are_listed(coder: Client, database: Database) -> None:
    """A user's live tokens are listed as they were issued, in the order of types, and nobody else's."""
    user = new_id()
    issued = [await coder.issue(user, token_type, digits=6 * (token_type % 2)) for token_type in reversed(TYPES)]
    await coder.issue()
    assert await coder.list(user) == [each.token for each in reversed(issued)]
    expire(database, issued[0])
    await coder.consume(issued[1])
    assert await coder.list(user) == [each.token for each in reversed(issued[2:])]
    assert await coder.list(new_id()) == []


async def test_tokens_are_revoked_by_type(coder: Client) -> None:
    """The types named are revoked, however often they are named, and no other type, nor another user's."""
    user = new_id()
    issued = {token_type: await coder.issue(user, token_type, digits=6 * (token_type % 2)) for token_type in TYPES}
    neighbour = await coder.issue()
    wanted = (TOKEN_TYPE_RECOVERY, TOKEN_TYPE_CONFIRMATION)
    assert await coder.revoke(user, *wanted, TOKEN_TYPE_RECOVERY) == 2
    assert await coder.revoke(user, *wanted) == 0
    for token_type, each in issued.items():
        if token_type in wanted:
            assert await reason(coder.consume(each)) == "TOKEN_NOT_FOUND"
        else:
            assert await coder.check(each) == each.token
    assert await coder.revoke(user) == 4
    assert await coder.list(user) == []
    assert await coder.consume(neighbour) == neighbour.token


async def test_revoking_counts_what_was_live(client: Client, database: Database) -> None:
    """Expired tokens go too, and are not counted; where there is nothing, nothing is revoked, and that is no error."""
    user = new_id()
    live, expired = await client.issue(user), await client.issue(user, TOKEN_TYPE_CONFIRMATION)
    expire(database, expired)
    assert await client.revoke(user) == 1
    assert await reason(client.check(live)) == await reason(client.check(expired)) == "TOKEN_NOT_FOUND"
    for table in ("auth.one_time_tokens", "onetime.one_time_token_states"):
        assert not database.execute(f"select from {table} where user_id = %s", [user]).fetchall()
    assert await client.revoke(user) == 0
    assert await client.revoke(new_id()) == 0


# Rows of others


def _foreign_row(database: Database, user: str, token_hash: str) -> str:
    """Add a row that another system has written, and return its id."""
    row_id = new_id()
    database.execute(
        "insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)"
        " values (%s, %s, 'recovery_token', %s, %s, now() at time zone 'utc', now() at time zone 'utc')",
        [row_id, user, token_hash, ADDRESS],
    )
    return row_id


@pytest.mark.parametrize(
    "token_hash",
    [
        pytest.param("", id="sha224, as GoTrue has it"),
        pytest.param("pkce_" + "0" * 56, id="GoTrue's PKCE"),
        pytest.param("A" * 43, id="a secret in clear"),
        pytest.param("123456", id="a code in clear"),
        pytest.param("otl1.k1." + "A" * 43, id="our format, but no state"),
        pytest.param("oth1.k1." + "A" * 43, id="our format of a code, but no state"),
        pytest.param("$argon2id$v=19$m=64,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$4WE2ir5ENH6uDbhCIZv8foyZMyEe5", id="Argon2"),
    ],
)
async def test_foreign_row_is_nobodys_token(coder: Client, database: Database, token_hash: str) -> None:
    """A row that is not ours is not matched, listed or revoked, and issuing may replace it."""
    user = new_id()
    row = database.execute("select encode(sha224('ada@example.org123456'), 'hex') as sha224").fetchone()
    assert row is not None
    row_id = _foreign_row(database, user, token_hash or row["sha224"])
    before = contents(database)
    foreign = pb.IssueTokenResponse(
        token=pb.OneTimeToken(user_id=user, token_type=TOKEN_TYPE_RECOVERY, relates_to=ADDRESS)
    )
    assert await reason(coder.consume(foreign, "A" * 43)) == "TOKEN_NOT_FOUND"
    assert await reason(coder.check(foreign, "A" * 43)) == "TOKEN_NOT_FOUND"
    foreign.token.attempts_remaining = 5
    assert await reason(coder.consume(foreign, "123456")) == "TOKEN_NOT_FOUND"
    assert await reason(coder.check(foreign, "123456")) == "TOKEN_NOT_FOUND"
    assert await coder.list(user) == []
    assert await coder.revoke(user) == 0
    assert contents(database) == before
    issued = await coder.issue(user, digits=6)
    assert not database.execute("select from auth.one_time_tokens where id = %s", [row_id]).fetchall()
    assert await coder.consume(issued) == issued.token


async def test_state_of_a_token_that_the_host_has_replaced(coder: Client, database: Database) -> None:
    """Where the host writes a row over ours, what is left of ours gives it no life."""
    issued = await coder.issue(digits=6)
    database.execute("delete from auth.one_time_tokens where id = %s", [issued.token.id])
    _foreign_row(database, issued.token.user_id, "oth1.k1." + "A" * 43)
    assert await reason(coder.consume(issued)) == "TOKEN_NOT_FOUND"
    assert await coder.list(issued.token.user_id) == []
    assert await coder.revoke(issued.token.user_id) == 0


async def test_damaged_row_is_a_fault_of_ours(client: Client, database: Database) -> None:
    """A stored code that cannot be read is INTERNAL, whatever code is tried, and costs its owner no attempt."""
    issued = await client.issue(digits=6)
    for damage in (r"regexp_replace(token_hash, '\$[^$]+$', '$!')", "substr(token_hash, 1, 30)"):
        token_hash = token_row(database, issued)["token_hash"]
        database.execute(f"update auth.one_time_tokens set token_hash = {damage} where id = %s", [issued.token.id])
        assert await reason(client.check(issued)) == "INTERNAL"
        assert await reason(client.consume(issued, wrong(issued.secret))) == "INTERNAL"
        assert token_row(database, issued)["failed_attempts"] == 0
        database.execute("update auth.one_time_tokens set token_hash = %s where id = %s", [token_hash, issued.token.id])
    assert await client.consume(issued) == issued.token


async def test_want_of_memory_is_no_wrong_code(serve: Serve, migrated_url: str, database: Database) -> None:
    """Where Argon2 gets no memory, the right code and the wrong one are OVERLOADED, and no attempt is charged."""
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        issued = await client.issue(digits=6)
        set_attempts(database, issued, 3)
        enlarge = "update auth.one_time_tokens set token_hash = replace(token_hash, %s, %s) where id = %s"
        database.execute(enlarge, ["m=64,", "m=1048576,", issued.token.id])
        with memory_limited(server.process.pid, 512):
            for secret in (issued.secret, wrong(issued.secret)):
                assert await reason(client.check(issued, secret)) == "OVERLOADED"
                assert await reason(client.consume(issued, secret)) == "OVERLOADED"
                # Many tries of one call were charged once, so that they give back once.
                again = new_id()
                calls = (client.consume(issued, secret, request_id=again) for _ in range(8))
                assert set(await asyncio.gather(*map(reason, calls))) == {"OVERLOADED"}
                assert token_row(database, issued)["failed_attempts"] == 3
                budget = database.execute(
                    "select failures, failures_in_a_row from onetime.budgets where user_id = %s", [issued.token.user_id]
                ).fetchall()
                assert budget == [{"failures": [], "failures_in_a_row": 0}]
        database.execute(enlarge, ["m=1048576,", "m=64,", issued.token.id])
        assert (await client.consume(issued)).attempts_remaining == 2


@pytest.mark.parametrize("late", ["first", "second"])
async def test_a_verdict_is_charged_though_another_try_came_to_none(
    serve: Serve, migrated_url: str, database: Database, late: str
) -> None:
    """Of two tries of one call on two servers the first, which was charged, gets no memory, and gives its charge back.

    But not if the second one has told by then that the code is wrong; and if it has not, it does not tell any more.
    """
    settings = {"argon2_threads": 1, "call_timeout": "60s", "drain_delay": "0s"}
    async with (
        serve(migrated_url, **settings) as poor,
        serve(migrated_url, **settings) as rich,
        poor.channel() as poor_channel,
        rich.channel() as rich_channel,
    ):
        first, second = Client(poor_channel), Client(rich_channel)
        issued, *busy = [await first.issue(digits=6) for _ in range(3)]
        change = "update auth.one_time_tokens set token_hash = replace(token_hash, %s, %s) where id = %s"
        database.execute(change, ["m=64,", "m=262144,", issued.token.id])
        # A thread is busy with one code for some seconds, and so the next one is charged, and waits to be compared.
        for number, each in enumerate(busy):
            database.execute(change, ["t=1,", f"t={40_000 * (number + 1)},", each.token.id])
        request_id, code = new_id(), wrong(issued.secret)

        def attempts(each: pb.IssueTokenResponse) -> int:
            return int(token_row(database, each)["failed_attempts"])

        async def behind(client: Client, each: pb.IssueTokenResponse) -> tuple[asyncio.Task[str], asyncio.Task[str]]:
            working = asyncio.create_task(ended(client.consume(each)))
            await until(lambda: attempts(each) == 1)
            return working, asyncio.create_task(reason(client.consume(issued, code, request_id=request_id)))

        with memory_limited(poor.process.pid, 128):
            working, one = await behind(first, busy[0])
            await until(lambda: attempts(issued) == 1)
            if late == "first":
                assert await reason(second.consume(issued, code, request_id=request_id)) == "CODE_MISMATCH"
                assert not working.done()
                assert await one == "OVERLOADED"
            else:
                longer, other = await behind(second, busy[1])
                # It leaves no trace where it finds the charge of the first one; both threads are busy for longer.
                await asyncio.sleep(0.5)
                assert not working.done()
                assert await one == "OVERLOADED"
                assert not longer.done()
                assert await other == "OVERLOADED"
        (budget,) = database.execute(
            "select cardinality(failures) as failures from onetime.budgets where user_id = %s", [issued.token.user_id]
        ).fetchall()
        charged = 1 if late == "first" else 0
        assert (attempts(issued), budget["failures"]) == (charged, charged)
        assert await reason(second.consume(issued, code, request_id=request_id)) == "CODE_MISMATCH"
        assert attempts(issued) == 1


@pytest.mark.parametrize("how", ["check", "consume"])
async def test_a_failure_after_the_right_code_costs_nothing(client: Client, database: Database, how: str) -> None:
    """Where the code was right, and the database fails before anything comes of it, the charge is given back."""
    issued = await client.issue(digits=6)
    # Once, and that is not rolled back: the first time that a charge is given back.
    database.execute("create sequence public.fails_once")
    database.execute("""
        create function public.fails_once() returns trigger language plpgsql as $$
        begin
          if nextval('public.fails_once') = 1 then
            raise exception 'made to fail' using errcode = 'lock_not_available';
          end if;
          return new;
        end $$
    """)
    database.execute(
        "create trigger fails_once before update on onetime.budgets for each row"
        f" when (old.user_id = '{issued.token.user_id}' and cardinality(new.failures) < cardinality(old.failures))"
        " execute function public.fails_once()"
    )
    try:
        assert await reason((client.check if how == "check" else client.consume)(issued)) == "DATABASE_UNAVAILABLE"
    finally:
        database.execute("drop function public.fails_once cascade")
        database.execute("drop sequence public.fails_once")
    assert token_row(database, issued)["failed_attempts"] == 0
    budget = database.execute(
        "select failures, failures_in_a_row from onetime.budgets where user_id = %s", [issued.token.user_id]
    ).fetchall()
    assert budget == [{"failures": [], "failures_in_a_row": 0}]
    assert (await client.consume(issued)).id == issued.token.id


# Keys


async def test_rotation_of_keys(serve: Serve, migrated_url: str, keys_file: Path, database: Database) -> None:
    """What an old key made is accepted while the ring has it, behind a new one that makes; then it is not found."""
    old, new = new_key(), new_key()
    write_keys(keys_file, old)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        kept = [await client.issue(digits=digits) for digits in (0, 6)]
        spent = [await client.issue(digits=digits) for digits in (0, 6)]
    write_keys(keys_file, new, old)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        for issued in (*spent, *kept):
            assert f".{old.id}." in token_row(database, issued)["token_hash"]
            assert await client.check(issued) == issued.token
        for issued in spent:
            assert await client.consume(issued) == issued.token
        fresh = [await client.issue(digits=digits) for digits in (0, 6)]
        for issued in fresh:
            assert f".{new.id}." in token_row(database, issued)["token_hash"]
    write_keys(keys_file, new)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        for issued in kept:
            assert await reason(client.check(issued)) == "TOKEN_NOT_FOUND"
            assert await reason(client.consume(issued)) == "TOKEN_NOT_FOUND"
            assert token_row(database, issued)["failed_attempts"] == 0
        for issued in fresh:
            assert await client.consume(issued) == issued.token


# Time zones


@pytest.mark.parametrize("zone", ["America/Los_Angeles", "Asia/Tokyo", "UTC"])
async def test_time_zone_of_the_role_means_nothing(
    client: Client, database: Database, migrated_url: str, zone: str
) -> None:
    """The timestamps without a zone hold UTC, and lifetimes stay as they are, whatever the role's sessions think."""
    with time_zone(database, zone):
        with connected(migrated_url) as session:
            setting = session.execute("select current_setting('timezone') as zone").fetchone()
            assert setting == {"zone": zone}
        before = clock(database)
        link, code = await client.issue(ttl=seconds(60)), await client.issue(digits=6, ttl=seconds(60))
        for issued in (link, code):
            row = token_row(database, issued)
            assert row["created_at"].replace(tzinfo=UTC) == moment(issued.token.create_time)
            assert before <= moment(issued.token.create_time) <= clock(database)
            assert moment(issued.token.expire_time) == moment(issued.token.create_time) + timedelta(seconds=60)
            assert await client.check(issued) == issued.token
            assert await client.list(issued.token.user_id) == [issued.token]
            expire(database, issued)
            assert await reason(client.consume(issued)) == "TOKEN_EXPIRED"
            assert await client.list(issued.token.user_id) == []


# Users


@pytest.mark.parametrize("timing", ["not deferrable", "deferrable initially deferred"])
async def test_users_are_asked_for_only_where_the_host_does(client: Client, database: Database, timing: str) -> None:
    """A table with a foreign key onto its host's users gives USER_NOT_FOUND, and nothing is written."""
    known = new_id()
    database.execute("insert into public.users values (%s)", [known])
    database.execute(
        "alter table auth.one_time_tokens add constraint of_the_host"
        f" foreign key (user_id) references public.users (id) {timing} not valid"
    )
    try:
        before = contents(database)
        assert await reason(client.issue(new_id())) == "USER_NOT_FOUND"
        assert await reason(client.issue(new_id(), request_id=new_id())) == "USER_NOT_FOUND"
        assert contents(database) == before
        assert (await client.issue(known)).token.user_id == known
    finally:
        database.execute("alter table auth.one_time_tokens drop constraint of_the_host")
    assert (await client.issue(new_id())).secret


# Malformed requests

USER: Final = "0b0e3d0e-8a5c-4f5e-9d0a-6a3f6a2b1c0d"
BAD_UUIDS: Final = (
    "nobody",
    USER[:-1],
    USER + "0",
    USER + "\n",
    " " + USER,
    USER.replace("-", ""),
    "{" + USER + "}",
    USER.replace("0", "\uff10"),
    USER[:-1] + "\0",
    "' or true --",
)
BAD_CODES: Final = (
    "",
    "12345",
    "12345678901",
    "\uff11\uff12\uff13\uff14\uff15\uff16",
    "\u0661\u0662\u0663\u0664\u0665\u0666",
    "12345\u00b2",
    "123456\n",
    "123456\0",
    " 123456",
    "+123456",
    "-123456",
    "1_23456",
    "abcdef",
)
BAD_SECRETS: Final = (
    "",
    "A" * 42,
    "A" * 44,
    "A" * 43 + "\n",
    "A" * 42 + "\0",
    "A" * 42 + "=",
    "A" * 42 + "+",
    "A" * 42 + "\u00c4",
    "%" * 43,
)
BAD_ADDRESSES: Final = (
    "",
    " \t\n",
    "a" * 321,
    "ada\0@example.org",
    "ada@example.org\r\nBcc: eve@example.net",
    "ada\uff20example.org",
    "\u017fteve@example.org",
    "ada\u202e@example.org",
)
BAD_TTLS: Final = (
    Duration(),
    Duration(seconds=-1),
    Duration(nanos=999_999_999),
    Duration(seconds=900, nanos=1),
    Duration(seconds=2**63 - 1),
    Duration(seconds=-(2**63)),
    Duration(seconds=1, nanos=10**9),
    Duration(seconds=1, nanos=2**31 - 1),
    Duration(seconds=5, nanos=-1),
    Duration(seconds=-5, nanos=1),
)
BAD_TYPES: Final = (0, 7, -1, 2**31 - 1)

GOOD_ISSUE: Final[dict[str, Any]] = {
    "user_id": USER,
    "token_type": TOKEN_TYPE_RECOVERY,
    "relates_to": ADDRESS,
    "secret_format": pb.SECRET_FORMAT_CODE,
    "code_length": 8,
    "ttl": seconds(60),
    "request_id": USER,
}
GOOD_CODE: Final[dict[str, Any]] = {"user_id": USER, "code": "123456"}

BAD_ISSUES: Final[Mapping[str, list[dict[str, Any]]]] = {
    "user_id": [{"user_id": value} for value in ("", *BAD_UUIDS)],
    "request_id": [{"request_id": value} for value in BAD_UUIDS],
    "token_type": [{"token_type": value} for value in BAD_TYPES],
    "relates_to": [{"relates_to": value} for value in BAD_ADDRESSES],
    "secret_format": [{"secret_format": value} for value in (3, -1, 2**31 - 1)],
    "code_length": [
        *({"code_length": value} for value in (1, 5, 11, -6, 2**31 - 1, -(2**31))),
        *({"code_length": value, "secret_format": pb.SECRET_FORMAT_LINK} for value in (6, -1)),
        {"secret_format": pb.SECRET_FORMAT_UNSPECIFIED},
    ],
    "ttl": [{"ttl": value} for value in BAD_TTLS],
    "user_id token_type relates_to": [{"user_id": "", "token_type": 0, "relates_to": ""}],
    "user_id token_type relates_to code_length ttl request_id": [
        {
            "user_id": "me",
            "token_type": 9,
            "relates_to": "\0",
            "code_length": 1,
            "ttl": Duration(seconds=-1),
            "request_id": "again",
        }
    ],
}
BAD_CREDENTIALS: Final[Mapping[str, list[dict[str, Any]]]] = {
    "token_type": [{"token_type": value, "link_secret": "A" * 43} for value in BAD_TYPES],
    "credential": [{}],
    "token_type credential": [{"token_type": 0}],
    "link_secret": [{"link_secret": value} for value in BAD_SECRETS],
    "code.code": [{"code": GOOD_CODE | {"code": value}} for value in BAD_CODES],
    "code.user_id": [{"code": GOOD_CODE | {"user_id": value}} for value in ("", *BAD_UUIDS)],
    "code.subject": [{"code": {"code": "123456"}}],
    "code.code code.subject": [{"code": {}}],
    "code.relates_to": [
        *({"code": {"code": "123456", "relates_to": value}} for value in BAD_ADDRESSES),
        *({"code": {"code": "123456", "relates_to": ADDRESS}, "token_type": value} for value in USER_ONLY_TYPES),
    ],
    "token_type code.user_id code.code": [{"token_type": 7, "code": {"user_id": "me", "code": "12"}}],
}


def _messages() -> Iterator[tuple[str, str, list[Any]]]:
    """Give the name of an rpc, the fields that are wrong, and requests in which they are."""
    for fields, changes in BAD_ISSUES.items():
        yield "IssueToken", fields, [IssueTokenRequest(**(GOOD_ISSUE | change)) for change in changes]
    for fields, changes in BAD_CREDENTIALS.items():
        given = [{"token_type": TOKEN_TYPE_RECOVERY} | change for change in changes]
        yield "CheckToken", fields, [CheckTokenRequest(**each) for each in given]
        yield "ConsumeToken", fields, [ConsumeTokenRequest(request_id=USER, **each) for each in given]
    request_ids = [
        ConsumeTokenRequest(token_type=TOKEN_TYPE_RECOVERY, link_secret="A" * 43, request_id=value)
        for value in BAD_UUIDS
    ]
    yield "ConsumeToken", "request_id", request_ids
    everything = ConsumeTokenRequest(request_id="again", code=CodeCredential(user_id="me"))
    yield "ConsumeToken", "token_type code.code code.user_id request_id", [everything]
    bad_users = [RevokeTokensRequest(user_id=value, all_types=True) for value in ("", *BAD_UUIDS)]
    yield "RevokeTokens", "user_id", bad_users
    neither = RevokeTokensRequest(user_id=USER)
    both = RevokeTokensRequest(user_id=USER, token_types=[TOKEN_TYPE_RECOVERY], all_types=True)
    yield "RevokeTokens", "token_types", [neither, both]
    strange = [pb.TokenType.ValueType(value) for value in BAD_TYPES]
    some = [RevokeTokensRequest(user_id=USER, token_types=[TOKEN_TYPE_RECOVERY, value]) for value in strange]
    yield "RevokeTokens", "token_types[1]", some
    yield "RevokeTokens", "user_id token_types", [RevokeTokensRequest()]
    everything_of_it = RevokeTokensRequest(user_id="me", token_types=strange[:2], all_types=True)
    yield "RevokeTokens", "user_id token_types token_types[0] token_types[1]", [everything_of_it]
    yield "ListTokens", "user_id", [ListTokensRequest(user_id=value) for value in ("", *BAD_UUIDS)]


@pytest.mark.parametrize(
    ("rpc", "fields", "messages"), [pytest.param(*each, id=f"{each[0]} {each[1]}") for each in _messages()]
)
async def test_malformed_request(
    client: Client, database: Database, rpc: str, fields: str, messages: list[Any]
) -> None:
    """Every violated field is named at once, and no other; nothing is changed, and no secret is repeated."""
    before = contents(database)
    for message in messages:
        refusal = await refused(getattr(client.tokens, rpc)(message))
        assert refusal.reason == "INVALID_REQUEST", message
        assert set(refusal.violations) == set(fields.split()), message
        for secret in (message.link_secret, message.code.code) if hasattr(message, "link_secret") else ():
            assert len(secret) < 5 or secret not in refusal.sentence
    assert contents(database) == before


async def test_nearly_right_secret_is_malformed_and_costs_nothing(coder: Client, database: Database) -> None:
    """A right secret with something around it, or in another script, is not accepted, and charges no attempt."""
    link, code = await coder.issue(), await coder.issue(digits=6)
    other_script = "".join(chr(0xFF10 + int(digit)) for digit in code.secret)
    before = contents(database)
    for issued, secret in (
        *((link, change.format(link.secret)) for change in ("{}\n", " {}", "{}=", "\0{}")),
        *((code, change.format(code.secret)) for change in ("{}\n", " {}", "{} ", "+{}", "{}\0")),
        (code, other_script),
    ):
        assert await reason(coder.check(issued, secret)) == "INVALID_REQUEST"
        assert await reason(coder.consume(issued, secret)) == "INVALID_REQUEST"
    assert contents(database) == before
    assert await coder.consume(link) == link.token
    assert await coder.consume(code) == code.token


async def test_address_is_no_subject_where_it_is_only_claimed(coder: Client, database: Database) -> None:
    """A new address may be claimed by anybody: its codes are found by their users only, and the others' by either."""
    for token_type in TYPES:
        issued = await coder.issue(token_type=token_type, digits=6, relates_to=f"{new_id()}@example.org")
        if token_type in USER_ONLY_TYPES:
            refusal = await refused(coder.consume(issued, by_address=True))
            assert set(refusal.violations) == {"code.relates_to"}
            assert token_row(database, issued)["failed_attempts"] == 0
        else:
            assert await coder.check(issued, by_address=True) == issued.token
        assert await coder.consume(issued) == issued.token
