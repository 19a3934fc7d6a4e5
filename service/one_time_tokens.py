"""OneTimeTokenService: tokens that are good for one purpose, one user and one use.

The use cases, from a checked request to the statements of `sql/one_time_tokens.sql`. Who calls and how errors travel
is the interceptors' business.

A link is found by its digest, and spent in one statement. A code is short, so its guesses are counted, on the token and
on the budget of its user and type: an attempt is charged and committed *before* the code is compared, and given back if
the code is right. Between the two no connection and no lock is held, since Argon2 is slow.
"""

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

import grpc.aio
from onetime.v1 import one_time_tokens_pb2 as pb
from onetime.v1 import one_time_tokens_pb2_grpc as pb_grpc
from psycopg.errors import ForeignKeyViolation

from service import budgets
from service.call import Call, about, current_call
from service.config import Settings
from service.crypto import (
    CodeHasher,
    CodeSubject,
    Keyring,
    binds_row,
    is_slow,
    new_code,
    new_link_secret,
    new_row_id,
)
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
    DatabaseUnavailable,
    OutcomeUnknown,
    Overloaded,
    TokenExpired,
    TokenNotFound,
    UserNotFound,
)
from service.fields import MESSAGE_TYPES, STORED_TYPES, Fields, set_time
from service.hashing import Hashing, Run
from service.receipts import Intent, Receipt, claim, drop, drop_refused, settle
from service.sets import Outcome, Sets, Skipped, each

_QUERIES = load_queries("one_time_tokens")

Context = grpc.aio.ServicerContext[Any, Any]
Row = Mapping[str, Any]
T = TypeVar("T")

_USER_ONLY_TYPES: Final = (pb.TOKEN_TYPE_EMAIL_CHANGE_NEW, pb.TOKEN_TYPE_PHONE_CHANGE)
"""The address of these is one that the user only claims: anybody may have claimed it."""

SHORTEST_CODE: Final = 6
LONGEST_CODE: Final = 10


@dataclass(frozen=True, slots=True, repr=False)
class _LinkCredential:
    token_type: str
    secret: str


@dataclass(frozen=True, slots=True)
class _Link:
    """A link that is presented, by what may be stored for it."""

    intent: Intent
    token_type: str
    token_hashes: Sequence[str]


@dataclass(frozen=True, slots=True, repr=False)
class _CodeCredential:
    token_type: str
    user_id: uuid.UUID | None
    relates_to: str | None
    code: str


@dataclass(frozen=True, slots=True)
class _Guess:
    """A code that is presented, by whom it is presented for."""

    intent: Intent
    token_type: str
    user_id: uuid.UUID | None
    relates_to: str | None


@dataclass(frozen=True, slots=True, repr=False)
class _NewToken:
    """What IssueToken is about to store, and the secret that it will return."""

    subject: CodeSubject
    ttl: timedelta
    secret: str
    token_hash: str
    intent: Intent


@dataclass(frozen=True, slots=True)
class _Judged:
    """A token on which an attempt is charged; or the answer that this call got before, and no token."""

    row: Row
    charged_at: datetime | None = None
    """Names the charge on the budget."""
    retried: bool = False
    """Whether an earlier try of this call was charged, and this one was not."""
    earlier_answer: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Right:
    """A code that was found right."""

    intent: Intent
    judged: _Judged
    spend: bool
    """Whether it is to be spent, or was asked for only."""


