"""What a caller sees of others' verifications, and does with types of tokens: no more than the policy grants."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Final, TypeAlias

import grpc
import pytest
from calls import LABELS, Client, Database, connected, contents, new_id, reason, refused, serving, wrong
from certificates import Authority, dns, ip
from conftest import PostgresServer, free_port
from onetime.v1 import admin_pb2
from onetime.v1 import one_time_tokens_pb2 as ott
from onetime.v1.email_verification_pb2 import (
    STATE_USED,
    CancelEmailVerificationRequest,
    GetEmailVerificationRequest,
    SendEmail,
    StartEmailVerificationRequest,
)

from service.crypto import api_key_hash, new_api_key

BACKEND: Final = """
rpcs = ["OneTimeTokenService/*", "EmailVerificationService/*"]
token_types = ["*"]
return_code = true
"""
GRANTS: Final = {
    "accounts": BACKEND,
    "signup": BACKEND,
    "support": 'rpcs = ["EmailVerificationService/*"]\nreturn_code = true\nany_caller = true',
    "mailer": 'rpcs = ["EmailVerificationService/*"]\nsend_email = true',
    "recovery": 'rpcs = ["OneTimeTokenService/*"]\ntoken_types = ["TOKEN_TYPE_RECOVERY", "TOKEN_TYPE_CONFIRMATION"]',
}

Clients: TypeAlias = dict[str, Client]


@pytest.fixture(scope="module")
def migrated_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """One database for all tests of this module, each of which takes users of its own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def connect(migrated_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], grpc.aio.Channel]]:
    """One server for all tests of this module; opens channels for callers by their names."""
    folder, authority = tmp_path_factory.mktemp("server"), Authority()
    keys = {name: new_api_key() for name in GRANTS}
    certificate = authority.issue(dns("onetime.example.org"), ip("127.0.0.1"))
    policy = "\n".join(
        f'[callers.{name}]\napi_keys = ["{api_key_hash(keys[name])}"]\n{grants}' for name, grants in GRANTS.items()
    )
    contents_of = {"tls_cert": certificate.certificate, "tls_key": certificate.key, "policy_file": policy.encode()}
    for name, content in contents_of.items():
        (folder / name).write_bytes(content)
    paths = {name: folder / name for name in contents_of}

    with serving(migrated_url, folder, health_listen=f"127.0.0.1:{free_port()}", **paths) as target:

        def open_channel(caller: str) -> grpc.aio.Channel:
            credentials = grpc.composite_channel_credentials(
                grpc.ssl_channel_credentials(authority.certificate), grpc.access_token_call_credentials(keys[caller])
            )
            return grpc.aio.secure_channel(target, credentials, options=[("grpc.use_local_subchannel_pool", 1)])

        yield open_channel


@pytest.fixture
async def clients(connect: Callable[[str], grpc.aio.Channel]) -> AsyncIterator[Clients]:
    """A client for each caller of the policy."""
    async with AsyncExitStack() as stack:
        yield {name: Client(await stack.enter_async_context(connect(name))) for name in GRANTS}


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


async def test_a_caller_sees_its_own_verifications(clients: Clients, database: Database) -> None:
    """Another's are not found, by id and by token, on every rpc; and nothing changes, nor is a guess counted."""
    accounts, signup = clients["accounts"], clients["signup"]
    started = await accounts.start()
    before = contents(database)
    by_token = started.email_verification_token
    get, cancel = signup.verifications.GetEmailVerification, signup.verifications.CancelEmailVerification
    for call in (
        signup.verify(started),
        signup.verify(started, wrong(started.code)),
        signup.verify(started, request_id=new_id()),
        signup.resend(started),
        signup.mark_sent(started),
        signup.get(started),
        get(GetEmailVerificationRequest(email_verification_token=by_token)),
        signup.cancel(started),
        cancel(CancelEmailVerificationRequest(email_verification_token=by_token)),
    ):
        assert await reason(call) == "TOKEN_NOT_FOUND"
    assert contents(database) == before
    assert (await accounts.verify(started)).state == STATE_USED


