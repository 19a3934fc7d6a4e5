import asyncio
import itertools
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from calls import (
    Client,
    Database,
    clock,
    connected,
    contents,
    ended,
    expire,
    mail_row,
    moment,
    new_id,
    open_channel,
    reason,
    refused,
    seconds,
    serving,
    time_zone,
    until,
    verification_row,
    write_keys,
    wrong,
)
from conftest import PostgresServer, Serve, clean_environment
from google.protobuf.duration_pb2 import Duration
from onetime.v1 import email_verification_pb2 as pb
from onetime.v1.email_verification_pb2 import (
    STATE_CANCELLED,
    STATE_EXPIRED,
    STATE_LOCKED,
    STATE_PENDING,
    STATE_USED,
    CancelEmailVerificationRequest,
    GetEmailVerificationRequest,
    MarkCodeSentRequest,
    ResendCodeRequest,
    ReturnCode,
    SendEmail,
    StartEmailVerificationRequest,
    VerifyCodeRequest,
)

from service.crypto import Keyring, new_key

AT_REST: Final = r"ev1\.[a-z0-9]{1,16}\.[0-9a-f]{128}"


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


def change(database: Database, started: pb.StartEmailVerificationResponse, what: str) -> None:
    """Change the row of a verification, as `update` says."""
    done = database.execute(
        f"update public.email_verification_tokens set {what} where id = %s", [started.verification.id]
    )
    assert done.rowcount == 1


def change_state(database: Database, started: pb.StartEmailVerificationResponse, what: str) -> None:
    """Change our own row of a verification, as `update` says."""
    done = database.execute(
        f"update onetime.email_verification_states set {what} where id = %s", [started.verification.id]
    )
    assert done.rowcount == 1


async def by_token(client: Client, started: pb.StartEmailVerificationResponse) -> pb.EmailVerification:
    """Return how a verification stands, by its token."""
    request = GetEmailVerificationRequest(email_verification_token=started.email_verification_token)
    return (await client.verifications.GetEmailVerification(request)).verification


async def cancel_by_token(client: Client, started: pb.StartEmailVerificationResponse) -> pb.EmailVerification:
    """Cancel a verification, by its token."""
    request = CancelEmailVerificationRequest(email_verification_token=started.email_verification_token)
    return (await client.verifications.CancelEmailVerification(request)).verification


# The life of a verification


async def test_verification_is_started_mailed_and_used_once(client: Client) -> None:
    """Token and code together are accepted once; every answer on the way tells how it stands."""
    user = new_id()
    started = await client.start(user)
    assert re.fullmatch("[A-Za-z0-9_-]{128}", started.email_verification_token)
    assert re.fullmatch("[0-9]{6}", started.code)
    pending = started.verification
    assert (pending.user_id, pending.state, pending.code_sent) == (user, STATE_PENDING, False)
    assert pending.attempts_remaining == 5
    assert not pending.HasField("use_time")
    assert not pending.HasField("delete_time")
    assert await client.get(started) == await by_token(client, started) == pending

    sent = await client.mark_sent(started)
    assert sent.code_sent
    assert moment(sent.update_time) > moment(pending.update_time)
    assert await client.mark_sent(started) == await client.get(started) == sent

    used = await client.verify(started)
    assert (used.id, used.user_id, used.state) == (pending.id, user, STATE_USED)
    assert used.attempts_remaining == 5
    assert moment(used.create_time) < moment(used.use_time) < moment(used.expire_time)
    assert used.code_sent
    assert await client.get(started) == await by_token(client, started) == used
    for _ in range(2):
        assert await reason(client.verify(started)) == "TOKEN_USED"
    assert await client.get(started) == used


async def test_times(client: Client, database: Database) -> None:
    """A verification lives 15 minutes, or as long as was asked for up to that, by the database's clock."""
    for ttl, expected in ((None, 900), (seconds(900), 900), (seconds(1), 1), (seconds(60.25), 60.25)):
        before = clock(database)
        started = await client.start(ttl=ttl)
        created = moment(started.verification.create_time)
        assert before <= created <= clock(database)
        assert moment(started.verification.expire_time) - created == timedelta(seconds=expected)
        assert moment(started.verification.update_time) == created


async def test_verification_at_rest(client: Client, database: Database) -> None:
    """The rows hold the documented formats, and neither token nor code in clear."""
    started = [await client.start() for _ in range(30)]
    dump = str(contents(database))
    pads = set()
    for each in started:
        row = verification_row(database, each)
        assert re.fullmatch(AT_REST, row["email_verification_token"])
        assert re.fullmatch("[0-9]{6}", row["code"])
        assert (row["caller"], row["delivery"], row["failed_attempts"]) == ("anonymous", "return_code", 0)
        assert each.email_verification_token not in dump
        pads.add((int(row["code"]) - int(each.code)) % 10**6)
    # What is stored is no function of the code alone: each row has its own pad. By chance, one in a million is 0.
    assert len(pads) > 25
    assert (await client.verify(started[0])).state == STATE_USED