class OneTimeTokens(pb_grpc.OneTimeTokenServiceServicer):
    """The servicer. See the proto for what each rpc promises."""

    def __init__(
        self, settings: Settings, database: Database, ring: Keyring, hasher: CodeHasher, hashing: Hashing
    ) -> None:
        """Take what the calls share."""
        self._settings = settings
        self._database = database
        self._ring = ring
        self._hasher = hasher
        self._hashing = hashing
        self._issues: Sets[_NewToken, Row] = Sets(
            "issue", self._issue_all, keys=lambda token: (_spender_of(token.subject), *token.intent.keys)
        )
        self._looks: Sets[_Link, Row] = Sets("check", self._find_links, keys=lambda _: (), decides=False)
        self._uses: Sets[_Link, pb.ConsumeTokenResponse] = Sets(
            "consume", self._consume_all, keys=lambda link: (link.token_hashes[0], *link.intent.keys)
        )
        self._guessed: WeakValueDictionary[tuple[str, uuid.UUID | str | None], asyncio.Lock] = WeakValueDictionary()
        """Held by the guess that is at the codes of a user or an address."""
        self._charges: Sets[_Guess, _Judged] = Sets("charge", self._charge_all, keys=lambda guess: guess.intent.keys)
        self._rights: Sets[_Right, pb.ConsumeTokenResponse] = Sets(
            "settle", self._settle_all, keys=lambda right: (_spender(right.judged.row), *right.intent.keys)
        )

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Context) -> pb.IssueTokenResponse:
        """Make a token."""
        del context
        fields = Fields()
        user_id = fields.identifier("user_id", request.user_id)
        token_type = fields.token_type("token_type", request.token_type)
        relates_to = fields.address("relates_to", request.relates_to)
        code_length = _code_length(fields, request)
        lifetime, ceiling = self._settings.lifetime(token_type)
        ttl = fields.ttl(request.ttl if request.HasField("ttl") else None, default=lifetime, ceiling=ceiling)
        request_id = fields.request_id(request.request_id)
        fields.done()
        _allow(token_type)

        subject = CodeSubject(new_row_id(), token_type, user_id, relates_to)
        if code_length:
            secret = new_code(code_length)
            if self._hasher.slow:
                async with self._hashing.turn() as run:
                    token_hash = await run(partial(self._hasher.hash, secret, subject))
            else:
                token_hash = self._hasher.hash(secret, subject)
        else:
            secret = new_link_secret()
            token_hash = self._ring.link_hash(token_type, secret)
        intent = Intent.of(self._ring, request, request_id)
        row = await self._issues.run(_NewToken(subject, ttl, secret, token_hash, intent))
        return pb.IssueTokenResponse(token=self._token(row, row["failed_attempts"]), secret=secret)

    async def _issue_all(self, tokens: Sequence[_NewToken]) -> Sequence[Outcome[Row]]:
        return await self._database.transact(partial(self._issue, tokens), writes=len(tokens))

    async def _issue(self, tokens: Sequence[_NewToken], transaction: Transaction) -> Sequence[Outcome[Row]]:
        alone = len(tokens) == 1
        transaction.impatient = not alone
        intents = [token.intent for token in tokens]
        spenders = [_spender_of(token.subject) for token in tokens]
        lock = budgets.lock(*spenders) if alone else budgets.claim(spenders)
        receipts, (*_, locked) = await claim(transaction, intents, *lock)
        if alone and (earlier := intents[0].earlier(receipts[0])):
            return [await self._reissue(earlier.row_id, tokens[0], transaction)]
        budget_of = {(row["user_id"], row["purpose"]): row for row in locked}

        def judge(token: _NewToken, receipt: Row | None) -> _NewToken:
            budget = budget_of.get(_spender_of(token.subject))
            if budget is None or token.intent.earlier(receipt):
                raise Skipped
            budgets.refuse_sends(self._settings, budget)
            return token

        judged = each(judge, tokens, receipts)
        issued = [token for token in judged if not isinstance(token, Exception)]
        if not issued:
            return [outcome for outcome in judged if isinstance(outcome, Exception)]
        params: Params = {
            "ids": [token.subject.token_id for token in issued],
            "user_ids": [token.subject.user_id for token in issued],
            "token_types": [token.subject.token_type for token in issued],
            "token_hashes": [token.token_hash for token in issued],
            "relates_to": [token.subject.relates_to for token in issued],
            "ttls": [token.ttl.total_seconds() for token in issued],
            "callers": [token.intent.call.caller for token in issued],
        }
        try:
            rows, *_ = await transaction.commit(
                (_QUERIES["issue_tokens"], params),
                *budgets.settle(self._settings, locked, [_spender_of(token.subject) for token in issued]),
                *settle(*((token.intent, token.subject.token_id, None) for token in issued)),
                *drop_refused(intents, receipts, judged),
            )
        except ForeignKeyViolation as error:
            # A table that was adopted may have a foreign key onto its host's users. Of several, whose user is missing
            # is found out alone.
            raise UserNotFound if alone else StatementFailed from error
        row_of = {row["id"]: row for row in rows}

        def stored(token: _NewToken) -> Row:
            row = row_of[token.subject.token_id]
            _about(token.intent.call, row)
            return {**row, "expire_time": row["create_time"] + token.ttl}

        return [token if isinstance(token, Exception) else stored(token) for token in judged]

    async def _reissue(self, token_id: uuid.UUID, token: _NewToken, transaction: Transaction) -> Row:
        """Give the token of an earlier try the secret of this one, if it is still live."""
        token_hash = token.token_hash
        if binds_row(token_hash):
            token_hash = self._hasher.hash(token.secret, replace(token.subject, token_id=token_id))
        params: Params = {"ids": [token_id], "token_hashes": [token_hash]}
        row = _only(await transaction.fetch(_QUERIES["refresh_tokens"], params))
        _about(token.intent.call, row)
        if row["expired"]:
            raise TokenExpired
        if row["failed_attempts"] >= self._settings.max_attempts:
            raise AttemptsExhausted
        await transaction.commit()
        return row

    async def CheckToken(self, request: pb.CheckTokenRequest, context: Context) -> pb.CheckTokenResponse:
        """Tell whether a credential would be accepted, without spending it."""
        del context
        fields = Fields()
        credential = _credential(fields, request)
        fields.done()
        _allow(credential.token_type)

        intent = Intent.of(self._ring, request, None)
        if isinstance(credential, _LinkCredential):
            row = await self._looks.run(self._link(intent, credential))
            _about(current_call.get(), row)
            if row["expired"]:
                raise TokenExpired
        else:
            row = await self._guess(credential, partial(self._check_code, intent, credential))
        return pb.CheckTokenResponse(token=self._token(row, row["failed_attempts"]))

    async def ConsumeToken(self, request: pb.ConsumeTokenRequest, context: Context) -> pb.ConsumeTokenResponse:
        """Accept a credential once."""
        del context
        fields = Fields()
        credential = _credential(fields, request)
        request_id = fields.request_id(request.request_id)
        fields.done()
        _allow(credential.token_type)

        intent = Intent.of(self._ring, request, request_id)
        if isinstance(credential, _LinkCredential):
            return await self._uses.run(self._link(intent, credential))
        return await self._guess(credential, partial(self._consume_code, intent, credential))

    async def _guess(self, credential: _CodeCredential, work: Callable[[Run | None], Coroutine[Any, Any, T]]) -> T:
        """Let work go on to its end, with a turn to hash where codes are slow.

        Guesses at codes of the same user or address wait for each other before they have a turn: while somebody else
        holds the user's rows, many guesses at them take no turns from other users' codes. A caller that hangs up before
        its turn has guessed nothing.

        Raises:
            Overloaded: At once, and nothing was guessed.
        """
        subject = (credential.token_type, credential.user_id or credential.relates_to)
        lock = self._guessed.setdefault(subject, asyncio.Lock())
        async with AsyncExitStack() as stack:
            run = await stack.enter_async_context(self._hashing.turn(behind=lock) if self._hasher.slow else lock)
            held = stack.pop_all()

        async def guess() -> T:
            async with held:
                return await work(run)

        return await self._database.protect(guess())

    def _link(self, intent: Intent, credential: _LinkCredential) -> _Link:
        hashes = self._ring.link_hashes(credential.token_type, credential.secret)
        return _Link(intent, credential.token_type, hashes)

    async def _find_links(self, links: Sequence[_Link]) -> Sequence[Outcome[Row]]:
        rows = await self._database.read(_QUERIES["find_links"], _link_params(links))
        row_of = {row["ord"]: row for row in rows}
        return [row_of.get(number) or TokenNotFound() for number in range(len(links))]

    async def _consume_all(self, links: Sequence[_Link]) -> Sequence[Outcome[pb.ConsumeTokenResponse]]:
        return await self._database.transact(partial(self._consume_links, links), writes=len(links))

    async def _consume_links(
        self, links: Sequence[_Link], transaction: Transaction
    ) -> Sequence[Outcome[pb.ConsumeTokenResponse]]:
        alone = len(links) == 1
        transaction.impatient = not alone
        intents = [link.intent for link in links]
        query = _QUERIES["consume_links"]
        params: Params = {
            **_link_params(links),
            "callers": [link.intent.call.caller for link in links for _ in link.token_hashes],
            "request_ids": [link.intent.request_id for link in links for _ in link.token_hashes],
        }
        consume = (query if alone else skipping_locked(query), params)
        receipts: Sequence[Row | None] = [None] * len(links)
        if any(intent.request_id for intent in intents):
            receipts, (rows,) = await claim(transaction, intents, consume)
        else:
            # Where no answer is to be kept, one trip does it all.
            (rows,) = await transaction.commit(consume)
        row_of = {row["ord"]: row for row in rows}

        def judge(link: _Link, receipt: Row | None, row: Row | None) -> pb.ConsumeTokenResponse:
            earlier = link.intent.earlier(receipt)
            if earlier and earlier.answer is not None:
                return pb.ConsumeTokenResponse.FromString(earlier.answer)
            if row is not None and row["id"] is None and not alone:
                raise Skipped
            if row is None or row["id"] is None:
                raise TokenNotFound
            _about(link.intent.call, row)
            if row["expired"]:
                raise TokenExpired
            return pb.ConsumeTokenResponse(token=self._token(row, row["failed_attempts"]))

        outcomes = each(judge, links, receipts, map(row_of.get, range(len(links))))
        spent = [
            (link.intent, row_of[number]["id"], outcome)
            for number, (link, outcome) in enumerate(zip(links, outcomes, strict=True))
            if number in row_of and not isinstance(outcome, Exception)
        ]
        if spent and not transaction.committed:
            await transaction.commit(*settle(*spent), *drop_refused(intents, receipts, outcomes))
        return outcomes

    async def _check_code(self, intent: Intent, credential: _CodeCredential, run: Run | None) -> Row:
        judged = await self._compare(intent, credential, run)
        await self._settle_right(_Right(intent, judged, spend=False))
        return judged.row

    async def _consume_code(
        self, intent: Intent, credential: _CodeCredential, run: Run | None
    ) -> pb.ConsumeTokenResponse:
        judged = await self._compare(intent, credential, run)
        if judged.earlier_answer is not None:
            return pb.ConsumeTokenResponse.FromString(judged.earlier_answer)
        return await self._settle_right(_Right(intent, judged, spend=True))

    async def _settle_right(self, right: _Right) -> pb.ConsumeTokenResponse:
        """Do what follows a right code; if nothing came of it, the failure is ours, and the charge is given back."""
        try:
            return await self._rights.run(right)
        except DatabaseUnavailable:
            with suppress(DatabaseUnavailable, OutcomeUnknown):
                await self._undo(right.intent, right.judged)
            raise

    async def _settle_all(self, rights: Sequence[_Right]) -> Sequence[Outcome[pb.ConsumeTokenResponse]]:
        return await self._database.transact(partial(self._settle, rights), writes=len(rights))

    async def _settle(
        self, rights: Sequence[_Right], transaction: Transaction
    ) -> Sequence[Outcome[pb.ConsumeTokenResponse]]:
        """Give charges back, and spend tokens. Another caller with the same right code may have been faster."""
        alone = len(rights) == 1
        transaction.impatient = not alone
        intents = [right.intent for right in rights]
        receipts: Sequence[Row | None] = [None] * len(rights)
        if any(intent.request_id for intent in intents):
            receipts, (*_, rows) = await claim(transaction, intents, *_spend(rights))
        else:
            # Where no answer is to be kept, one trip does it all.
            *_, rows = await transaction.commit(*_spend(rights))
        spent = {row["id"]: row for row in rows}

        outcomes = each(partial(self._judge_right, spent), rights, receipts)
        if transaction.committed:
            return outcomes
        answered, refused = [], []
        for right, outcome in zip(rights, outcomes, strict=True):
            if not isinstance(outcome, Exception):
                answered.append((right.intent, right.judged.row["id"], outcome))
            elif isinstance(outcome, TokenExpired | TokenNotFound):
                refused.append(right.intent)
            elif alone:
                # Another call's receipt has taken the place of this one's: what was spent for it is rolled back.
                return outcomes
            else:
                # Of several, that is done to it alone.
                raise StatementFailed
        await transaction.commit(*settle(*answered), *drop(*refused))
        return outcomes

    def _judge_right(
        self, spent: Mapping[uuid.UUID, Row], right: _Right, receipt: Row | None
    ) -> pb.ConsumeTokenResponse:
        """Return the answer to a right code.

        Raises:
            CredentialError: It was too late, or another caller faster.
        """
        earlier = right.intent.earlier(receipt)
        if earlier and earlier.answer is not None:
            # Another try of this very call was faster: what it got is the answer of both.
            return pb.ConsumeTokenResponse.FromString(earlier.answer)
        row = right.judged.row
        if right.spend and row["id"] not in spent:
            raise TokenNotFound
        if right.spend and spent[row["id"]]["expired"]:
            raise TokenExpired
        return pb.ConsumeTokenResponse(token=self._token(row, row["failed_attempts"]))

    async def _compare(self, intent: Intent, credential: _CodeCredential, run: Run | None) -> _Judged:
        """Charge an attempt, commit it, and compare the code. Return only if it is right; its charge is not back yet.

        Where codes are slow, the turn to hash is there already. To be refused one after the charge would cost the user
        an attempt; and what is charged is compared at once, so that those who still wait lose nothing if the server
        dies.

        Raises:
            CredentialError: As the proto says.
            Overloaded: Nothing was compared, and nothing is charged.
        """
        guess = _Guess(intent, credential.token_type, credential.user_id, credential.relates_to)
        try:
            judged = await self._charges.run(guess)
        except TokenNotFound:
            if run is not None:
                await run(self._hasher.pretend)
            if intent.request_id:
                # Spend the time that a wrong code takes, up to the commit of its answer.
                await self._database.commit(CHARGE_NOBODY)
            raise
        if judged.earlier_answer is not None:
            return judged
        row = judged.row
        subject = CodeSubject(row["id"], row["token_type"], row["user_id"], row["relates_to"])
        match = partial(self._hasher.matches, credential.code, row["token_hash"], subject)
        try:
            right = await self._run(match, run) if is_slow(row["token_hash"]) else match()
        except Exception as error:
            # There is no verdict, so there was no guess.
            await self._undo(intent, judged)
            if isinstance(error, KeyError):
                # The token's key has been retired.
                raise TokenNotFound from error
            raise
        if right:
            return judged
        mismatch = CodeMismatch(max(self._settings.max_attempts - row["failed_attempts"] - 1, 0))
        await self._answer(intent, judged, mismatch)
        raise mismatch

    async def _run(self, work: Callable[[], T], run: Run | None) -> T:
        """Hash in the turn that this call has.

        It has none for a code that was made before code_hashing was turned to hmac.
        """
        if run is not None:
            return await run(work)
        async with self._hashing.turn() as own:
            return await own(work)

    async def _charge_all(self, guesses: Sequence[_Guess]) -> Sequence[Outcome[_Judged]]:
        return await self._database.transact(partial(self._charge, guesses), writes=len(guesses))

    async def _charge(self, guesses: Sequence[_Guess], transaction: Transaction) -> Sequence[Outcome[_Judged]]:
        """Charge an attempt on each token that a code is presented for, and on the budget of its user and type."""
        alone = len(guesses) == 1
        transaction.impatient = not alone
        intents = [guess.intent for guess in guesses]
        query = _QUERIES["lock_codes"]
        params: Params = {
            "ords": list(range(len(guesses))),
            "token_types": [guess.token_type for guess in guesses],
            "user_ids": [guess.user_id for guess in guesses],
            "relates_to": [guess.relates_to for guess in guesses],
        }
        receipts, (locked,) = await claim(transaction, intents, (query if alone else skipping_locked(query), params))
        if alone and (earlier := intents[0].earlier(receipts[0])):
            return [await self._charged_before(earlier, intents[0], transaction)]
        row_of = {row["ord"]: row for row in locked}
        seen: set[budgets.Subject] = set()

        def judge(guess: _Guess, receipt: Row | None, row: Row | None) -> _Judged:
            if guess.intent.earlier(receipt) or (row is not None and row["skipped"] and not alone):
                raise Skipped
            if row is None or row["token_hash"] is None:
                raise TokenNotFound
            if _spender(row) in seen:
                # The one before it may change the counts that this one is judged by.
                raise Skipped
            seen.add(_spender(row))
            _about(guess.intent.call, row)
            if row["expired"]:
                raise TokenExpired
            if row["failed_attempts"] >= self._settings.max_attempts:
                raise AttemptsExhausted
            budgets.refuse_failures(self._settings, row)
            return _Judged(row, budgets.name_of_charge(row))

        outcomes = each(judge, guesses, receipts, map(row_of.get, range(len(guesses))))
        charged = [
            (intent, judged)
            for intent, judged in zip(intents, outcomes, strict=True)
            if not isinstance(judged, Exception)
        ]
        counts = [
            *(self._count([judged.row for _, judged in charged]) if charged else []),
            # As much work as a charge: otherwise the time of an answer would tell who has a code.
            *(_charge_nobody() if any(isinstance(outcome, TokenNotFound) for outcome in outcomes) else []),
        ]
        if counts:
            answers = settle(*((intent, judged.row["id"], judged.charged_at) for intent, judged in charged))
            await transaction.commit(*answers, *drop_refused(intents, receipts, outcomes), *counts)
        return outcomes

    def _count(self, rows: Sequence[Row]) -> list[tuple[str, Params]]:
        """Return the statements that charge an attempt on tokens and budgets."""
        charges = [(_spender(row), budgets.name_of_charge(row)) for row in rows]
        return [budgets.charge(self._settings, *charges), (_QUERIES["charge_codes"], _code_params(*rows))]

    async def _charged_before(self, earlier: Receipt, intent: Intent, transaction: Transaction) -> _Judged:
        """Return what an earlier try of this call has come to."""
        if earlier.answer is not None:
            return _Judged({}, earlier_answer=earlier.answer)
        # The first try was charged, and died before it had an answer. It is the same code, so it is free.
        row = _only(await transaction.fetch(_QUERIES["find_codes"], {"ids": [earlier.row_id]}))
        _about(intent.call, row)
        # Its own attempt is among those that were counted.
        return _Judged({**row, "failed_attempts": row["failed_attempts"] - 1}, earlier.charged_at, retried=True)

    async def _answer(self, intent: Intent, judged: _Judged, mismatch: CodeMismatch) -> None:
        """Keep a verdict for retries.

        Raises:
            Overloaded: This was a retry, and its first try has given up meanwhile and taken the charge back: a verdict
                would be a free guess.
        """
        statements = settle((intent, judged.row["id"], mismatch))
        if judged.retried:
            if not await self._database.run(partial(self._commit_if_pending, intent, judged, statements)):
                raise Overloaded
        elif statements:
            await self._database.commit(*statements)

    async def _undo(self, intent: Intent, judged: _Judged) -> None:
        """Forget a call that came to no verdict, and give its charge back: once, and unless another try came to one."""
        if judged.retried:
            return
        statements = [
            *drop(intent),  # receipts are locked before budgets, and budgets before tokens
            budgets.forget((_spender(judged.row), judged.charged_at)),
            (_QUERIES["refund_codes"], _code_params(judged.row)),
        ]
        with suppress(CodeMismatch):
            await self._database.run(partial(self._commit_if_pending, intent, judged, statements))

    async def _commit_if_pending(
        self, intent: Intent, judged: _Judged, statements: Sequence[tuple[str, Params]], transaction: Transaction
    ) -> bool:
        """Commit statements if no try of a call has come to a verdict on the charge that they share, and tell whether.

        Raises:
            CodeMismatch: That was the verdict.
        """
        if intent.request_id:
            (receipt,), _ = await claim(transaction, [intent])
            earlier = intent.earlier(receipt)
            if earlier is None or earlier.charged_at != judged.charged_at:
                return False
        await transaction.commit(*statements)
        return True

    async def RevokeTokens(self, request: pb.RevokeTokensRequest, context: Context) -> pb.RevokeTokensResponse:
        """Make a user's tokens worthless."""
        del context
        fields = Fields()
        user_id = fields.identifier("user_id", request.user_id)
        if request.all_types == bool(request.token_types):
            fields.refuse("token_types", "either some token_types or all_types is required, not both")
        token_types = [
            fields.token_type(f"token_types[{index}]", token_type)
            for index, token_type in enumerate(request.token_types)
        ]
        fields.done()

        wanted = sorted(set(STORED_TYPES.values() if request.all_types else token_types))
        _allow(*wanted)
        about(current_call.get(), user_id=user_id)
        params: Params = {"ords": [1] * len(wanted), "user_ids": [user_id] * len(wanted), "token_types": wanted}
        ((*rows,),) = await self._database.commit((_QUERIES["revoke_tokens"], params))
        return pb.RevokeTokensResponse(revoked_count=rows[0]["revoked_count"] if rows else 0)

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        """List a user's tokens that have not expired."""
        del context
        fields = Fields()
        user_id = fields.identifier("user_id", request.user_id)
        fields.done()

        about(current_call.get(), user_id=user_id)
        rows = await self._database.fetch(_QUERIES["list_tokens"], {"user_ids": [user_id]})
        permissions = current_call.get().permissions
        return pb.ListTokensResponse(
            tokens=[self._token(row, row["failed_attempts"]) for row in rows if permissions.may_use(row["token_type"])]
        )

    def _token(self, row: Row, failed_attempts: int) -> pb.OneTimeToken:
        token = pb.OneTimeToken(
            id=str(row["id"]),
            user_id=str(row["user_id"]),
            token_type=MESSAGE_TYPES[row["token_type"]],
            relates_to=row["relates_to"],
        )
        set_time(token.create_time, row["create_time"])
        set_time(token.update_time, row["update_time"])
        set_time(token.expire_time, row["expire_time"])
        if not row["token_hash"].startswith("otl1."):
            token.attempts_remaining = max(self._settings.max_attempts - failed_attempts, 0)
        return token


