"""Who may call what: each kind of evidence on every rpc, what a policy may say, and what `serve` starts with."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from calls import Client, new_id, reason, refused, serving
from certificates import Authority, GeneralName, Issued, dns, email, ip, uri
from conftest import PostgresServer, clean_environment, free_port
from grpc.experimental import session_cache
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott

from service import app
from service.call import NOTHING, Permissions
from service.callers import Callers, Contract
from service.config import Settings, SettingsError, load
from service.crypto import api_key_hash, certificate_names, new_api_key
from service.errors import CallerUnknown
from service.fields import STORED_TYPES

GARBAGE: Final = b"\xff\xff\xff"
RPCS: Final = [f"{service.full_name}/{method.name}" for service in app.SERVICES for method in service.methods]
SHORT: Final = [rpc.removeprefix("onetime.v1.") for rpc in RPCS]
LIST_TOKENS: Final = "onetime.v1.OneTimeTokenService/ListTokens"
NO_SUCH: Final = ["onetime.v1.OneTimeTokenService/DropTable", "onetime.v1.NoService/Call", "x/y"]
CONTRACT: Final = Contract.of(app.SERVICES, {ott.TokenType.Name(type_): label for type_, label in STORED_TYPES.items()})

ACCOUNTS: Final = "spiffe://example.org/accounts"
SIGNUP: Final = "signup.example.org"
READER: Final = "spiffe://example.org/reader"

BILLING_KEY: Final = new_api_key()
BILLING_NEXT_KEY: Final = new_api_key()
SUPPORT_KEY: Final = new_api_key()

ALL: Final = """
rpcs = ["OneTimeTokenService/*", "EmailVerificationService/*", "AdminService/*"]
token_types = ["*"]
return_code = true
"""
POLICY: Final = f"""
[callers."{ACCOUNTS}"]
{ALL}
[callers."{SIGNUP}"]
{ALL}
[callers."{READER}"]
rpcs = ["OneTimeTokenService/ListTokens"]
token_types = ["TOKEN_TYPE_RECOVERY"]
[callers.billing]
api_keys = ["{api_key_hash(BILLING_KEY)}", "{api_key_hash(BILLING_NEXT_KEY)}"]
{ALL}
[callers.support]
api_keys = ["{api_key_hash(SUPPORT_KEY)}"]
rpcs = ["OneTimeTokenService/ListTokens"]
token_types = ["*"]
"""
KEYS_ONLY: Final = "[callers.billing]" + POLICY.partition("[callers.billing]")[2]


def bearer(key: str, scheme: str = "Bearer") -> tuple[tuple[str, str], ...]:
    """Return the metadata that carry an API key."""
    return (("authorization", f"{scheme} {key}"),)


# Servers


@dataclass(frozen=True, slots=True)
class Served:
    """A server that identifies callers, shared by the tests of this module."""

    target: str
    health: str
    """Where health is asked in plain text."""
    log: Path
    folder: Path
    roots: bytes
    """The authority of the server's certificate."""
    clients: Authority
    """The authority of the clients' certificates, if they are asked for one."""

    def channel(self, client: Issued | None = None) -> grpc.aio.Channel:
        """Open a channel, with a client's certificate or without."""
        key, certificate = (None, None) if client is None else (client.key, client.certificate)
        credentials = grpc.ssl_channel_credentials(self.roots, key, certificate)
        return grpc.aio.secure_channel(self.target, credentials, options=[("grpc.use_local_subchannel_pool", 1)])

    def plain(self) -> grpc.aio.Channel:
        """Open a channel to the port of health."""
        return grpc.aio.insecure_channel(self.health, options=[("grpc.use_local_subchannel_pool", 1)])

    def decisions(self) -> list[dict[str, Any]]:
        """Return the lines of the log on calls that ended."""
        lines = [json.loads(line) for line in self.log.read_text("utf-8").splitlines()]
        return [line for line in lines if line["event"] == "audit"]


@contextlib.contextmanager
def identifying(url: str, folder: Path, policy: str, *, mutual: bool) -> Iterator[Served]:
    """Run a server that identifies callers."""
    servers, clients = Authority("servers"), Authority("clients")
    certificate = servers.issue(dns("onetime.example.org"), ip("127.0.0.1"))
    paths = {}
    for name, content in {
        "policy_file": policy.encode(),
        "tls_cert": certificate.certificate,
        "tls_key": certificate.key,
        **({"tls_client_ca": clients.certificate} if mutual else {}),
    }.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    health = f"127.0.0.1:{free_port()}"
    with serving(url, folder, health_listen=health, **paths) as target:
        log = folder / f"server-{target.rpartition(':')[2]}.log"
        yield Served(target, health, log, folder, servers.certificate, clients)


@pytest.fixture(scope="module")
def url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """A database for the servers of this module."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def mutual(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that asks for certificates."""
    with identifying(url, tmp_path_factory.mktemp("mutual"), POLICY, mutual=True) as served:
        yield served