async def test_trigger_keeps_the_time_of_the_last_change(client: Client, database: Database) -> None:
    """Every change of a row moves `updated_at`, and what changes no row does not."""
    started = await client.start()
    times = [verification_row(database, started)["updated_at"]]
    await client.resend(started)
    await refused(client.verify(started, wrong(started.code)))
    assert verification_row(database, started)["updated_at"] == times[0]
    for step in (client.mark_sent, client.verify):
        verification = await step(started)
        times.append(verification_row(database, started)["updated_at"])
        assert moment(verification.update_time) == times[-1]
    assert times == sorted(set(times))


async def test_several_verifications_of_one_user(client: Client) -> None:
    """Two devices of one user do not disturb each other, and neither's code is good for the other's token."""
    user = new_id()
    phone, laptop, tablet = [await client.start(user) for _ in range(3)]
    assert len({each.email_verification_token for each in (phone, laptop, tablet)}) == 3
    if laptop.code != phone.code:
        assert await reason(client.verify(phone, laptop.code)) == "CODE_MISMATCH"
    await client.cancel(tablet)
    assert (await client.verify(laptop)).attempts_remaining == 5
    assert (await client.verify(phone)).state == STATE_USED
    assert await reason(client.verify(tablet)) == "TOKEN_CANCELLED"


async def test_code_is_good_for_its_token_only(client: Client, database: Database) -> None:
    """Of all pairs of verifications, of one user and of two, token and code go together where they are the same."""
    user = new_id()
    started = [await client.start(user), await client.start(user), await client.start()]
    for one, other in itertools.permutations(started, 2):
        if one.code != other.code:
            assert await reason(client.verify(one, other.code)) == "CODE_MISMATCH"
    # A sealed code, copied to another row, opens to nothing that its owner knows.
    source = verification_row(database, started[0])
    change(database, started[1], f"code = '{source['code']}'")
    assert await reason(client.verify(started[1], started[0].code)) == "CODE_MISMATCH"
    for each in (started[0], started[2]):
        assert (await client.verify(each)).user_id == each.verification.user_id


# Wrong codes


async def test_wrong_codes_are_counted_and_then_none_is_compared(client: Client, database: Database) -> None:
    """The fifth wrong code is CODE_MISMATCH with none left; then the right one is refused too, and it is LOCKED."""
    started = await client.start()
    for remaining in (4, 3, 2, 1, 0):
        refusal = await refused(client.verify(started, wrong(started.code, by=remaining + 1)))
        assert (refusal.reason, refusal.attempts_remaining) == ("CODE_MISMATCH", remaining)
        verification = await client.get(started)
        assert verification.attempts_remaining == remaining
        assert verification.state == (STATE_PENDING if remaining else STATE_LOCKED)
        assert verification_row(database, started)["failed_attempts"] == 5 - remaining
    for code in (wrong(started.code), started.code):
        assert await reason(client.verify(started, code)) == "ATTEMPTS_EXHAUSTED"
    for call in (client.resend, client.mark_sent):
        assert await reason(call(started)) == "ATTEMPTS_EXHAUSTED"
    assert verification_row(database, started)["failed_attempts"] == 5
    assert (await client.cancel(started)).state == STATE_CANCELLED


async def test_right_code_after_wrong_ones(client: Client) -> None:
    """After four wrong codes the right one is accepted, and neither looking nor resending restores an attempt."""
    started = await client.start()
    for by in (1, 2, 3, 4):
        await refused(client.verify(started, wrong(started.code, by=by)))
        await client.resend(started)
        await client.get(started)
        await client.mark_sent(started)
    assert (await client.verify(started)).attempts_remaining == 1


async def test_unknown_token(client: Client, database: Database) -> None:
    """A token or an id that was never made is TOKEN_NOT_FOUND to every call, and leaves no trace."""
    unknown = pb.StartEmailVerificationResponse(
        verification=pb.EmailVerification(id=new_id()), email_verification_token="A" * 128, code="123456"
    )
    before = contents(database)
    calls = (client.verify, client.resend, client.mark_sent, client.get, client.cancel)
    for call in calls:
        assert await reason(call(unknown)) == "TOKEN_NOT_FOUND"
    assert await reason(by_token(client, unknown)) == "TOKEN_NOT_FOUND"
    assert await reason(cancel_by_token(client, unknown)) == "TOKEN_NOT_FOUND"
    assert contents(database) == before


# States