def _allow(*token_types: str) -> None:
    """Let the caller go on if the policy lets it deal with all of these types of tokens.

    Raises:
        CallerNotAllowed: It does not.
    """
    permissions = current_call.get().permissions
    denied = [token_type for token_type in token_types if not permissions.may_use(token_type)]
    if denied:
        names = ", ".join(pb.TokenType.Name(MESSAGE_TYPES[token_type]) for token_type in denied)
        raise CallerNotAllowed(f"the policy does not let this caller deal with {names}")


def _about(call: Call, row: Row) -> None:
    """Note which token a call is about."""
    about(call, user_id=row["user_id"], token_id=row["id"], token_type=row["token_type"])


def _spender(row: Row) -> budgets.Subject:
    """Return the subject whose budget a token's guesses are counted on."""
    return row["user_id"], row["token_type"]


def _spender_of(subject: CodeSubject) -> budgets.Subject:
    """Return the subject whose budget a new token is counted on."""
    return subject.user_id, subject.token_type


def _link_params(links: Sequence[_Link]) -> Params:
    """Return the parameters of `find_links`: for each link, what may be stored for it under any key of the ring."""
    wanted = [
        (number, link.token_type, token_hash) for number, link in enumerate(links) for token_hash in link.token_hashes
    ]
    ords, token_types, token_hashes = zip(*wanted, strict=True)
    return {"ords": list(ords), "token_types": list(token_types), "token_hashes": list(token_hashes)}


