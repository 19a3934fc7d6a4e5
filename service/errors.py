"""Every error that a caller can get, each with its status, its reason and its sentence.

    OnetimeError
    ├── InvalidRequest          INVALID_ARGUMENT     INVALID_REQUEST
    ├── UserNotFound            NOT_FOUND            USER_NOT_FOUND
    ├── CredentialError
    │   ├── TokenNotFound       NOT_FOUND            TOKEN_NOT_FOUND
    │   ├── TokenUsed           FAILED_PRECONDITION  TOKEN_USED
    │   ├── TokenCancelled      FAILED_PRECONDITION  TOKEN_CANCELLED
    │   ├── TokenExpired        FAILED_PRECONDITION  TOKEN_EXPIRED
    │   ├── AttemptsExhausted   FAILED_PRECONDITION  ATTEMPTS_EXHAUSTED
    │   ├── CodeMismatch        FAILED_PRECONDITION  CODE_MISMATCH
    │   └── TooManyFailures     RESOURCE_EXHAUSTED   TOO_MANY_FAILURES
    ├── RequestIdReused         FAILED_PRECONDITION  REQUEST_ID_REUSED
    ├── MailNotConfigured       FAILED_PRECONDITION  MAIL_NOT_CONFIGURED
    ├── TooSoon                 RESOURCE_EXHAUSTED   TOO_SOON
    ├── TooManySends            RESOURCE_EXHAUSTED   TOO_MANY_SENDS
    ├── Overloaded              RESOURCE_EXHAUSTED   OVERLOADED
    ├── CallerUnknown           UNAUTHENTICATED      CALLER_UNKNOWN
    ├── CallerNotAllowed        PERMISSION_DENIED    CALLER_NOT_ALLOWED
    ├── DatabaseUnavailable     UNAVAILABLE          DATABASE_UNAVAILABLE
    ├── OutcomeUnknown          UNAVAILABLE          OUTCOME_UNKNOWN
    └── InternalError           INTERNAL             INTERNAL

The sentence is for the developer of the calling backend. `public` is what an end user may be shown: it is the same
for every credential that is refused, so that nobody learns from it which tokens exist.

This module knows how an error looks on the wire, and nothing of when it is raised.
"""

import math
from collections.abc import Mapping
from datetime import timedelta

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, LocalizedMessage, RetryInfo
from google.rpc.status_pb2 import Status

DOMAIN = "onetime"
"""`ErrorInfo.domain` of every error of ours."""

REASON_KEY = "onetime-reason"
"""Trailing metadata that repeats the reason, for clients that do not unpack details."""

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries `google.rpc.Status`, as gRPC's own libraries read it."""


class OnetimeError(Exception):
    """An answer other than OK. Its text holds no secret, no address and no driver's words."""

    status: grpc.StatusCode
    reason: str
    sentence: str
    public = "Something went wrong. Please try again later."
    retry_after: timedelta | None = None
    """When the caller may come again, as RetryInfo."""

    def __init__(self, sentence: str | None = None) -> None:
        """Take the class's sentence, or a more exact one."""
        super().__init__(sentence or self.sentence)

    def metadata(self) -> Mapping[str, str]:
        """Return what ErrorInfo carries beside the reason."""
        return {}

    def details(self) -> list[Message]:
        """Return the messages of `google.rpc.Status.details`, ErrorInfo first."""
        details: list[Message] = [
            ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata())),
            LocalizedMessage(locale="en-US", message=self.public),
        ]
        if self.retry_after is not None:
            retry_info = RetryInfo()
            retry_info.retry_delay.FromTimedelta(self.retry_after)
            details.append(retry_info)
        return details

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the trailing metadata that carry reason and details."""
        status = Status(code=self.status.value[0], message=str(self))
        for detail in self.details():
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return ((REASON_KEY, self.reason), (DETAILS_KEY, status.SerializeToString()))


class InvalidRequest(OnetimeError):
    """The request is malformed. Nothing changed, and no attempt was counted."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"
    sentence = "the request is malformed"
    public = "Please check what you entered."

    def __init__(self, violations: Mapping[str, str]) -> None:
        """Take every violated field, by its path in the request, with what would be right."""
        super().__init__("; ".join(f"{field}: {what}" for field, what in violations.items()))
        self.violations = dict(violations)

    def details(self) -> list[Message]:
        """Add BadRequest with every violated field, not only the first."""
        violations = [
            BadRequest.FieldViolation(field=field, description=what) for field, what in self.violations.items()
        ]
        return [*super().details(), BadRequest(field_violations=violations)]


