"""What every call passes through, whatever it asks for: one list, one adapter to grpc.aio, and nothing else.

`listed` is the list. It owns the call's name and its line in the log, its count, the translation of errors into
statuses, who may make it, and its time. It knows nothing of tokens.

grpc.aio is adapted once, by `build`. A plain interceptor of grpc.aio sees four kinds of handlers, and those who wrap
only the unary ones let streams such as Health/Watch slip past; and it sees no message that cannot be parsed, which
grpc.aio then reports as UNKNOWN, with the exception's text. Here every kind is wrapped into a coroutine that gets raw
bytes and parses them at the innermost end of the list. What cannot be wrapped is refused.
"""

import asyncio
import inspect
import itertools
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, Final, Never, Protocol, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message

from service import metrics
from service.call import EVERYTHING, NOTHING, ServedCall, current_call
from service.callers import Callers
from service.errors import CallerNotAllowed, CallerUnknown, InternalError, InvalidRequest, OnetimeError, OutcomeUnknown
from service.logs import redacted, traceback_text
from service.places import Places

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata, both ways: the name of the call in our log, which a caller may choose."""

ATTEMPTS_KEY: Final = "grpc-previous-rpc-attempts"
"""Metadata that gRPC's own retries add."""

AUTHORIZATION_KEY: Final = "authorization"
"""Metadata: `Bearer` and an API key."""

LEAST_TIME_S: Final = 0.010
"""A call that arrives with less left is refused: its work would cost us, and its answer come too late."""

UNKNOWN: Final = "unknown"
"""The service and method of a call for a method that is not served. Never the client's words: it could make up a
million of them, each a time series for ever."""

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = "grpc.reflection.v1alpha.ServerReflection"

OURS: Final = "onetime.v1."
"""What the names of our services begin with."""

UNARY: Final = "unary"
_KINDS: Final = {
    # (the client streams, the server streams): as go-grpc-prometheus names them
    (False, False): UNARY,
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}

_BEHAVIOURS: Final = {
    (False, False): "unary_unary",
    (True, False): "stream_unary",
    (False, True): "unary_stream",
    (True, True): "stream_stream",
}
_MAKERS: Final = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}

_SANE_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LONGEST_PATH: Final = 200

_PROCESS: Final = uuid.uuid4().hex[:16]
_numbers = itertools.count()
"""Names of calls: unique among all replicas, and no secret, so that one need not ask the kernel for each."""

_LOG = logging.getLogger(__name__)

Answer: TypeAlias = bytes | None
"""The serialised response; None where responses are a stream, and have been written."""
Proceed: TypeAlias = Callable[[ServedCall], Awaitable[Answer]]
"""The rest of the list."""
Interceptor: TypeAlias = Callable[[ServedCall, Proceed], Awaitable[Answer]]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_MaybeHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


class ServiceDescription(Protocol):
    """A service's descriptor, of either of the classes that protobuf has for it: to types they are strangers."""

    @property
    def full_name(self) -> str:
        """Its package and name."""

    @property
    def methods(self) -> Sequence[Any]:
        """The descriptors of its methods."""


class PlainStatus(Exception):
    """A status as gRPC has it, for which the contract documents no reason of ours."""

    def __init__(self, status: grpc.StatusCode, sentence: str) -> None:
        """Take the status and what to tell the client's developer."""
        super().__init__(sentence)
        self.status = status


def listed(callers: Callers | None, cap: float, limit: int) -> tuple[Interceptor, ...]:
    """Return the list, outermost first. Every call passes all of it, streams and unknown methods included."""
    return (
        log_call,  # first, so that every call has a name, and a line that tells how it ended
        count_call,  # outside of all that can refuse, so that refusals count, with the status that leaves
        translate_errors,  # outside of all that can fail, so that no exception's text leaves
        identify(callers),  # nobody unknown gets further, or takes up the room of those who are known
        admit(limit),  # outside of parsing and the work: what is refused for want of room has cost neither
        limit_time(cap),  # last, around what takes time: parsing, the work, and nothing else
    )


