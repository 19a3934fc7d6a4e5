"""EmailVerificationService: a long token for the frontend and a 6-digit code by mail, both needed.

The use cases, from a checked request to the statements of `sql/email_verification.sql`. Who calls and how errors travel
is the interceptors' business.

A code is compared while its row and the budget of its user are locked, and the verdict is committed before anybody
hears it, in a transaction that no caller can cancel: so no more wrong codes are ever compared than the limits allow,
however many arrive at once.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final

import grpc.aio
from onetime.v1 import email_verification_pb2 as pb
from onetime.v1 import email_verification_pb2_grpc as pb_grpc
from psycopg.errors import ForeignKeyViolation

from service import budgets, outbox
from service.call import about, current_call
from service.config import Settings
from service.crypto import EMAIL_CODE_LENGTH, Keyring, equal, new_code, new_email_token
from service.db import CHARGE_NOBODY, Database, Params, Transaction, load_queries
from service.errors import (
    AttemptsExhausted,
    CallerNotAllowed,
    CodeMismatch,
    CredentialError,
    InvalidRequest,
    MailNotConfigured,
    TokenCancelled,
    TokenExpired,
    TokenNotFound,
    TokenUsed,
    TooSoon,
    UserNotFound,
)
from service.fields import Fields
from service.receipts import Intent

_QUERIES = load_queries("email_verification")

Context = grpc.aio.ServicerContext[Any, Any]
Row = Mapping[str, Any]

_REFUSALS: Final[Mapping[pb.State.ValueType, type[CredentialError]]] = {
    pb.STATE_USED: TokenUsed,
    pb.STATE_CANCELLED: TokenCancelled,
    pb.STATE_EXPIRED: TokenExpired,
    pb.STATE_LOCKED: AttemptsExhausted,
}
"""What a verification that is not pending answers."""

_DELIVERY_STATES: Final[Mapping[str | None, pb.DeliveryState.ValueType]] = {
    None: pb.DELIVERY_STATE_UNSPECIFIED,
    "queued": pb.DELIVERY_STATE_QUEUED,
    "sent": pb.DELIVERY_STATE_SENT,
    "failed": pb.DELIVERY_STATE_FAILED,
}

_DELIVERY_FAILURES: Final[Mapping[str | None, pb.DeliveryFailure.ValueType]] = {
    None: pb.DELIVERY_FAILURE_UNSPECIFIED,
    "address_refused": pb.DELIVERY_FAILURE_ADDRESS_REFUSED,
    "message_refused": pb.DELIVERY_FAILURE_MESSAGE_REFUSED,
    "service_refused": pb.DELIVERY_FAILURE_SERVICE_REFUSED,
    "deferred": pb.DELIVERY_FAILURE_DEFERRED,
    "unreachable": pb.DELIVERY_FAILURE_UNREACHABLE,
    "verification_over": pb.DELIVERY_FAILURE_VERIFICATION_OVER,
}


@dataclass(frozen=True, slots=True)
class _Key:
    """Which verification is meant: by its id, or by what may be stored for its token."""

    id: uuid.UUID | None
    token_hashes: Sequence[str]

    def params(self) -> Params:
        """Return the parameters of `find_verifications` and `lock_verifications`: others' are as if there were none."""
        call = current_call.get()
        caller = None if call.permissions.any_caller else call.caller
        if self.id:
            return {"ords": [1], "ids": [self.id], "token_hashes": [None], "callers": [caller]}
        count = len(self.token_hashes)
        return {
            "ords": [1] * count,
            "ids": [None] * count,
            "token_hashes": self.token_hashes,
            "callers": [caller] * count,
        }

    def lock(self) -> tuple[str, Params]:
        """Return the statement that locks the verification until the end of the transaction."""
        return _QUERIES["lock_verifications"], self.params()

    def locked(self, rows: Sequence[Row]) -> Row:
        """Return what `lock` found.

        Raises:
            TokenNotFound: Nothing; or, while this call waited, a retry of StartEmailVerification replaced the token.
        """
        row = _only(rows)
        _about(row)
        if not self.id and row["token_hash"] not in self.token_hashes:
            raise TokenNotFound
        return row


