"""Budgets: how many wrong codes are compared, and how much is sent, for one user and purpose.

They bound what anybody can try who may have new tokens issued: a limit for each token would not. So they are kept apart
from tokens, and nothing but time, a right code and `onetime unlock` gives anything back.

The windows slide and are exact: a limit of 10 in 15 minutes refuses while the tenth newest is younger than that. All
times are the database's, read and written under the lock of the budget's row.

It owns the limits' rules and the budgets' statements, and knows nothing of tokens.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

from service.config import Settings
from service.db import Params, load_queries
from service.errors import TooManyFailures, TooManySends

_QUERIES = load_queries("budgets")

EMAIL_VERIFICATION: Final = "email_verification"
"""The purpose of email verifications. Of one-time tokens it is the label of their type."""

_DAY: Final = timedelta(days=1)

Statement: TypeAlias = tuple[str, Params]
Subject: TypeAlias = tuple[UUID, str]
"""A user and a purpose."""


def lock(subject: Subject) -> list[Statement]:
    """Return the statements that lock a budget, and make it if it is not there; the last one gives its row."""
    return [(_QUERIES["lock_budgets"], _params([subject])), (_QUERIES["read_budgets"], _params([subject]))]


def claim(subjects: Sequence[Subject]) -> list[Statement]:
    """Return the statement that does so for sends of many, and gives the rows of those that nobody else has locked.

    What it makes counts its send already: `settle` is to follow in the same transaction.
    """
    return [(_QUERIES["claim_budgets"], _params(subjects))]


def refuse_failures(settings: Settings, budget: Mapping[str, Any]) -> None:
    """Refuse to compare a code if too many were wrong.

    Args:
        settings: The limits.
        budget: A row with `failures`, `failures_in_a_row` and `now`; the first two are None where there is no budget.

    Raises:
        TooManyFailures: With the time until the next code is compared.
    """
    failures = budget["failures"] or []
    ends = [
        *_window(failures, settings.failures_per_window, settings.failure_window),
        *_window(failures, settings.failures_per_day, _DAY),
    ]
    beyond = (budget["failures_in_a_row"] or 0) - settings.failures_in_a_row
    if beyond >= 0 and failures:
        # NIST SP 800-63B asks for an end after 100 in a row. Doubling, for each one beyond, comes close to it, and an
        # owner who was attacked is not locked out for ever.
        doubled = settings.stop_time * 2 ** min(beyond, 16)
        ends.append(failures[-1] + min(doubled, settings.longest_stop))
    seconds = _seconds_until(ends, budget["now"])
    if seconds > 0:
        raise TooManyFailures(seconds)


def refuse_sends(settings: Settings, budget: Mapping[str, Any]) -> None:
    """Refuse to issue or send if too much was.

    Args:
        settings: The limits.
        budget: A row with `sends`, which is None where there is no budget, and `now`.

    Raises:
        TooManySends: With the time until the next one.
    """
    sends = budget["sends"] or []
    ends = [
        *_window(sends, settings.sends_per_window, settings.send_window),
        *_window(sends, settings.sends_per_day, _DAY),
    ]
    seconds = _seconds_until(ends, budget["now"])
    if seconds > 0:
        raise TooManySends(seconds)


def _window(times: Sequence[datetime], limit: int, length: timedelta) -> Iterator[datetime]:
    """Give when there is room again in a window that holds as many as it may, if it does."""
    if len(times) >= limit:
        yield times[-limit] + length


def _seconds_until(ends: Sequence[datetime], now: datetime) -> float:
    return (max(ends) - now).total_seconds() if ends else 0


def spend(settings: Settings, *subjects: Subject) -> Statement:
    """Return the statement that counts a send for each."""
    keep = max(settings.sends_per_window, settings.sends_per_day)
    return _QUERIES["spend_sends"], {**_params(subjects), "keep": keep}


def settle(settings: Settings, rows: Sequence[Mapping[str, Any]], sent: Collection[Subject]) -> list[Statement]:
    """Return the statements that count sends on what `lock` or `claim` gave, and forget what was made for nothing.

    Args:
        settings: The limits.
        rows: All that was given.
        sent: Whose sends came about.
    """
    made = {(row["user_id"], row["purpose"]) for row in rows if row["made"]}
    there = [subject for subject in sent if subject not in made]
    forgotten = made.difference(sent)
    return [
        *([spend(settings, *there)] if there else []),
        *([(_QUERIES["drop_budgets"], _params(list(forgotten)))] if forgotten else []),
    ]


def name_of_charge(budget: Mapping[str, Any]) -> datetime:
    """Return the time by which a charge is counted, and by which it is given back: no two of a budget are the same.

    Args:
        budget: A row with `failures`, None where there is no budget, and `now`. It must be locked.
    """
    now: datetime = budget["now"]
    failures = budget["failures"]
    # The clock may have stood still, or have been set back.
    return max(now, failures[-1] + timedelta(microseconds=1)) if failures else now


Charge: TypeAlias = tuple[Subject, datetime]
"""A subject, and the name of a wrong code that is counted on its budget."""


def charge(settings: Settings, *charges: Charge) -> Statement:
    """Return the statement that counts wrong codes on budgets that this transaction has locked."""
    keep = max(settings.failures_per_window, settings.failures_per_day)
    return _QUERIES["charge_budgets"], {**_charged(charges), "keep": keep}


def end_runs(*charges: tuple[Subject, datetime | None]) -> Statement:
    """Return the statement for right codes: it takes back each one's own charge, and ends the run."""
    return _QUERIES["end_runs"], _charged(charges)


def forget(*charges: tuple[Subject, datetime | None]) -> Statement:
    """Return the statement for codes that came to no verdict: it takes back their charges, and nothing else.

    For a subject without a budget it costs nearly what `charge` costs, and does nothing.
    """
    return _QUERIES["forget_failures"], _charged(charges)


def _params(subjects: Sequence[Subject]) -> dict[str, object]:
    return {"user_ids": [user_id for user_id, _ in subjects], "purposes": [purpose for _, purpose in subjects]}


def _charged(charges: Sequence[tuple[Subject, datetime | None]]) -> dict[str, object]:
    return {**_params([subject for subject, _ in charges]), "charged_ats": [charged_at for _, charged_at in charges]}
