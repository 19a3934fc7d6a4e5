"""Calls as the tests make them, what a refusal carries, and the rows that calls leave.

Nothing here knows how the service works: requests go through a channel, and rows are looked at by SQL.
"""

import asyncio
import contextlib
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, LiteralString, TypeAlias

import grpc
import grpc.aio
import psycopg
from conftest import clean_environment, free_port
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, LocalizedMessage, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott
from onetime.v1.admin_pb2_grpc import AdminServiceStub
from onetime.v1.email_verification_pb2_grpc import EmailVerificationServiceStub
from onetime.v1.one_time_tokens_pb2_grpc import OneTimeTokenServiceStub
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from service.crypto import Key, Keyring, new_key

Database: TypeAlias = psycopg.Connection[DictRow]

ADDRESS: Final = "ada@example.org"
LABELS: Final = {
    ott.TOKEN_TYPE_CONFIRMATION: "confirmation_token",
    ott.TOKEN_TYPE_REAUTHENTICATION: "reauthentication_token",
    ott.TOKEN_TYPE_RECOVERY: "recovery_token",
    ott.TOKEN_TYPE_EMAIL_CHANGE_NEW: "email_change_token_new",
    ott.TOKEN_TYPE_EMAIL_CHANGE_CURRENT: "email_change_token_current",
    ott.TOKEN_TYPE_PHONE_CHANGE: "phone_change_token",
}
"""The types of tokens, and what the table calls them."""


# Refusals


@dataclass(frozen=True, slots=True)
class Promise:
    """What the contract promises of one reason."""

    status: grpc.StatusCode
    public: str = "Something went wrong. Please try again later."
    """What an end user may be shown."""
    metadata: frozenset[str] = frozenset()
    """Keys of ErrorInfo's metadata."""
    bad_request: bool = False
    retry_info: bool = False


_CREDENTIAL: Final = "This link or code is not valid. Please request a new one."
_REFUSED: Final = grpc.StatusCode.FAILED_PRECONDITION

PROMISES: Final[Mapping[str, Promise]] = {
    "INVALID_REQUEST": Promise(
        grpc.StatusCode.INVALID_ARGUMENT, public="Please check what you entered.", bad_request=True
    ),
    "USER_NOT_FOUND": Promise(grpc.StatusCode.NOT_FOUND),
    # The same sentence for every credential that is refused, so that nobody learns from it which tokens exist.
    "TOKEN_NOT_FOUND": Promise(grpc.StatusCode.NOT_FOUND, public=_CREDENTIAL),
    "TOKEN_USED": Promise(_REFUSED, public=_CREDENTIAL),
    "TOKEN_CANCELLED": Promise(_REFUSED, public=_CREDENTIAL),
    "TOKEN_EXPIRED": Promise(_REFUSED, public=_CREDENTIAL),
    "ATTEMPTS_EXHAUSTED": Promise(_REFUSED, public=_CREDENTIAL),
    "CODE_MISMATCH": Promise(_REFUSED, public=_CREDENTIAL, metadata=frozenset({"attempts_remaining"})),
    "TOO_MANY_FAILURES": Promise(grpc.StatusCode.RESOURCE_EXHAUSTED, public=_CREDENTIAL, retry_info=True),
    "TOO_SOON": Promise(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        public="Please wait a moment before you ask for another code.",
        retry_info=True,
    ),
    "TOO_MANY_SENDS": Promise(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        public="Please wait a while before you ask for another one.",
        retry_info=True,
    ),
    "CALLER_UNKNOWN": Promise(grpc.StatusCode.UNAUTHENTICATED),
    "CALLER_NOT_ALLOWED": Promise(grpc.StatusCode.PERMISSION_DENIED),
    "REQUEST_ID_REUSED": Promise(_REFUSED),
    "MAIL_NOT_CONFIGURED": Promise(_REFUSED),
    "OVERLOADED": Promise(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info=True),
    "DATABASE_UNAVAILABLE": Promise(grpc.StatusCode.UNAVAILABLE, retry_info=True),
    "OUTCOME_UNKNOWN": Promise(grpc.StatusCode.UNAVAILABLE, retry_info=True),
    "INTERNAL": Promise(grpc.StatusCode.INTERNAL),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status other than OK, with all that it carries."""

    status: grpc.StatusCode
    reason: str
    """Empty where gRPC itself refused."""
    sentence: str
    """For the developer of the caller."""
    public: str
    """For an end user."""
    metadata: Mapping[str, str]
    """Of ErrorInfo."""
    violations: Mapping[str, str]
    """Of BadRequest: what would be right, by field."""
    retry_after: timedelta | None

    @property
    def attempts_remaining(self) -> int:
        """What a CODE_MISMATCH tells."""
        return int(self.metadata["attempts_remaining"])


async def refused(call: Awaitable[object]) -> Refusal:
    """Return how a call was refused; fail if it was not, or if the refusal is not as the contract promises."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    raise AssertionError(f"it was not refused, but answered by a {type(answer).__name__}")


async def reason(call: Awaitable[object]) -> str:
    """Return the reason why a call was refused, as `refused` does."""
    return (await refused(call)).reason


async def ended(call: Awaitable[object]) -> str:
    """Tell how a call ended: OK, the reason of a refusal, or a status that has none."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return refusal(error).reason or error.code().name
    return "OK"


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Return what a refusal carries; fail if it is not as the contract promises."""
    sentence = error.details() or ""
    trailing = [(str(key), value) for key, value in error.trailing_metadata() or ()]
    reasons = [value for key, value in trailing if key == "onetime-reason"]
    packed = [value for key, value in trailing if key == "grpc-status-details-bin"]
    if not reasons and not packed:
        return Refusal(error.code(), "", sentence, "", {}, {}, None)
    (blob,) = packed
    assert isinstance(blob, bytes)
    status = Status.FromString(blob)
    assert (status.code, status.message) == (error.code().value[0], sentence)
    info, localized, retry, bad = ErrorInfo(), LocalizedMessage(), RetryInfo(), BadRequest()
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details]
    for detail in status.details:
        assert any(detail.Unpack(message) for message in (info, localized, retry, bad)), detail.type_url
    violations = {violation.field: violation.description for violation in bad.field_violations}
    assert len(violations) == len(bad.field_violations)
    told = Refusal(
        status=error.code(),
        reason=info.reason,
        sentence=sentence,
        public=localized.message,
        metadata=dict(info.metadata),
        violations=violations,
        retry_after=retry.retry_delay.ToTimedelta() if "RetryInfo" in kinds else None,
    )
    promise = PROMISES[info.reason]
    promised = ["ErrorInfo", "LocalizedMessage"]
    promised += ["RetryInfo"] * promise.retry_info + ["BadRequest"] * promise.bad_request
    assert (info.domain, reasons) == ("onetime", [info.reason])
    assert (told.status, told.public) == (promise.status, promise.public)
    assert sorted(kinds) == sorted(promised)
    assert told.metadata.keys() == promise.metadata
    assert told.retry_after is None or told.retry_after > timedelta()
    return told