async def test_order_of_judgement(client: Client, database: Database) -> None:
    """Used, cancelled, expired, locked: of several that hold, the first is told, by the state and by every refusal."""
    started = await client.start()
    change(database, started, "used_at = now(), deleted_at = now(), expires_at = now()")
    change_state(database, started, "failed_attempts = 5")

    async def expect(state: pb.State.ValueType, refusal: str) -> None:
        before = contents(database)
        assert (await client.get(started)).state == (await by_token(client, started)).state == state
        for code in (started.code, wrong(started.code)):
            assert await reason(client.verify(started, code)) == refusal
        assert await reason(client.resend(started)) == refusal
        assert await reason(client.mark_sent(started)) == refusal
        assert contents(database) == before

    await expect(STATE_USED, "TOKEN_USED")
    change(database, started, "used_at = null")
    await expect(STATE_CANCELLED, "TOKEN_CANCELLED")
    change(database, started, "deleted_at = null")
    await expect(STATE_EXPIRED, "TOKEN_EXPIRED")
    change(database, started, "expires_at = now() + interval '1 minute'")
    await expect(STATE_LOCKED, "ATTEMPTS_EXHAUSTED")
    change_state(database, started, "failed_attempts = 0")
    assert (await client.get(started)).state == STATE_PENDING
    assert await reason(client.verify(started, wrong(started.code))) == "CODE_MISMATCH"
    assert (await client.verify(started)).state == STATE_USED


async def test_expired_verification(client: Client, database: Database) -> None:
    """A verification of which seconds are left is good; the moment it has none, it is not."""
    started = await client.start()
    change(database, started, "expires_at = clock_timestamp() + interval '30 seconds'")
    assert (await client.get(started)).state == STATE_PENDING
    expire(database, started)
    assert (await client.get(started)).state == STATE_EXPIRED
    assert await reason(client.verify(started)) == "TOKEN_EXPIRED"
    database.execute("delete from public.email_verification_tokens where id = %s", [started.verification.id])
    assert await reason(client.verify(started)) == "TOKEN_NOT_FOUND"
    assert await reason(client.get(started)) == "TOKEN_NOT_FOUND"


@pytest.mark.parametrize("by", [0, 1], ids=["right code", "wrong code"])
async def test_verification_that_expires_while_it_waits_for_a_lock(
    client: Client, database: Database, migrated_url: str, by: int
) -> None:
    """Expiry is held against the clock after the wait for the row's lock, not against a transaction's start."""
    started = await client.start()
    change(database, started, "expires_at = clock_timestamp() + interval '600 ms'")
    with connected(migrated_url) as other, other.transaction():
        other.execute(
            "select from public.email_verification_tokens where id = %s for update", [started.verification.id]
        )
        call = asyncio.create_task(reason(client.verify(started, wrong(started.code, by=by))))
        await until(lambda: verification_row(database, started)["expires_at"] <= clock(database))
    assert await call == "TOKEN_EXPIRED"


async def test_a_verification_that_is_used_while_it_is_waited_for(
    client: Client, database: Database, migrated_url: str
) -> None:
    """Whoever waits for the row of a verification finds it used, once the one before has used it."""
    started = await client.start()
    with connected(migrated_url) as other, other.transaction():
        used = "update public.email_verification_tokens set used_at = now() where id = %s"
        assert other.execute(used, [started.verification.id]).rowcount == 1
        call = asyncio.create_task(ended(client.verify(started)))
        waiting = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        await until(lambda: database.execute(waiting).rowcount > 0)
    assert await call == "TOKEN_USED"


async def test_cancelling(client: Client, database: Database) -> None:
    """To cancel is a soft delete, by id or token, as often as one likes; nothing of a cancelled one works."""
    for cancel in (client.cancel, lambda started: cancel_by_token(client, started)):
        started = await client.start()
        before = clock(database)
        cancelled = await cancel(started)
        assert cancelled.state == STATE_CANCELLED
        assert before <= moment(cancelled.delete_time) <= clock(database)
        assert verification_row(database, started)["deleted_at"] == moment(cancelled.delete_time)
        assert await client.cancel(started) == await cancel_by_token(client, started) == cancelled
        assert await client.get(started) == cancelled
        for call in (client.verify, client.resend, client.mark_sent):
            assert await reason(call(started)) == "TOKEN_CANCELLED"


async def test_what_can_be_cancelled(client: Client, database: Database) -> None:
    """An expired or a locked verification may be cancelled; a used one is TOKEN_USED, and stays as it is."""
    expired, locked, used = [await client.start() for _ in range(3)]
    expire(database, expired)
    change_state(database, locked, "failed_attempts = 5")
    assert (await client.cancel(expired)).state == (await client.cancel(locked)).state == STATE_CANCELLED
    proof = await client.verify(used)
    assert await reason(client.cancel(used)) == "TOKEN_USED"
    assert await reason(cancel_by_token(client, used)) == "TOKEN_USED"
    assert await client.get(used) == proof