@pytest.fixture(scope="module")
def keyed(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that asks for API keys alone."""
    with identifying(url, tmp_path_factory.mktemp("keyed"), KEYS_ONLY, mutual=False) as served:
        yield served


# Calls


def raw(channel: Any, rpc: str, metadata: Sequence[tuple[str, str]] = ()) -> Awaitable[bytes]:  # noqa: ANN401 - its type forbids bytes
    """Call an rpc with a message that cannot be parsed: who gets as far as that is told INVALID_REQUEST."""
    call: Awaitable[bytes] = channel.unary_unary(f"/{rpc}")(GARBAGE, metadata=metadata, timeout=20)
    return call


def reflection_stub(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401 - it ships half a type
    """Make a client of reflection."""
    return reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type] # as above


async def reflected(channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]) -> None:
    """Open a stream to reflection and ask nothing: grpc.aio has no status for who writes while being refused."""
    call = reflection_stub(channel).ServerReflectionInfo(metadata=metadata, timeout=20)
    with contextlib.suppress(grpc.aio.InternalError):
        await call.done_writing()
    async for _ in call:
        raise AssertionError("nothing was asked")


def health_stub(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401 - it ships half a type
    """Make a client of health."""
    return health_pb2_grpc.HealthStub(channel)


async def outcomes(channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """Return the reason, or else the status, that each rpc of each service, reflection and unknown methods give."""
    found = {}
    calls = {rpc: raw(channel, rpc, metadata) for rpc in (*RPCS, *NO_SUCH)}
    for name, call in {**calls, "reflection": reflected(channel, metadata)}.items():
        try:
            found[name] = (told := await refused(call)).reason or told.status.name
        except AssertionError:
            found[name] = "OK"
    return found


def expected(ours: str, unknown: str | None = None, reflection: str | None = None) -> dict[str, str]:
    """Return outcomes: the same for all rpcs of ours, and another or the same for the rest."""
    return {
        **dict.fromkeys(RPCS, ours),
        **dict.fromkeys(NO_SUCH, unknown or ours),
        "reflection": reflection or ours,
    }


ALLOWED: Final = expected("INVALID_REQUEST", "UNIMPLEMENTED", "OK")
UNKNOWN: Final = expected("CALLER_UNKNOWN")
NOT_ALLOWED: Final = expected("CALLER_NOT_ALLOWED")
NO_HANDSHAKE: Final = expected("UNAVAILABLE")
READS: Final = {**expected("CALLER_NOT_ALLOWED", "UNIMPLEMENTED", "OK"), LIST_TOKENS: "INVALID_REQUEST"}


@dataclass(frozen=True)
class Evidence:
    """What a client shows, and what each call of it comes to."""

    outcome: Mapping[str, str]
    names: tuple[GeneralName, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    certificate: dict[str, Any] = field(default_factory=dict)
    """More of the certificate."""
    caller: str = "anonymous"
    """Whom the log names."""


EVIDENCE: Final[Mapping[str, Evidence]] = {
    # Certificates
    "a listed URI": Evidence(ALLOWED, (uri(ACCOUNTS),), caller=ACCOUNTS),
    "a listed DNS name": Evidence(ALLOWED, (dns(SIGNUP),), caller=SIGNUP),
    "a listed name among others": Evidence(
        ALLOWED, (dns("pod-7.example.org"), uri("https://else"), uri(ACCOUNTS)), caller=ACCOUNTS
    ),
    "a listed name for one rpc": Evidence(READS, (uri(READER),), caller=READER),
    "a name that is not listed": Evidence(
        NOT_ALLOWED, (uri("spiffe://example.org/else"),), caller="spiffe://example.org/else"
    ),
    "a longer name": Evidence(NOT_ALLOWED, (uri(f"{ACCOUNTS}/x"),), caller=f"{ACCOUNTS}/x"),
    "a name in capitals": Evidence(NOT_ALLOWED, (dns(SIGNUP.upper()),), caller=SIGNUP.upper()),
    "a wildcard": Evidence(NOT_ALLOWED, (dns("*.example.org"),), caller="*.example.org"),
    "a listed name up to a NUL": Evidence(NOT_ALLOWED, (dns(f"{SIGNUP}\0.evil.example"),)),
    "a name too long to show": Evidence(NOT_ALLOWED, (uri(f"spiffe://{'x' * 200}"),)),
    "a name that turns lines": Evidence(NOT_ALLOWED, (uri("spiffe://a\nb"),)),
    "the name of nobody": Evidence(NOT_ALLOWED, (dns("anonymous"),)),
    "an empty name": Evidence(NOT_ALLOWED, (dns(""),)),
    "two listed names": Evidence(UNKNOWN, (uri(ACCOUNTS), dns(SIGNUP))),
    "a listed name as a mail address": Evidence(UNKNOWN, (email(SIGNUP),)),
    "an address alone": Evidence(UNKNOWN, (ip("127.0.0.1"),)),
    "a listed name as common name": Evidence(UNKNOWN, certificate={"common_name": SIGNUP}),
    "the name of a caller with keys": Evidence(NOT_ALLOWED, (dns("billing"),)),
    # Certificates and keys
    "a key, and a name that is not listed": Evidence(
        ALLOWED, (dns("proxy.example.org"),), bearer(BILLING_KEY), caller="billing"
    ),
    "a key, and its caller's name": Evidence(ALLOWED, (dns("billing"),), bearer(BILLING_NEXT_KEY), caller="billing"),
    "a key, and another caller's name": Evidence(UNKNOWN, (uri(ACCOUNTS),), bearer(BILLING_KEY)),
    "an unknown key, and a listed name": Evidence(UNKNOWN, (uri(ACCOUNTS),), bearer(new_api_key())),
    "no key after the scheme, and a listed name": Evidence(UNKNOWN, (uri(ACCOUNTS),), bearer("")),
    "an empty authorization, and a listed name": Evidence(UNKNOWN, (uri(ACCOUNTS),), (("authorization", ""),)),
    "another scheme, and a listed name": Evidence(UNKNOWN, (uri(ACCOUNTS),), bearer(BILLING_KEY, "Basic")),
}

KEY_EVIDENCE: Final[Mapping[str, Evidence]] = {
    "a key": Evidence(ALLOWED, metadata=bearer(BILLING_KEY), caller="billing"),
    "the second key": Evidence(ALLOWED, metadata=bearer(BILLING_NEXT_KEY), caller="billing"),
    "a scheme in capitals": Evidence(ALLOWED, metadata=bearer(BILLING_KEY, "BEARER"), caller="billing"),
    "a key for one rpc": Evidence(READS, metadata=bearer(SUPPORT_KEY), caller="support"),
    "nothing": Evidence(UNKNOWN),
    "an unknown key": Evidence(UNKNOWN, metadata=bearer(new_api_key())),
    "half a key": Evidence(UNKNOWN, metadata=bearer(BILLING_KEY[:-1])),
    "the hash of a key": Evidence(UNKNOWN, metadata=bearer(str(api_key_hash(BILLING_KEY)))),
    "the name of a caller": Evidence(UNKNOWN, metadata=bearer("billing")),
    "another scheme": Evidence(UNKNOWN, metadata=bearer(BILLING_KEY, "Basic")),
    "a key without a scheme": Evidence(UNKNOWN, metadata=(("authorization", BILLING_KEY),)),
    "the same key twice": Evidence(UNKNOWN, metadata=bearer(BILLING_KEY) * 2),
    "two keys of one caller": Evidence(UNKNOWN, metadata=bearer(BILLING_KEY) + bearer(BILLING_NEXT_KEY)),
    "a certificate nobody asked for": Evidence(UNKNOWN, (uri(ACCOUNTS),)),
}


@pytest.mark.parametrize("evidence", EVIDENCE.values(), ids=EVIDENCE.keys())
async def test_a_certificate_on_every_rpc(mutual: Served, evidence: Evidence) -> None:
    """Who shows a certificate of the right authority gets what the policy grants to its one name, and no more."""
    await check(mutual, evidence)


@pytest.mark.parametrize("evidence", KEY_EVIDENCE.values(), ids=KEY_EVIDENCE.keys())
async def test_an_api_key_on_every_rpc(keyed: Served, evidence: Evidence) -> None:
    """Who shows a key that the policy has gets what the policy grants to its owner, and no more."""
    await check(keyed, evidence)


async def check(served: Served, evidence: Evidence) -> None:
    """Call everything with some evidence, and see what it comes to and what the log tells."""
    before = len(served.decisions())
    client = (
        served.clients.issue(*evidence.names, **evidence.certificate)
        if evidence.names or evidence.certificate
        else None
    )
    async with served.channel(client) as channel:
        assert await outcomes(channel, evidence.metadata) == evidence.outcome
        # Health is open to all, in every way to ask for it.
        assert (await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status
        async for answer in health_stub(channel).Watch(health_pb2.HealthCheckRequest()):
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            break
    told = served.decisions()[before:]
    assert [line["caller"] for line in told if line["service"] != "unknown"]
    assert {line["caller"] for line in told} == {evidence.caller}
    for _, value in evidence.metadata:
        secret = value.partition(" ")[2]
        assert not secret.startswith("otk_") or secret not in served.log.read_text("utf-8")


@pytest.mark.parametrize("case", ["no certificate", "another authority", "expired", "plain text"])
async def test_no_connection_without_a_certificate_of_the_authority(mutual: Served, case: str) -> None:
    """Without a valid certificate of the authority there is no connection, whatever the name, and no API key helps."""
    match case:
        case "no certificate":
            channel = mutual.channel()
        case "another authority":
            channel = mutual.channel(Authority("clients").issue(uri(ACCOUNTS)))
        case "expired":
            channel = mutual.channel(mutual.clients.issue(uri(ACCOUNTS), days=-1))
        case _:
            channel = grpc.aio.insecure_channel(mutual.target, options=[("grpc.use_local_subchannel_pool", 1)])
    async with channel:
        for metadata in ((), bearer(BILLING_KEY)):
            assert await outcomes(channel, metadata) == NO_HANDSHAKE
    mutual.decisions()  # every line of the log is JSON still: those who are not let in do not write to it


def test_a_resumed_session_does_not_outlive_its_certificate(mutual: Served) -> None:
    """Who comes back with a TLS session rather than a certificate is refused once the certificate has expired."""
    client = mutual.clients.issue(uri(ACCOUNTS), days=6 / 86_400)
    credentials = grpc.ssl_channel_credentials(mutual.roots, client.key, client.certificate)
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.ssl_session_cache", session_cache.ssl_session_cache_lru(1)),  # type: ignore[no-untyped-call] # it ships no type
        ("grpc.ssl_target_name_override", "onetime.example.org"),
    ]
    told = []
    for wait in (0, 0, 6):
        time.sleep(wait)
        with (
            grpc.secure_channel(mutual.target, credentials, options) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            raw(channel, LIST_TOKENS)
        told.append(caught.value.details())
    assert told[0] == told[1]
    assert told[2] == "the certificate has expired"


async def test_the_port_of_health_serves_nothing_else(mutual: Served, keyed: Served) -> None:
    """In plain text nobody is known, by no key; health alone is answered there."""
    for served in (mutual, keyed):
        async with served.plain() as channel:
            for metadata in ((), bearer(BILLING_KEY)):
                assert await outcomes(channel, metadata) == UNKNOWN
            told = await refused(raw(channel, LIST_TOKENS, bearer(BILLING_KEY)))
            assert "over TLS only" in told.sentence
            answer = await health_stub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            request = health_pb2.HealthListRequest()  # type: ignore[attr-defined] # its stubs leave it out
            listed = (await health_stub(channel).List(request)).statuses
            assert listed.keys() == {"", *(service.full_name for service in app.SERVICES)}
            assert {each.status for each in listed.values()} == {health_pb2.HealthCheckResponse.SERVING}


async def test_a_refusal_says_what_helps(mutual: Served) -> None:
    """The developer of a caller learns from the refusal what to change, and where."""
    async with mutual.channel(mutual.clients.issue(uri(READER))) as channel:
        told = await refused(raw(channel, "onetime.v1.OneTimeTokenService/IssueToken"))
        assert told.status is grpc.StatusCode.PERMISSION_DENIED
        assert told.sentence == "the policy does not let this caller call onetime.v1.OneTimeTokenService/IssueToken"
        told = await refused(raw(channel, LIST_TOKENS, bearer(new_api_key())))
        assert told.status is grpc.StatusCode.UNAUTHENTICATED
        assert "this API key is not known" in told.sentence


async def test_reflection_tells_callers_what_there_is(mutual: Served) -> None:
    """Any caller of the policy may look at the contract, so that grpcurl needs no protos."""
    async with mutual.channel(mutual.clients.issue(uri(READER))) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_stub(channel).ServerReflectionInfo(iter([request]))
        names = [service.name async for answer in call for service in answer.list_services_response.service]
        assert {service.full_name for service in app.SERVICES} < set(names)


async def test_what_the_policy_grants_works(mutual: Served) -> None:
    """A caller with rpcs, token types and return_code gets real work done, under its name."""
    async with mutual.channel(mutual.clients.issue(uri(ACCOUNTS))) as channel:
        client = Client(channel)
        issued = await client.issue(digits=6)
        assert await client.consume(issued) == issued.token
        assert await reason(client.consume(issued)) == "TOKEN_NOT_FOUND"
        assert (await client.verify(await client.start())).state == ev.STATE_USED
    async with mutual.channel(mutual.clients.issue(uri(READER))) as channel:
        assert await Client(channel).list(new_id()) == []


# The policy


def grant(policy: str, *, certificates: bool = True) -> Callers:
    """Read a policy."""
    return Callers(policy.encode(), CONTRACT, certificates=certificates)


FAULTS: Final[Sequence[tuple[str, Sequence[str]]]] = [
    ("", ["callers: at least one table, such as"]),
    ("callers = 3", ["callers: at least one table, such as"]),
    ("callers = {}", ["callers: at least one table, such as"]),
    ("a = ", ["a TOML file is right: "]),
    ("[caller.a]\nrpcs = 1", ['"caller": there is no such key; did you mean callers?', "callers: at least one"]),
    ("[callers]\na = 3", ['callers."a": a table with rpcs is right']),
    ("[callers.a]", ['callers."a".rpcs: this is missing: rpcs such as']),
    ("[callers.a]\nrpcs = []", ['callers."a".rpcs: rpcs such as']),
    ('[callers.a]\nrpcs = "AdminService/*"', ['callers."a".rpcs: rpcs such as']),
    ('[callers.a]\nrpcs = ["*"]', ['callers."a".rpcs: there is no "*"; Service/Method or Service/* is right']),
    ('[callers.a]\nrpcs = ["*/*"]', ['callers."a".rpcs: there is no "*/*"']),
    ('[callers.a]\nrpcs = ["AdminService/"]', ['callers."a".rpcs: there is no "AdminService/"; did you mean']),
    (
        '[callers.a]\nrpcs = ["OneTimeTokenService/IsueToken"]',
        ['callers."a".rpcs: there is no "OneTimeTokenService/IsueToken"; did you mean OneTimeTokenService/IssueToken?'],
    ),
    (
        '[callers.a]\nrpcs = ["onetime.v1.AdminService/PurgeUser"]',
        ['there is no "onetime.v1.AdminService/PurgeUser"; did you mean AdminService/PurgeUser?'],
    ),
    (
        '[callers.a]\nrpcs = ["OneTimeTokenService/ListTokens"]',
        ['callers."a".token_types: this is missing, and OneTimeTokenService/ListTokens can do nothing without'],
    ),
    (
        '[callers.a]\nrpcs = ["OneTimeTokenService/*"]\ntoken_types = []',
        ['callers."a".token_types: names such as ["TOKEN_TYPE_RECOVERY"], or ["*"] for all, are right'],
    ),
    (
        '[callers.a]\nrpcs = ["AdminService/*"]\ntoken_types = ["TOKEN_TYPE_RECOVRY", "*", "recovery_token"]',
        [
            'callers."a".token_types: there is no "TOKEN_TYPE_RECOVRY"; did you mean TOKEN_TYPE_RECOVERY?',
            'callers."a".token_types: "*" is right alone: it stands for all',
            'callers."a".token_types: there is no "recovery_token"',
        ],
    ),
    (
        '[callers.a]\nrpcs = ["AdminService/*"]\ntoken_types = ["TOKEN_TYPE_UNSPECIFIED"]',
        ['there is no "TOKEN_TYPE_UNSPECIFIED"'],
    ),
    (
        '[callers.a]\nrpcs = ["EmailVerificationService/*"]',
        ["EmailVerificationService/StartEmailVerification can do nothing without return_code = true or send_email"],
    ),
    (
        '[callers.a]\nrpcs = ["AdminService/*"]\nreturn_code = 1\nsend_email = "yes"\nany_caler = true',
        [
            'callers."a": "any_caler": there is no such key; did you mean any_caller?',
            'callers."a".return_code: true or false is right',
            'callers."a".send_email: true or false is right',
        ],
    ),
    (
        '[callers.a]\nrpcs = ["AdminService/*"]\napi_keys = []\n[callers.b]\nrpcs = ["AdminService/*"]\napi_keys = "x"',
        [
            'callers."a".api_keys: one or two hashes, as `onetime keys api` prints them, are right',
            'callers."b".api_keys: one or two hashes, as `onetime keys api` prints them, are right',
        ],
    ),
    (
        f'[callers.a]\nrpcs = ["AdminService/*"]\napi_keys = ["sha256:12", "SHA256:x", "{BILLING_KEY}"]',
        [
            'callers."a".api_keys: there are 3: one is right, and a second while it takes its place',
            'callers."a".api_keys: number 1: sha256: and 64 digits of 0-9 and a-f are right',
            'callers."a".api_keys: number 2: sha256: and 64 digits of 0-9 and a-f are right',
            'callers."a".api_keys: number 3 is a key itself, and no secret any more: its hash is right, of a new one',
        ],
    ),
    (
        '[callers.a]\nrpcs = ["AdminService/*"]\napi_keys = ["{0}", "{0}"]'.format(api_key_hash(BILLING_KEY)),
        ['callers."a".api_keys: one stands here twice'],
    ),
    (
        f"""
        [callers.a]
        rpcs = ["AdminService/*"]
        api_keys = ["{api_key_hash(BILLING_KEY)}"]
        [callers.b]
        rpcs = ["AdminService/*"]
        api_keys = ["{api_key_hash(BILLING_KEY)}"]
        """,
        ['callers."b".api_keys: one of them is "a"\'s too: a key of its own is right for each'],
    ),
    ('[callers.""]\nrpcs = ["AdminService/*"]', ['callers."": 1 to 200 printable characters are right']),
    (
        '[callers."{}"]\nrpcs = ["AdminService/*"]'.format("x" * 201),
        ["1 to 200 printable characters are right"],
    ),
    (
        '[callers."a\\u0000b"]\nrpcs = ["AdminService/*"]\n[callers."a\\u202eb"]\nrpcs = ["AdminService/*"]',
        [
            'callers."a\\x00b": 1 to 200 printable characters are right',
            'callers."a\\u202eb": 1 to 200 printable characters are right',
        ],
    ),
    (
        '[callers.anonymous]\nrpcs = ["AdminService/*"]',
        ['callers."anonymous": this stands for callers whom nobody asked; another name is right'],
    ),
    ('[callers.a]\nrpcs = ["AdminService/*"]\n[callers.a]', ["a TOML file is right: "]),
]


@pytest.mark.parametrize(("policy", "told"), FAULTS)
def test_a_policy_that_is_not_right(policy: str, told: Sequence[str]) -> None:
    """Every fault is told at once, a line each, with what would be right, and no key."""
    with pytest.raises(ValueError, match=": ") as caught:
        grant(policy)
    lines = str(caught.value).splitlines()
    for each in told:
        assert any(each in line for line in lines), (each, lines)
    assert len(lines) == len(told), lines
    assert BILLING_KEY not in str(caught.value)
    assert str(api_key_hash(BILLING_KEY)) not in str(caught.value)


def test_the_faults_of_all_callers_are_told_together() -> None:
    """One caller's faults do not hide another's."""
    texts = [policy.replace("[callers.a]", f"[callers.c{number}]") for number, (policy, _) in enumerate(FAULTS)]
    texts = [
        text for text in texts if text.startswith("[callers.c") and text.count("[") <= 4 and "[callers.b]" not in text
    ]
    with pytest.raises(ValueError, match=": ") as caught:
        grant("\n".join(texts[:-1]))
    for number in range(len(FAULTS)):
        if any(text.startswith(f"[callers.c{number}]") for text in texts[:-1]):
            assert f'callers."c{number}"' in str(caught.value)


def test_a_policy_in_another_encoding_is_refused() -> None:
    """What is no UTF-8 is told, and not quoted."""
    with pytest.raises(ValueError, match="a TOML file in UTF-8 is right"):
        Callers(b"[callers.a]\n\xff", CONTRACT, certificates=True)


def test_without_certificates_every_caller_needs_a_key() -> None:
    """A caller who could never be known is a mistake, and told as one."""
    grant(KEYS_ONLY, certificates=False)
    with pytest.raises(ValueError, match=f'callers."{READER}".api_keys: without tls_client_ca nobody shows'):
        grant(POLICY, certificates=False)


def test_the_rpcs_that_need_more_are_rpcs() -> None:
    """An rpc that is renamed does not slip out of the rules on token types and deliveries."""
    for rpc in ("IssueToken", "CheckToken", "ConsumeToken", "RevokeTokens", "ListTokens"):
        with pytest.raises(ValueError, match="token_types: this is missing"):
            grant(f'[callers.a]\nrpcs = ["OneTimeTokenService/{rpc}"]')
    served = {rpc.partition("/")[2] for rpc in SHORT if rpc.startswith("OneTimeTokenService/")}
    assert served == {"IssueToken", "CheckToken", "ConsumeToken", "RevokeTokens", "ListTokens"}


_NAMES: Final = st.sampled_from(["a", "b", ACCOUNTS, "c d", "é"])
_TABLES: Final = st.fixed_dictionaries(
    {
        "rpcs": st.lists(
            st.sampled_from([*SHORT, "AdminService/*", "OneTimeTokenService/*", "EmailVerificationService/*"]),
            min_size=1,
        )
    },
    optional={
        "token_types": st.one_of(st.just(["*"]), st.lists(st.sampled_from(sorted(CONTRACT.token_types)), min_size=1)),
        "return_code": st.booleans(),
        "send_email": st.booleans(),
        "any_caller": st.booleans(),
    },
)


def as_toml(callers: Mapping[str, Mapping[str, Any]]) -> str:
    """Write a policy: JSON's texts, lists and truths are TOML's too."""
    return "\n".join(
        f"[callers.{json.dumps(name, ensure_ascii=False)}]\n"
        + "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
        for name, table in callers.items()
    )


@given(st.dictionaries(_NAMES, _TABLES, min_size=1))
def test_a_policy_grants_what_it_says_and_no_more(tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Whatever is granted stands in the file; what can do nothing is refused; what is not there is not granted."""
    rpcs = {
        name: {rpc for rpc in SHORT for text in table["rpcs"] if text in (rpc, f"{rpc.partition('/')[0]}/*")}
        for name, table in tables.items()
    }
    useless = [
        name
        for name, table in tables.items()
        if ("token_types" not in table and any(rpc.startswith("OneTimeTokenService/") for rpc in rpcs[name]))
        or (
            "EmailVerificationService/StartEmailVerification" in rpcs[name]
            and not (table.get("return_code") or table.get("send_email"))
        )
    ]
    try:
        callers = grant(as_toml(tables))
    except ValueError as error:
        assert useless, str(error)  # noqa: PT017 - which of the two comes is what is tested
        return
    assert not useless
    for name, table in tables.items():
        if not name.isascii():
            continue  # no certificate has such a name
        caller, may = shown(callers, [uri(name)])
        assert caller == name
        types = {
            label
            for type_, label in CONTRACT.token_types.items()
            if table.get("token_types") == ["*"] or type_ in table.get("token_types", ())
        }
        assert [rpc for rpc in RPCS if may.may_call(rpc)] == [
            rpc for rpc in RPCS if rpc.removeprefix("onetime.v1.") in rpcs[name]
        ]
        assert {label for label in CONTRACT.token_types.values() if may.may_use(label)} == types
        assert (may.return_code, may.send_email, may.any_caller) == tuple(
            table.get(key, False) for key in ("return_code", "send_email", "any_caller")
        )


@given(st.data())
def test_a_damaged_policy_is_refused_or_grants_no_more(data: st.DataObject) -> None:
    """Whatever a slip does to the file: either it is refused, or nobody may do more than before."""
    cut = data.draw(st.integers(0, len(POLICY)))
    length = data.draw(st.integers(0, 40))
    added = data.draw(st.text(alphabet='abc"[]=*\n.\\#{}', max_size=3))
    try:
        callers = grant(POLICY[:cut] + added + POLICY[cut + length :])
    except ValueError:
        return
    _, may = shown(callers, [uri(READER)])
    if may is not NOTHING and "OneTimeTokenService/*" not in added:
        assert may.may_call(LIST_TOKENS)
    _, may = shown(callers, [uri("spiffe://example.org/else")])
    assert may is NOTHING


# Evidence, in all combinations

_AUTHORITY: Final = Authority()


def shown(
    callers: Callers, names: Sequence[GeneralName], authorizations: Sequence[str] = ()
) -> tuple[str, Permissions]:
    """Identify a caller by a certificate with these names, as gRPC hands it over."""
    pem = [_AUTHORITY.issue(*names).certificate] if names else []
    return callers.identify({"transport_security_type": [b"ssl"], "x509_pem_cert": pem}, authorizations)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([ACCOUNTS, SIGNUP, READER, "billing", "support", "else", "elsewhere"]), unique=True, max_size=4
    ),
    st.lists(st.sampled_from([BILLING_KEY, BILLING_NEXT_KEY, SUPPORT_KEY, "otk_unknown"]), max_size=2),
)
def test_all_evidence_must_lead_to_one_caller(names: Sequence[str], keys: Sequence[str]) -> None:
    """Of a certificate's names and keys, whatever the combination, exactly one caller must come out."""
    owners = {BILLING_KEY: "billing", BILLING_NEXT_KEY: "billing", SUPPORT_KEY: "support"}
    by_name = {name for name in names if name in (ACCOUNTS, SIGNUP, READER)}
    by_key = {owners.get(key) for key in keys}
    callers = grant(POLICY)
    evidence = [uri(name) if "://" in name else dns(name) for name in names]
    try:
        caller, may = shown(callers, evidence, [f"Bearer {key}" for key in keys])
    except CallerUnknown:
        assert len(keys) > 1 or None in by_key or len(by_name | by_key) > 1 or not (names or keys)
        return
    assert len(keys) <= 1
    if by_name | by_key:
        assert {caller} == by_name | by_key
        assert may is not NOTHING
    else:
        assert may is NOTHING
        assert caller in {"else", "elsewhere", "anonymous"}


