"""EmailVerificationService: a long token for the frontend and a 6-digit code by mail, both needed.

The use cases, from a checked request to the statements of `sql/email_verification.sql`. Who calls and how errors travel
is the interceptors' business.

A code is compared while its row and the budget of its user are locked, and the verdict is committed before anybody
hears it, in a transaction that no caller can cancel: so no more wrong codes are ever compared than the limits allow,
however many arrive at once.
"""

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Self, TypeAlias

import grpc.aio
from onetime.v1 import email_verification_pb2 as pb
from onetime.v1 import email_verification_pb2_grpc as pb_grpc
from psycopg.errors import ForeignKeyViolation

from service import budgets, outbox
from service.call import Call, about, current_call
from service.config import Settings
from service.crypto import EMAIL_CODE_LENGTH, Keyring, equal, new_code, new_email_token, new_row_id
from service.db import (
    CHARGE_NOBODY,
    Database,
    Params,
    StatementFailed,
    Transaction,
    load_queries,
    skipping_locked,
)
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
from service.fields import Fields, set_time
from service.receipts import Intent, claim, drop_refused, settle
from service.sets import Outcome, Sets, Skipped, each

_QUERIES = load_queries("email_verification")

Context = grpc.aio.ServicerContext[Any, Any]
Row = Mapping[str, Any]
Statement: TypeAlias = tuple[str, Params]

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
    caller: str | None
    """Whose it must be, since others' are as if there were none; None if any."""

    @classmethod
    def of(cls, row_id: uuid.UUID | None, token_hashes: Sequence[str] = ()) -> Self:
        """Describe the verification that the current call means."""
        call = current_call.get()
        return cls(row_id, token_hashes, None if call.permissions.any_caller else call.caller)

    def refuse_unless_meant(self, row: Row) -> None:
        """Refuse a verification whose token was replaced while this call waited, by a retry of its start.

        Raises:
            TokenNotFound: It was.
        """
        if not self.id and row["token_hash"] not in self.token_hashes:
            raise TokenNotFound


def _find(keys: Sequence[_Key]) -> Params:
    """Return the parameters of `find_verifications` and `lock_verifications`."""
    wanted = [
        (number, key.id, token_hash, key.caller)
        for number, key in enumerate(keys)
        for token_hash in ((None,) if key.id else key.token_hashes)
    ]
    ords, ids, token_hashes, callers = zip(*wanted, strict=True)
    return {"ords": list(ords), "ids": list(ids), "token_hashes": list(token_hashes), "callers": list(callers)}


def _lock(*keys: _Key) -> Statement:
    """Return the statement that locks verifications, to the end of the transaction; of several, those that are free."""
    query = _QUERIES["lock_verifications"]
    return query if len(keys) == 1 else skipping_locked(query), _find(keys)


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
    intent: Intent