# Resending


async def test_resending_gives_the_same_code_and_nothing_more(client: Client, database: Database) -> None:
    """The caller that started it gets the same code again; nothing is extended or reset, only the send counted."""
    started = await client.start()
    await refused(client.verify(started, wrong(started.code)))
    row = verification_row(database, started)
    for _ in range(3):
        resent = await client.resend(started)
        assert resent.code == started.code
        assert resent.verification == await client.get(started)
        assert resent.verification.expire_time == started.verification.expire_time
        assert resent.verification.attempts_remaining == 4
    assert verification_row(database, started) == row
    assert (await client.verify(started)).state == STATE_USED


async def test_whoever_merely_holds_the_token_never_gets_the_code(client: Client, database: Database) -> None:
    """To a caller that did not start it, a resend gives no code."""
    started = await client.start()
    change_state(database, started, "caller = 'somebody-else'")
    resent = await client.resend(started)
    assert resent.code == ""
    assert resent.verification == started.verification


# Rows of others


async def test_foreign_row_is_nobodys_verification(client: Client, database: Database) -> None:
    """A row that another system has written, its token in clear or in our format, is not found by token or by id."""
    user = new_id()
    database.execute("insert into public.users values (%s)", [user])
    for stored in ("T" * 128, "ev1.k1." + "0" * 128):
        foreign = pb.StartEmailVerificationResponse(
            verification=pb.EmailVerification(id=new_id()), email_verification_token="T" * 128, code="123456"
        )
        database.execute(
            "insert into public.email_verification_tokens (id, user_id, email_verification_token, code)"
            " values (%s, %s, %s, '123456')",
            [foreign.verification.id, user, stored],
        )
        before = contents(database)
        for call in (client.verify, client.resend, client.mark_sent, client.get, client.cancel):
            assert await reason(call(foreign)) == "TOKEN_NOT_FOUND"
        assert await reason(by_token(client, foreign)) == "TOKEN_NOT_FOUND"
        assert await reason(cancel_by_token(client, foreign)) == "TOKEN_NOT_FOUND"
        assert contents(database) == before


async def test_token_written_over_by_the_host(client: Client, database: Database) -> None:
    """Where the host puts another token into our row, that one is not accepted, and the old one is not either."""
    started = await client.start()
    change(database, started, f"email_verification_token = '{'S' * 128}'")
    foreign = pb.StartEmailVerificationResponse(
        verification=started.verification, email_verification_token="S" * 128, code=started.code
    )
    for call in (client.verify, client.resend, client.mark_sent, client.get, client.cancel):
        assert await reason(call(started)) == await reason(call(foreign)) == "TOKEN_NOT_FOUND"
    assert await reason(by_token(client, started)) == await reason(by_token(client, foreign)) == "TOKEN_NOT_FOUND"


# Keys and zones


async def test_rotation_of_keys(serve: Serve, migrated_url: str, keys_file: Path, database: Database) -> None:
    """What an old key made is good while the ring has it, behind a new one that makes; then its token is not found."""
    old, new = new_key(), new_key()
    write_keys(keys_file, old)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        kept, spent = await client.start(), await client.start()
    write_keys(keys_file, new, old)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        assert f".{old.id}." in verification_row(database, kept)["email_verification_token"]
        assert (await client.resend(kept)).code == kept.code
        assert (await client.verify(spent)).state == STATE_USED
        fresh = await client.start()
        assert f".{new.id}." in verification_row(database, fresh)["email_verification_token"]
    write_keys(keys_file, new)
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        assert await reason(client.verify(kept)) == "TOKEN_NOT_FOUND"
        assert await reason(client.resend(kept)) == "TOKEN_NOT_FOUND"
        assert await client.get(kept) == kept.verification
        assert (await client.cancel(kept)).state == STATE_CANCELLED
        assert (await client.verify(fresh)).state == STATE_USED


@pytest.mark.parametrize("zone", ["America/Los_Angeles", "Asia/Tokyo", "UTC"])
async def test_time_zone_of_the_role_means_nothing(client: Client, database: Database, zone: str) -> None:
    """Lifetimes and times stay as they are, whatever the time zone of the role's sessions."""
    with time_zone(database, zone):
        before = clock(database)
        started = await client.start(ttl=seconds(60))
        created = moment(started.verification.create_time)
        assert before <= created <= clock(database)
        assert moment(started.verification.expire_time) == created + timedelta(seconds=60)
        assert verification_row(database, started)["created_at"] == created
        assert (await client.get(started)).state == STATE_PENDING
        expire(database, started)
        assert await reason(client.verify(started)) == "TOKEN_EXPIRED"


# Users