def test_names_of_certificates() -> None:
    """URIs and DNS names, whole; nothing of what is no certificate."""
    pem = _AUTHORITY.issue(dns("b"), email("c@d"), uri("spiffe://a"), ip("10.0.0.1"), dns("e\0f")).certificate
    assert certificate_names(pem) == ("spiffe://a", "b", "e\0f")
    assert certificate_names(_AUTHORITY.issue().certificate) == ()
    for nonsense in (b"", b"x", pem[:200], pem.replace(b"M", b"N")):
        assert certificate_names(nonsense) == ()


def test_api_keys() -> None:
    """A key has 256 random bits; its hash tells nothing of it; what has not its form is none."""
    keys = {new_api_key() for _ in range(1000)}
    assert len(keys) == 1000
    key = keys.pop()
    assert len(key) == 47
    assert key.startswith("otk_")
    assert (
        api_key_hash(key)
        == "sha256:"
        + subprocess.run(["sha256sum"], input=key.encode(), capture_output=True, check=True).stdout.decode().split()[0]
    )
    for none in ("", "otk_", key[:-1], key + "x", key.replace("otk_", "OTK_"), key + "\n", "é" + key[1:]):
        assert api_key_hash(none) is None


# The start


@pytest.fixture
def files(tmp_path: Path, keys_file: Path) -> dict[str, str]:
    """The settings of a server that identifies callers, and their files."""
    certificate = _AUTHORITY.issue(dns("onetime.example.org"))
    contents = {
        "policy_file": POLICY.encode(),
        "tls_cert": certificate.certificate,
        "tls_key": certificate.key,
        "tls_client_ca": _AUTHORITY.certificate,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in contents} | {"keys_file": str(keys_file)}