def _code_params(*rows: Row) -> Params:
    """Return the parameters of `charge_codes` and `refund_codes`."""
    return {
        "user_ids": [row["user_id"] for row in rows],
        "token_types": [row["token_type"] for row in rows],
        "ids": [row["id"] for row in rows],
    }


def _spend(rights: Sequence[_Right]) -> list[tuple[str, Params]]:
    """Return the statements for right codes; the last one gives what it has spent, if any is to be.

    Budgets are locked before tokens, and either in one order: so no two sets wait for each other in a circle.
    """
    ordered = sorted(rights, key=lambda right: _spender(right.judged.row))
    statements = [budgets.end_runs(*((_spender(right.judged.row), right.judged.charged_at) for right in ordered))]
    if kept := [right.judged.row for right in ordered if not right.spend]:
        statements.append((_QUERIES["refund_codes"], _code_params(*kept)))
    if spent := [right.judged.row for right in ordered if right.spend]:
        params = {"ids": [row["id"] for row in spent], "token_hashes": [row["token_hash"] for row in spent]}
        statements.append((_QUERIES["consume_codes"], params))
    return statements


def _charge_nobody() -> list[tuple[str, Params]]:
    """Return statements that cost what a charge costs, where there is nothing to charge."""
    nobody: Row = {"id": uuid.uuid4(), "user_id": uuid.uuid4(), "token_type": next(iter(MESSAGE_TYPES))}
    return [
        budgets.forget((_spender(nobody), None)),
        (_QUERIES["charge_codes"], _code_params(nobody)),
        CHARGE_NOBODY,
    ]