async def test_user_is_added_to_our_own_table(client: Client, database: Database) -> None:
    """Where there was no table of users, a user not seen before is added, once."""
    user = new_id()
    for _ in range(2):
        assert (await client.start(user)).verification.user_id == user
    rows = database.execute("select id from public.users where id = %s", [user]).fetchall()
    assert rows == [{"id": uuid.UUID(user)}]


async def test_user_is_not_added_to_the_hosts_table(serve: Serve, database_url: str) -> None:
    """A host's own users are never added to: one it does not know is USER_NOT_FOUND, and nothing is written."""
    known = new_id()
    with connected(database_url) as database:
        database.execute("create table public.users (id uuid primary key, name text)")
        database.execute("insert into public.users values (%s, 'Ada')", [known])
        command = [sys.executable, "-m", "service", "migrate"]
        subprocess.run(command, env=clean_environment(database_url=database_url), check=True, capture_output=True)  # noqa: ASYNC221 - nothing else runs
        async with serve(database_url, drain_delay="0s") as server, server.channel() as channel:
            client = Client(channel)
            before = contents(database)
            assert await reason(client.start(new_id())) == "USER_NOT_FOUND"
            assert await reason(client.start(new_id(), request_id=new_id())) == "USER_NOT_FOUND"
            assert contents(database) == before
            started = await client.start(known)
            assert (await client.verify(started)).user_id == known
            assert database.execute("select name from public.users").fetchall() == [{"name": "Ada"}]


# Mailing


async def test_nothing_is_mailed_without_a_mail_server(client: Client, database: Database) -> None:
    """send_email is MAIL_NOT_CONFIGURED, and nothing is written; but what is malformed is told first."""
    request = StartEmailVerificationRequest(
        user_id=new_id(), send_email=SendEmail(email="ada@example.org", locale="pt-BR"), request_id=new_id()
    )
    before = contents(database)
    assert await reason(client.verifications.StartEmailVerification(request)) == "MAIL_NOT_CONFIGURED"
    request.send_email.CopyFrom(SendEmail(email="", locale="not a language"))
    refusal = await refused(client.verifications.StartEmailVerification(request))
    assert (refusal.reason, set(refusal.violations)) == (
        "INVALID_REQUEST",
        {"send_email.email", "send_email.locale"},
    )
    assert contents(database) == before


async def test_mail_of_another_replica_is_not_sent_again_without_a_mail_server(
    client: Client, database: Database
) -> None:
    """Where a replica has no mail server, ResendCode is MAIL_NOT_CONFIGURED there, and nothing is written."""
    started = await client.start()
    change_state(database, started, "delivery = 'send_email'")
    before = contents(database)
    assert await reason(client.resend(started, request_id=new_id())) == "MAIL_NOT_CONFIGURED"
    assert contents(database) == before


@dataclass(frozen=True, slots=True)
class Mailing:
    """A server whose mail server is not there: what it is to send stays in the outbox."""

    client: Client
    database: Database
    """Its own: the courier changes rows at any time."""
    ring: Keyring

    def code(self, started: pb.StartEmailVerificationResponse) -> str:
        """Return the code of a verification, which no answer has."""
        row = verification_row(self.database, started)
        return self.ring.unseal_code(
            row["code"], row_id=row["id"], user_id=row["user_id"], token_hash=row["email_verification_token"]
        )

    async def ended(self, started: pb.StartEmailVerificationResponse) -> None:
        """Wait until the address of a verification is forgotten, and see that no mail follows."""
        await until(lambda: mail_row(self.database, started)["sealed_address"] is None)
        row = mail_row(self.database, started)
        assert (row["state"], row["failure"], row["due_at"]) == ("failed", "verification_over", None)


@pytest.fixture(scope="module")
def mailing_server(
    postgres_18: PostgresServer, template_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Keyring]]:
    """The target, the database and the keys of one such server for all tests."""
    folder = tmp_path_factory.mktemp("mailing")
    with (
        postgres_18.database(template_url) as url,
        serving(url, folder, smtp_url="smtp://127.0.0.1:1?timeout=1s") as target,
    ):
        yield target, url, Keyring.parse((folder / "keys").read_text("ascii"))


@pytest.fixture
async def mailing(mailing_server: tuple[str, str, Keyring]) -> AsyncIterator[Mailing]:
    """That server."""
    target, url, ring = mailing_server
    async with open_channel(target) as channel:
        with connected(url) as database:
            yield Mailing(Client(channel), database, ring)


