"""Retries: a call that is repeated with its request_id gets the answer of the first.

A receipt is written in the transaction of its call's effect, so that there is no effect without a receipt, and no
receipt without its effect. What can be made anew is not kept; what is kept is sealed.

It knows the shape of answers, and nothing of their meaning.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self

from google.protobuf.message import Message
from psycopg.rows import DictRow

from service.call import current_call
from service.crypto import Keyring
from service.db import Params, Transaction, load_queries
from service.errors import CodeMismatch, RequestIdReused

_QUERIES = load_queries("receipts")

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
    caller: str
    rpc: str
    request_id: uuid.UUID | None
    message: bytes

    @classmethod
    def of(cls, ring: Keyring, request: Message, request_id: uuid.UUID | None) -> Self:
        """Describe the call that this task serves."""
        call = current_call.get()
        if request_id is None:
            return cls(ring, call.caller, call.method, None, b"")
        content = type(request)()
        content.CopyFrom(request)
        # It finds the receipt. As a string it may be spelt in two cases.
        content.ClearField("request_id")
        return cls(ring, call.caller, call.method, request_id, content.SerializeToString(deterministic=True))

    async def claim(
        self, transaction: Transaction, *statements: tuple[str, Params]
    ) -> tuple[Receipt | None, list[list[DictRow]]]:
        """Find the receipt of an earlier call, or make one, to be settled in this transaction.

        The statements run in the same trip, after that, whatever is found; their rows are returned too. Of two calls
        with one request_id at the same time, the second waits here until the first has ended.

        Raises:
            RequestIdReused: The earlier call had other content.
            CodeMismatch: That was the earlier call's answer.
        """
        if self.request_id is None:
            return None, await transaction.fetch_all(*statements) if statements else []
        fingerprint = self.ring.fingerprint(self.message)
        claim: tuple[str, Params] = (_QUERIES["claim_receipts"], {**self._key(), "fingerprints": [fingerprint]})
        (row,), *others = await transaction.fetch_all(claim, *statements)
        return self._earlier(row), others

    def _earlier(self, row: Mapping[str, Any]) -> Receipt | None:
        """Return the receipt in a row, unless this call has made it just now."""
        if row["retries"] == 0:
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

    def settle(
        self, row_id: uuid.UUID, answer: Message | CodeMismatch | datetime | None = None
    ) -> list[tuple[str, Params]]:
        """Return the statement that keeps the answer, to be committed with the call's effect; none without an id.

        Args:
            row_id: The token or verification that the call made, charged or changed.
            answer: The response or the verdict; the name of a charge that is to be followed by one; or nothing, where
                the response is made anew.
        """
        if self.request_id is None:
            return []
        sealed = None
        if isinstance(answer, CodeMismatch):
            sealed = self._seal(_CODE_MISMATCH + str(answer.attempts_remaining).encode())
        elif isinstance(answer, datetime):
            sealed = self._seal(_CHARGED + answer.isoformat().encode())
        elif answer is not None:
            sealed = self._seal(_OK + answer.SerializeToString())
        return [(_QUERIES["settle_receipts"], {**self._key(), "row_ids": [row_id], "answers": [sealed]})]

    def drop(self) -> list[tuple[str, Params]]:
        """Return the statement that forgets the call, so that a retry is a first try."""
        return [] if self.request_id is None else [(_QUERIES["drop_receipts"], self._key())]

    def _seal(self, answer: bytes) -> bytes:
        return self.ring.seal_answer(answer, place=self._place())

    def _place(self) -> str:
        return f"{self.caller}/{self.rpc}/{self.request_id}"

    def _key(self) -> Mapping[str, object]:
        return {"callers": [self.caller], "rpcs": [self.rpc], "request_ids": [self.request_id]}
