"""What is known of the call being served: who made it, by when it must end, and under which name it is logged.

Set once per call by the interceptors. What lies below them reads `Call`; only the interceptors look at `ServedCall`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

ANONYMOUS = "anonymous"
"""The caller who has not been asked who they are: on plain text on loopback, or of health, which is open to all."""


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a caller may do. None stands for all there are."""

    rpcs: frozenset[str] | None
    """Full names, such as `onetime.v1.OneTimeTokenService/IssueToken`."""
    token_types: frozenset[str] | None
    """Labels of auth.one_time_token_type."""
    return_code: bool
    """Whether it may have the codes of email verifications, to mail them itself."""
    send_email: bool
    """Whether it may have codes mailed."""
    any_caller: bool
    """Whether it sees the email verifications that others started."""

    def may_call(self, rpc: str) -> bool:
        """Tell whether it may call an rpc."""
        return self.rpcs is None or rpc in self.rpcs

    def may_use(self, token_type: str) -> bool:
        """Tell whether it may deal with tokens of a type."""
        return self.token_types is None or token_type in self.token_types


EVERYTHING = Permissions(rpcs=None, token_types=None, return_code=True, send_email=True, any_caller=True)
NOTHING = Permissions(rpcs=frozenset(), token_types=frozenset(), return_code=False, send_email=False, any_caller=False)


@dataclass(slots=True)
class Call:
    """One call, from its first byte to its status."""

    service: str
    """Full name, such as `onetime.v1.OneTimeTokenService`."""
    method: str
    """Such as `IssueToken`."""
    call_id: str
    """Names the call in the log. Not the request_id of the message, which names the caller's intent."""
    caller: str = ANONYMOUS
    """Who calls, as the policy names it. Receipts and verifications belong to it."""
    permissions: Permissions = NOTHING
    """What that caller may do."""
    deadline: float | None = None
    """When the caller stops waiting, by `time.monotonic()`. For how long to try, never for what to decide."""
    request: Message | None = None
    """The message that was received, once it is understood; of a stream, the newest."""
    in_doubt: bool = False
    """Whether COMMIT was sent for this call, and its outcome is not known yet."""
    unheard: asyncio.Future[Any] | None = None
    """Work that goes on, although the call was cancelled or its time is over."""
    subject: Mapping[str, str] = field(default_factory=dict)
    """Whom and what it is about, as far as the database has told: ids and purposes, for the audit event."""

    def remaining(self) -> float | None:
        """Return the seconds until the deadline, 0 or less once it has passed, or None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()


@dataclass(slots=True, kw_only=True)
class ServedCall(Call):
    """A call with what the interceptors need of gRPC, and what they find out about its end."""

    context: grpc.aio.ServicerContext[Any, Any]
    peer: str
    """The address of the caller's end of the connection."""
    kind: str
    """As metrics name it: unary, client_stream, server_stream, bidi_stream."""
    path: str
    """As the client wrote it. Of any length and content, where the method is unknown."""
    metadata: Sequence[tuple[str, str | bytes]] = field(repr=False)  # it may hold an API key
    payload: bytes | AsyncIterator[Message] = field(repr=False)
    """The request as it came; where the client streams, its messages."""
    started: float = field(default_factory=time.monotonic)
    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    """How it ended. Not OK until something has said so."""
    reason: str = ""
    """Of an error of ours, as in `service.errors`."""
    failure: str = ""
    """The traceback of an error that is a bug of ours, without secrets."""

    def age(self) -> float:
        """Return the seconds since the call arrived."""
        return time.monotonic() - self.started

    def header(self, key: str) -> str:
        """Return the first value of a key of the caller's metadata, or an empty string."""
        for name, value in self.metadata:
            if name == key and isinstance(value, str):
                return value
        return ""


current_call: ContextVar[Call] = ContextVar("current_call")
"""The call that this task serves, where it serves one alone."""

_calls_together: ContextVar[Sequence[Call]] = ContextVar("_calls_together", default=())


def serve_together(calls: Sequence[Call]) -> None:
    """Say which calls this task serves, where it serves several at once."""
    _calls_together.set(calls)


def calls_served() -> Sequence[Call]:
    """Return the calls that this task serves, one or several; none where it works for itself."""
    alone = current_call.get(None)
    return _calls_together.get() if alone is None else (alone,)


def about(call: Call, **subject: object) -> None:
    """Note whom and what a call is about, as the database tells it, for its audit event. No secrets."""
    call.subject = {name: str(value) for name, value in subject.items()}