async def test_mail_is_queued_with_the_verification(mailing: Mailing) -> None:
    """The answer tells that a mail is queued, and has no code; the row has the address sealed, and no code either."""
    started = await mailing.client.start_by_mail(email="Ada@Ex\u00e4mple.com", locale="pt-BR")
    assert started.code == ""
    assert re.fullmatch("[A-Za-z0-9_-]{128}", started.email_verification_token)
    verification = started.verification
    assert (verification.state, verification.code_sent) == (STATE_PENDING, False)
    assert (verification.delivery_state, verification.delivery_failure) == (
        pb.DELIVERY_STATE_QUEUED,
        pb.DELIVERY_FAILURE_UNSPECIFIED,
    )
    row = mail_row(mailing.database, started)
    assert (row["state"], row["locale"]) == ("queued", "pt-BR")
    sealed = row["sealed_address"]
    assert mailing.ring.open_address(sealed, row_id=row["verification_id"]) == "Ada@xn--exmple-cua.com"
    assert b"exmple" not in sealed
    code = mailing.code(started)
    assert code not in str(row)
    # While its mail server is not there, it stays queued, and Get tells why.
    await until(lambda: mail_row(mailing.database, started)["failure"] is not None)
    got = await mailing.client.get(started)
    assert got.delivery_failure == pb.DELIVERY_FAILURE_UNREACHABLE
    assert (got.state, got.delivery_state, got.code_sent) == (STATE_PENDING, pb.DELIVERY_STATE_QUEUED, False)
    assert await by_token(mailing.client, started) == got
    assert (await mailing.client.verify(started, code)).state == STATE_USED


async def test_nothing_is_told_of_mails_where_the_caller_mails(client: Client, mailing: Mailing) -> None:
    """With return_code, delivery_state and delivery_failure are unspecified in every answer, and no mail is queued."""
    for each in (client, mailing.client):
        started, cancelled = await each.start(), await each.start()
        assert started.code
        answers = [started.verification, (await each.resend(started)).verification, await each.mark_sent(started)]
        answers += [await each.get(started), await by_token(each, started), await each.verify(started)]
        answers += [await each.cancel(cancelled), await each.get(started)]
        for verification in answers:
            assert verification.delivery_state == pb.DELIVERY_STATE_UNSPECIFIED
            assert verification.delivery_failure == pb.DELIVERY_FAILURE_UNSPECIFIED
        ids = [started.verification.id, cancelled.verification.id]
        query = "select from onetime.outbox where verification_id = any (%s::uuid[])"
        assert mailing.database.execute(query, [ids]).rowcount == 0


async def test_mail_is_sent_again(mailing: Mailing) -> None:
    """ResendCode queues another mail with the same code in place of the one before, and gives the code to nobody."""
    started = await mailing.client.start_by_mail()
    code, before = mailing.code(started), mail_row(mailing.database, started)
    request_id = new_id()
    resent = await mailing.client.resend(started, request_id=request_id)
    assert resent.code == ""
    assert resent.verification.delivery_state == pb.DELIVERY_STATE_QUEUED
    assert resent.verification.expire_time == started.verification.expire_time
    again = mail_row(mailing.database, started)
    assert again["message_id"] != before["message_id"]
    assert again["sealed_address"] == before["sealed_address"]
    assert again["queued_at"] > before["queued_at"]
    assert mailing.code(started) == code
    # A retry of that call queues none.
    assert (await mailing.client.resend(started, request_id=request_id)).code == ""
    assert mail_row(mailing.database, started)["message_id"] == again["message_id"]


async def test_retried_start_queues_one_mail(mailing: Mailing) -> None:
    """A retry gets a fresh token for the same verification; the mail, its code and its address stay as they are."""
    user, request_id = new_id(), new_id()
    first = await mailing.client.start_by_mail(user, request_id=request_id)
    code, mail = mailing.code(first), mail_row(mailing.database, first)
    second = await mailing.client.start_by_mail(user, request_id=request_id)
    assert second.code == ""
    assert second.verification.id == first.verification.id
    assert second.verification.delivery_state == pb.DELIVERY_STATE_QUEUED
    assert second.email_verification_token != first.email_verification_token
    assert mail_row(mailing.database, second)["message_id"] == mail["message_id"]
    assert mailing.code(second) == code
    (budget,) = mailing.database.execute("select sends from onetime.budgets where user_id = %s", [user]).fetchall()
    assert len(budget["sends"]) == 1
    assert await reason(mailing.client.verify(first, code)) == "TOKEN_NOT_FOUND"
    assert (await mailing.client.verify(second, code)).state == STATE_USED
    other = mailing.client.start_by_mail(user, email="eve@example.org", request_id=request_id)
    assert await reason(other) == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("end", ["used", "cancelled", "expired", "locked", "deleted by the host"])