@dataclass(frozen=True, slots=True, repr=False)
class _NewVerification:
    """What StartEmailVerification is about to store, and the secrets that it will return."""

    id: uuid.UUID
    user_id: uuid.UUID
    ttl: timedelta
    token: str
    token_hash: str
    code: str
    address: str | None
    """Where to mail the code; None if it is returned."""
    locale: str


class EmailVerifications(pb_grpc.EmailVerificationServiceServicer):
    """The servicer. See the proto for what each rpc promises."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        ring: Keyring,
        *,
        adds_users: bool,
        on_mail: Callable[[], None] | None,
    ) -> None:
        """Take what the calls share.

        Args:
            settings: Checked settings.
            database: Where everything is.
            ring: The keys.
            adds_users: Whether public.users is our own, so that unknown users are added to it.
            on_mail: Called when a mail has been queued; None if there is no mail server.
        """
        self._settings = settings
        self._database = database
        self._ring = ring
        self._adds_users = adds_users
        self._on_mail = on_mail

    async def StartEmailVerification(
        self, request: pb.StartEmailVerificationRequest, context: Context
    ) -> pb.StartEmailVerificationResponse:
        """Make a token and a code."""
        del context
        fields = Fields()
        user_id = fields.identifier("user_id", request.user_id)
        delivery = request.WhichOneof("delivery")
        if delivery is None:
            fields.refuse("delivery", "return_code or send_email is required")
        address = None
        if delivery == "send_email":
            address = fields.mailbox("send_email.email", request.send_email.email)
            fields.locale("send_email.locale", request.send_email.locale)
        lifetime, ceiling = self._settings.lifetime("email_verification")
        ttl = fields.ttl(request.ttl if request.HasField("ttl") else None, default=lifetime, ceiling=ceiling)
        request_id = fields.request_id(request.request_id)
        fields.done()
        permissions = current_call.get().permissions
        if not (permissions.return_code if delivery == "return_code" else permissions.send_email):
            raise CallerNotAllowed(f"the policy does not let this caller use {delivery}")
        if address is not None and self._on_mail is None:
            raise MailNotConfigured

        token = new_email_token()
        new = _NewVerification(
            id=uuid.uuid4(),
            user_id=user_id,
            ttl=ttl,
            token=token,
            token_hash=self._ring.email_token_hash(token),
            code=new_code(EMAIL_CODE_LENGTH),
            address=address,
            locale=request.send_email.locale,
        )
        return await self._database.run(partial(self._start, Intent.of(self._ring, request, request_id), new))

    async def _start(
        self, intent: Intent, new: _NewVerification, transaction: Transaction
    ) -> pb.StartEmailVerificationResponse:
        spender = (new.user_id, budgets.EMAIL_VERIFICATION)
        known: tuple[str, Params] = (_QUERIES["find_users"], {"user_ids": [new.user_id]})
        earlier, (users, _, (budget,)) = await intent.claim(transaction, known, *budgets.lock(spender))
        if earlier:
            return await self._restart(earlier.row_id, new, transaction)
        if not users and not self._adds_users:
            raise UserNotFound
        budgets.refuse_sends(self._settings, budget)
        params: Params = {
            "ids": [new.id],
            "user_ids": [new.user_id],
            "token_hashes": [new.token_hash],
            "sealed_codes": [self._seal(new.code, new.id, new.user_id, new.token_hash)],
            "ttls": [new.ttl.total_seconds()],
            "callers": [intent.caller],
            "deliveries": ["return_code" if new.address is None else "send_email"],
        }
        statements: list[tuple[str, Params]] = [(_QUERIES["start_verifications"], params)]
        if new.address is not None:
            statements.insert(0, outbox.queue(self._ring, new.id, address=new.address, locale=new.locale))
        if not users:
            statements.insert(0, (_QUERIES["add_users"], {"user_ids": [new.user_id]}))
        try:
            *_, rows = await transaction.commit(
                budgets.spend(self._settings, spender), *intent.settle(new.id), *statements
            )
        except ForeignKeyViolation:
            rows = []
        if not rows:
            # The host deleted the user since our look.
            raise UserNotFound
        (row,) = rows
        _about(row)
        if new.address is not None:
            self._mail_queued()
            row = {**row, "delivery_state": "queued"}
        return self._started(row, new.token, new.code)

    def _started(self, row: Row, token: str, code: str) -> pb.StartEmailVerificationResponse:
        response = pb.StartEmailVerificationResponse(
            verification=self._verification(row), email_verification_token=token
        )
        if row["delivery"] == "return_code":
            response.code = code
        return response

    def _mail_queued(self) -> None:
        if self._on_mail is not None:
            self._on_mail()

    async def _restart(
        self, row_id: uuid.UUID, new: _NewVerification, transaction: Transaction
    ) -> pb.StartEmailVerificationResponse:
        """Give the verification of an earlier try the token of this one, if it is still pending. Its code stays."""
        key = _Key(row_id, ())
        row = key.locked(await transaction.fetch(*key.lock()))
        self._refuse_unless_pending(row)
        code = self._unseal(row)
        params: Params = {
            "ids": [row_id],
            "old_hashes": [row["token_hash"]],
            "token_hashes": [new.token_hash],
            "sealed_codes": [self._seal(code, row_id, row["user_id"], new.token_hash)],
        }
        rows, *_ = await transaction.commit((_QUERIES["refresh_verifications"], params))
        return self._started({**row, **rows[0]}, new.token, code)

    async def VerifyCode(self, request: pb.VerifyCodeRequest, context: Context) -> pb.VerifyCodeResponse:
        """Accept token and code once."""
        del context
        fields = Fields()
        key = self._token_key(fields, request.email_verification_token)
        code = fields.code("code", request.code, shortest=EMAIL_CODE_LENGTH, longest=EMAIL_CODE_LENGTH)
        request_id = fields.request_id(request.request_id)
        fields.done()

        intent = Intent.of(self._ring, request, request_id)
        row = await self._database.run(partial(self._verify, intent, key, code))
        return pb.VerifyCodeResponse(verification=self._verification(row))

    async def _verify(self, intent: Intent, key: _Key, code: str, transaction: Transaction) -> Row:
        earlier, (rows,) = await intent.claim(transaction, key.lock())
        if earlier:
            # The first try was right: a wrong one's answer is kept, and raised by claim. A used row stays as it is.
            row = _only(await transaction.fetch(_QUERIES["find_verifications"], _Key(earlier.row_id, ()).params()))
            _about(row)
            if row["used_at"] is None:
                # It was right, and too late: see below.
                raise TokenExpired
            return row
        try:
            row = key.locked(rows)
            right_code = self._unseal(row)
        except TokenNotFound:
            # As much work as a charge: otherwise the time of an answer would tell what exists.
            nobody = (uuid.uuid4(), budgets.EMAIL_VERIFICATION)
            charge_none: tuple[str, Params] = (_QUERIES["charge_verifications"], {"token_hashes": [""]})
            await transaction.commit(budgets.forget(nobody, None), charge_none, CHARGE_NOBODY, *intent.drop())
            raise
        self._refuse_unless_pending(row)
        budgets.refuse_failures(self._settings, row)
        subject = (row["user_id"], budgets.EMAIL_VERIFICATION)
        if not equal(code, right_code):
            mismatch = CodeMismatch(self._attempts_remaining(row) - 1)
            charge: tuple[str, Params] = (_QUERIES["charge_verifications"], {"token_hashes": [row["token_hash"]]})
            charged_at = budgets.name_of_charge(row)
            await transaction.commit(
                budgets.charge(self._settings, subject, charged_at), charge, *intent.settle(row["id"], mismatch)
            )
            raise mismatch
        use: tuple[str, Params] = (_QUERIES["use_verifications"], {"ids": [row["id"]]})
        run_ends = [budgets.end_run(subject, None)] if row["failures_in_a_row"] else []
        used, *_, mails = await transaction.commit(use, *intent.settle(row["id"]), *run_ends, *_end_mail(row))
        if not used:
            # It expired between the lock and the update.
            raise TokenExpired
        return {**row, **used[0], **_mail_of(row, mails)}

    async def ResendCode(self, request: pb.ResendCodeRequest, context: Context) -> pb.ResendCodeResponse:
        """Send the same code again."""
        del context
        fields = Fields()
        key = self._token_key(fields, request.email_verification_token)
        request_id = fields.request_id(request.request_id)
        fields.done()

        intent = Intent.of(self._ring, request, request_id)
        return await self._database.run(partial(self._resend, intent, key))

    async def _resend(self, intent: Intent, key: _Key, transaction: Transaction) -> pb.ResendCodeResponse:
        earlier, (rows,) = await intent.claim(transaction, key.lock())
        if earlier:
            # What it asks for is done. The answer tells how the verification stands now.
            key = _Key(earlier.row_id, ())
            return self._resent(key.locked(await transaction.fetch(*key.lock())))
        row = key.locked(rows)
        self._refuse_unless_pending(row)
        wait = row["last_sent_at"] + self._settings.send_interval - row["now"]
        if wait > timedelta():
            raise TooSoon(wait.total_seconds())
        by_mail = row["delivery"] == "send_email"
        if by_mail and self._on_mail is None:
            raise MailNotConfigured
        budgets.refuse_sends(self._settings, row)
        response = self._resent(row)
        *_, mails = await transaction.commit(
            budgets.spend(self._settings, (row["user_id"], budgets.EMAIL_VERIFICATION)),
            (_QUERIES["mark_resent"], {"token_hashes": [row["token_hash"]]}),
            *intent.settle(row["id"]),
            *([outbox.requeue(row["id"])] if by_mail else []),
        )
        if by_mail:
            self._mail_queued()
            response.verification.CopyFrom(self._verification({**row, **_mail_of(row, mails)}))
        return response

    def _resent(self, row: Row) -> pb.ResendCodeResponse:
        call = current_call.get()
        response = pb.ResendCodeResponse(verification=self._verification(row))
        # The frontend's token travels through browsers: it alone must never be worth the code.
        started_it = row["delivery"] == "return_code" and row["caller"] == call.caller
        if started_it and call.permissions.return_code:
            response.code = self._unseal(row)
        return response

    async def MarkCodeSent(self, request: pb.MarkCodeSentRequest, context: Context) -> pb.MarkCodeSentResponse:
        """Record that the caller has mailed the code."""
        del context
        fields = Fields()
        key = _Key(fields.identifier("id", request.id), ())
        fields.done()

        row = await self._database.run(partial(self._mark_code_sent, key))
        return pb.MarkCodeSentResponse(verification=self._verification(row))

    async def _mark_code_sent(self, key: _Key, transaction: Transaction) -> Row:
        row = key.locked(await transaction.fetch(*key.lock()))
        if row["delivery"] == "send_email":
            raise InvalidRequest({"id": "a verification that was started with return_code is required"})
        self._refuse_unless_pending(row)
        if row["code_sent"]:
            return row
        rows, *_ = await transaction.commit((_QUERIES["mark_codes_sent"], {"ids": [row["id"]]}))
        return {**row, **rows[0]}

    async def GetEmailVerification(
        self, request: pb.GetEmailVerificationRequest, context: Context
    ) -> pb.GetEmailVerificationResponse:
        """Tell how a verification stands."""
        del context
        key = self._key(request)
        row = _only(await self._database.fetch(_QUERIES["find_verifications"], key.params()))
        _about(row)
        return pb.GetEmailVerificationResponse(verification=self._verification(row))

    async def CancelEmailVerification(
        self, request: pb.CancelEmailVerificationRequest, context: Context
    ) -> pb.CancelEmailVerificationResponse:
        """Make a verification worthless."""
        del context
        row = await self._database.run(partial(self._cancel, self._key(request)))
        return pb.CancelEmailVerificationResponse(verification=self._verification(row))

    async def _cancel(self, key: _Key, transaction: Transaction) -> Row:
        row = key.locked(await transaction.fetch(*key.lock()))
        if row["used_at"] is not None:
            raise TokenUsed
        if row["deleted_at"] is not None:
            return row
        cancel: tuple[str, Params] = (_QUERIES["cancel_verifications"], {"ids": [row["id"]]})
        rows, *_, mails = await transaction.commit(cancel, *_end_mail(row))
        return {**row, **rows[0], **_mail_of(row, mails)}

    def _key(self, request: pb.GetEmailVerificationRequest | pb.CancelEmailVerificationRequest) -> _Key:
        """Return which verification a request means, by id or by token."""
        fields = Fields()
        match request.WhichOneof("key"):
            case "id":
                key = _Key(fields.identifier("id", request.id), ())
            case "email_verification_token":
                key = self._token_key(fields, request.email_verification_token)
            case _:
                fields.refuse("key", "id or email_verification_token is required")
                key = _Key(None, ())
        fields.done()
        return key

    def _token_key(self, fields: Fields, token: str) -> _Key:
        return _Key(None, self._ring.email_token_hashes(fields.email_token("email_verification_token", token)))

    def _seal(self, code: str, row_id: uuid.UUID, user_id: uuid.UUID, token_hash: str) -> str:
        return self._ring.seal_code(code, row_id=row_id, user_id=user_id, token_hash=token_hash)

    def _unseal(self, row: Row) -> str:
        """Return the code of a verification.

        Raises:
            TokenNotFound: Its key has been retired.
        """
        try:
            return self._ring.unseal_code(
                row["sealed_code"], row_id=row["id"], user_id=row["user_id"], token_hash=row["token_hash"]
            )
        except KeyError as error:
            raise TokenNotFound from error

    def _attempts_remaining(self, row: Row) -> int:
        failed_attempts: int = row["failed_attempts"]
        return max(self._settings.max_attempts - failed_attempts, 0)

    def _state(self, row: Row) -> pb.State.ValueType:
        """Return how a verification stands; where several states hold, the first in the documented order."""
        if row["used_at"] is not None:
            return pb.STATE_USED
        if row["deleted_at"] is not None:
            return pb.STATE_CANCELLED
        if row["expired"]:
            return pb.STATE_EXPIRED
        if not self._attempts_remaining(row):
            return pb.STATE_LOCKED
        return pb.STATE_PENDING

    def _refuse_unless_pending(self, row: Row) -> None:
        refusal = _REFUSALS.get(self._state(row))
        if refusal:
            raise refusal

    def _verification(self, row: Row) -> pb.EmailVerification:
        return pb.EmailVerification(
            id=str(row["id"]),
            user_id=str(row["user_id"]),
            state=self._state(row),
            code_sent=row["code_sent"],
            create_time=row["created_at"],
            update_time=row["updated_at"],
            expire_time=row["expires_at"],
            use_time=row["used_at"],
            delete_time=row["deleted_at"],
            attempts_remaining=self._attempts_remaining(row),
            delivery_state=_DELIVERY_STATES[row["delivery_state"]],
            delivery_failure=_DELIVERY_FAILURES[row["delivery_failure"]],
        )


def _end_mail(row: Row) -> list[tuple[str, Params]]:
    """Return the statement for a verification that is over: its code is not mailed any more."""
    return [outbox.end(row["id"])] if row["delivery"] == "send_email" else []


def _mail_of(row: Row, mails: Sequence[Row]) -> Row:
    """Return how the mail stands, of what the last statement gave, which was about a mail if there is one."""
    return mails[0] if mails and row["delivery"] == "send_email" else {}


def _about(row: Row) -> None:
    """Note which verification this call is about."""
    about(user_id=row["user_id"], verification_id=row["id"])


def _only(rows: Sequence[Row]) -> Row:
    """Return the row of the one element that was asked for."""
    if not rows:
        raise TokenNotFound
    return rows[0]