# Requests


def new_id() -> str:
    """Return a UUID as requests have it: of a user whom no other test knows, or of a call."""
    return str(uuid.uuid4())


def seconds(number: float) -> Duration:
    """Return a duration."""
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=number))
    return duration


def moment(timestamp: Timestamp) -> datetime:
    """Return a timestamp of an answer, in UTC."""
    return timestamp.ToDatetime(tzinfo=UTC)


def wrong(code: str, *, by: int = 1) -> str:
    """Return another code of the same length."""
    return f"{(int(code) + by) % 10 ** len(code):0{len(code)}d}"


class Client:
    """Short ways to make calls. A class because all of them go through one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Take the channel."""
        self.tokens = OneTimeTokenServiceStub(channel)
        self.verifications = EmailVerificationServiceStub(channel)
        self.admin = AdminServiceStub(channel)

    async def issue(
        self,
        user_id: str = "",
        token_type: ott.TokenType.ValueType = ott.TOKEN_TYPE_RECOVERY,
        *,
        digits: int = 0,
        relates_to: str = ADDRESS,
        ttl: Duration | None = None,
        request_id: str = "",
    ) -> ott.IssueTokenResponse:
        """Issue a link, or a code of so many digits, to a new user if none is named."""
        request = ott.IssueTokenRequest(
            user_id=user_id or new_id(),
            token_type=token_type,
            relates_to=relates_to,
            secret_format=ott.SECRET_FORMAT_CODE if digits else ott.SECRET_FORMAT_LINK,
            code_length=digits,
            ttl=ttl,
            request_id=request_id,
        )
        return await self.tokens.IssueToken(request)

    async def check(
        self, issued: ott.IssueTokenResponse, secret: str | None = None, *, by_address: bool = False
    ) -> ott.OneTimeToken:
        """Check a token by its secret, or by another one of the same form."""
        request = consume_request(issued, secret, by_address=by_address)
        message = ott.CheckTokenRequest(token_type=request.token_type)
        if request.WhichOneof("credential") == "code":
            message.code.CopyFrom(request.code)
        else:
            message.link_secret = request.link_secret
        return (await self.tokens.CheckToken(message)).token

    async def consume(
        self,
        issued: ott.IssueTokenResponse,
        secret: str | None = None,
        *,
        by_address: bool = False,
        request_id: str = "",
    ) -> ott.OneTimeToken:
        """Consume a token by its secret, or by another one of the same form."""
        request = consume_request(issued, secret, by_address=by_address, request_id=request_id)
        return (await self.tokens.ConsumeToken(request)).token

    async def revoke(self, user_id: str, *token_types: ott.TokenType.ValueType) -> int:
        """Revoke a user's tokens of these types, or of all if none is named; return how many were live."""
        request = ott.RevokeTokensRequest(user_id=user_id, token_types=token_types, all_types=not token_types)
        return (await self.tokens.RevokeTokens(request)).revoked_count

    async def list(self, user_id: str) -> list[ott.OneTimeToken]:
        """List a user's live tokens."""
        return list((await self.tokens.ListTokens(ott.ListTokensRequest(user_id=user_id))).tokens)

    async def start(
        self, user_id: str = "", *, ttl: Duration | None = None, request_id: str = ""
    ) -> ev.StartEmailVerificationResponse:
        """Start a verification with `return_code`, of a new user if none is named."""
        request = ev.StartEmailVerificationRequest(
            user_id=user_id or new_id(), return_code=ev.ReturnCode(), ttl=ttl, request_id=request_id
        )
        return await self.verifications.StartEmailVerification(request)

    async def start_by_mail(
        self, user_id: str = "", *, email: str = ADDRESS, locale: str = "", request_id: str = ""
    ) -> ev.StartEmailVerificationResponse:
        """Start a verification with `send_email`, of a new user if none is named."""
        request = ev.StartEmailVerificationRequest(
            user_id=user_id or new_id(), send_email=ev.SendEmail(email=email, locale=locale), request_id=request_id
        )
        return await self.verifications.StartEmailVerification(request)

    async def verify(
        self, started: ev.StartEmailVerificationResponse, code: str | None = None, *, request_id: str = ""
    ) -> ev.EmailVerification:
        """Verify a code, the right one if none is given."""
        request = ev.VerifyCodeRequest(
            email_verification_token=started.email_verification_token,
            code=started.code if code is None else code,
            request_id=request_id,
        )
        return (await self.verifications.VerifyCode(request)).verification

    async def resend(
        self, started: ev.StartEmailVerificationResponse, *, request_id: str = ""
    ) -> ev.ResendCodeResponse:
        """Ask for the same code again."""
        request = ev.ResendCodeRequest(email_verification_token=started.email_verification_token, request_id=request_id)
        return await self.verifications.ResendCode(request)

    async def mark_sent(self, started: ev.StartEmailVerificationResponse) -> ev.EmailVerification:
        """Say that the code has been mailed."""
        request = ev.MarkCodeSentRequest(id=started.verification.id)
        return (await self.verifications.MarkCodeSent(request)).verification

    async def get(self, started: ev.StartEmailVerificationResponse) -> ev.EmailVerification:
        """Return how a verification stands, by its id."""
        request = ev.GetEmailVerificationRequest(id=started.verification.id)
        return (await self.verifications.GetEmailVerification(request)).verification

    async def cancel(self, started: ev.StartEmailVerificationResponse) -> ev.EmailVerification:
        """Cancel a verification, by its id."""
        request = ev.CancelEmailVerificationRequest(id=started.verification.id)
        return (await self.verifications.CancelEmailVerification(request)).verification


