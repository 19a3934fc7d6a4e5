import asyncio
import contextlib
import io
import json
import logging
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Never, TypeAlias, cast

import grpc
import grpc.aio
import psycopg
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, MethodDescriptorProto, ServiceDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import DESCRIPTOR as WRAPPERS
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from onetime.v1 import one_time_tokens_pb2 as ott
from onetime.v1.one_time_tokens_pb2_grpc import (
    OneTimeTokenServiceServicer,
    OneTimeTokenServiceStub,
    add_OneTimeTokenServiceServicer_to_server,
)
from psycopg.pq import DiagnosticField

from service import errors, interceptors, logs, metrics
from service.call import ServedCall, current_call

SECRET: Final = "c3VwZXItc2VjcmV0LXZhbHVlLW9mLWEtbGluay10aGlz"
ADDRESS: Final = "ada@example.org"
TOKENS: Final = "onetime.v1.OneTimeTokenService"
HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = "grpc.reflection.v1alpha.ServerReflection"
GARBAGE: Final = b"\xff\xff\xff"

Work: TypeAlias = Callable[[Message], Awaitable[Any]]


# What is served


class Tokens(OneTimeTokenServiceServicer):
    """CheckToken does what a test wants. The others are as wrong as a servicer can be."""

    def __init__(self, work: Work) -> None:
        """Take what the methods do."""
        self.work = work

    async def CheckToken(self, request: ott.CheckTokenRequest, context: object) -> ott.CheckTokenResponse:  # noqa: ARG002, N802 - gRPC's signature
        """Do what the test wants."""
        return cast("ott.CheckTokenResponse", await self.work(request))

    async def ConsumeToken(self, request: ott.ConsumeTokenRequest, context: object) -> ott.ConsumeTokenResponse:  # noqa: ARG002, N802 - as above
        """Do what the test wants."""
        return cast("ott.ConsumeTokenResponse", await self.work(request))

    async def IssueToken(self, request: ott.IssueTokenRequest, context: object) -> ott.IssueTokenResponse:  # noqa: ARG002, N802 - as above
        """Do what the test wants."""
        return cast("ott.IssueTokenResponse", await self.work(request))

    def RevokeTokens(self, request: ott.RevokeTokensRequest, context: object) -> ott.RevokeTokensResponse:  # noqa: ARG002, N802 - as above
        """Is no coroutine function: gRPC would run it in a thread."""
        return ott.RevokeTokensResponse(revoked_count=1)

    async def ListTokens(self, request: ott.ListTokensRequest, context: object) -> ott.ListTokensResponse:  # noqa: ARG002, N802 - as above
        """Answers with a message of another type."""
        return cast("ott.ListTokensResponse", ott.OneTimeToken(relates_to=ADDRESS))


