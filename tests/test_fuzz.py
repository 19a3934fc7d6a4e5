import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import fuzz
import grpc
import grpc.aio
import pytest
from calls import Client, connected, new_id, open_channel, serving
from conftest import OnetimeServer, PostgresServer, wait_until_serving
from fuzz import MARK, PRIVATE, Judge, Sent
from onetime.v1 import one_time_tokens_pb2 as ott

from service.errors import InternalError, InvalidRequest, OnetimeError, Overloaded, TokenNotFound

SENT: Final = Sent(
    7,
    "/onetime.v1.OneTimeTokenService/ListTokens",
    b"\0",
    method=ott.DESCRIPTOR.services_by_name["OneTimeTokenService"].methods_by_name["ListTokens"],
)
MAIL: Final = "insert into onetime.outbox (verification_id, message_id, locale)"
SECRET: Final = "s3cret_" * 7
LINE: Final = {"time": "2026-01-01T00:00:00.000Z", "level": "INFO", "logger": "service.interceptors", "event": "call"}


@pytest.fixture(scope="module")
def rows_url(postgres_18: PostgresServer, template_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database with a token, a verification and a receipt, made by calls."""

    async def make(target: str) -> None:
        async with open_channel(target) as channel:
            client = Client(channel)
            await client.issue(request_id=new_id())
            await client.issue(digits=6)
            await client.start()

    with postgres_18.database(template_url) as url:
        with serving(url, tmp_path_factory.mktemp("rows")) as target:
            asyncio.run(make(target))
        yield url


@pytest.mark.timeout(300)
async def test_a_storm(migrated_url: str, tmp_path: Path) -> None:
    """Some thousand hostile requests bring out nothing that must not be, and honest callers are served all the while.

    `make fuzz` sends a million.
    """
    report = await fuzz.storm(migrated_url, tmp_path, requests=12_000, seed=1)
    assert not report.judge.found, str(report)
    # The service was not just refusing everything at its door.
    wanted = {"OK", "INVALID_REQUEST", "TOKEN_NOT_FOUND", "CODE_MISMATCH", "TOKEN_USED", "UNIMPLEMENTED"}
    wanted |= {"hung up", "bare connection", "REQUEST_ID_REUSED", "DEADLINE_EXCEEDED"}
    assert wanted <= report.judge.ends.keys(), str(report)


async def send_bare(server: OnetimeServer, headers: Mapping[bytes, bytes]) -> bytes:
    """Make a call on a connection of its own, and return what comes back within a second."""
    host, port = server.target.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    # An empty message.
    writer.write(fuzz.OPENED + fuzz.started_call(1, headers) + fuzz.frame(0, 1, 1, bytes(5)))
    received = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            while chunk := await reader.read(65536):
                received += chunk
    writer.close()
    return received


async def test_a_header_that_is_not_utf8(server: OnetimeServer) -> None:
    """A header is not written into the log in full, as gRPC would: it may be an API key."""
    headers = fuzz.call_headers(b"/onetime.v1.OneTimeTokenService/ListTokens")
    received = await send_bare(server, headers | {b"authorization": f"Bearer {SECRET}".encode() + b"\xff"})
    assert b"INVALID_REQUEST" in received
    log = server.log.read_text("utf-8")
    assert "ListTokens" in log
    assert SECRET not in log
    assert "ERROR" not in log


async def test_a_path_that_is_not_utf8(server: OnetimeServer) -> None:
    """A call whose path is not UTF-8 ends gRPC's loop, and nobody's service: under load too, it is back each time."""
    pid = server.process.pid
    ended: list[grpc.StatusCode] = []

    async def call_on_and_on(client: Client) -> None:
        while True:
            try:
                await client.list(new_id())
            except grpc.aio.AioRpcError as error:
                ended.append(error.code())
                await asyncio.sleep(0.01)

    async with server.channel() as channel:
        callers = [asyncio.create_task(call_on_and_on(Client(channel))) for _ in range(16)]
        try:
            for _ in range(4):
                await asyncio.sleep(0.5)
                await send_bare(server, fuzz.call_headers(b"/\xff\xfe"))
                await wait_until_serving(server)
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
    assert (server.process.pid, server.process.returncode) == (pid, None)
    log = server.log.read_text("utf-8")
    assert log.count('"event":"gRPC has stopped taking calls"') == 4
    assert log.count('"event":"serving"') == 5
    assert set(ended) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_requests_follow_from_the_seed() -> None:
    """The same seed makes the same messages, and another one others."""

    def made(seed: int) -> list[bytes]:
        forger, chance = fuzz.Forger(seed), fuzz.chance_of(seed, 1)
        of = ott.IssueTokenRequest.DESCRIPTOR
        return [forger.message(chance, of, spite=1) for _ in range(50)] + [forger.broken(chance, of) for _ in range(50)]

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert len(set(made(1))) > 80


def test_messages_without_spite_are_in_order() -> None:
    """What is to be in order can be parsed, so that requests get further than the parser."""
    forger, chance = fuzz.Forger(1), fuzz.chance_of(1, 1)
    for _ in range(100):
        raw = forger.message(chance, ott.ConsumeTokenRequest.DESCRIPTOR, spite=0)
        assert ott.ConsumeTokenRequest.FromString(raw).ByteSize() <= len(raw)


# The judge


def refusal(
    code: grpc.StatusCode, sentence: str = "", trailing: tuple[tuple[str, str | bytes], ...] = ()
) -> grpc.aio.AioRpcError:
    """Make up a refusal."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=sentence)


def of(error: OnetimeError, *more: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    """Make the refusal that the service makes of an error, with more metadata than it has."""
    return refusal(error.status, str(error), (*error.trailing_metadata(), *more))


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (of(TokenNotFound()), None),
        (of(InvalidRequest({"user_id": "a UUID is required"})), None),
        (of(Overloaded()), None),
        (of(TokenNotFound(), ("x-request-id", "a-1"), ("key-bin", b"\0\xff")), None),
        (refusal(grpc.StatusCode.UNIMPLEMENTED, "this server has no such method"), None),
        (refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 65536)"), None),
        (of(InternalError()), "INTERNAL"),
        (refusal(grpc.StatusCode.INTERNAL, "no reason"), "INTERNAL"),
        (refusal(grpc.StatusCode.UNKNOWN, "no reason"), "UNKNOWN"),
        (refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed"), "UNAVAILABLE without a reason"),
        (refusal(grpc.StatusCode.CANCELLED), "CANCELLED without a reason"),
        (refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too long an answer"), "RESOURCE_EXHAUSTED without a reason"),
        (refusal(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), "UNIMPLEMENTED without a reason"),
        (
            refusal(grpc.StatusCode.NOT_FOUND, str(TokenNotFound()), (("onetime-reason", "TOKEN_NOT_FOUND"),)),
            "a refusal that the contract does not promise",
        ),
        (
            refusal(grpc.StatusCode.ABORTED, str(TokenNotFound()), TokenNotFound().trailing_metadata()),
            "a refusal that the contract does not promise",
        ),
        (of(InvalidRequest({"id": f"{MARK.upper()}@example.org is wrong"})), "shows an address"),
        (of(InvalidRequest({"id": "012345 is wrong"})), "shows a code"),
        (of(InvalidRequest({"id": f"not {SECRET}"})), "shows a secret"),
        (of(InvalidRequest({"id": "ValueError: no"})), "shows 'eError'"),
        (of(InvalidRequest({"id": "in /srv/service/db.py"})), "shows '/service/'"),
        (of(TokenNotFound(), ("why", "psycopg.errors")), "shows 'psycopg'"),
        (of(TokenNotFound(), ("why-bin", b"\0SELECT 1")), "shows 'SELECT '"),
        (of(TokenNotFound(), ("why-bin", f"\0{SECRET}".encode())), "shows a secret"),
    ],
)
def test_refusals_are_judged(error: grpc.aio.AioRpcError, found: str | None) -> None:
    """What the contract promises is accepted, and anything else is found."""
    judge = Judge()
    judge.remember(SECRET)
    judge.refused(SENT, error)
    assert found in judge.found if found else not judge.found, judge.findings


def test_hurried_calls_are_judged() -> None:
    """Only a call whose client lets it no time may end by its deadline, or cancelled."""
    for code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
        judge = Judge()
        judge.refused(Sent(7, SENT.path, hurried=True), refusal(code))
        assert not judge.found
        assert judge.late == 0
    judge = Judge()
    judge.requests = 1000
    for _ in range(6):
        judge.refused(SENT, refusal(grpc.StatusCode.DEADLINE_EXCEEDED))
    judge.finish(0)
    assert "too many late answers" in judge.found


@pytest.mark.parametrize(
    ("sent", "payload", "found"),
    [
        (SENT, ott.ListTokensResponse(tokens=[ott.OneTimeToken(relates_to=MARK)]).SerializeToString(), None),
        (SENT, b"\xff", "answers with another message"),
        (
            SENT,
            ott.ListTokensResponse(tokens=[ott.OneTimeToken(relates_to=PRIVATE)]).SerializeToString(),
            "answers with what belongs to another",
        ),
        (Sent(7, "/a/b"), b"", "answers for a method that is not there"),
    ],
)
def test_answers_are_judged(sent: Sent, payload: bytes, found: str | None) -> None:
    """An OK answer is the method's own, and shows nothing of honest callers."""
    judge = Judge()
    judge.answer(sent, payload)
    assert judge.found.keys() == ({found} if found else set())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (json.dumps(LINE).encode(), None),
        (b"E1121 22:36:36.723476   12949 hpack_parser.cc:1048] Error parsing 'te' metadata: invalid value\n", None),
        (b"E0000 00:00:1700000000.123456   12345 hpack_parser.cc:1048] Error parsing 'te' metadata\n", None),
        (json.dumps(LINE | {"level": "ERROR"}).encode(), "an error in the log"),
        (b"Exception ignored in: <function", "a line that is not ours"),
        (b"[]", "a line that is not ours"),
        (json.dumps(LINE | {"relates_to": f"{MARK}@example.org"}).encode(), "shows an address"),
        (json.dumps(LINE | {"secret": SECRET}).encode(), "shows a secret"),
        (json.dumps(LINE | {"event": "otl1.a1.abc"}).encode(), "shows 'otl1.'"),
        (json.dumps(LINE | {"event": "\u202e"}, ensure_ascii=False).encode(), "a line that a terminal may obey"),
        (json.dumps(LINE | {"request": "x" * 5000}).encode(), "a long line"),
    ],
)
def test_lines_are_judged(line: bytes, found: str | None) -> None:
    """A line of the log is JSON, no error, and shows nothing."""
    judge = Judge()
    judge.remember(SECRET)
    judge.line(line)
    assert found in judge.found if found else not judge.found, judge.findings