def build(
    *, callers: Callers | None, cap: float, limit: int, known: Iterable[ServiceDescription]
) -> Sequence[grpc.aio.ServerInterceptor]:
    """Return the interceptors to give to `grpc.aio.server`: all of them, none beside them.

    Args:
        callers: Who tells callers apart; None where nobody is asked who they are, and everybody may do everything.
        cap: Seconds after which the server ends a unary call.
        limit: How many calls may be under way at once.
        known: The services that are served: their metrics are there from the start, and no other service is served.
    """
    services = tuple(known)
    for service in services:
        for method in service.methods:
            metrics.series(_KINDS[method.client_streaming, method.server_streaming], service.full_name, method.name)
    for error in _descendants(OnetimeError):
        metrics.ERRORS.labels(error.reason)
    return (_Adapter(listed(callers, cap, limit), services),)


def _descendants(of: type[OnetimeError]) -> Iterable[type[OnetimeError]]:
    """Give the classes of errors that have a reason."""
    for each in of.__subclasses__():
        if hasattr(each, "reason"):
            yield each
        yield from _descendants(each)


# The list


async def log_call(call: ServedCall, proceed: Proceed) -> Answer:
    """Name the call, tell its name to the client, and write its line when it has ended.

    The line of a call to a service of ours, or of a caller who was turned away, is an audit event: who asked for what,
    about whom, when, and how it was decided. It is written whatever level is set.
    """
    wanted = call.header(REQUEST_ID_KEY)
    call.call_id = wanted if _SANE_ID.fullmatch(wanted) else f"{_PROCESS}-{next(_numbers):x}"
    # Trailing, because initial metadata would be a trip of its own.
    call.context.set_trailing_metadata(((REQUEST_ID_KEY, call.call_id),))
    try:
        return await proceed(call)
    finally:
        level = logging.INFO
        if call.failure or call.status is grpc.StatusCode.INTERNAL:
            level = logging.ERROR
        elif call.service == HEALTH:
            level = logging.DEBUG
        if _is_decision(call) or _LOG.isEnabledFor(level):
            # Not _LOG.log, which walks the stack to find out where it was called from: no line tells that.
            _LOG.handle(logging.LogRecord(_LOG.name, level, "", 0, _line(call), (), None))


def _is_decision(call: ServedCall) -> bool:
    """Tell whether a call is one that an auditor asks for."""
    return call.service.startswith(OURS) or call.reason in (CallerUnknown.reason, CallerNotAllowed.reason)


def _line(call: ServedCall) -> dict[str, object]:
    """Return what the log tells of a call that has ended."""
    line: dict[str, object] = {
        "event": "audit" if _is_decision(call) else "call",
        "call_id": call.call_id,
        "service": call.service,
        "method": call.method,
        "peer": call.peer,
        "caller": call.caller,
        "status": call.status.name,
        "duration_ms": round(call.age() * 1000, 3),
    }
    if call.reason:
        line["reason"] = call.reason
    line.update(call.subject)
    if call.method == UNKNOWN:
        line["path"] = call.path[:_LONGEST_PATH]
    attempts = call.header(ATTEMPTS_KEY)
    if attempts:
        line["previous_attempts"] = attempts[:10]
    if call.request is not None:
        line["request"] = redacted(call.request)
    if call.failure:
        line["traceback"] = call.failure
    return line


async def count_call(call: ServedCall, proceed: Proceed) -> Answer:
    """Count the call, its status, its reason and its time."""
    series = metrics.series(call.kind, call.service, call.method)
    series.started.inc()
    try:
        return await proceed(call)
    finally:
        series.handled[call.status].inc()
        series.seconds.observe(call.age())
        if call.reason:
            metrics.ERRORS.labels(call.reason).inc()