def kinds_pool() -> DescriptorPool:
    """Describe a service with a method of each kind."""
    text = ".google.protobuf.StringValue"
    methods = [
        MethodDescriptorProto(
            name=name, input_type=text, output_type=text, client_streaming=client, server_streaming=server
        )
        for name, client, server in [
            ("Upper", False, False),
            ("Join", True, False),
            ("Split", False, True),
            ("Echo", True, True),
        ]
    ]
    file = FileDescriptorProto(name="kinds.proto", package="test", dependency=[WRAPPERS.name], syntax="proto3")
    file.service.append(ServiceDescriptorProto(name="Kinds", method=methods))
    pool = DescriptorPool()
    pool.AddSerializedFile(WRAPPERS.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL: Final = kinds_pool()
KINDS: Final = _POOL.FindServiceByName("test.Kinds")


async def upper(request: StringValue, _: object) -> StringValue:
    """Answer with the word in capitals."""
    return StringValue(value=request.value.upper())


async def join(requests: AsyncIterator[StringValue], _: object) -> StringValue:
    """Answer with the words in one."""
    return StringValue(value="".join([request.value async for request in requests]))


async def split(request: StringValue, _: object) -> AsyncIterator[StringValue]:
    """Answer with each word."""
    for word in request.value.split():
        yield StringValue(value=word)


async def echo(_: object, context: grpc.aio.ServicerContext[StringValue, StringValue]) -> None:
    """Use the reader and the writer, rather than iterators."""
    while isinstance(request := await context.read(), StringValue):
        await context.write(request)


def kinds_handler() -> grpc.GenericRpcHandler:
    """Make the handlers of the service with a method of each kind."""
    make: Mapping[str, tuple[Any, Any]] = {
        "Upper": (grpc.unary_unary_rpc_method_handler, upper),
        "Join": (grpc.stream_unary_rpc_method_handler, join),
        "Split": (grpc.unary_stream_rpc_method_handler, split),
        "Echo": (grpc.stream_stream_rpc_method_handler, echo),
    }
    return grpc.method_handlers_generic_handler(
        "test.Kinds",
        {
            name: maker(
                behaviour,
                request_deserializer=StringValue.FromString,
                response_serializer=StringValue.SerializeToString,
            )
            for name, (maker, behaviour) in make.items()
        },
    )


async def answer(_: Message) -> ott.CheckTokenResponse:
    """Answer OK."""
    return ott.CheckTokenResponse(token=ott.OneTimeToken(id="the token"))


@contextlib.asynccontextmanager
async def serving(
    work: Work = answer,
    *,
    cap: float = 60.0,
    servicer: health.aio.HealthServicer | None = None,
    options: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve on a socket, behind the interceptors, and yield a channel to it, with the client's options."""
    known: list[Any] = [  # health and reflection ship types of their own for the same thing
        ott.DESCRIPTOR.services_by_name["OneTimeTokenService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
        KINDS,
    ]
    server = grpc.aio.server(interceptors=interceptors.build(callers=None, cap=cap, limit=512, known=known))
    add_OneTimeTokenServiceServicer_to_server(Tokens(work), server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer or health.aio.HealthServicer(), server)
    reflection.enable_server_reflection([TOKENS], server)
    server.add_generic_rpc_handlers((kinds_handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1), *options]
        ) as channel:
            yield channel
    finally:
        await server.stop(0)


# What is seen


class Log(io.StringIO):
    """The log, as a stream that can be waited for: a call's line comes after its answer."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self._calls: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def write(self, text: str) -> int:
        """Take one line."""
        line = json.loads(text)
        if line["event"] in ("audit", "call"):
            self._calls.put_nowait(line)
        return super().write(text)

    async def call(self) -> dict[str, Any]:
        """Return the line of the next call that has ended. Its counts are made by then."""
        return await self._calls.get()

    def calls(self) -> int:
        """Return how many lines nobody has asked for."""
        return self._calls.qsize()


@pytest.fixture
def log() -> Iterator[Log]:
    """Give the log, at its most talkative."""
    ours, root = logging.getLogger("service"), logging.getLogger()
    levels = ours.level, root.level
    stream = Log()
    logs.configure("DEBUG", stream)
    yield stream
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, logs.Lines)]:
        root.removeHandler(handler)
    ours.setLevel(levels[0])
    root.setLevel(levels[1])


def stub(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401 - the tests call it with what its types forbid, too
    """Make a client of the tokens' service."""
    return OneTimeTokenServiceStub(channel)


def raw_unary(channel: Any, path: str, message: bytes) -> Awaitable[bytes]:  # noqa: ANN401 - its type forbids bytes
    """Send bytes as a message."""
    call: Awaitable[bytes] = channel.unary_unary(path)(message)
    return call


def health_stub(channel: grpc.aio.Channel) -> Any:  # noqa: ANN401 - it ships half a type
    """Make a client of health."""
    return health_pb2_grpc.HealthStub(channel)


def a_request() -> ott.CheckTokenRequest:
    """Make a request with a code and an address."""
    return ott.CheckTokenRequest(
        token_type=ott.TOKEN_TYPE_RECOVERY, code=ott.CodeCredential(relates_to=ADDRESS, code="493027")
    )


def a_link() -> ott.CheckTokenRequest:
    """Make a request with the secret of a link."""
    return ott.CheckTokenRequest(token_type=ott.TOKEN_TYPE_RECOVERY, link_secret=SECRET)


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """Return the error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def trailing(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Return the trailing metadata of an error."""
    return {key: value for key, value in error.trailing_metadata() or ()}  # noqa: C416 - Metadata is no mapping to mypy


def details(error: grpc.aio.AioRpcError) -> Status:
    """Return the details of an error."""
    return Status.FromString(trailing(error)["grpc-status-details-bin"])


def shown(error: grpc.aio.AioRpcError) -> str:
    """Return all that a client gets to see of an error."""
    return f"{error.details()} {error.trailing_metadata()} {error.initial_metadata()}"


def count(name: str, **labels: str) -> float:
    """Return a sample of the metrics, 0 if there is none."""
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def of_method(kind: str, service: str, method: str) -> dict[str, str]:
    """Return the labels of a method."""
    return {"grpc_type": kind, "grpc_service": service, "grpc_method": method}


# The list


def test_the_order_of_the_list() -> None:
    """The list stands as the design has it, outermost first."""
    assert [getattr(each, "__name__", "") for each in interceptors.listed(None, 5.0, 512)] == [
        "log_call",
        "count_call",
        "translate_errors",
        "identify",
        "admit",
        "limit_time",
    ]


@pytest.mark.parametrize(
    ("method", "kind", "received", "sent"),
    [
        ("Upper", "unary", 1, 1),
        ("Join", "client_stream", 2, 1),
        ("Split", "server_stream", 1, 2),
        ("Echo", "bidi_stream", 2, 2),
    ],
)
async def test_every_kind_passes_the_list(log: Log, method: str, kind: str, received: int, sent: int) -> None:
    """A method of each of the four kinds works, is logged, and is counted with its messages."""
    labels = of_method(kind, "test.Kinds", method)
    names = ["started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count"]

    def counts() -> list[float]:
        return [
            *(count(f"grpc_server_{name}", **labels) for name in names),
            count("grpc_server_handled_total", **labels, grpc_code="OK"),
        ]

    before = counts()
    async with serving() as channel:
        call: Any = getattr(
            channel,
            {"Upper": "unary_unary", "Join": "stream_unary", "Split": "unary_stream", "Echo": "stream_stream"}[method],
        )(f"/test.Kinds/{method}", StringValue.SerializeToString, StringValue.FromString)
        words = [StringValue(value="one "), StringValue(value="two")]
        request: Any = words if received == 2 else StringValue(value="one two")
        responses = [await call(request)] if sent == 1 else [each async for each in call(request)]
        line = await log.call()
    assert [each.value.strip() for each in responses] == {
        "Upper": ["ONE TWO"],
        "Join": ["one two"],
        "Split": ["one", "two"],
        "Echo": ["one", "two"],
    }[method]
    assert (line["service"], line["method"], line["status"]) == ("test.Kinds", method, "OK")
    assert [after - first for after, first in zip(counts(), before, strict=True)] == [1, received, sent, 1, 1]


async def test_reflection_passes_the_list(log: Log) -> None:
    """Server reflection, a stream each way, works behind the list and is logged and counted."""
    labels = of_method("bidi_stream", REFLECTION, "ServerReflectionInfo")
    before = count("grpc_server_handled_total", **labels, grpc_code="OK")
    async with serving() as channel:
        make_stub: Any = reflection_pb2_grpc.ServerReflectionStub  # it ships types of the blocking client only
        call = make_stub(channel).ServerReflectionInfo
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = [each async for each in call(iter([request]))]
        line = await log.call()
    assert [each.name for each in response.list_services_response.service] == [TOKENS]
    assert (line["service"], line["status"]) == (REFLECTION, "OK")
    assert count("grpc_server_handled_total", **labels, grpc_code="OK") == before + 1


async def test_a_watch_that_is_hung_up(log: Log) -> None:
    """Health/Watch goes through the list, and is logged and counted as cancelled when the client hangs up."""
    labels = of_method("server_stream", HEALTH, "Watch")
    before = count("grpc_server_handled_total", **labels, grpc_code="Canceled")
    sent = count("grpc_server_msg_sent_total", **labels)
    servicer = health.aio.HealthServicer()
    async with serving(servicer=servicer) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        line = await log.call()
    assert (line["method"], line["status"], line["level"]) == ("Watch", "CANCELLED", "DEBUG")
    assert count("grpc_server_handled_total", **labels, grpc_code="Canceled") == before + 1
    assert count("grpc_server_msg_sent_total", **labels) == sent + 2


async def test_calls_at_once_are_told_apart() -> None:
    """Each of many calls at once finds itself in `current_call`, before and after it has waited."""
    arrived: list[str] = []
    all_here = asyncio.Event()

    async def work(request: Message) -> ott.CheckTokenResponse:
        before = current_call.get()
        arrived.append(before.call_id)
        if len(arrived) == 20:
            all_here.set()
        await all_here.wait()
        assert current_call.get() is before
        assert before.request is request
        return ott.CheckTokenResponse(token=ott.OneTimeToken(id=before.call_id))

    async with serving(work) as channel:
        names = [f"call-{number}" for number in range(20)]
        calls = [stub(channel).CheckToken(a_request(), metadata=(("x-request-id", name),)) for name in names]
        assert [(await call).token.id for call in calls] == names


async def test_two_servers_in_one_process(log: Log) -> None:
    """Two servers behind the interceptors do not get in each other's way."""
    async with serving() as one, serving() as two:
        for channel in (one, two, one):
            await stub(channel).CheckToken(a_request())
            assert (await log.call())["status"] == "OK"


# What is not a message


@pytest.mark.parametrize("raw", [GARBAGE, b"\x12\x02\xc3\x28", b"\x12\x7fshort"], ids=["garbage", "UTF-8", "cut"])
async def test_garbage_is_an_invalid_request(log: Log, raw: bytes) -> None:
    """Bytes that are no message are the client's mistake, and the answer says which message would be right."""

    async def never(_: Message) -> Never:
        raise AssertionError

    async with serving(never) as channel:
        error = await refusal(raw_unary(channel, f"/{TOKENS}/CheckToken", raw))
        line = await log.call()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["onetime-reason"] == "INVALID_REQUEST"
    violations = BadRequest()
    assert details(error).details[-1].Unpack(violations)
    assert [each.field for each in violations.field_violations] == ["onetime.v1.CheckTokenRequest"]
    assert "Error parsing" not in shown(error)
    assert (line["status"], line["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert "request" not in line


@pytest.mark.parametrize(
    ("path", "streams"),
    [
        (f"/{HEALTH}/Watch", False),
        (f"/{REFLECTION}/ServerReflectionInfo", True),
        ("/test.Kinds/Join", True),
        ("/test.Kinds/Echo", True),
    ],
)
async def test_garbage_in_a_stream(log: Log, path: str, streams: bool) -> None:  # noqa: FBT001 - pytest passes it
    """Garbage is an invalid request in streams too, as the first message or as a later one."""
    async with serving() as channel:
        untyped: Any = channel
        call = untyped.stream_stream(path)(iter([b"", GARBAGE])) if streams else untyped.unary_stream(path)(GARBAGE)

        async def read() -> None:
            async for _ in call:
                pass

        error = await refusal(read())
        line = await log.call()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["onetime-reason"] == line["reason"] == "INVALID_REQUEST"


# Errors


def driver_error(cls: type[psycopg.Error] = psycopg.errors.UniqueViolation) -> psycopg.Error:
    """Make an error as PostgreSQL's driver does, which quotes a row."""
    told = {
        DiagnosticField.SQLSTATE: b"23505",
        DiagnosticField.MESSAGE_PRIMARY: b'duplicate key value violates unique constraint "the_key"',
        DiagnosticField.MESSAGE_DETAIL: b"Key (token_hash)=(0ddba11) already exists.",
        DiagnosticField.CONSTRAINT_NAME: b"the_key",
        DiagnosticField.TABLE_NAME: b"one_time_tokens",
    }
    return cls(
        'duplicate key value violates unique constraint "the_key"\nDETAIL:  Key (token_hash)=(0ddba11) already exists.',
        info=cast("Any", told),
    )


class UnprintableError(Exception):
    """An error whose text is an error."""

    def __str__(self) -> str:
        """Fail, with a secret."""
        raise RuntimeError(SECRET)


def raise_plain() -> Never:
    """Raise what quotes the secret."""
    raise RuntimeError(f"SELECT secret FROM tokens; token={SECRET}")


def raise_in_other_case() -> Never:
    """Raise what quotes the secret in capitals."""
    raise ValueError(f"no such token: {SECRET.upper()!r}")


def raise_driver() -> Never:
    """Raise what quotes a row."""
    raise driver_error()


def raise_from_driver() -> Never:
    """Raise what has a row in its cause."""
    try:
        raise driver_error()
    except psycopg.Error as error:
        raise RuntimeError(SECRET) from error


def raise_while_handling() -> Never:
    """Raise what has a row in its context, and in the `repr` that is its text."""
    try:
        raise driver_error()
    except psycopg.Error as error:
        raise KeyError(str(error))  # noqa: B904 - that is what it is about


def raise_group() -> Never:
    """Raise a group of what must not be told."""
    raise ExceptionGroup("two", [RuntimeError(SECRET), driver_error(psycopg.Error)])


def raise_unprintable() -> Never:
    """Raise what cannot be printed."""
    raise UnprintableError


def raise_timeout() -> Never:
    """Raise what the end of a call's time raises elsewhere."""
    raise TimeoutError(SECRET)


def raise_grpc() -> Never:
    """Raise an error of gRPC's own."""
    raise grpc.aio.UsageError(SECRET)


def raise_stop() -> Never:
    """Raise what ends an iteration."""
    raise StopAsyncIteration(SECRET)


@pytest.mark.parametrize(
    "fail",
    [
        raise_plain,
        raise_in_other_case,
        raise_driver,
        raise_from_driver,
        raise_while_handling,
        raise_group,
        raise_unprintable,
        raise_timeout,
        raise_grpc,
        raise_stop,
    ],
)
async def test_a_bug_tells_the_client_nothing(log: Log, fail: Callable[[], Never]) -> None:
    """Whatever is raised, the client sees "internal error" and the log the traceback, and neither sees a secret."""

    async def work(_: Message) -> Never:
        fail()

    labels = of_method("unary", TOKENS, "CheckToken")
    before = count("grpc_server_handled_total", **labels, grpc_code="Internal")
    of_reason = count("onetime_errors_total", reason="INTERNAL")
    async with serving(work) as channel:
        error = await refusal(stub(channel).CheckToken(a_link()))
        line = await log.call()
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert trailing(error)["onetime-reason"] == "INTERNAL"
    for word in ["0ddba11", SECRET, fail.__name__, "Error(", "SELECT", "RuntimeError"]:
        assert word not in shown(error)
    assert (line["level"], line["status"], line["reason"]) == ("ERROR", "INTERNAL", "INTERNAL")
    assert fail.__name__ in line["traceback"]
    assert line["call_id"] == trailing(error)["x-request-id"]
    assert "0ddba11" not in log.getvalue()
    assert SECRET.lower() not in log.getvalue().lower()
    assert count("grpc_server_handled_total", **labels, grpc_code="Internal") == before + 1
    assert count("onetime_errors_total", reason="INTERNAL") == of_reason + 1


async def test_what_the_log_tells_of_a_driver_error(log: Log) -> None:
    """Class, SQLSTATE, primary message, table and constraint are logged, for that is what one mends a bug with."""

    async def work(_: Message) -> Never:
        raise_from_driver()

    async with serving(work) as channel:
        await refusal(stub(channel).CheckToken(a_link()))
        line = await log.call()
    for word in ["psycopg.errors.UniqueViolation", "sqlstate=23505", "table=one_time_tokens", "constraint=the_key"]:
        assert word in line["traceback"]
    assert "direct cause" in line["traceback"]
    assert "RuntimeError: [redacted]" in line["traceback"]


@pytest.mark.parametrize("method", ["RevokeTokens", "ListTokens"])
async def test_a_servicer_that_is_wrong(log: Log, method: str) -> None:
    """A method that is no coroutine function is not run, and a response of another type does not leave."""
    async with serving() as channel:
        request = ott.RevokeTokensRequest() if method == "RevokeTokens" else ott.ListTokensRequest()
        error = await refusal(getattr(stub(channel), method)(request))
        line = await log.call()
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "TypeError" in line["traceback"]
    assert ADDRESS not in log.getvalue()


async def test_a_list_that_is_broken(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a bug in the list itself tells the client nothing."""

    def broken(_: ServedCall) -> Never:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(interceptors, "_line", broken)
    async with serving() as channel:
        error = await refusal(stub(channel).CheckToken(a_link()))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert SECRET not in shown(error)
    assert "an interceptor failed" in log.getvalue()
    assert SECRET not in log.getvalue()


@pytest.mark.parametrize(
    "error",
    [
        errors.TokenNotFound(),
        errors.CodeMismatch(attempts_remaining=3),
        errors.Overloaded(),
        errors.OutcomeUnknown(),
        errors.InvalidRequest({"ttl": "must be positive", "user_id": "must be a UUID"}),
    ],
    ids=lambda error: error.reason,
)
async def test_an_error_of_ours_is_told(log: Log, error: errors.OnetimeError) -> None:
    """An error of ours arrives with its status, sentence, reason and details, and is logged and counted by reason."""

    async def work(_: Message) -> Never:
        raise error

    before = count("onetime_errors_total", reason=error.reason)
    async with serving(work) as channel:
        told = await refusal(stub(channel).CheckToken(a_link()))
        line = await log.call()
    assert (told.code(), told.details()) == (error.status, str(error))
    assert trailing(told)["onetime-reason"] == error.reason
    assert trailing(told)["x-request-id"] == line["call_id"]
    status = details(told)
    info, retry, bad = ErrorInfo(), RetryInfo(), BadRequest()
    assert status.details[0].Unpack(info)
    assert (status.message, info.reason, info.domain) == (str(error), error.reason, "onetime")
    assert dict(info.metadata) == dict(error.metadata())
    assert any(each.Unpack(retry) for each in status.details) is (error.retry_after is not None)
    assert any(each.Unpack(bad) for each in status.details) is isinstance(error, errors.InvalidRequest)
    assert (line["level"], line["status"], line["reason"]) == ("INFO", error.status.name, error.reason)
    assert "traceback" not in line
    assert count("onetime_errors_total", reason=error.reason) == before + 1


async def test_an_abort_of_anothers_servicer_passes(log: Log) -> None:
    """An abort by a servicer that is not ours arrives as it is, and its status is recorded."""
    labels = of_method("unary", HEALTH, "Check")
    before = count("grpc_server_handled_total", **labels, grpc_code="NotFound")
    async with serving() as channel:
        error = await refusal(health_stub(channel).Check(health_pb2.HealthCheckRequest(service="no")))
        line = await log.call()
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "onetime-reason" not in trailing(error)
    assert trailing(error)["x-request-id"] == line["call_id"]
    assert (line["status"], line["level"]) == ("NOT_FOUND", "DEBUG")
    assert count("grpc_server_handled_total", **labels, grpc_code="NotFound") == before + 1


# Methods that are not there


async def test_unknown_methods_are_bounded(log: Log) -> None:
    """However many methods a client makes up, they are answered, logged, and counted as one."""
    labels = of_method("bidi_stream", "unknown", "unknown")
    async with serving() as channel:
        before = count("grpc_server_handled_total", **labels, grpc_code="Unimplemented")
        series = _samples()
        for path in ["/no.Such/Method", f"/{TOKENS}/NoSuch", "/x", "/" + "y" * 5000, f"/{TOKENS}/CheckToken/"]:
            error = await refusal(raw_unary(channel, path, GARBAGE))
            line = await log.call()
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert trailing(error)["x-request-id"] == line["call_id"]
            assert (line["service"], line["method"], line["status"]) == ("unknown", "unknown", "UNIMPLEMENTED")
            assert path.startswith(line["path"])
            assert len(line["path"]) <= 200
    assert count("grpc_server_handled_total", **labels, grpc_code="Unimplemented") == before + 5
    assert _samples() == series


def _samples() -> int:
    return sum(len(metric.samples) for metric in metrics.REGISTRY.collect() if metric.name.startswith("grpc"))


async def test_an_unknown_stream_is_answered_before_it_says_anything(log: Log) -> None:
    """A client that opens a stream to nowhere, and sends nothing, is not waited for."""
    async with serving() as channel:
        call: Any = channel.stream_stream("/no.Such/Method")()
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await log.call())["status"] == "UNIMPLEMENTED"


async def test_a_method_that_nobody_declared_is_not_served(log: Log) -> None:
    """A service that was added to the server, and not to the interceptors, is none."""
    ours = [ott.DESCRIPTOR.services_by_name["OneTimeTokenService"]]
    server = grpc.aio.server(interceptors=interceptors.build(callers=None, cap=5.0, limit=512, known=ours))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        error = await refusal(health_stub(channel).Check(health_pb2.HealthCheckRequest()))
        line = await log.call()
    await server.stop(0)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert line["path"] == f"/{HEALTH}/Check"


# Time


async def test_a_call_that_is_hung_up(log: Log) -> None:
    """A client that hangs up cancels the work, and the call is recorded as cancelled, with its peer."""
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def work(_: Message) -> Never:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    labels = of_method("unary", TOKENS, "CheckToken")
    before = count("grpc_server_handled_total", **labels, grpc_code="Canceled")
    async with serving(work) as channel:
        call = stub(channel).CheckToken(a_request())
        await started.wait()
        call.cancel()
        await cancelled.wait()
        line = await log.call()
    assert (line["status"], line["level"]) == ("CANCELLED", "INFO")
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert "traceback" not in line
    assert count("grpc_server_handled_total", **labels, grpc_code="Canceled") == before + 1


async def test_the_cap_ends_a_call(log: Log) -> None:
    """A call that would never end is ended by the cap, and its work is cancelled."""
    cancelled = asyncio.Event()

    async def work(_: Message) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    labels = of_method("unary", TOKENS, "CheckToken")
    before = count("grpc_server_handled_total", **labels, grpc_code="DeadlineExceeded")
    async with serving(work, cap=0.02) as channel:
        error = await refusal(stub(channel).CheckToken(a_request()))
        await cancelled.wait()
        line = await log.call()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.02 s" in (error.details() or "")
    assert "onetime-reason" not in trailing(error)
    assert trailing(error)["x-request-id"] == line["call_id"]
    assert (line["status"], line["level"]) == ("DEADLINE_EXCEEDED", "INFO")
    assert count("grpc_server_handled_total", **labels, grpc_code="DeadlineExceeded") == before + 1


async def test_the_cap_does_not_wait_for_work_that_outlives_its_call(log: Log) -> None:
    """The client is answered at the cap even if the database is frozen, and what was begun goes on."""
    let_go, done = asyncio.Event(), asyncio.Event()

    async def outlive() -> None:
        await let_go.wait()
        done.set()

    async def work(_: Message) -> ott.CheckTokenResponse:
        await asyncio.shield(asyncio.create_task(outlive()))
        return ott.CheckTokenResponse()

    async with serving(work, cap=0.02) as channel:
        error = await refusal(stub(channel).CheckToken(a_link()))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await log.call())["status"] == "DEADLINE_EXCEEDED"
        let_go.set()
        async with asyncio.timeout(5):
            await done.wait()


async def test_a_timeout_of_the_work_is_not_the_cap(log: Log) -> None:
    """A TimeoutError that the work raises is a bug of ours, not the end of the call's time."""

    async def work(_: Message) -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    async with serving(work) as channel:
        error = await refusal(stub(channel).CheckToken(a_request()))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "TimeoutError" in (await log.call())["traceback"]


@pytest.mark.parametrize(("allowed", "most"), [(None, 7.0), (3.0, 3.1), (3600.0, 7.0)])
async def test_the_work_knows_its_time(allowed: float | None, most: float) -> None:
    """What lies below reads how much time is left: by the client's deadline or the cap, whichever comes first."""
    left: list[float | None] = []

    async def work(_: Message) -> ott.CheckTokenResponse:
        left.append(current_call.get().remaining())
        return ott.CheckTokenResponse()

    async with serving(work, cap=7.0) as channel:
        await stub(channel).CheckToken(a_request(), timeout=allowed)
    (seconds,) = left
    assert seconds is not None
    assert 0 < seconds <= most


def a_call(kind: str = "unary", *, seconds: float = 60.0) -> ServedCall:
    """Return a call that has so much time left, as the interceptors see it."""
    return ServedCall(
        service=TOKENS,
        method="CheckToken",
        call_id="one",
        deadline=time.monotonic() + seconds,
        context=cast("Any", None),
        peer="",
        kind=kind,
        path="",
        metadata=(),
        payload=b"",
    )


async def test_a_call_that_is_done_in_time_is_left_alone() -> None:
    """What its task does later, such as sending the answer, is not cut short by the cap."""

    async def answer(_: ServedCall) -> bytes:
        return b"done"

    assert await interceptors.limit_time(0.01)(a_call(), answer) == b"done"
    await asyncio.sleep(0.05)


async def test_who_hangs_up_at_the_cap_has_hung_up() -> None:
    """Where both end a call at once, nobody is there to be told of the cap."""

    async def work(_: ServedCall) -> Never:
        task = asyncio.current_task()
        assert task is not None
        try:
            await asyncio.Event().wait()
        finally:
            task.cancel()
        raise AssertionError

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(interceptors.limit_time(0.01)(a_call(), work))  # type: ignore[arg-type] # it is one


async def test_a_call_that_comes_too_late_does_no_work() -> None:
    """With less than the least time left, a call is refused before any work, whatever its kind."""

    async def never(_: ServedCall) -> Never:
        raise AssertionError

    for kind in ("unary", "server_stream"):
        call = a_call(kind, seconds=interceptors.LEAST_TIME_S / 2)
        with pytest.raises(interceptors.PlainStatus, match="nothing happened") as caught:
            await interceptors.limit_time(5.0)(call, never)
        assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_streams_have_no_cap(log: Log) -> None:
    """A watch goes on after a unary call that came later has been ended by the cap."""

    async def work(_: Message) -> None:
        await asyncio.Event().wait()

    servicer = health.aio.HealthServicer()
    async with serving(work, cap=0.02, servicer=servicer) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        error = await refusal(stub(channel).CheckToken(a_request()))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await log.call())["method"] == "CheckToken"
        assert log.calls() == 0


# Names and lines


@pytest.mark.parametrize("name", ["a", "Req.1_2-3", "x" * 128])
async def test_a_caller_names_the_call(log: Log, name: str) -> None:
    """A sane x-request-id names the call in the log and comes back."""
    async with serving() as channel:
        call = stub(channel).CheckToken(a_request(), metadata=(("x-request-id", name),))
        await call
        assert ("x-request-id", name) in list(await call.trailing_metadata())
        assert (await log.call())["call_id"] == name


@pytest.mark.parametrize("name", [None, "", "x" * 129, "a b", 'a"b', "a/b"])
async def test_a_call_without_a_sane_name_gets_one(log: Log, name: str | None) -> None:
    """Without a name, or with one that could spoil a log or a URL, a call gets a new one, and each another."""
    metadata = () if name is None else (("x-request-id", name),)
    async with serving() as channel:
        names = set()
        for _ in range(3):
            call = stub(channel).CheckToken(a_request(), metadata=metadata)
            await call
            (told,) = [value for key, value in await call.trailing_metadata() if key == "x-request-id"]
            assert told == (await log.call())["call_id"]
            names.add(told)
    assert len(names) == 3
    assert all(re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", each) for each in names)


async def test_the_line_of_a_call(log: Log) -> None:
    """A line tells when, who, what, how it ended and how long it took, and shows no secret and no address."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    async with serving() as channel:
        await stub(channel).CheckToken(
            a_request(),
        )
        line = await log.call()
    assert line["time"].endswith("Z")
    assert before <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC)
    assert {key: line[key] for key in line if key not in {"time", "call_id", "peer", "duration_ms"}} == {
        "level": "INFO",
        "logger": "service.interceptors",
        "event": "audit",
        "service": TOKENS,
        "method": "CheckToken",
        "caller": "anonymous",
        "status": "OK",
        "request": {
            "token_type": "TOKEN_TYPE_RECOVERY",
            "code": {"relates_to": "[redacted]", "code": "[redacted]"},
        },
    }
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert line["duration_ms"] > 0
    assert ADDRESS not in log.getvalue()
    assert "493027" not in log.getvalue()


async def test_the_line_of_a_retry(log: Log) -> None:
    """A call that gRPC's own retry made says so."""
    tries = iter([errors.DatabaseUnavailable(), None])

    async def work(_: Message) -> ott.CheckTokenResponse:
        error = next(tries)
        if error is not None:
            raise error
        return ott.CheckTokenResponse()

    retry = {"maxAttempts": 2, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    policy = {"methodConfig": [{"name": [{}], "retryPolicy": {**retry, "retryableStatusCodes": ["UNAVAILABLE"]}}]}
    async with serving(work, options=[("grpc.service_config", json.dumps(policy))]) as channel:
        await stub(channel).CheckToken(a_request())
        first, second = await log.call(), await log.call()
    assert (first["status"], first.get("previous_attempts")) == ("UNAVAILABLE", None)
    assert (second["status"], second.get("previous_attempts")) == ("OK", "1")


async def test_health_checks_are_quiet(log: Log) -> None:
    """Health checks have no line above debug level, and other calls do."""
    logging.getLogger("service").setLevel("INFO")
    async with serving() as channel:
        await health_stub(channel).Check(health_pb2.HealthCheckRequest())
        await stub(channel).CheckToken(a_request())
        assert (await log.call())["method"] == "CheckToken"
    assert HEALTH not in log.getvalue()


# The page


async def test_the_metrics_page() -> None:
    """The page has every method and every reason from the start, Go's names of statuses, and no `_created`."""
    async with serving():
        port, stop = metrics.serve_metrics("127.0.0.1", 0)
        try:
            page = await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")
        finally:
            await asyncio.to_thread(stop)
    for code in ["OK", "Canceled", "NotFound", "FailedPrecondition", "DeadlineExceeded", "Unauthenticated"]:
        assert (
            f'grpc_server_handled_total{{grpc_code="{code}",grpc_method="IssueToken",grpc_service="{TOKENS}",grpc_type="unary"}}'
            in page
        )
    for name in ["started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count"]:
        assert re.search(rf'^grpc_server_{name}{{grpc_method="Watch".*grpc_type="server_stream"}} ', page, re.MULTILINE)
    assert 'onetime_errors_total{reason="CODE_MISMATCH"}' in page
    assert "process_resident_memory_bytes" in page
    assert "_created" not in page
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/metrics")


def _get(url: str) -> str:
    with urllib.request.urlopen(url) as response:  # noqa: S310 - our own
        text: str = response.read().decode()
        return text