async def test_address_is_forgotten_when_a_verification_is_over(mailing: Mailing, end: str) -> None:
    """Nothing is mailed for a verification that is over, and its address is not kept: at once where a call ends it."""
    client, database = mailing.client, mailing.database
    started = await client.start_by_mail()
    code = mailing.code(started)
    told = None
    if end in ("used", "cancelled"):
        told = await (client.verify(started, code) if end == "used" else client.cancel(started))
        assert mail_row(database, started)["sealed_address"] is None
    elif end == "expired":
        expire(database, started)
    elif end == "locked":
        for _ in range(5):
            assert await reason(client.verify(started, wrong(code))) == "CODE_MISMATCH"
    else:
        database.execute("delete from public.email_verification_tokens where id = %s", [started.verification.id])
    await mailing.ended(started)
    if end == "deleted by the host":
        assert await reason(client.get(started)) == "TOKEN_NOT_FOUND"
        return
    verification = await client.get(started)
    assert verification.code_sent is False
    assert (verification.delivery_state, verification.delivery_failure) == (
        pb.DELIVERY_STATE_FAILED,
        pb.DELIVERY_FAILURE_VERIFICATION_OVER,
    )
    assert told in (None, verification)
    assert await reason(client.resend(started)) in (
        "TOKEN_USED",
        "TOKEN_CANCELLED",
        "TOKEN_EXPIRED",
        "ATTEMPTS_EXHAUSTED",
    )
    assert mail_row(database, started)["sealed_address"] is None


async def test_service_says_itself_what_it_has_mailed(mailing: Mailing) -> None:
    """MarkCodeSent is for callers that mail the code themselves: of others' mails it is INVALID_REQUEST."""
    started = await mailing.client.start_by_mail()
    refusal = await refused(mailing.client.mark_sent(started))
    assert (refusal.reason, set(refusal.violations)) == ("INVALID_REQUEST", {"id"})
    assert verification_row(mailing.database, started)["code_sent"] is False


async def test_mails_count_as_sends(mailing: Mailing) -> None:
    """Starts and resends by mail are held to the same limits as any, and one too many queues nothing."""
    user = new_id()
    started = await mailing.client.start_by_mail(user)
    for _ in range(4):
        await mailing.client.resend(started)
    mail = mail_row(mailing.database, started)
    assert await reason(mailing.client.resend(started)) == "TOO_MANY_SENDS"
    assert await reason(mailing.client.start_by_mail(user)) == "TOO_MANY_SENDS"
    assert mail_row(mailing.database, started)["message_id"] == mail["message_id"]
    query = (
        "select from onetime.outbox as o join public.email_verification_tokens as t on t.id = o.verification_id"
        " where t.user_id = %s"
    )
    assert mailing.database.execute(query, [user]).rowcount == 1


async def test_no_refusal_repeats_an_address(mailing: Mailing) -> None:
    """Every wrong field is told at once, and no text has the address, or a part of it."""
    for email in (
        "geheim@geheim@example.org",
        "geheim@geheim..org",
        "geh\u0435im@example.org",
        "geheim\r\n@example.org",
    ):
        request = StartEmailVerificationRequest(
            user_id="?", send_email=SendEmail(email=email, locale="geheim geheim"), ttl=Duration(), request_id="?"
        )
        refusal = await refused(mailing.client.verifications.StartEmailVerification(request))
        assert set(refusal.violations) == {"user_id", "send_email.email", "send_email.locale", "ttl", "request_id"}
        assert "geh" not in str(refusal)
        assert "example.org" not in str(refusal)


# Malformed requests

USER: Final = "0b0e3d0e-8a5c-4f5e-9d0a-6a3f6a2b1c0d"
BAD_UUIDS: Final = ("me", USER[:-1], USER + "\n", USER.replace("-", ""), USER.replace("0", "\uff10"), USER[:-1] + "\0")
BAD_TOKENS: Final = (
    "",
    "A" * 127,
    "A" * 129,
    "A" * 128 + "\n",
    "A" * 127 + "\0",
    "A" * 127 + "=",
    "A" * 127 + "\u00c4",
    "' or true --".ljust(128),
)
BAD_CODES: Final = (
    "",
    "12345",
    "1234567",
    "\uff11\uff12\uff13\uff14\uff15\uff16",
    "\u0661\u0662\u0663\u0664\u0665\u0666",
    "12345\u00b2",
    "123456\n",
    "12345\0",
    " 12345",
    "+12345",
    "1_2345",
    "abcdef",
)
BAD_TTLS: Final = (
    Duration(),
    Duration(seconds=-1),
    Duration(nanos=999_999_999),
    Duration(seconds=900, nanos=1),
    Duration(seconds=2**63 - 1),
    Duration(seconds=-(2**63)),
    Duration(seconds=1, nanos=10**9),
    Duration(seconds=5, nanos=-1),
    Duration(seconds=-5, nanos=1),
)
BAD_EMAILS: Final = (
    "",
    " ",
    "ada",
    "a" * 321,
    "a" * 65 + "@example.org",
    "ada\0@example.org",
    "ada\uff20example.org",
    "a@b.c\r\nBcc: eve@example.net",
    "ada@example.org,eve@example.net",
    '"eve@example.net"@example.org',
    "ada@eve@example.org",
    "Ada <ada@example.org>",
    "ada@[127.0.0.1]",
    "ada@127.0.0.1",
    "ada@example.org.",
    "\u017fteve@example.org",
    "ad\u0430@example.org",
    "ada@xn--80ak6aa92e.com",
    "a\u202eda@example.org",
)
BAD_LOCALES: Final = ("e", "en_GB", "en\n", "a" * 36, "../en")