def consume_request(
    issued: ott.IssueTokenResponse, secret: str | None = None, *, by_address: bool = False, request_id: str = ""
) -> ott.ConsumeTokenRequest:
    """Return the request that consumes a token by its secret, or by another one of the same form."""
    secret = issued.secret if secret is None else secret
    request = ott.ConsumeTokenRequest(token_type=issued.token.token_type, request_id=request_id)
    if not issued.token.HasField("attempts_remaining"):
        request.link_secret = secret
    elif by_address:
        request.code.CopyFrom(ott.CodeCredential(relates_to=issued.token.relates_to, code=secret))
    else:
        request.code.CopyFrom(ott.CodeCredential(user_id=issued.token.user_id, code=secret))
    return request


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds, for 20 s at most."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.02)


# Rows

_TABLES: Final[tuple[LiteralString, ...]] = (
    "auth.one_time_tokens",
    "onetime.one_time_token_states",
    "public.users",
    "public.email_verification_tokens",
    "onetime.email_verification_states",
    "onetime.outbox",
    "onetime.receipts",
    "onetime.budgets",
)


@contextlib.contextmanager
def connected(url: str) -> Iterator[Database]:
    """Connect to a database, to look at rows and to age them. In autocommit mode."""
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as database:
        yield database


def contents(database: Database) -> Mapping[str, list[DictRow]]:
    """Return all rows of all tables, to see that nothing changed."""
    return {
        table: database.execute(f"select t.*, t.xmin from {table} as t order by t::text").fetchall()
        for table in _TABLES
    }


def clock(database: Database) -> datetime:
    """Return the time by the database's clock."""
    row = database.execute("select clock_timestamp() at time zone 'utc' as now").fetchone()
    assert row is not None
    now: datetime = row["now"]
    return now.replace(tzinfo=UTC)