def faults_at_start(files: Mapping[str, str]) -> list[str]:
    """Return what is said of files that a server must not start with."""
    with pytest.raises(SettingsError) as caught:
        app.read_files(Settings.model_validate(files), plain_text=False)
    for name in ("keys_file", "tls_key"):
        if name in files and Path(files[name]).exists():
            for word in Path(files[name]).read_text("latin-1").split():
                assert len(word) < 20 or word not in str(caught.value)
    return list(caught.value.problems)


def test_right_files_are_taken(files: Mapping[str, str]) -> None:
    """What the fixture gives is right, so that the faults below are those that were made."""
    read = app.read_files(Settings.model_validate(files), plain_text=False)
    assert read.callers
    assert read.certificate
    assert [len(each) for each in (read.ring.keys, read.watched)] == [1, 3]


def encrypted(key: bytes) -> bytes:
    """Return a private key under a passphrase."""
    return subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-passout", "pass:geheim"], input=key, capture_output=True, check=True
    ).stdout


FILE_FAULTS: Final[Mapping[str, tuple[str, Callable[[bytes], bytes | None], str]]] = {
    "no policy": ("policy_file", lambda _: None, "policy_file {}: No such file or directory"),
    "an empty policy": ("policy_file", lambda _: b"", "policy_file {}: callers: at least one table"),
    "no certificate": ("tls_cert", lambda _: None, "tls_cert {}: No such file or directory"),
    "a key as certificate": (
        "tls_cert",
        lambda _: Path(__file__).read_bytes(),
        "tls_cert {}: tls_cert holds no certificate in PEM",
    ),
    "another's certificate": (
        "tls_cert",
        lambda _: _AUTHORITY.issue(dns("x")).certificate,
        "tls_cert {}: tls_key is not the key of tls_cert's first certificate",
    ),
    "the authority first": (
        "tls_cert",
        lambda certificate: _AUTHORITY.certificate + certificate,
        "tls_cert {}: tls_key is not the key of tls_cert's first certificate",
    ),
    "half a key": ("tls_key", lambda key: key[:100], "tls_key holds no private key in PEM"),
    "an encrypted key": (
        "tls_key",
        encrypted,
        "tls_key holds no private key in PEM; one without a passphrase is right",
    ),
    "no authorities": ("tls_client_ca", lambda _: b"", "tls_client_ca holds no certificate in PEM"),
    "expired authorities": (
        "tls_client_ca",
        lambda _: _AUTHORITY.issue(days=-1).certificate,
        "so no client's certificate would be taken",
    ),
    "no keys": ("keys_file", lambda _: b"# none", "keys_file {}: 0 keys: 1 to 4 are right"),
    "foreign keys": ("keys_file", lambda _: b"\xff", "keys_file {}: this is no file of keys"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_file_that_is_not_right_stops_the_start(fault: str, files: Mapping[str, str]) -> None:
    """No server starts with less than it was told to, and says by which file, and what is right."""
    setting, damage, told = FILE_FAULTS[fault]
    path = Path(files[setting])
    content = damage(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    [problem] = faults_at_start(files)
    assert told.format(path) in problem


@pytest.mark.parametrize(("days", "told"), [(-1, "expired at "), (2, "is not valid before ")])
def test_a_certificate_of_another_time_stops_the_start(days: int, told: str, files: Mapping[str, str]) -> None:
    """A server whose certificate every client would refuse does not start."""
    issued = _AUTHORITY.issue(dns("x"), days=days, starts=1 if days > 0 else None)
    Path(files["tls_cert"]).write_bytes(issued.certificate)
    Path(files["tls_key"]).write_bytes(issued.key)
    [problem] = faults_at_start(files)
    assert told in problem


KINDS_OF_KEYS: Final[Mapping[str, tuple[list[str], bool]]] = {
    "RSA-2048": (["rsa:2048"], True),
    "P-256": (["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], True),
    "P-384": (["ec", "-pkeyopt", "ec_paramgen_curve:P-384"], True),
    "RSA-1024": (["rsa:1024"], False),
    "RSA-PSS": (["rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"], False),
    "P-521": (["ec", "-pkeyopt", "ec_paramgen_curve:P-521"], False),
    "brainpool": (["ec", "-pkeyopt", "ec_paramgen_curve:brainpoolP256r1"], False),
    "unknown curve": (["ec", "-pkeyopt", "ec_paramgen_curve:prime239v1"], False),
    "Ed25519": (["ed25519"], False),
}
"""By name: how openssl makes it, and whether it is taken."""


@pytest.mark.parametrize("kind", KINDS_OF_KEYS)
def test_a_key_that_grpc_cannot_serve_with_stops_the_start(kind: str, files: Mapping[str, str]) -> None:
    """Some keys are taken by gRPC without a word, and then every handshake fails: it is told which are right."""
    how, served = KINDS_OF_KEYS[kind]
    name = ["-subj", "/CN=x", "-addext", "subjectAltName=DNS:x"]
    out = ["-keyout", files["tls_key"], "-out", files["tls_cert"]]
    subprocess.run(["openssl", "req", "-x509", "-nodes", "-newkey", *how, *name, *out], capture_output=True, check=True)
    if served:
        assert app.read_files(Settings.model_validate(files), plain_text=False).certificate
        return
    told = "\n".join(faults_at_start(files))
    assert "tls_cert has a key that gRPC cannot serve with: RSA of 2048 bits or more, P-256 or P-384 is right" in told


def test_all_files_are_told_at_once(files: Mapping[str, str]) -> None:
    """One start tells what is wrong with each file."""
    for path in files.values():
        Path(path).write_bytes(b"x = 1")
    told = faults_at_start(files)
    assert [line.partition(" ")[0] for line in told] == ["keys_file", "policy_file", "policy_file", *["tls_cert"] * 3]


def run(*arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run `onetime` to its end."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "service", *arguments],
        env=clean_environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_serve_ends_with_what_is_wrong_in_the_files(files: dict[str, str]) -> None:
    """It is told as settings are, before the database is asked for anything."""
    Path(files["policy_file"]).write_text("[callers.a]\nrpcs = []\n")
    Path(files["tls_key"]).write_text("x")
    result = run("serve", database_url="postgresql://app@127.0.0.1:1/app", **files)
    assert result.returncode == 2
    assert result.stderr.startswith("onetime: 2 settings are wrong:\n")
    assert 'callers."a".rpcs: rpcs such as' in result.stderr
    assert "tls_key holds no private key" in result.stderr
    assert "Traceback" not in result.stderr


PLAIN: Final = {"database_url": "postgresql:///x"}


@pytest.mark.parametrize("given_name", ["policy_file", "tls_cert", "tls_key", "tls_client_ca", "health_listen"])
def test_plain_text_takes_nothing_that_would_identify(given_name: str) -> None:
    """Nobody who set a certificate or a policy is served plain text unawares."""
    with pytest.raises(SettingsError) as caught:
        load({given_name: "127.0.0.1:1"}, plain_text=True)
    [problem] = caught.value.problems
    assert problem.startswith(f"--{given_name.replace('_', '-')}: it has no use in plain text")


@pytest.mark.parametrize(
    "missing",
    list(
        itertools.chain.from_iterable(
            itertools.combinations(["tls_cert", "tls_key", "policy_file"], n) for n in (1, 2, 3)
        )
    ),
)
def test_what_identifies_callers_is_asked_for(missing: tuple[str, ...], files: dict[str, str]) -> None:
    """What is missing is told in one line, with the two ways out."""
    given = {name: path for name, path in files.items() if name not in missing}
    with pytest.raises(SettingsError) as caught:
        load(given, require=("tls_cert", "tls_key", "policy_file"))
    [problem] = caught.value.problems
    assert problem.startswith(", ".join(f"ONETIME_{name.upper()}" for name in missing))
    assert "or add --insecure-loopback" in problem


def test_every_address_is_listened_on_over_tls(files: dict[str, str]) -> None:
    """With callers identified, others than this machine may be."""
    assert load(files | {"listen": "0.0.0.0:50051"}, require=("tls_cert",)).listen == "0.0.0.0:50051"


# onetime health, onetime keys api


def test_health_is_asked_over_tls(keyed: Served, mutual: Served, tmp_path: Path) -> None:
    """The command that containers run finds its way to each kind of server, and trusts no other certificate."""
    result = run("health", listen=keyed.target, tls_cert=keyed.folder / "tls_cert")
    assert (result.returncode, result.stdout, result.stderr) == (0, "SERVING\n", "")
    result = run("health", listen=mutual.target, tls_cert=mutual.folder / "tls_cert", health_listen=mutual.health)
    assert (result.returncode, result.stdout) == (0, "SERVING\n")
    (tmp_path / "other").write_bytes(_AUTHORITY.issue(dns("onetime.example.org")).certificate)
    result = run("health", listen=keyed.target, tls_cert=tmp_path / "other")
    assert (result.returncode, result.stdout) == (1, "")
    for name in ("tls_cert", "tls_client_ca"):
        assert (mutual.folder / name).exists()
    result = run(
        "health",
        listen=mutual.target,
        tls_cert=mutual.folder / "tls_cert",
        tls_client_ca=mutual.folder / "tls_client_ca",
    )
    assert result.returncode == 1
    assert "set --health-listen" in result.stderr


def test_a_new_api_key_is_shown_once() -> None:
    """The key alone on standard output, to be piped to where it belongs; what the policy needs beside it."""
    result = run("keys", "api")
    assert result.returncode == 0
    key = result.stdout.removesuffix("\n")
    assert f'api_keys = ["{api_key_hash(key)}"]' in result.stderr
    assert key not in result.stderr
    assert run("keys", "api").stdout != result.stdout
