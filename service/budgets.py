"""Budgets: how many wrong codes are compared, and how much is sent, for one user and purpose.

They bound what anybody can try who may have new tokens issued: a limit for each token would not. So they are kept apart
from tokens, and nothing but time, a right code and `onetime unlock` gives anything back.

The windows slide and are exact: a limit of 10 in 15 minutes refuses while the tenth newest is younger than that. All
times are the database's, read and written under the lock of the budget's row.

It owns the limits' rules and the budgets' statements, and knows nothing of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    return [(_QUERIES["lock_budgets"], _params(subject)), (_QUERIES["read_budgets"], _params(subject))]


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


def spend(settings: Settings, subject: Subject) -> Statement:
    """Return the statement that counts a send."""
    keep = max(settings.sends_per_window, settings.sends_per_day)
    return _QUERIES["spend_sends"], {**_params(subject), "keep": keep}


def name_of_charge(budget: Mapping[str, Any]) -> datetime:
    """Return the time by which a charge is counted, and by which it is given back: no two of a budget are the same.

    Args:
        budget: A row with `failures`, None where there is no budget, and `now`. It must be locked.
    """
    now: datetime = budget["now"]
    failures = budget["failures"]
    # The clock may have stood still, or have been set back.
    return max(now, failures[-1] + timedelta(microseconds=1)) if failures else now


def charge(settings: Settings, subject: Subject, charged_at: datetime) -> Statement:
    """Return the statement that counts a wrong code on a budget that this transaction has locked."""
    keep = max(settings.failures_per_window, settings.failures_per_day)
    return _QUERIES["charge_budgets"], {**_params(subject), "charged_ats": [charged_at], "keep": keep}


def end_run(subject: Subject, charged_at: datetime | None) -> Statement:
    """Return the statement for a right code: it takes back the code's own charge, and ends the run."""
    return _QUERIES["end_runs"], {**_params(subject), "charged_ats": [charged_at]}


def forget(subject: Subject, charged_at: datetime | None) -> Statement:
    """Return the statement for a code that came to no verdict: it takes back its charge, and nothing else.

    For a subject without a budget it costs nearly what `charge` costs, and does nothing.
    """
    return _QUERIES["forget_failures"], {**_params(subject), "charged_ats": [charged_at]}


def _params(subject: Subject) -> dict[str, object]:
    user_id, purpose = subject
    return {"user_ids": [user_id], "purposes": [purpose]}