@dataclass(frozen=True, slots=True, repr=False)
class _Guess:
    """A code that is presented with a token."""

    intent: Intent
    key: _Key
    code: str


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found about a guess; of a wrong one, what its caller is told."""

    row: Row
    mismatch: CodeMismatch | None = None


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
        self._starts: Sets[_NewVerification, Row] = Sets(
            "start", self._start_all, keys=lambda new: (new.user_id, *new.intent.keys)
        )
        self._guesses: Sets[_Guess, Row] = Sets(
            "verify", self._verify_all, keys=lambda guess: (guess.key.token_hashes[0], *guess.intent.keys)
        )
        self._looks: Sets[_Key, Row] = Sets("get", self._find_all, keys=lambda _: (), decides=False)

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
            id=new_row_id(),
            user_id=user_id,
            ttl=ttl,
            token=token,
            token_hash=self._ring.email_token_hash(token),
            code=new_code(EMAIL_CODE_LENGTH),
            address=address,
            locale=request.send_email.locale,
            intent=Intent.of(self._ring, request, request_id),
        )
        row = await self._starts.run(new)
        response = pb.StartEmailVerificationResponse(
            verification=self._verification(row), email_verification_token=token
        )
        if row["delivery"] == "return_code":
            response.code = row["code"]
        return response

    async def _start_all(self, news: Sequence[_NewVerification]) -> Sequence[Outcome[Row]]:
        return await self._database.transact(partial(self._start, news), writes=len(news))

    async def _start(self, news: Sequence[_NewVerification], transaction: Transaction) -> Sequence[Outcome[Row]]:
        alone = len(news) == 1
        transaction.impatient = not alone
        intents = [new.intent for new in news]
        subjects = [_subject(new.user_id) for new in news]
        find_users: Statement = (_QUERIES["find_users"], {"user_ids": [new.user_id for new in news]})
        lock = budgets.lock(*subjects) if alone else budgets.claim(subjects)
        receipts, (users, *_, locked) = await claim(transaction, intents, find_users, *lock)
        if alone and (earlier := intents[0].earlier(receipts[0])):
            return [await self._restart(earlier.row_id, news[0], transaction)]
        known = {row["id"] for row in users}
        budget_of = {row["user_id"]: row for row in locked}

        def judge(new: _NewVerification, receipt: Row | None) -> _NewVerification:
            if new.user_id not in budget_of or new.intent.earlier(receipt):
                raise Skipped
            if new.user_id not in known and not self._adds_users:
                raise UserNotFound
            budgets.refuse_sends(self._settings, budget_of[new.user_id])
            return new

        judged = each(judge, news, receipts)
        started = [new for new in judged if not isinstance(new, Exception)]
        if not started:
            return [outcome for outcome in judged if isinstance(outcome, Exception)]
        try:
            *_, rows = await transaction.commit(
                *budgets.settle(self._settings, locked, [_subject(new.user_id) for new in started]),
                *settle(*((new.intent, new.id, None) for new in started)),
                *drop_refused(intents, receipts, judged),
                *self._store(started, known),
            )
        except ForeignKeyViolation as error:
            # The host deleted a user since our look. Of several, it is found out of whom, alone.
            raise UserNotFound if alone else StatementFailed from error
        stored = {row["id"]: row for row in rows}
        if any(new.address is not None for new in started) and self._on_mail is not None:
            self._on_mail()
        return [new if isinstance(new, Exception) else self._started(new, stored[new.id]) for new in judged]

    def _store(self, news: Sequence[_NewVerification], known: Collection[uuid.UUID]) -> list[Statement]:
        """Return the statements that store verifications; the last one gives their rows."""
        unknown = [new.user_id for new in news if new.user_id not in known]
        mails = [outbox.Mail(new.id, new.address, new.locale) for new in news if new.address is not None]
        params: Params = {
            "ids": [new.id for new in news],
            "user_ids": [new.user_id for new in news],
            "token_hashes": [new.token_hash for new in news],
            "sealed_codes": [self._seal(new.code, new.id, new.user_id, new.token_hash) for new in news],
            "ttls": [new.ttl.total_seconds() for new in news],
            "callers": [new.intent.call.caller for new in news],
            "deliveries": ["return_code" if new.address is None else "send_email" for new in news],
        }
        return [
            *([(_QUERIES["add_users"], {"user_ids": unknown})] if unknown else []),
            *([outbox.queue(self._ring, mails)] if mails else []),
            (_QUERIES["start_verifications"], params),
        ]

    def _started(self, new: _NewVerification, row: Row) -> Row:
        _about(new.intent.call, row)
        return {
            **row,
            "code": new.code,
            "expired": False,
            "failed_attempts": 0,
            "delivery": "return_code" if new.address is None else "send_email",
            "delivery_state": None if new.address is None else "queued",
            "delivery_failure": None,
        }

    async def _restart(self, row_id: uuid.UUID, new: _NewVerification, transaction: Transaction) -> Row:
        """Give the verification of an earlier try the token of this one, if it is still pending. Its code stays."""
        key = _Key(row_id, (), new.intent.call.caller)
        row = _only(await transaction.fetch(*_lock(key)))
        _about(new.intent.call, row)
        self._refuse_unless_pending(row)
        code = self._unseal(row)
        params: Params = {
            "ids": [row_id],
            "token_hashes": [new.token_hash],
            "sealed_codes": [self._seal(code, row_id, row["user_id"], new.token_hash)],
        }
        rows, *_ = await transaction.commit((_QUERIES["refresh_verifications"], params))
        return {**row, **rows[0], "code": code}

    async def VerifyCode(self, request: pb.VerifyCodeRequest, context: Context) -> pb.VerifyCodeResponse:
        """Accept token and code once."""
        del context
        fields = Fields()
        key = self._token_key(fields, request.email_verification_token)
        code = fields.code("code", request.code, shortest=EMAIL_CODE_LENGTH, longest=EMAIL_CODE_LENGTH)
        request_id = fields.request_id(request.request_id)
        fields.done()

        row = await self._guesses.run(_Guess(Intent.of(self._ring, request, request_id), key, code))
        return pb.VerifyCodeResponse(verification=self._verification(row))

    async def _verify_all(self, guesses: Sequence[_Guess]) -> Sequence[Outcome[Row]]:
        return await self._database.transact(partial(self._verify, guesses), writes=len(guesses))

    async def _verify(self, guesses: Sequence[_Guess], transaction: Transaction) -> Sequence[Outcome[Row]]:
        alone = len(guesses) == 1
        transaction.impatient = not alone
        intents = [guess.intent for guess in guesses]
        receipts, (locked,) = await claim(transaction, intents, _lock(*(guess.key for guess in guesses)))
        if alone and (earlier := intents[0].earlier(receipts[0])):
            return [await self._verified_before(earlier.row_id, intents[0], transaction)]
        row_of = {row["ord"]: row for row in locked}
        seen: set[uuid.UUID] = set()

        def judge(guess: _Guess, receipt: Row | None, row: Row | None) -> _Verdict:
            if guess.intent.earlier(receipt) or (row is not None and row["skipped"] and not alone):
                raise Skipped
            if row is None or row["token_hash"] is None:
                raise TokenNotFound
            if row["user_id"] in seen:
                # The one before it may change the budget that this one is judged by.
                raise Skipped
            seen.add(row["user_id"])
            return self._judge(guess, row)

        verdicts = each(judge, guesses, receipts, map(row_of.get, range(len(guesses))))
        decided = [
            (guess, found) for guess, found in zip(guesses, verdicts, strict=True) if isinstance(found, _Verdict)
        ]
        unknown = any(isinstance(verdict, TokenNotFound) for verdict in verdicts)
        if not decided and not unknown:
            return [verdict for verdict in verdicts if isinstance(verdict, Exception)]
        right = [verdict.row for _, verdict in decided if verdict.mismatch is None]
        wrong = [verdict.row for _, verdict in decided if verdict.mismatch is not None]
        writes = [
            *settle(*((guess.intent, verdict.row["id"], verdict.mismatch) for guess, verdict in decided)),
            *drop_refused(intents, receipts, verdicts),
            *(_charge_nobody() if unknown else []),
            *(self._charge(wrong) if wrong else []),
        ]
        used = await self._use(right, writes, transaction)
        return [
            verdict
            if isinstance(verdict, Exception)
            else verdict.mismatch or used.get(verdict.row["id"]) or TokenExpired()
            for verdict in verdicts
        ]

    def _judge(self, guess: _Guess, row: Row) -> _Verdict:
        """Judge a guess at a verification that is locked.

        Raises:
            CredentialError: It is not compared.
        """
        _about(guess.intent.call, row)
        guess.key.refuse_unless_meant(row)
        right_code = self._unseal(row)
        self._refuse_unless_pending(row)
        budgets.refuse_failures(self._settings, row)
        if equal(guess.code, right_code):
            return _Verdict(row)
        return _Verdict(row, CodeMismatch(self._attempts_remaining(row) - 1))

    def _charge(self, rows: Sequence[Row]) -> list[Statement]:
        """Return the statements that count wrong codes."""
        charges = [(_subject(row["user_id"]), budgets.name_of_charge(row)) for row in rows]
        return [
            budgets.charge(self._settings, *charges),
            (_QUERIES["charge_verifications"], {"ids": [row["id"] for row in rows]}),
        ]

    async def _use(
        self, right: Sequence[Row], writes: Sequence[Statement], transaction: Transaction
    ) -> Mapping[uuid.UUID, Row]:
        """Spend verifications and commit, and return their rows; of one that expired since it was locked, none."""
        if not right:
            await transaction.commit(*writes)
            return {}
        runs = [(_subject(row["user_id"]), None) for row in right if row["failures_in_a_row"]]
        mailed = [row["id"] for row in right if row["delivery"] == "send_email"]
        used, *others = await transaction.commit(
            (_QUERIES["use_verifications"], {"ids": [row["id"] for row in right]}),
            *writes,
            *([budgets.end_runs(*runs)] if runs else []),
            *([outbox.end(mailed)] if mailed else []),
        )
        row_of = {row["id"]: row for row in right}
        mail_of = {row["id"]: row for row in others[-1]} if mailed else {}
        return {row["id"]: {**row_of[row["id"]], **row, **mail_of.get(row["id"], {})} for row in used}

    async def _verified_before(self, row_id: uuid.UUID, intent: Intent, transaction: Transaction) -> Row:
        """Return the verification of an earlier try that was right: a wrong one's answer is kept. It stays as it is."""
        key = _Key(row_id, (), intent.call.caller)
        row = _only(await transaction.fetch(_QUERIES["find_verifications"], _find([key])))
        _about(intent.call, row)
        if row["used_at"] is None:
            # It was right, and too late: see `_use`.
            raise TokenExpired
        return row

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
        (receipt,), (rows,) = await claim(transaction, [intent], _lock(key))
        if earlier := intent.earlier(receipt):
            # What it asks for is done. The answer tells how the verification stands now.
            key = _Key.of(earlier.row_id)
            return self._resent(self._locked(key, await transaction.fetch(*_lock(key))))
        row = self._locked(key, rows)
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
            budgets.spend(self._settings, _subject(row["user_id"])),
            *settle((intent, row["id"], None)),
            (_QUERIES["mark_resent"], {"ids": [row["id"]]}),
            *([outbox.requeue(row["id"])] if by_mail else []),
        )
        if by_mail and self._on_mail is not None:
            self._on_mail()
            response.verification.CopyFrom(self._verification({**row, **mails[0]}))
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
        key = _Key.of(fields.identifier("id", request.id))
        fields.done()

        row = await self._database.run(partial(self._mark_code_sent, key))
        return pb.MarkCodeSentResponse(verification=self._verification(row))

    async def _mark_code_sent(self, key: _Key, transaction: Transaction) -> Row:
        row = self._locked(key, await transaction.fetch(*_lock(key)))
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
        row = await self._looks.run(self._key(request))
        _about(current_call.get(), row)
        return pb.GetEmailVerificationResponse(verification=self._verification(row))

    async def _find_all(self, keys: Sequence[_Key]) -> Sequence[Outcome[Row]]:
        rows = await self._database.read(_QUERIES["find_verifications"], _find(keys))
        row_of = {row["ord"]: row for row in rows}
        return [row_of.get(number) or TokenNotFound() for number in range(len(keys))]

    async def CancelEmailVerification(
        self, request: pb.CancelEmailVerificationRequest, context: Context
    ) -> pb.CancelEmailVerificationResponse:
        """Make a verification worthless."""
        del context
        row = await self._database.run(partial(self._cancel, self._key(request)))
        return pb.CancelEmailVerificationResponse(verification=self._verification(row))

    async def _cancel(self, key: _Key, transaction: Transaction) -> Row:
        row = self._locked(key, await transaction.fetch(*_lock(key)))
        if row["used_at"] is not None:
            raise TokenUsed
        if row["deleted_at"] is not None:
            return row
        cancel: Statement = (_QUERIES["cancel_verifications"], {"ids": [row["id"]]})
        mailed = row["delivery"] == "send_email"
        rows, *mails = await transaction.commit(cancel, *([outbox.end([row["id"]])] if mailed else []))
        return {**row, **rows[0], **(mails[0][0] if mailed and mails[0] else {})}

    def _locked(self, key: _Key, rows: Sequence[Row]) -> Row:
        """Return the verification that this transaction has locked.

        Raises:
            TokenNotFound: There is none.
        """
        row = _only(rows)
        _about(current_call.get(), row)
        key.refuse_unless_meant(row)
        return row

    def _key(self, request: pb.GetEmailVerificationRequest | pb.CancelEmailVerificationRequest) -> _Key:
        """Return which verification a request means, by id or by token."""
        fields = Fields()
        match request.WhichOneof("key"):
            case "id":
                key = _Key.of(fields.identifier("id", request.id))
            case "email_verification_token":
                key = self._token_key(fields, request.email_verification_token)
            case _:
                fields.refuse("key", "id or email_verification_token is required")
                key = _Key.of(None)
        fields.done()
        return key

    def _token_key(self, fields: Fields, token: str) -> _Key:
        return _Key.of(None, self._ring.email_token_hashes(fields.email_token("email_verification_token", token)))

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
        verification = pb.EmailVerification(
            id=str(row["id"]),
            user_id=str(row["user_id"]),
            state=self._state(row),
            code_sent=row["code_sent"],
            attempts_remaining=self._attempts_remaining(row),
            delivery_state=_DELIVERY_STATES[row["delivery_state"]],
            delivery_failure=_DELIVERY_FAILURES[row["delivery_failure"]],
        )
        set_time(verification.create_time, row["created_at"])
        set_time(verification.update_time, row["updated_at"])
        set_time(verification.expire_time, row["expires_at"])
        set_time(verification.use_time, row["used_at"])
        set_time(verification.delete_time, row["deleted_at"])
        return verification


def _subject(user_id: uuid.UUID) -> budgets.Subject:
    """Return whose budget a verification's guesses and sends are counted on."""
    return user_id, budgets.EMAIL_VERIFICATION


def _charge_nobody() -> list[Statement]:
    """Return as much work as a charge: otherwise the time of an answer would tell what exists."""
    return [
        budgets.forget((_subject(uuid.uuid4()), None)),
        (_QUERIES["charge_verifications"], {"ids": [uuid.uuid4()]}),
        CHARGE_NOBODY,
    ]


def _about(call: Call, row: Row) -> None:
    """Note which verification a call is about."""
    about(call, user_id=row["user_id"], verification_id=row["id"])


def _only(rows: Sequence[Row]) -> Row:
    """Return the row of the one element that was asked for, unless it went while this call waited for it."""
    if not rows or rows[0]["token_hash"] is None:
        raise TokenNotFound
    return rows[0]