def _only(rows: Sequence[Row]) -> Row:
    """Return the row of the one element that was asked for."""
    if not rows:
        raise TokenNotFound
    return rows[0]


def _code_length(fields: Fields, request: pb.IssueTokenRequest) -> int | None:
    """Return the length of the code asked for, or None for a link."""
    if request.secret_format == pb.SECRET_FORMAT_CODE:
        if request.code_length and not SHORTEST_CODE <= request.code_length <= LONGEST_CODE:
            fields.refuse("code_length", f"{SHORTEST_CODE} to {LONGEST_CODE}, or nothing, is right")
        return request.code_length or SHORTEST_CODE
    if request.secret_format not in (pb.SECRET_FORMAT_UNSPECIFIED, pb.SECRET_FORMAT_LINK):
        fields.refuse("secret_format", "SECRET_FORMAT_LINK, SECRET_FORMAT_CODE or nothing is right")
    elif request.code_length:
        fields.refuse("code_length", "nothing is right with a link; set secret_format to SECRET_FORMAT_CODE for a code")
    return None


def _credential(
    fields: Fields, request: pb.CheckTokenRequest | pb.ConsumeTokenRequest
) -> _LinkCredential | _CodeCredential:
    token_type = fields.token_type("token_type", request.token_type)
    given = request.WhichOneof("credential")
    if given is None:
        fields.refuse("credential", "link_secret or code is required")
    if given != "code":
        return _LinkCredential(token_type, fields.link_secret("link_secret", request.link_secret) if given else "")
    code = fields.code("code.code", request.code.code, shortest=SHORTEST_CODE, longest=LONGEST_CODE)
    match request.code.WhichOneof("subject"):
        case "user_id":
            return _CodeCredential(token_type, fields.identifier("code.user_id", request.code.user_id), None, code)
        case "relates_to":
            if request.token_type in _USER_ONLY_TYPES:
                fields.refuse("code.relates_to", "user_id is required as the subject of this token_type")
            return _CodeCredential(token_type, None, fields.address("code.relates_to", request.code.relates_to), code)
        case _:
            fields.refuse("code.subject", "user_id or relates_to is required")
            return _CodeCredential(token_type, None, None, code)