def token_row(database: Database, issued: ott.IssueTokenResponse) -> DictRow:
    """Return the row of a token, with that of its state."""
    row = database.execute(
        "select t.*, s.ttl, s.failed_attempts, s.caller from auth.one_time_tokens as t"
        " join onetime.one_time_token_states as s on s.token_id = t.id where t.id = %s",
        [issued.token.id],
    ).fetchone()
    assert row is not None
    return row


def verification_row(database: Database, started: ev.StartEmailVerificationResponse) -> DictRow:
    """Return the row of a verification, with that of its state."""
    row = database.execute(
        "select t.*, s.failed_attempts, s.caller, s.delivery from public.email_verification_tokens as t"
        " join onetime.email_verification_states as s on s.id = t.id where t.id = %s",
        [started.verification.id],
    ).fetchone()
    assert row is not None
    return row


def mail_row(database: Database, started: ev.StartEmailVerificationResponse) -> DictRow:
    """Return the row of a verification's mail."""
    row = database.execute(
        "select * from onetime.outbox where verification_id = %s", [started.verification.id]
    ).fetchone()
    assert row is not None
    return row


def expire(database: Database, made: ott.IssueTokenResponse | ev.StartEmailVerificationResponse) -> None:
    """Age a token or a verification, so that its time has just run out."""
    if isinstance(made, ott.IssueTokenResponse):
        done = database.execute(
            "update auth.one_time_tokens as t set created_at = clock_timestamp() at time zone 'utc' - s.ttl"
            " from onetime.one_time_token_states as s where s.token_id = t.id and t.id = %s",
            [made.token.id],
        )
    else:
        done = database.execute(
            "update public.email_verification_tokens set expires_at = clock_timestamp() where id = %s",
            [made.verification.id],
        )
    assert done.rowcount == 1


@contextlib.contextmanager
def time_zone(database: Database, zone: str) -> Iterator[None]:
    """Give the role's sessions in this database another time zone, and end the ones that there are."""
    row = database.execute("select current_database() as name").fetchone()
    assert row is not None
    change = sql.SQL("alter role current_user in database {} ").format(sql.Identifier(row["name"]))
    database.execute(change + sql.SQL("set timezone to {}").format(sql.Literal(zone)))
    try:
        database.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        yield
    finally:
        database.execute(change + sql.SQL("reset timezone"))


# Servers

START_TIMEOUT_S: Final = 60.0


def write_keys(path: Path, *keys: Key) -> None:
    """Write a file of keys, the one that makes first."""
    path.touch(0o600)
    path.write_text(Keyring(keys).format(), "ascii")


@contextlib.contextmanager
def serving(url: str, folder: Path, **settings: object) -> Iterator[str]:
    """Run one `onetime serve` for many tests, and yield its target: a process of its own for each would take minutes.

    Tests that share it share its database too: each takes users of its own. Servers of one folder have the same keys.
    With `tls_cert` callers are identified, and `health_listen` is where health is asked in plain text.
    """
    keys_file = folder / "keys"
    if not keys_file.exists():
        write_keys(keys_file, new_key())
    port = free_port()
    target, log = f"127.0.0.1:{port}", folder / f"server-{port}.log"
    defaults = {
        "database_url": url,
        "keys_file": keys_file,
        "listen": target,
        "cleanup_probability": 0,
        "drain_delay": "0s",
        "send_interval": "0s",  # tests of the limits set it
        "unsafe_cheap_argon2": True,
        "argon2_memory_kib": 64,
        "argon2_time_cost": 1,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "service",
                "serve",
                *["--insecure-loopback"] * ("tls_cert" not in settings),
            ],
            env=clean_environment(**(defaults | settings)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_serving(str(settings.get("health_listen", target)), process, log)
        yield target
    finally:
        process.terminate()
        exit_code = process.wait(START_TIMEOUT_S)
    assert exit_code == 0, log.read_text("utf-8")


def _wait_until_serving(target: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)  # type: ignore[attr-defined] # its stubs leave it out
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.05)
    raise AssertionError(f"onetime is not serving:\n{log.read_text('utf-8')}")


def open_channel(target: str) -> grpc.aio.Channel:
    """Return a new channel, to be entered by `async with`."""
    # Channels share connections by default, also between tests' event loops.
    return grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])


@contextlib.contextmanager
def memory_limited(process_id: int, mebibytes: int) -> Iterator[None]:
    """Let a process have so much more address space and no more, so that large allocations fail as they really do."""
    pages = int(Path(f"/proc/{process_id}/statm").read_text("ascii").split()[0])
    before = resource.prlimit(process_id, resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.prlimit(process_id, resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process_id, resource.RLIMIT_AS, before)