async def test_any_caller_sees_all_and_gets_no_code(clients: Clients) -> None:
    """With any_caller a verification of another's is used like an own one; its code is for the one that started it."""
    accounts, support = clients["accounts"], clients["support"]
    started = await accounts.start()
    resent = await support.resend(started)
    assert (resent.verification.id, resent.code) == (started.verification.id, "")
    assert (await accounts.resend(started)).code == started.code
    assert (await support.get(started)).id == started.verification.id
    assert (await support.mark_sent(started)).code_sent
    assert (await refused(support.verify(started, wrong(started.code)))).attempts_remaining == 4
    assert (await support.verify(started)).state == STATE_USED
    other = await accounts.start()
    await support.cancel(other)
    assert await reason(accounts.verify(other)) == "TOKEN_CANCELLED"


async def test_a_receipt_is_its_callers_own(clients: Clients) -> None:
    """The same request_id from two callers is two calls."""
    again, user_id = new_id(), new_id()
    one = await clients["accounts"].start(user_id, request_id=again)
    other = await clients["signup"].start(user_id, request_id=again)
    assert one.verification.id != other.verification.id
    assert await reason(clients["signup"].verify(one, request_id=again)) == "TOKEN_NOT_FOUND"
    assert (await clients["accounts"].verify(one, request_id=again)).state == STATE_USED


async def test_ways_of_delivery_are_granted_one_by_one(clients: Clients, database: Database) -> None:
    """Who may not have codes does not get one, and who may not have them mailed has none mailed; nothing is written."""
    before = contents(database)
    send = StartEmailVerificationRequest(user_id=new_id(), send_email=SendEmail(email="ada@example.org"))
    assert await reason(clients["mailer"].start()) == "CALLER_NOT_ALLOWED"
    assert await reason(clients["accounts"].verifications.StartEmailVerification(send)) == "CALLER_NOT_ALLOWED"
    # That is granted, and there is no mail server.
    assert await reason(clients["mailer"].verifications.StartEmailVerification(send)) == "MAIL_NOT_CONFIGURED"
    assert contents(database) == before


async def test_types_of_tokens_are_granted_one_by_one(clients: Clients, database: Database) -> None:
    """A type that is not listed is refused on every rpc, with its name; what is there stays, and is not shown."""
    accounts, recovery = clients["accounts"], clients["recovery"]
    user_id = new_id()
    granted = (ott.TOKEN_TYPE_RECOVERY, ott.TOKEN_TYPE_CONFIRMATION)
    issued = {token_type: await accounts.issue(user_id, token_type, digits=6) for token_type in LABELS}
    before = contents(database)
    for token_type in LABELS:
        if token_type in granted:
            continue
        one = issued[token_type]
        for call in (
            recovery.issue(user_id, token_type),
            recovery.check(one),
            recovery.consume(one),
            recovery.consume(one, wrong(one.secret)),
            recovery.revoke(user_id, token_type),
            recovery.revoke(user_id, granted[0], token_type),
        ):
            refusal = await refused(call)
            assert refusal.reason == "CALLER_NOT_ALLOWED"
            assert ott.TokenType.Name(token_type) in refusal.sentence
    assert await reason(recovery.revoke(user_id)) == "CALLER_NOT_ALLOWED"
    assert contents(database) == before
    assert {token.token_type for token in await recovery.list(user_id)} == set(granted)
    assert len(await accounts.list(user_id)) == len(LABELS)
    assert (await recovery.consume(issued[granted[0]])).user_id == user_id
    assert await recovery.revoke(user_id, granted[1]) == 1


async def test_admin_is_granted_by_name(clients: Clients) -> None:
    """None of these callers has it."""
    for client in clients.values():
        assert (
            await reason(client.admin.PurgeUser(admin_pb2.PurgeUserRequest(user_id=new_id()))) == "CALLER_NOT_ALLOWED"
        )


async def test_a_malformed_request_is_told_before_what_is_not_granted(clients: Clients) -> None:
    """Of a request that nobody could make sense of, nothing can be granted."""
    assert await reason(clients["recovery"].issue("ada", ott.TOKEN_TYPE_PHONE_CHANGE)) == "INVALID_REQUEST"
