"""What is known of the call being served: who made it, by when it must end, and under which name it is logged.

Set once per call by the interceptors. What lies below them reads `Call`; only the interceptors look at `ServedCall`.
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

ANONYMOUS = "anonymous"
"""The caller where nobody is asked who they are: plain text on loopback."""


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
    deadline: float | None = None
    """When the caller stops waiting, by `time.monotonic()`. For how long to try, never for what to decide."""
    request: Message | None = None
    """The message that was received, once it is understood; of a stream, the newest."""

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
    metadata: Sequence[tuple[str, str | bytes]]
    payload: bytes | AsyncIterator[Message]
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
        return next((value for name, value in self.metadata if name == key and isinstance(value, str)), "")


current_call: ContextVar[Call] = ContextVar("current_call")
"""The call that this task serves."""