def test_metrics_are_judged() -> None:
    """A call that ended in an internal error is found even where nobody heard its answer."""
    line = 'grpc_server_handled_total{grpc_code="%s",grpc_method="IssueToken"} %s\n'
    judge = Judge()
    judge.page((line % ("OK", "12.0") + line % ("Internal", "0.0")).encode())
    assert not judge.found
    judge.page((line % ("Internal", "1.0") + line % ("Unknown", "2.0")).encode())
    assert judge.found == {"an internal error in the metrics": 2}


@pytest.mark.parametrize(
    ("held", "grows"),
    [
        (lambda done: 90_000_000 + done % 7 * 100_000, False),  # up and down
        (lambda done: 90_000_000 + min(done, 400_000) * 100, False),  # only in the first half
        (lambda done: 90_000_000 + 64 * done, True),  # 64 bytes are kept of each request
    ],
)
def test_memory_is_judged(held: Callable[[int], int], *, grows: bool) -> None:
    """Memory that grows with the requests is found, and memory that goes up and down is not."""
    judge = Judge()
    judge.memory = [(done, held(done)) for done in range(0, 1_000_001, 5_000)]
    judge.growth()
    assert judge.found.keys() == ({"memory grows"} if grows else set())


def test_the_end_is_judged() -> None:
    """A server that ends badly is found, and so is one that was not looked at."""
    judge = Judge()
    judge.requests = 1000
    judge.finish(1)
    assert judge.found.keys() == {"the server ended badly", "too few looks at the memory"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("delete from onetime.one_time_token_states", "a token without its state"),
        ("delete from auth.one_time_tokens", "a state without its token"),
        ("delete from onetime.email_verification_states", "a verification without its state"),
        ("delete from public.email_verification_tokens", "a state without its verification"),
        ("update auth.one_time_tokens set token_hash = 'plain'", "a stored secret of another format"),
        ("update public.email_verification_tokens set code = 'abc'", "a stored code of another format"),
        ("update onetime.email_verification_states set failed_attempts = 6", "a count of attempts out of its range"),
        ("update onetime.one_time_token_states set ttl = '25 hours'", "a lifetime out of its range"),
        (
            "update public.email_verification_tokens set used_at = now(), deleted_at = now()",
            "a verification both used and cancelled",
        ),
        (f"{MAIL} select gen_random_uuid(), gen_random_uuid(), ''", "a mail without its verification"),
        (f"{MAIL} select id, id, '' from public.email_verification_tokens", "a mail of a code that was returned"),
        (
            f"""
            {MAIL} select id, id, '' from public.email_verification_tokens;
            update onetime.outbox set sealed_address = 'k0.x';
            update onetime.email_verification_states set delivery = 'send_email';
            update public.email_verification_tokens set used_at = now()
            """,
            "an address of a verification that is over",
        ),
        (
            f"""
            {MAIL} select id, id, '' from public.email_verification_tokens;
            update onetime.outbox set state = 'sent';
            update onetime.email_verification_states set delivery = 'send_email'
            """,
            "a mail that was sent by nobody",
        ),
        ("update onetime.receipts set row_id = null", "a receipt that was never settled"),
        ("update auth.one_time_tokens set relates_to = 'Ada'", "an address that is not in its normal form"),
    ],
)
def test_rows_are_judged(rows_url: str, change: str, found: str) -> None:
    """Rows that do not belong together are found."""
    judge = Judge()
    with connected(rows_url) as database, database.transaction(force_rollback=True):
        judge.rows(database)
        assert not judge.found, judge.findings
        database.execute(change.encode())
        judge.rows(database)
    assert judge.found.keys() == {found}