def _messages() -> Iterator[tuple[str, str, list[Any]]]:
    """Give the name of an rpc, the fields that are wrong, and requests in which they are."""
    good: dict[str, Any] = {"user_id": USER, "return_code": ReturnCode(), "ttl": seconds(60), "request_id": USER}
    starts: dict[str, list[dict[str, Any]]] = {
        "user_id": [{"user_id": value} for value in ("", *BAD_UUIDS)],
        "request_id": [{"request_id": value} for value in BAD_UUIDS],
        "ttl": [{"ttl": value} for value in BAD_TTLS],
        "delivery": [{"return_code": None}],
        "send_email.email": [{"return_code": None, "send_email": SendEmail(email=value)} for value in BAD_EMAILS],
        "send_email.locale": [
            {"return_code": None, "send_email": SendEmail(email="a@b.c", locale=value)} for value in BAD_LOCALES
        ],
        "user_id delivery ttl request_id": [
            {"user_id": "", "return_code": None, "ttl": Duration(), "request_id": "again"}
        ],
        "user_id send_email.email send_email.locale ttl request_id": [
            {
                "user_id": "",
                "return_code": None,
                "send_email": SendEmail(locale="?"),
                "ttl": Duration(),
                "request_id": "again",
            }
        ],
    }
    for fields, changes in starts.items():
        messages = [StartEmailVerificationRequest(**(good | each)) for each in changes]
        yield "StartEmailVerification", fields, messages
    token = "A" * 128
    codes = [VerifyCodeRequest(email_verification_token=token, code=value) for value in BAD_CODES]
    yield "VerifyCode", "code", codes
    unnamed = [VerifyCodeRequest(email_verification_token=value, code="123456") for value in BAD_TOKENS]
    yield "VerifyCode", "email_verification_token", unnamed
    again = [VerifyCodeRequest(email_verification_token=token, code="123456", request_id=each) for each in BAD_UUIDS]
    yield "VerifyCode", "request_id", again
    yield "VerifyCode", "email_verification_token code request_id", [VerifyCodeRequest(request_id="again")]
    resends = [ResendCodeRequest(email_verification_token=value) for value in BAD_TOKENS]
    yield "ResendCode", "email_verification_token", resends
    yield "ResendCode", "email_verification_token request_id", [ResendCodeRequest(request_id="again")]
    yield "MarkCodeSent", "id", [MarkCodeSentRequest(id=value) for value in ("", *BAD_UUIDS)]
    for rpc, of in (
        ("GetEmailVerification", GetEmailVerificationRequest),
        ("CancelEmailVerification", CancelEmailVerificationRequest),
    ):
        yield rpc, "key", [of()]
        yield rpc, "id", [of(id=value) for value in ("", *BAD_UUIDS)]
        yield rpc, "email_verification_token", [of(email_verification_token=value) for value in BAD_TOKENS]


@pytest.mark.parametrize(
    ("rpc", "fields", "messages"), [pytest.param(*each, id=f"{each[0]} {each[1]}") for each in _messages()]
)
async def test_malformed_request(
    client: Client, database: Database, rpc: str, fields: str, messages: list[Any]
) -> None:
    """Every violated field is named at once, and no other; nothing is changed, and no secret is repeated."""
    before = contents(database)
    for message in messages:
        refusal = await refused(getattr(client.verifications, rpc)(message))
        assert refusal.reason == "INVALID_REQUEST", message
        assert set(refusal.violations) == set(fields.split()), message
        for secret in (getattr(message, "email_verification_token", ""), getattr(message, "code", "")):
            assert len(secret) < 5 or secret not in refusal.sentence
    assert contents(database) == before


async def test_nearly_right_code_is_malformed_and_costs_nothing(client: Client, database: Database) -> None:
    """A right code with something around it, or in another script, is not accepted, and charges no attempt."""
    started = await client.start()
    before = contents(database)
    other_script = "".join(chr(0xFF10 + int(digit)) for digit in started.code)
    for code in (started.code + "\n", " " + started.code, started.code + "\0", "+" + started.code, other_script):
        assert await reason(client.verify(started, code)) == "INVALID_REQUEST"
    assert contents(database) == before
    assert (await client.verify(started)).attempts_remaining == 5