async def translate_errors(call: ServedCall, proceed: Proceed) -> Answer:
    """Turn what was raised into a status. Only here is a call of ours aborted.

    An error of ours tells its own. Any other exception is a bug of ours: the client learns nothing of it but INTERNAL,
    and the log has it in full, without secrets.
    """
    refusal: OnetimeError | PlainStatus
    try:
        answer = await proceed(call)
    except grpc.aio.AbortError:
        # A servicer that is not ours, such as health's, has answered.
        call.status = _status_of(call.context)
        raise
    except asyncio.CancelledError:
        remaining = call.remaining()
        late = remaining is not None and remaining <= 0
        call.status = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        raise
    except (OnetimeError, PlainStatus) as error:
        # Without its traceback, whose frames hold `refusal`: each refusal would wait for the garbage collector.
        refusal = error.with_traceback(None)
    except grpc.aio.InternalError:
        # gRPC could not write: the client has gone.
        refusal = PlainStatus(grpc.StatusCode.CANCELLED, "the client has gone")
    except Exception as error:  # noqa: BLE001 - the last resort: what gets past here is sent to the client in full
        call.failure = traceback_text(error, call.request)
        refusal = InternalError()
    else:
        call.status = _status_of(call.context)
        return answer
    # Not within an except block: what is raised from there has the original exception as its context, and gRPC logs
    # what it does not expect.
    return await _abort(call, refusal)


