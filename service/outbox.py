"""The outbox: mails with codes that are to be sent, in the transaction of what they are about.

It owns the outbox's statements, and knows nothing of how mails are made and sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID, uuid4

from service.config import Settings
from service.crypto import Keyring
from service.db import Params, load_queries

_QUERIES = load_queries("outbox")

Statement: TypeAlias = tuple[str, Params]


@dataclass(frozen=True, slots=True, repr=False)
class Mail:
    """The first mail with the code of a verification."""

    verification_id: UUID
    address: str
    locale: str


def queue(ring: Keyring, mails: Sequence[Mail]) -> Statement:
    """Return the statement that queues mails."""
    return _QUERIES["queue_mails"], {
        "verification_ids": [mail.verification_id for mail in mails],
        "message_ids": [uuid4() for _ in mails],
        "sealed_addresses": [ring.seal_address(mail.address, row_id=mail.verification_id) for mail in mails],
        "locales": [mail.locale for mail in mails],
    }


def requeue(verification_id: UUID) -> Statement:
    """Return the statement that queues another mail with the same code; its row tells how that stands."""
    return _QUERIES["requeue_mails"], {"verification_ids": [verification_id], "message_ids": [uuid4()]}


def end(verification_ids: Sequence[UUID]) -> Statement:
    """Return the statement for verifications that are over: no mail is sent any more, and addresses are forgotten."""
    return _QUERIES["end_mails"], {"verification_ids": verification_ids}


def end_due(settings: Settings, *, count: int) -> Statement:
    """Return the statement that does so for the verifications of which nobody says that they are over: expired ones."""
    return _QUERIES["end_due_mails"], {"count": count, "max_attempts": settings.max_attempts}


def claim(*, count: int, lease: float) -> Statement:
    """Return the statement that takes mails which are due, for `lease` seconds."""
    return _QUERIES["claim_mails"], {"count": count, "lease": lease}


def confirm(settings: Settings, verification_id: UUID, message_id: UUID, tries: int) -> Statement:
    """Return the statement that gives a row if a mail that was taken is still to be sent."""
    params = {**_mail(verification_id, message_id), "tries": [tries], "max_attempts": settings.max_attempts}
    return _QUERIES["confirm_mails"], params


def mark_sent(verification_id: UUID, message_id: UUID) -> Statement:
    """Return the statement that records a mail server's acceptance."""
    return _QUERIES["mark_mails_sent"], _mail(verification_id, message_id)


def mark_failed(verification_id: UUID, message_id: UUID, tries: int, *, failure: str, wait: float | None) -> Statement:
    """Return the statement that records a try that failed; the next one follows in `wait` seconds, if at all."""
    params = {**_mail(verification_id, message_id), "tries": [tries], "failures": [failure], "waits": [wait]}
    return _QUERIES["mark_mails_failed"], params


def count_queued() -> Statement:
    """Return the statement that tells how many mails are queued, and for how long the oldest has been."""
    return _QUERIES["count_queued_mails"], {}


def _mail(verification_id: UUID, message_id: UUID) -> dict[str, object]:
    return {"verification_ids": [verification_id], "message_ids": [message_id]}
