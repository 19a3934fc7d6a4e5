"""Retries: a call that is repeated with its request_id gets the answer of the first.

A receipt is written in the transaction of its call's effect, so that there is no effect without a receipt, and no
receipt without its effect. What can be made anew is not kept; what is kept is sealed.

It knows the shape of answers, and nothing of their meaning.
"""

import uuid
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self, TypeAlias

from google.protobuf.message import Message
from psycopg.rows import DictRow

from service.call import Call, current_call
from service.crypto import Keyring
from service.db import Params, Transaction, load_queries
from service.errors import CodeMismatch, RequestIdReused

_QUERIES = load_queries("receipts")

Row: TypeAlias = Mapping[str, Any]
Statement: TypeAlias = tuple[str, Params]

_OK: Final = b"0"
_CODE_MISMATCH: Final = b"1"
_CHARGED: Final = b"2"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is left of an earlier call with the same request_id."""

    row_id: uuid.UUID
    """The token or verification that it made, charged or changed."""
    answer: bytes | None
    """Its serialised response, or None where that is made anew or a charge is pending."""
    charged_at: datetime | None = None
    """The charge that is pending: it was made, and its call died before it had a verdict."""


@dataclass(frozen=True, slots=True)
class Intent:
    """One call that may be repeated: who asks for what, under which request_id."""

    ring: Keyring
    call: Call
    request_id: str | None
    """A UUID in its normal form; None where the call is not to be repeated."""
    message: bytes

    @classmethod
    def of(cls, ring: Keyring, request: Message, request_id: str | None) -> Self:
        """Describe the call that this task serves."""
        call = current_call.get()
        if request_id is None:
            return cls(ring, call, None, b"")
        content = type(request)()
        content.CopyFrom(request)
        # It finds the receipt. As a string it may be spelt in two cases.
        content.ClearField("request_id")
        return cls(ring, call, request_id, content.SerializeToString(deterministic=True))

    @property
    def key(self) -> tuple[str, str, str | None]:
        """Return what finds the receipt: the caller, the rpc and the request_id."""
        return self.call.caller, self.call.method, self.request_id

    def earlier(self, row: Row | None) -> Receipt | None:
        """Return what is left of an earlier call, of the row that `claim` gave; None if this is the first.

        Raises:
            RequestIdReused: The earlier call had other content.
            CodeMismatch: That was the earlier call's answer.
        """
        if row is None:
            return None
        if not self.ring.same_fingerprint(row["fingerprint"], self.message):
            raise RequestIdReused
        if row["answer"] is None:
            return Receipt(row["row_id"], None)
        answer = self.ring.open_answer(row["answer"], place=self._place())
        if answer.startswith(_CODE_MISMATCH):
            raise CodeMismatch(int(answer[1:]))
        if answer.startswith(_CHARGED):
            return Receipt(row["row_id"], None, datetime.fromisoformat(answer[1:].decode()))
        return Receipt(row["row_id"], answer[1:])

    def seal(self, answer: Message | CodeMismatch | datetime | None) -> bytes | None:
        """Return the form in which an answer is kept."""
        if isinstance(answer, CodeMismatch):
            content = _CODE_MISMATCH + str(answer.attempts_remaining).encode()
        elif isinstance(answer, datetime):
            content = _CHARGED + answer.isoformat().encode()
        elif answer is not None:
            content = _OK + answer.SerializeToString()
        else:
            return None
        return self.ring.seal_answer(content, place=self._place())

    def _place(self) -> str:
        return "/".join(map(str, self.key))

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """Return what no two calls that are decided together may share: nothing, without a request_id."""
        return (self.key,) if self.request_id else ()


async def claim(
    transaction: Transaction, intents: Sequence[Intent], *statements: Statement
) -> tuple[list[Row | None], list[list[DictRow]]]:
    """Find the receipts of earlier calls, or make them, to be settled or dropped in this transaction.

    Of two calls with one request_id at the same time, the second waits here until the first has ended. The statements
    run in the same trip, after that, whatever is found.

    Args:
        transaction: One that has not begun, or in which nothing is locked yet.
        intents: No two with one request_id of one caller.
        statements: What to do beside.

    Returns:
        For each intent what its `earlier` understands, None for a first try; and the rows of each statement.
    """
    named = [intent for intent in intents if intent.request_id]
    if not named:
        return [None] * len(intents), await transaction.fetch_all(*statements) if statements else []
    fingerprints = [intent.ring.fingerprint(intent.message) for intent in named]
    statement: Statement = (_QUERIES["claim_receipts"], {**_keys(named), "fingerprints": fingerprints})
    rows, *others = await transaction.fetch_all(statement, *statements)
    found: dict[tuple[str, str, str | None], Row] = {
        (row["caller"], row["rpc"], str(row["request_id"])): row for row in rows
    }
    return [found.get(intent.key) for intent in intents], others


Answered: TypeAlias = tuple[Intent, uuid.UUID, Message | CodeMismatch | datetime | None]
"""A call, the token or verification that it made, charged or changed, and the answer to be kept: the response or the
verdict; the name of a charge that is to be followed by one; or nothing, where the response is made anew."""


def settle(*answered: Answered) -> list[Statement]:
    """Return the statement that keeps answers, to be committed with their effects; none if there are no request_ids."""
    named = [each for each in answered if each[0].request_id]
    if not named:
        return []
    return [
        (
            _QUERIES["settle_receipts"],
            {
                **_keys([intent for intent, _, _ in named]),
                "row_ids": [row_id for _, row_id, _ in named],
                "answers": [intent.seal(answer) for intent, _, answer in named],
            },
        )
    ]


def drop(*intents: Intent) -> list[Statement]:
    """Return the statement that forgets calls, so that a retry is a first try; none if there are no request_ids."""
    named = [intent for intent in intents if intent.request_id]
    return [(_QUERIES["drop_receipts"], _keys(named))] if named else []


def drop_refused(
    intents: Sequence[Intent], receipts: Sequence[Row | None], outcomes: Sequence[object]
) -> list[Statement]:
    """Return the statement that forgets those of a set that came to nothing, and made their receipts just now."""
    return drop(
        *(
            intent
            for intent, receipt, outcome in zip(intents, receipts, outcomes, strict=True)
            if isinstance(outcome, Exception) and receipt is None
        )
    )


def _keys(intents: Sequence[Intent]) -> dict[str, object]:
    callers, rpcs, request_ids = zip(*(intent.key for intent in intents), strict=True)
    return {"callers": list(callers), "rpcs": list(rpcs), "request_ids": list(request_ids)}