class UserNotFound(OnetimeError):
    """The host's tables know no such user."""

    status = grpc.StatusCode.NOT_FOUND
    reason = "USER_NOT_FOUND"
    sentence = "there is no such user"


class CredentialError(OnetimeError):
    """A token, link or code that is not accepted."""

    public = "This link or code is not valid. Please request a new one."


class TokenNotFound(CredentialError):
    """It is unknown, consumed, replaced, revoked or cleaned away; or a code was tried on a link."""

    status = grpc.StatusCode.NOT_FOUND
    reason = "TOKEN_NOT_FOUND"
    sentence = "there is no such token: it is unknown, consumed, replaced, revoked or cleaned away"


class TokenUsed(CredentialError):
    """It was accepted before."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "TOKEN_USED"
    sentence = "the token has been used"


class TokenCancelled(CredentialError):
    """It was cancelled."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "TOKEN_CANCELLED"
    sentence = "the token has been cancelled"


class TokenExpired(CredentialError):
    """Its time has run out by the database's clock."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "TOKEN_EXPIRED"
    sentence = "the token has expired"


class AttemptsExhausted(CredentialError):
    """Too many wrong codes were tried on it: the right one is refused too, and none is compared."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ATTEMPTS_EXHAUSTED"
    sentence = "too many wrong codes were tried on this token; issue a new one"


class CodeMismatch(CredentialError):
    """The code was compared and is wrong; the attempt is counted."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "CODE_MISMATCH"
    sentence = "the code is wrong"

    def __init__(self, attempts_remaining: int) -> None:
        """Take how many wrong codes will still be compared."""
        super().__init__()
        self.attempts_remaining = attempts_remaining

    def metadata(self) -> Mapping[str, str]:
        """Carry `attempts_remaining`, a decimal number."""
        return {"attempts_remaining": str(self.attempts_remaining)}


class RequestIdReused(OnetimeError):
    """The request_id was used before, for a request of other content."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "REQUEST_ID_REUSED"
    sentence = "this request_id was used for another request; take a new one for each intent"


class MailNotConfigured(OnetimeError):
    """The service has no mail server; nothing was written."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MAIL_NOT_CONFIGURED"
    sentence = "the service has no mail server to send with; use return_code and mail the code yourself"


class _UntilLater(OnetimeError):
    """A refusal that time lifts."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, seconds: float) -> None:
        """Take how long it holds. RetryInfo has whole seconds, so that the caller does not come too early."""
        super().__init__()
        self.retry_after = timedelta(seconds=max(math.ceil(seconds), 1))


class TooManyFailures(_UntilLater, CredentialError):
    """Too many wrong codes were tried for this user and purpose. Nothing was compared, and nothing counted."""

    reason = "TOO_MANY_FAILURES"
    sentence = "too many wrong codes were tried for this user and purpose; nothing was compared"


class TooSoon(_UntilLater):
    """The code of this verification was sent a moment ago. Nothing was sent."""

    reason = "TOO_SOON"
    sentence = "the code was sent a moment ago; nothing was sent"
    public = "Please wait a moment before you ask for another code."


class TooManySends(_UntilLater):
    """Too much was issued or sent for this user and purpose. Nothing changed: what was issued before holds."""

    reason = "TOO_MANY_SENDS"
    sentence = "too much was issued or sent for this user and purpose; nothing changed"
    public = "Please wait a while before you ask for another one."


class CallerUnknown(OnetimeError):
    """Nothing that the caller presented says who it is."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = "CALLER_UNKNOWN"
    sentence = "present a client certificate or an API key that this server knows"


class CallerNotAllowed(OnetimeError):
    """The policy does not let this caller do this."""

    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "CALLER_NOT_ALLOWED"
    sentence = "the policy does not let this caller do this"


class Overloaded(OnetimeError):
    """The service has more work than it will queue; nothing happened."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"
    sentence = "the service is overloaded; nothing happened"
    retry_after = timedelta(seconds=1)


class DatabaseUnavailable(OnetimeError):
    """The database did not answer; nothing happened."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "DATABASE_UNAVAILABLE"
    sentence = "the database is not available; nothing happened"
    retry_after = timedelta(seconds=1)


class OutcomeUnknown(OnetimeError):
    """The database did not confirm its commit: the call took effect whole, or not at all."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = "OUTCOME_UNKNOWN"
    sentence = "nobody can know whether the call took effect; repeat it with the same request_id to find out"
    retry_after = timedelta(seconds=1)


class InternalError(OnetimeError):
    """A bug of ours. The log has it in full under the call's id."""

    status = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"
    sentence = "internal error"