def _status_of(context: grpc.aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """Return the status that a servicer has set, by `abort` or `set_code`."""
    code: object = context.code()  # None where nothing was set, a number where that was
    if code is None:
        return grpc.StatusCode.OK
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


async def _abort(call: ServedCall, refusal: OnetimeError | PlainStatus) -> Never:
    """End the call with a status other than OK."""
    trailing: Metadata = ()
    if isinstance(refusal, OnetimeError):
        call.reason = refusal.reason
        trailing = refusal.trailing_metadata()
    call.status = refusal.status
    try:
        await call.context.abort(refusal.status, str(refusal), (*trailing, (REQUEST_ID_KEY, call.call_id)))
    except (grpc.aio.InternalError, grpc.aio.UsageError):
        # The client has gone meanwhile, or another servicer had answered: gRPC would log either as an error of ours.
        raise asyncio.CancelledError from None
    raise AssertionError("abort always raises")


def identify(callers: Callers | None) -> Interceptor:
    """Make the interceptor that finds out who calls, and refuses what the policy does not let them do."""

    async def identify(call: ServedCall, proceed: Proceed) -> Answer:
        """Name the caller, for each call anew: a key or a name that is withdrawn is refused from the next call on.

        Health is open to all. Reflection, and the news that a method does not exist, are for every caller of the
        policy; all else is for those to whom the policy grants it, and refused before its message is parsed.
        """
        if callers is None:
            call.permissions = EVERYTHING
            return await proceed(call)
        if call.service == HEALTH:
            return await proceed(call)
        authorizations = [str(value) for name, value in call.metadata if name == AUTHORIZATION_KEY]
        call.caller, call.permissions = callers.identify(call.context.auth_context(), authorizations)
        if call.permissions is NOTHING:
            raise CallerNotAllowed("the policy does not name this caller")
        rpc = f"{call.service}/{call.method}"
        if call.service not in (REFLECTION, UNKNOWN) and not call.permissions.may_call(rpc):
            raise CallerNotAllowed(f"the policy does not let this caller call {rpc}")
        return await proceed(call)

    return identify


def admit(limit: int) -> Interceptor:
    """Make the interceptor that bounds the calls under way, streams included, and shares the room among callers."""
    places = Places(limit)
    watches = Places(limit)
    metrics.CALLS_UNDER_WAY.set_function(places.taken)

    async def admit(call: ServedCall, proceed: Proceed) -> Answer:
        """Refuse a call at once where there is no room, or where its caller has its share of it.

        Health is open to all, and a server that is busy must not look like one that is dead: its checks are free. Its
        watches are held open by whoever likes, so they have room of their own, shared among the hosts that they come
        from.
        """
        if call.service != HEALTH:
            room, holder = places, call.caller
        elif call.kind == UNARY:
            return await proceed(call)
        else:
            room, holder = watches, call.peer.rpartition(":")[0]
        room.take(holder)
        try:
            return await proceed(call)
        finally:
            if call.unheard is None:
                room.give_back(holder)
            else:
                # Otherwise a caller that hangs up at once could start any number of transactions.
                call.unheard.add_done_callback(lambda _: room.give_back(holder))

    return admit


def limit_time(cap: float) -> Interceptor:
    """Make the interceptor that ends unary calls by the client's deadline or the cap, whichever comes first."""

    async def limit_time(call: ServedCall, proceed: Proceed) -> Answer:
        """Refuse a call that comes too late, and end one that takes too long, whatever the database does.

        What is slow goes on in tasks that outlive the call (`Database.protect`), so that a call that is cancelled lets
        go at once. Streams have no cap: they are there to be watched.
        """
        remaining = call.remaining()
        if remaining is not None and remaining < LEAST_TIME_S:
            raise PlainStatus(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"less than {LEAST_TIME_S * 1000:g} ms were left when the call arrived; nothing happened",
            )
        if call.kind != UNARY:
            return await proceed(call)
        seconds = cap if remaining is None else min(remaining, cap)
        call.deadline = time.monotonic() + seconds
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for mypy: a coroutine runs in one
        over = False

        def end() -> None:
            nonlocal over
            over = True
            task.cancel()

        # asyncio.timeout does so too, and more than is needed where nothing but the call's end comes after it, at
        # three times the cost. Each call pays it.
        limit = asyncio.get_running_loop().call_later(seconds, end)
        try:
            return await proceed(call)
        except asyncio.CancelledError:
            if not over or task.uncancel():
                # The client has gone.
                raise
        finally:
            limit.cancel()
        if call.in_doubt:
            # Its COMMIT is on its way, so that not even we know whether it took effect.
            raise OutcomeUnknown
        raise PlainStatus(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"the call was not done within {cap:g} s, which is all that this server gives a call, or by its own"
            " deadline; it took effect whole or not at all",
        )

    return limit_time


# The adapter

_arrival: ContextVar[grpc.HandlerCallDetails] = ContextVar("_arrival")
"""What `intercept_service` was told of the call. Its handler runs in the same task."""


class _Adapter(grpc.aio.ServerInterceptor):
    """Puts the list around every handler. A class because grpc.aio asks for one."""

    def __init__(self, interceptors: Sequence[Interceptor], known: Iterable[ServiceDescription]) -> None:
        """Take the list, and the services beside which none is served."""
        self._interceptors = interceptors
        self._known = {f"/{service.full_name}/{method.name}": method for service in known for method in service.methods}
        self._adapted: dict[str, tuple[_Handler, _Handler]] = {}
        self._unknown = _unknown(interceptors)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_MaybeHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Return the method's handler with the list around it, made once for each method."""
        _arrival.set(handler_call_details)
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        method = self._known.get(path)
        if handler is None or method is None:
            # A method that nobody declared is none, even if somebody has added it to the server.
            return self._unknown
        kept = self._adapted.get(path)
        if kept is None or kept[0] is not handler:
            kept = self._adapted[path] = (handler, _adapt(handler, method, self._interceptors))
        return kept[1]


def _unknown(interceptors: Sequence[Interceptor]) -> _Handler:
    """Return the handler of methods that are not served."""

    async def refuse(_: ServedCall) -> Never:
        raise PlainStatus(grpc.StatusCode.UNIMPLEMENTED, "this server has no such method")

    # Both sides stream, as far as gRPC is concerned: otherwise it would wait for a message first.
    kind = _KINDS[True, True]
    metrics.series(kind, UNKNOWN, UNKNOWN)
    return grpc.stream_stream_rpc_method_handler(_around(interceptors, refuse, kind, UNKNOWN, UNKNOWN))


def _adapt(handler: _Handler, method: MethodDescriptor, interceptors: Sequence[Interceptor]) -> _Handler:
    """Return a handler that gets raw bytes, with the list around what parses and serves them."""
    streams = (method.client_streaming, method.server_streaming)
    # None where the handler is of another kind than its method, or is no handler as gRPC makes them.
    behaviour: Any = getattr(handler, _BEHAVIOURS[streams], None)
    deserialise: Any = getattr(handler, "request_deserializer", None)
    serialise: Any = getattr(handler, "response_serializer", None)
    kind, service = _KINDS[streams], method.containing_service.full_name
    path, response_name = f"/{service}/{method.name}", method.output_type.full_name
    series = metrics.series(kind, service, method.name)
    generates = method.server_streaming and inspect.isasyncgenfunction(behaviour)
    fit = deserialise is not None and serialise is not None and (generates or inspect.iscoroutinefunction(behaviour))

    def decode(raw: bytes | AsyncIterator[Message]) -> Message:
        try:
            message: Message = deserialise(raw)
        except DecodeError:
            name = method.input_type.full_name
            raise InvalidRequest({name: "must be this message in protobuf's encoding, its strings UTF-8"}) from None
        series.received.inc()
        current_call.get().request = message
        return message

    def encode(message: Message) -> bytes:
        if message.DESCRIPTOR.full_name != response_name:
            # protobuf itself would write any message as if it were this one.
            raise TypeError(f"{path} answers with {response_name}, not with {message.DESCRIPTOR.full_name}")
        raw: bytes = serialise(message)
        series.sent.inc()
        return raw

    async def serve(call: ServedCall) -> Answer:
        if not fit:
            # A plain function would run in a thread, out of reach of deadlines: none of ours is one.
            raise TypeError(f"{path} is not served by a coroutine function with a message each way")
        request = call.payload if method.client_streaming else decode(call.payload)
        if generates:
            async with aclosing(behaviour(request, call.context)) as responses:
                async for response in responses:
                    await call.context.write(response)
            return None
        response = await behaviour(request, call.context)
        return None if method.server_streaming else encode(response)

    # Where a side streams, gRPC itself calls these, from the servicer's reads and writes: inside of the list too.
    return _MAKERS[streams](
        _around(interceptors, serve, kind, service, method.name),
        request_deserializer=decode if method.client_streaming else None,
        response_serializer=encode if method.server_streaming else None,
    )


def _around(
    interceptors: Sequence[Interceptor], serve: Proceed, kind: str, service: str, method: str
) -> Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Answer]]:
    """Return what grpc.aio is to call: the list around a method, for a call that it describes."""
    chain = serve
    for interceptor in reversed(interceptors):
        chain = _bind(interceptor, chain)

    async def handle(payload: bytes | AsyncIterator[Message], context: grpc.aio.ServicerContext[Any, Any]) -> Answer:
        arrival = _arrival.get()
        remaining = context.time_remaining()
        call = ServedCall(
            service=service,
            method=method,
            call_id="",
            context=context,
            # Now: gRPC forgets the peer of a call that was hung up, and who guesses and hangs up is whom we look for.
            peer=context.peer(),
            kind=kind,
            path=arrival.method,
            metadata=arrival.invocation_metadata,
            payload=payload,
        )
        if remaining is not None:
            call.deadline = call.started + remaining
        current_call.set(call)
        try:
            return await chain(call)
        except grpc.aio.BaseError:
            # It is answered, or the client has gone; gRPC knows its own.
            raise
        except Exception:  # noqa: BLE001 - see below
            # The list itself is broken. Even then no exception's text leaves.
            _LOG.exception("an interceptor failed")
        return await _abort(call, InternalError())

    return handle


def _bind(interceptor: Interceptor, proceed: Proceed) -> Proceed:
    """Return an interceptor with the rest of the list."""
    return lambda call: interceptor(call, proceed)
