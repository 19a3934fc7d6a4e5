"""Broken variants of the service, each with the tests that must catch it.

A test that passes on a broken service is worth nothing, and nobody notices when it becomes one. So the faults that this
service must never have are kept here, by name: each is what a real system got wrong, or what a hurried change to ours
would. `test_mutants.py` breaks a copy of the service in each way, and sees the tests fail on it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent

PYTEST: Final = ("pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider")
RUFF: Final = ("ruff", "check", "--no-cache", "service")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One way to break the service."""

    name: str
    breaks: str
    """What it breaks."""
    file: str
    """Of the folder `service`."""
    changes: tuple[tuple[str, str], ...]
    """What stands there, once, and what is put in its place."""
    tests: tuple[str, ...]
    """What must catch it: of all the tests that do, the quickest."""
    command: tuple[str, ...] = PYTEST
    """What is run with them."""


class Outdated(Exception):
    """A mutant no longer fits the code, and must be adapted, so that it breaks again what it says."""


def copy(folder: Path) -> None:
    """Copy what the tests need into a new folder, from which they import nothing but the copy."""
    for name in ("service", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)


def mutate(mutant: Mutant, folder: Path) -> None:
    """Break the copy in a folder.

    Raises:
        Outdated: What is to be replaced does not stand there once, or what comes of it is no Python.
    """
    path = folder / "service" / mutant.file
    text = path.read_text("utf-8")
    for old, new in mutant.changes:
        if text.count(old) != 1:
            raise Outdated(f"{mutant.name}: stands {text.count(old)} times in service/{mutant.file}:\n{old}")
        text = text.replace(old, new)
    if path.suffix == ".py":
        try:
            compile(text, mutant.file, "exec")
        except SyntaxError as error:
            raise Outdated(f"{mutant.name}: {error}") from error
    # Python tells by size and second whether a compiled form is up to date.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    path.write_text(text, "utf-8")


def run(
    folder: Path, command: Iterable[str], tests: Iterable[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy. Whatever they start imports the copy too: PYTHONPATH goes before what is installed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", *command, *tests],
        cwd=folder,
        env={**inherited, **environment, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


_LAST: Final = "tests/test_races.py::test_guesses_that_wait_together_share_the_last_attempt"
_WAITING: Final = "tests/test_one_time_tokens.py::test_token_that_expires_while_it_waits_for_a_lock"
_COUNTED: Final = "test_wrong_codes_are_counted_and_then_none_is_compared"

MUTANTS: Final = (
    # At most one success
    Mutant(
        "link-checked-then-deleted",
        "A link is looked at without a lock and then deleted, and whoever saw it is told that it is spent.",
        "sql/one_time_tokens.sql",
        (
            ("  for update of t /* skip locked */\n", ""),
            ("where j.id is null or j.expired or t.id is not null\n", ""),
        ),
        ("tests/test_one_time_tokens.py::test_a_link_that_is_spent_while_it_is_waited_for",),
    ),
    Mutant(
        "code-checked-then-deleted",
        "A right code is looked for without a lock, and whoever found its token is told that it is spent.",
        "sql/one_time_tokens.sql",
        (
            (
                "  for update of t\n), judged as materialized (\n  select ord, id, created_at",
                "), judged as materialized (\n  select ord, id, created_at",
            ),
            ("where j.expired or t.id is not null\n\n-- name: revoke_tokens", "\n-- name: revoke_tokens"),
        ),
        # Calls for one user cannot show it: they queue up for the user's budget, which is locked before.
        ("tests/test_sql.py::test_one_code_presented_twice_in_a_set",),
    ),
    Mutant(
        "verification-not-locked",
        "A verification is looked at without a lock, and used although another caller has used it meanwhile.",
        "sql/email_verification.sql",
        (
            ("  order by t.id\n  for update of t, s /* skip locked */\n", "  order by t.id\n"),
            ("case when t.used_at is null and", "case when"),
            ("    for update of b /* skip locked */\n", ""),
        ),
        ("tests/test_email_verification.py::test_a_verification_that_is_used_while_it_is_waited_for",),
    ),
    Mutant(
        "used-at-not-asked",
        "The statement that uses a verification does not ask whether it is used already.",
        "sql/email_verification.sql",
        (("t.used_at is null and ", ""),),
        ("tests/test_sql.py::test_use_verifications",),
    ),
    Mutant(
        "code-replaced-while-compared",
        "A right code spends whatever secret its row holds by now.",
        "sql/one_time_tokens.sql",
        (("on t.id = r.id and t.token_hash = r.token_hash", "on t.id = r.id"),),
        ("tests/test_sql.py::test_consume_codes",),
    ),
    # Time
    Mutant(
        "link-expiry-before-lock",
        "Whether a link has expired is asked before the wait for its lock.",
        "sql/one_time_tokens.sql",
        (
            (
                "  select r.ord, t.id, t.user_id, t.token_type, t.token_hash\n",
                (
                    "  select r.ord, t.id, t.user_id, t.token_type, t.token_hash,\n"
                    "    clock_timestamp() at time zone 'utc' as seen\n"
                ),
            ),
            (
                "    s.ttl, s.failed_attempts\n  from found as f\n  join auth.one_time_tokens as t\n",
                "    s.ttl, s.failed_attempts, f.seen\n  from found as f\n  join auth.one_time_tokens as t\n",
            ),
            (
                "select *, created_at + ttl <= clock_timestamp() at time zone 'utc' as expired",
                "select *, created_at + ttl <= seen as expired",
            ),
        ),
        (f"{_WAITING}[argon2id-0]",),
    ),
    Mutant(
        "link-expiry-by-now",
        "Whether a link has expired is held against its transaction's start.",
        "sql/one_time_tokens.sql",
        (
            (
                "select *, created_at + ttl <= clock_timestamp() at time zone 'utc' as expired",
                "select *, created_at + ttl <= now() at time zone 'utc' as expired",
            ),
        ),
        (f"{_WAITING}[argon2id-0]",),
    ),
    Mutant(
        "verification-expiry-by-now",
        "Whether a verification has expired is held against its transaction's start, for comparing and for using it.",
        "sql/email_verification.sql",
        (
            ("l.expires_at <= clock_timestamp() as expired", "l.expires_at <= now() as expired"),
            ("t.expires_at > clock_timestamp() end\n", "t.expires_at > now() end\n"),
        ),
        ("tests/test_email_verification.py::test_verification_that_expires_while_it_waits_for_a_lock[right code]",),
    ),
    # Guesses
    Mutant(
        "charged-after-compare",
        "A code is compared first, and the attempt charged when it was wrong.",
        "one_time_tokens.py",
        (
            (
                "            *(self._count([judged.row for _, judged in charged]) if charged else []),\n",
                "",
            ),
            (
                "        mismatch = CodeMismatch(",
                ("        await self._database.commit(*self._count([row]))\n        mismatch = CodeMismatch("),
            ),
        ),
        (f"{_LAST}[code by user]",),
    ),
    Mutant(
        "charge-not-committed",
        "A wrong code's charge is not committed before its verdict is told, and so is rolled back.",
        "one_time_tokens.py",
        (
            (
                "await transaction.commit(*answers, *drop_refused(intents, receipts, outcomes), *counts)",
                "await transaction.fetch_all(*answers, *drop_refused(intents, receipts, outcomes), *counts)",
            ),
        ),
        (f"tests/test_one_time_tokens.py::{_COUNTED}[argon2id]",),
    ),
    Mutant(
        "email-charge-not-committed",
        "A wrong email code's charge is not committed before its verdict is told, and so is rolled back.",
        "email_verification.py",
        (
            (
                "        if not right:\n            await transaction.commit(*writes)\n",
                "        if not right:\n            await transaction.fetch_all(*writes)\n",
            ),
        ),
        (f"tests/test_email_verification.py::{_COUNTED}",),
    ),
    Mutant(
        "code-not-locked-for-charge",
        "Of guesses at once, each sees the count that was there when it came.",
        "sql/one_time_tokens.sql",
        (
            (
                "  order by f.user_id, f.token_type\n  for update of t, s /* skip locked */\n",
                "  order by f.user_id, f.token_type\n",
            ),
            (
                "  order by b.user_id, b.purpose\n  for update of b /* skip locked */\n",
                "  order by b.user_id, b.purpose\n",
            ),
        ),
        (f"{_LAST}[code by user]",),
    ),
    Mutant(
        "attempts-off-by-one",
        "A sixth wrong code is compared.",
        "one_time_tokens.py",
        (
            (
                (
                    'row["failed_attempts"] >= self._settings.max_attempts:\n'
                    "                raise AttemptsExhausted\n            budgets"
                ),
                (
                    'row["failed_attempts"] > self._settings.max_attempts:\n'
                    "                raise AttemptsExhausted\n            budgets"
                ),
            ),
        ),
        (f"tests/test_one_time_tokens.py::{_COUNTED}[argon2id]",),
    ),
    Mutant(
        "work-dies-with-its-caller",
        "A caller who hangs up cancels the work, and so a guess before it is counted.",
        "db.py",
        (("return await asyncio.shield(task)", "return await task"),),
        ("tests/test_overload.py::test_calls_that_were_cancelled_count_while_their_work_goes_on",),
    ),
    Mutant(
        "resend-resets-attempts",
        "Who has a code sent again may guess five times more.",
        "sql/email_verification.sql",
        (("set last_sent_at = clock_timestamp()", "set last_sent_at = clock_timestamp(), failed_attempts = 0"),),
        ("tests/test_email_verification.py::test_right_code_after_wrong_ones",),
    ),
    Mutant(
        "send-resets-budget",
        "A new token, or a code sent again, forgets the wrong codes of its user.",
        "sql/budgets.sql",
        (("  sends = (b.sends ||", "  failures = '{}', failures_in_a_row = 0, sends = (b.sends ||"),),
        ("tests/test_budgets.py::test_ten_in_a_quarter_of_an_hour",),
    ),
    Mutant(
        "clean-up-deletes-budgets",
        "The clean-up takes budgets along that bound something.",
        "sql/cleanup.sql",
        (
            (
                (
                    "        + case\n"
                    "          when b.failures_in_a_row > 0 then make_interval(secs => %(longest_run)s)\n"
                    "          else make_interval(secs => %(longest_failure)s)\n"
                    "        end\n"
                ),
                "",
            ),
        ),
        ("tests/test_budgets.py::test_clean_up_takes_only_what_bounds_nothing",),
    ),
    Mutant(
        "window-off-by-one",
        "A window holds one more than it may.",
        "budgets.py",
        (("if len(times) >= limit:", "if len(times) > limit:"),),
        ("tests/test_budgets.py::test_windows_slide",),
    ),
    Mutant(
        "stop-not-doubled",
        "Each further wrong code in a row stops a subject for no longer than the one before.",
        "budgets.py",
        (("doubled = settings.stop_time * 2 ** min(beyond, 16)", "doubled = settings.stop_time"),),
        ("tests/test_budgets.py::test_a_run_stops_for_a_day_and_doubles_to_a_week",),
    ),
    Mutant(
        "run-outlives-success",
        "A right code does not end the run of wrong ones.",
        "sql/budgets.sql",
        (
            (
                "(select count(*) from unnest(b.failures) as f (time) where f.time > r.charged_at)",
                "b.failures_in_a_row",
            ),
        ),
        ("tests/test_sql.py::test_budgets",),
    ),
    Mutant(
        "nobodys-guess-charges-somebody",
        "A guess at a user who has no code is counted on the user's budget, so that anybody can stop anybody.",
        "one_time_tokens.py",
        (
            (
                "        if counts:\n            answers",
                (
                    "        if counts and not charged:\n"
                    "            somebody = (guesses[0].user_id or uuid.UUID(int=0), guesses[0].token_type)\n"
                    "            counts += [budgets.charge(self._settings, (somebody, datetime.now().astimezone()))]\n"
                    "        if counts:\n            answers"
                ),
            ),
        ),
        ("tests/test_one_time_tokens.py::test_code_of_nobody[argon2id]",),
    ),
    Mutant(
        "nobodys-code-not-hashed",
        "A code of nobody is refused without the work of a wrong one, so that time tells who has a code.",
        "one_time_tokens.py",
        (("                await run(self._hasher.pretend)\n", "                pass\n"),),
        ("tests/test_matrix.py::test_unknown_and_wrong_do_the_same_work",),
    ),
    # Sends
    Mutant(
        "resend-not-counted",
        "A code that is sent again is no send.",
        "email_verification.py",
        (
            (
                (
                    '            budgets.spend(self._settings, _subject(row["user_id"])),\n'
                    '            *settle((intent, row["id"], None)),\n'
                ),
                '            *settle((intent, row["id"], None)),\n',
            ),
        ),
        ("tests/test_budgets.py::test_resends",),
    ),
    Mutant(
        "never-too-soon",
        "Codes can be sent again as fast as one likes.",
        "email_verification.py",
        (("        if wait > timedelta():", "        if wait > timedelta.max:"),),
        ("tests/test_budgets.py::test_resends",),
    ),
    # Sets
    Mutant(
        "two-of-one-key-in-a-set",
        "Calls about one thing are decided at the same time.",
        "sets.py",
        (("and self._in_use.isdisjoint(waiting.keys):", "and True:"),),
        ("tests/test_sets.py::test_who_shares_a_key_waits",),
    ),
    Mutant(
        "one-user-twice-in-a-set",
        "Of wrong codes for one user in a set, each is judged by the budget as it was before, and one of them counted.",
        "email_verification.py",
        (
            ('if row["user_id"] in seen:', "if False:"),
            ("budgets.charge(self._settings, *charges)", "budgets.charge(self._settings, *dict(charges).items())"),
        ),
        ("tests/test_sets.py::test_wrong_codes_for_one_user_in_one_set",),
    ),
    Mutant(
        "guesses-wait-before-the-queue",
        "Guesses at one user wait for each other before they have a place in the queue, until it is too late.",
        "one_time_tokens.py",
        (
            (
                "            run = await stack.enter_async_context(self._hashing.turn(behind=lock)",
                """\
            await stack.enter_async_context(lock)
            run = await stack.enter_async_context(self._hashing.turn()""",
            ),
        ),
        ("tests/test_overload.py::test_guesses_at_one_user_beyond_the_queue_are_refused_at_once",),
    ),
    Mutant(
        "guesses-charged-for-who-has-gone",
        "A guess that waits to be hashed is charged and compared when its turn comes, although its caller has hung up.",
        "one_time_tokens.py",
        (
            (
                "        async with AsyncExitStack() as stack:\n",
                """\
        async def turn_and_guess() -> T:
            async with self._hashing.turn(behind=lock) if self._hasher.slow else lock as run:
                return await work(run)

        return await self._database.protect(turn_and_guess())
        async with AsyncExitStack() as stack:
""",
            ),
        ),
        ("tests/test_overload.py::test_who_hangs_up_before_a_turn_has_guessed_nothing",),
    ),
    Mutant(
        "turns-held-back-from-idle-threads",
        "While guesses wait for rows that somebody else has locked, no other code is compared by idle threads.",
        "hashing.py",
        (("if self._idle or given <=", "if given <="),),
        ("tests/test_overload.py::test_guesses_at_many_locked_users_keep_no_thread_idle",),
    ),
    Mutant(
        "told-when-little-is-left-only",
        "A verdict is told when little is left to hash, and never if work goes on arriving.",
        "hashing.py",
        (("if little else self._most - self._left)", "if little else 10**6)"),),
        ("tests/test_overload.py::test_work_that_goes_on_arriving_is_told_of",),
    ),
    Mutant(
        "turn-over-before-it-is-settled",
        "A turn is over when its code is hashed, so that more are charged than there are turns.",
        "hashing.py",
        (
            ("            return result\n", "            self._end_turn(caller)\n            return result\n"),
            (
                "                    self._end_turn(caller)\n        finally:\n",
                "                    if not jobs:\n                        self._end_turn(caller)\n        finally:\n",
            ),
        ),
        ("tests/test_overload.py::test_turns_are_given_several_at_a_time",),
    ),
    Mutant(
        "guesses-at-one-user-take-all-turns",
        "While somebody holds a user's rows, guesses at that user's code hold the turns to hash, and nobody else's code"
        " is compared.",
        "one_time_tokens.py",
        (("self._hashing.turn(behind=lock)", "self._hashing.turn()"),),
        ("tests/test_overload.py::test_guesses_at_a_locked_user_take_no_turns_from_others",),
    ),
    Mutant(
        "verdict-told-and-given-back",
        "A try of a call that gets no verdict takes back the charge for the verdict that another try of it was told.",
        "one_time_tokens.py",
        (("if earlier is None or earlier.charged_at != judged.charged_at:", "if False:"),),
        ("tests/test_one_time_tokens.py::test_a_verdict_is_charged_though_another_try_came_to_none[second]",),
    ),
    Mutant(
        "locked-link-is-unknown",
        "A link whose row somebody else has locked is told to be unknown, although nobody knows yet.",
        "one_time_tokens.py",
        (('if row is not None and row["id"] is None and not alone:', "if False:"),),
        ("tests/test_sets.py::test_a_locked_row_holds_up_its_own_call_only[consume-token]",),
    ),
    Mutant(
        "locked-verification-is-unknown",
        "A verification that somebody else has locked is told to be unknown, although nobody knows yet.",
        "email_verification.py",
        ((' or (row is not None and row["skipped"] and not alone):', ":"),),
        ("tests/test_sets.py::test_a_locked_row_holds_up_its_own_call_only[verify-state]",),
    ),
    Mutant(
        "receipt-of-a-set-not-asked",
        "A retry that goes in a set is a first try, although an earlier one was answered.",
        "email_verification.py",
        (("if guess.intent.earlier(receipt) or (row", "if (row"),),
        ("tests/test_sets.py::test_each_is_decided_as_if_it_were_alone[verify]",),
    ),
    Mutant(
        "link-of-an-answered-call-spent",
        "A retry that goes in a set spends its link although its earlier try was answered.",
        "sql/one_time_tokens.sql",
        (
            (
                "  where r.request_id is null or (\n    select p.retries = 0\n",
                "  where r.request_id is null or (\n    select true\n",
            ),
        ),
        ("tests/test_sql.py::test_links_whose_receipts_are_answered",),
    ),
    Mutant(
        "error-of-one-told-to-all",
        "What is refused to one call of a set is refused to all.",
        "sets.py",
        (("            outcomes.append(error.with_traceback(None))\n", "            raise\n"),),
        ("tests/test_sets.py::test_what_one_raises_is_its_outcome",),
    ),
    Mutant(
        "doubtful-set-done-again",
        "A set of whose COMMIT nobody knows the outcome is decided once more, and a link that it spent is unknown.",
        "sets.py",
        (("(isinstance(error, StatementFailed) or not isinstance(error, OnetimeError)):", "True:"),),
        ("tests/test_sets.py::test_a_failure_of_the_database_is_everybodys",),
    ),
    Mutant(
        "late-set-done-again",
        "A call that waited for a connection and a lock waits for both again, and is cut off in doubt.",
        "sets.py",
        (("and now - waiting.since > LATE_S", "and False"),),
        ("tests/test_sets.py::test_who_waited_long_is_not_decided_anew",),
    ),
    Mutant(
        "late-call-fails-its-neighbours",
        "One call that waited long fails its whole set: whoever is behind a locked row takes others along.",
        "sets.py",
        (("and now - waiting.since > LATE_S", "and now - chosen[0].since > LATE_S"),),
        ("tests/test_sets.py::test_who_waited_long_fails_nobody_else",),
    ),
    Mutant(
        "set-not-narrowed-down",
        "All calls of a set fail with the one that makes it fail.",
        "sets.py",
        (("if len(chosen) > 1 and (isinstance", "if False and (isinstance"),),
        ("tests/test_sets.py::test_a_set_that_fails_is_narrowed_down",),
    ),
    Mutant(
        "receipt-of-a-refused-call-kept",
        "A call that was refused in a set is taken for answered when it is repeated.",
        "receipts.py",
        (("if isinstance(outcome, Exception) and receipt is None", "if False"),),
        ("tests/test_sets.py::test_each_is_decided_as_if_it_were_alone[consume]",),
    ),
    Mutant(
        "array-not-quoted",
        "A quote in an address makes it two elements of an array, and every call of its set another's.",
        "db.py",
        (('if "\\\\" in text or \'"\' in text:', "if False:"),),
        ("tests/test_db.py::test_no_text_becomes_two",),
    ),
    Mutant(
        "set-dies-with-a-caller",
        "One caller who hangs up takes the outcomes of the whole set along.",
        "sets.py",
        (("if self.outcome.cancelled():", "if False:"),),
        ("tests/test_sets.py::test_who_hangs_up_later_is_decided",),
    ),
    Mutant(
        "gone-and-decided",
        "A call whose caller hung up while it waited for its set is decided all the same.",
        "sets.py",
        (("                self._queue.remove(waiting)\n", "                pass\n"),),
        ("tests/test_sets.py::test_who_hangs_up_in_the_queue_is_dropped",),
    ),
    Mutant(
        "slow-set-holds-up-all",
        "While a set waits for a lock, or for its connection, no other one begins.",
        "sets.py",
        (
            (
                "            passed = True\n            self._prompt = False\n            self._begin()\n",
                "            passed = False\n",
            ),
        ),
        ("tests/test_sets.py::test_a_slow_set_holds_up_nobody",),
    ),
    Mutant(
        "failure-spoils-statements",
        "After a trip that failed, a statement is taken for prepared that is not, and fails ever after.",
        "db.py",
        (("if self._cut_short:", "if False:"),),
        ("tests/test_sets.py::test_a_failure_spoils_no_statement",),
    ),
    # Purpose, user, address
    Mutant(
        "link-hash-without-type",
        "A link's hash does not hold its type, so that it is as good for another.",
        "crypto.py",
        (("_frame(token_type, secret)", "_frame(secret)"),),
        ("tests/test_crypto.py::test_two_different_links_are_never_stored_alike",),
    ),
    Mutant(
        "code-found-for-other-types",
        "A code is tried on the user's tokens of every type.",
        "sql/one_time_tokens.sql",
        (
            (
                "t.user_id = r.user_id and t.token_type = r.token_type and t.token_hash ~ '^ot[ch]1\\.'",
                "t.user_id = r.user_id and t.token_hash ~ '^ot[ch]1\\.'",
            ),
        ),
        ("tests/test_sql.py::test_lock_codes",),
    ),
    Mutant(
        "code-mac-without-type",
        "A code's hash does not hold its type.",
        "crypto.py",
        (("parts = (subject.token_type, subject.user_id", "parts = (subject.user_id"),),
        ("tests/test_crypto.py::test_code_is_good_for_its_subject_only",),
    ),
    Mutant(
        "code-mac-without-user",
        "A code's hash does not hold its user.",
        "crypto.py",
        (("subject.user_id.bytes, subject.relates_to, code", "subject.relates_to, code"),),
        ("tests/test_crypto.py::test_code_is_good_for_its_subject_only",),
    ),
    Mutant(
        "code-mac-without-address",
        "A code's hash does not hold its address.",
        "crypto.py",
        (("subject.relates_to, code, *row)", "code, *row)"),),
        ("tests/test_crypto.py::test_code_is_good_for_its_subject_only",),
    ),
    Mutant(
        "address-from-the-request",
        "An answer echoes the address of the request instead of telling the row's.",
        "one_time_tokens.py",
        (
            (
                "        return pb.IssueTokenResponse(",
                '        row = {**row, "relates_to": request.relates_to}\n        return pb.IssueTokenResponse(',
            ),
        ),
        ("tests/test_one_time_tokens.py::test_address_in_any_writing[argon2id]",),
    ),
    Mutant(
        "code-in-any-digits",
        "A code in the digits of another script is taken for a code.",
        "fields.py",
        (("value.isascii() and value.isdigit() and", "value.isdigit() and"),),
        ("tests/test_fields.py::test_refused",),
    ),
    # Cryptography
    Mutant(
        "pad-without-row",
        "One pad hides the codes of many rows, so that two of them tell their difference.",
        "crypto.py",
        (("_frame(row_id.bytes, user_id.bytes, token_hash)", "_frame(user_id.bytes, token_hash)"),),
        ("tests/test_crypto.py::test_sealed_code_is_worth_nothing_elsewhere",),
    ),
    Mutant(
        "shortage-is-a-wrong-code",
        "A code that cannot be compared for want of memory counts as a wrong one.",
        "crypto.py",
        (
            (
                (
                    "        except VerifyMismatchError:\n"
                    '            # Its parent VerificationError means "could not check", which must never'
                ),
                (
                    "        except VerificationError:\n"
                    '            # Its parent VerificationError means "could not check", which must never'
                ),
            ),
        ),
        ("tests/test_crypto.py::test_want_of_memory_is_no_wrong_code",),
    ),
    Mutant(
        "codes-from-random",
        "Codes come from a generator whose next number follows from the ones before.",
        "crypto.py",
        (
            ("import hmac\n", "import hmac\nimport random\n"),
            ("{secrets.randbelow(10**length):0{length}d}", "{random.randrange(10**length):0{length}d}"),
        ),
        ("--select=S311",),
        command=RUFF,
    ),
    Mutant(
        "compared-by-equality",
        "Codes are compared in a time that tells where they differ.",
        "crypto.py",
        (("    return hmac.compare_digest(presented, stored)", "    return presented == stored"),),
        ("tests/test_crypto.py::test_secrets_are_compared_in_constant_time",),
    ),
    Mutant(
        "code-compared-by-equality",
        "The servicer compares codes itself, in a time that tells where they differ.",
        "email_verification.py",
        (("if equal(guess.code, right_code):", "if guess.code == right_code:"),),
        ("tests/test_crypto.py::test_secrets_are_compared_in_constant_time",),
    ),
    # Retries
    Mutant(
        "receipts-of-all-callers",
        "Receipts are not kept apart by caller, so that one gets, or blocks, another's answer.",
        "receipts.py",
        (
            (
                "return self.call.caller, self.call.method, self.request_id",
                'return "", self.call.method, self.request_id',
            ),
        ),
        ("tests/test_ownership.py::test_a_receipt_is_its_callers_own",),
    ),
    Mutant(
        "request-id-reused",
        "Another request under a request_id that was used gets the first one's answer.",
        "receipts.py",
        (("            raise RequestIdReused\n", "            pass\n"),),
        ("tests/test_receipts.py::test_other_content_is_refused[argon2id first]",),
    ),
    Mutant(
        "retry-charged-twice",
        "A retry that finds its charge pending is charged again.",
        "one_time_tokens.py",
        (
            (
                "(earlier := intents[0].earlier(receipts[0])):\n            return [await self._charged_before",
                "(earlier := None):\n            return [await self._charged_before",
            ),
        ),
        ("tests/test_receipts.py::test_wrong_code_whose_verdict_was_lost[argon2id first]",),
    ),
    Mutant(
        "receipt-without-answer",
        "The answer of a call that spends a link is not kept, so that its retry is told that there is no such link.",
        "one_time_tokens.py",
        (
            (
                "await transaction.commit(*settle(*spent), *drop_refused(intents, receipts, outcomes))",
                "await transaction.commit(*drop(*intents))",
            ),
        ),
        ("tests/test_receipts.py::test_repeated_consume_gets_the_same_answer[argon2id first-0]",),
    ),
    # Mail
    Mutant(
        "mail-not-leased",
        "A mail that is being sent is due again at once, for another courier.",
        "sql/outbox.sql",
        (("due_at = clock_timestamp() + make_interval(secs => %(lease)s)", "due_at = clock_timestamp()"),),
        ("tests/test_sql.py::test_mails_are_claimed_once_and_for_a_time",),
    ),
    Mutant(
        "mail-not-confirmed",
        "A mail is sent although its verification was used or cancelled while it was made.",
        "courier.py",
        (("return bool(found)", "return True"),),
        ("tests/test_courier.py::test_no_mail_that_is_on_its_way_for_a_verification_that_is_over",),
    ),
    Mutant(
        "code-sent-when-queued",
        "A code is said to be sent before any mail server has it.",
        "sql/email_verification.sql",
        (
            (
                "select id, user_id, token_hash, sealed_code, false, now",
                "select id, user_id, token_hash, sealed_code, true, now",
            ),
        ),
        ("tests/test_courier.py::test_a_mail_whose_end_is_not_known",),
    ),
    Mutant(
        "code-sent-never",
        "That the mail server has accepted a mail is not told.",
        "sql/outbox.sql",
        (("  set code_sent = true\n", "  set code_sent = false\n"),),
        ("tests/test_sql.py::test_what_became_of_mails_is_recorded",),
    ),
    Mutant(
        "resend-undone-by-a-late-answer",
        "What is heard late of a mail is recorded of the one that was queued in its place.",
        "sql/outbox.sql",
        (
            (
                "where o.verification_id = sent.verification_id and o.message_id = sent.message_id",
                "where o.verification_id = sent.verification_id",
            ),
        ),
        ("tests/test_sql.py::test_what_became_of_mails_is_recorded",),
    ),
    Mutant(
        "resend-undone-by-a-late-failure",
        "A mail that is given up late takes the one along that was queued in its place.",
        "sql/outbox.sql",
        (
            (
                "where o.verification_id = r.verification_id and o.message_id = r.message_id and o.tries = r.tries",
                "where o.verification_id = r.verification_id",
            ),
        ),
        ("tests/test_sql.py::test_what_became_of_mails_is_recorded",),
    ),
    Mutant(
        "mail-of-a-dead-verification",
        "A code that cannot be used any more, after too many wrong ones, is mailed.",
        "sql/outbox.sql",
        (("  and s.failed_attempts < %(max_attempts)s\n", ""),),
        ("tests/test_sql.py::test_mails_are_confirmed_while_they_are_wanted",),
    ),
    Mutant(
        "address-kept-after-the-end",
        "The address stays in the outbox when its verification has been used or cancelled.",
        "sql/outbox.sql",
        (
            (
                (
                    "and forget their addresses.\nupdate onetime.outbox as o\n"
                    "set sealed_address = null, due_at = null,\n"
                ),
                "and forget their addresses.\nupdate onetime.outbox as o\nset due_at = null,\n",
            ),
        ),
        ("tests/test_sql.py::test_mails_of_verifications_that_are_over_end",),
    ),
    Mutant(
        "address-in-plain-text",
        "Addresses lie in the outbox as they are, for whoever gets a dump.",
        "crypto.py",
        (
            (
                '        return _seal(key, key.address, address.encode(), _frame("address", key.id, row_id.bytes))\n',
                '        return key.id.encode() + b"." + address.encode()\n',
            ),
        ),
        ("tests/test_crypto.py::test_sealed_address_is_not_to_be_read_or_changed",),
    ),
    Mutant(
        "mail-tried-for-ever",
        "A mail on which couriers die is tried again and again.",
        "courier.py",
        (
            ('if row["tries"] > self._settings.mail_tries:', "if False:"),
            ('if not error.permanent and row["tries"] < self._settings.mail_tries:', "if not error.permanent:"),
        ),
        ("tests/test_courier.py::test_a_mail_is_given_up",),
    ),
    Mutant(
        "refused-mail-tried-again",
        "A mail that the server has refused for good is sent again and again.",
        "smtp.py",
        (("return self.failure in (ADDRESS_REFUSED, MESSAGE_REFUSED)", "return False"),),
        ("tests/test_smtp.py::test_what_answers_mean",),
    ),
    Mutant(
        "mail-with-a-name-for-each-try",
        "A mail that is sent twice, since nobody heard of its end, cannot be told to be the same one.",
        "courier.py",
        (
            (
                'message_id=row["message_id"],\n            date',
                'message_id=__import__("uuid").uuid4(),\n            date',
            ),
        ),
        ("tests/test_courier.py::test_a_mail_whose_end_is_not_known",),
    ),
    Mutant(
        "certificate-of-the-mail-server-not-checked",
        "Codes, and the password, go to whoever answers in the mail server's place.",
        "smtp.py",
        (
            (
                "        return ssl.create_default_context(cafile=server.ca)\n",
                (
                    "        ssl.create_default_context(cafile=server.ca)\n"
                    "        return ssl._create_unverified_context()\n"
                ),
            ),
        ),
        ("tests/test_smtp.py::test_a_certificate_that_is_not_right",),
    ),
    Mutant(
        "starttls-optional",
        "Where somebody in between takes STARTTLS out of the mail server's answer, mail goes in plain text.",
        "smtp.py",
        (('start_tls=server.tls == "starttls",', 'start_tls=None if server.tls == "starttls" else False,'),),
        ("tests/test_smtp.py::test_a_server_without_starttls",),
    ),
    Mutant(
        "html-not-escaped",
        "What the product is called is HTML to the mail.",
        "mail.py",
        (('autoescape=lambda name: name is not None and name.endswith(".html"),', "autoescape=False,"),),
        ("tests/test_mail.py::test_any_product_and_code_come_out_as_they_went_in",),
    ),
    Mutant(
        "misspelt-variable-is-empty",
        "What a template shows of something that is not there is nothing, and nobody is told.",
        "mail.py",
        (("undefined=jinja2.StrictUndefined,", "undefined=jinja2.Undefined,"),),
        ("tests/test_mail.py::test_every_fault_is_told_at_once",),
    ),
    Mutant(
        "templates-out-of-their-sandbox",
        "Whoever may write a template runs code in the service.",
        "mail.py",
        (("    return SandboxedEnvironment(\n", "    return jinja2.Environment(\n"),),
        ("tests/test_mail.py::test_template_stays_in_its_sandbox",),
    ),
    Mutant(
        "line-break-in-a-header",
        "A product's name ends its header, and begins another one.",
        "mail.py",
        (
            (
                '    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):\n',
                "    if False:\n",
            ),
        ),
        ("tests/test_mail.py::test_control_characters_make_no_header",),
    ),
    Mutant(
        "digits-are-look-alikes",
        "An address of digits is taken for one that deceives, and gets no mail.",
        "fields.py",
        (("any(letters and letters <= look_alikes", "any(letters <= look_alikes"),),
        ("tests/test_fields.py::test_mailbox",),
    ),
    Mutant(
        "smtp-url-quoted",
        "What is not understood of the mail server's URL is shown, with the password in it.",
        "config.py",
        (("        raise ValueError(_RIGHT_SMTP_URL) from None\n", "        raise\n"),),
        ("tests/test_config.py::test_parse_smtp_url_refuses",),
    ),
    # The clean-up
    Mutant(
        "sweep-waits-for-a-mail",
        "A sweep waits for the courier, which has locked the mail of what is swept.",
        "sql/cleanup.sql",
        (
            (
                (
                    "  where o.verification_id = any (array(select token.id from token))\n"
                    "  for update of o skip locked\n"
                ),
                "  where o.verification_id = any (array(select token.id from token))\n  for update of o\n",
            ),
        ),
        ("tests/test_cleanup.py::test_locked_rows_are_passed_over[onetime.outbox]",),
    ),
    Mutant(
        "sweep-pairs-rows",
        "A sweep of many dead rows compares each of them with each, and never comes to its end.",
        "sql/cleanup.sql",
        (("set_config('enable_hashjoin', 'on', true)", "set_config('enable_hashjoin', 'off', true)"),),
        ("tests/test_cleanup.py::test_two_clean_ups_at_once",),
    ),
    Mutant(
        "set-counts-as-one-write",
        "Under load, when sets are large, the clean-up falls behind what is written.",
        "cleanup.py",
        (
            (
                "chance(1 - (1 - self._settings.cleanup_probability) ** writes)",
                "chance(self._settings.cleanup_probability)",
            ),
        ),
        ("tests/test_sets.py::test_the_chance_of_a_clean_up_is_that_of_each_write",),
    ),
    # Callers
    Mutant(
        "others-verifications-found",
        "A caller sees the verifications that others have started.",
        "email_verification.py",
        (("None if call.permissions.any_caller else call.caller)", "None)"),),
        ("tests/test_ownership.py::test_a_caller_sees_its_own_verifications",),
    ),
    Mutant(
        "code-resent-to-any-caller",
        "Whoever holds the frontend's token gets the code by having it sent again.",
        "email_verification.py",
        ((' and row["caller"] == call.caller', ""),),
        ("tests/test_ownership.py::test_any_caller_sees_all_and_gets_no_code",),
    ),
    Mutant(
        "api-key-in-plain-text",
        "An API key is taken from a connection that anybody can listen to.",
        "callers.py",
        (('if list(connection.get("transport_security_type", ())) != [b"ssl"]:', "if False:"),),
        ("tests/test_callers.py::test_the_port_of_health_serves_nothing_else",),
    ),
    Mutant(
        "common-name-is-identity",
        "Of a certificate without other names, the common name is taken for its caller.",
        "crypto.py",
        (
            (
                "        return ()\n",
                (
                    "        of = x509.load_pem_x509_certificate(pem).subject\n"
                    "        return tuple(str(x.value) for x in of.get_attributes_for_oid(x509.NameOID.COMMON_NAME))\n"
                ),
            ),
        ),
        ("tests/test_callers.py::test_a_certificate_on_every_rpc",),
    ),
    Mutant(
        "unlisted-rpc",
        "A caller of the policy may call what the policy does not grant.",
        "interceptors.py",
        (("and not call.permissions.may_call(rpc):", "and False:"),),
        ("tests/test_callers.py::test_an_api_key_on_every_rpc",),
    ),
    Mutant(
        "unlisted-token-type",
        "A caller may deal with tokens of every type, whatever the policy says.",
        "call.py",
        (("return self.token_types is None or token_type in self.token_types", "return True"),),
        ("tests/test_ownership.py::test_types_of_tokens_are_granted_one_by_one",),
    ),
    Mutant(
        "streams-past-identity",
        "Streams, and so reflection, are for everybody.",
        "interceptors.py",
        (
            (
                "        if call.service == HEALTH:\n            return await proceed(call)\n        authorizations",
                (
                    "        if call.service == HEALTH or call.kind != UNARY:\n            return await proceed(call)\n"
                    "        authorizations"
                ),
            ),
        ),
        ("tests/test_callers.py::test_an_api_key_on_every_rpc",),
    ),
    Mutant(
        "broken-policy-in-part",
        "Of a policy with faults, the rest is put in force.",
        "callers.py",
        (("    if faults:\n        raise ValueError", "    if not permissions:\n        raise ValueError"),),
        ("tests/test_callers.py::test_the_faults_of_all_callers_are_told_together",),
    ),
    Mutant(
        "broken-policy-allows-everything",
        "With a policy that cannot be read, nobody is asked who they are.",
        "app.py",
        (("            problems.extend(str(error).splitlines())\n", ""),),
        ("tests/test_callers.py::test_a_file_that_is_not_right_stops_the_start[no policy]",),
    ),
    Mutant(
        "broken-keys-empty-the-ring",
        "A file of keys that is broken while the service runs takes the keys away.",
        "reload.py",
        (
            (
                "        except ValueError as error:\n            self._fail(",
                (
                    "        except ValueError as error:\n"
                    '            getattr(self.in_force, "_by_id", {}).clear()\n'
                    "            self._fail("
                ),
            ),
        ),
        ("tests/test_reload.py::test_a_broken_file_changes_nothing",),
    ),
    # Bounds
    Mutant(
        "places-without-bound",
        "Any number of calls and of hashes is let in.",
        "places.py",
        (("if held >= _SHARE * self._free:", "if False:"),),
        ("tests/test_overload.py::test_calls_under_way_are_bounded_and_shared",),
    ),
    Mutant(
        "calls-not-admitted",
        "Calls under way are not counted.",
        "interceptors.py",
        (
            (
                "            room, holder = places, call.caller\n",
                "            return await proceed(call)\n",
            ),
        ),
        ("tests/test_overload.py::test_calls_under_way_are_bounded_and_shared",),
    ),
    Mutant(
        "watches-unbounded",
        "Whoever likes holds as many watches of health open as memory has room for.",
        "interceptors.py",
        (("        elif call.kind == UNARY:\n            return", "        elif call.kind:\n            return"),),
        ("tests/test_overload.py::test_watches_of_health_are_bounded",),
    ),
    Mutant(
        "budget-made-and-not-locked",
        "Of sends at once, each sees the budget as it was when it came; a clean-up takes it from under them.",
        "sql/budgets.sql",
        (("do update set purpose = excluded.purpose where false", "do nothing"),),
        ("tests/test_budgets.py::test_a_send_that_waits_counts_those_before_it",),
    ),
    Mutant(
        "budgets-of-a-set-not-locked",
        "A set of sends counts on budgets that other servers are counting on.",
        "sql/budgets.sql",
        (("for update of b skip locked\n", ""),),
        ("tests/test_sql.py::test_budgets_that_somebody_else_has_locked",),
    ),
    Mutant(
        "first-send-of-a-set-counted-twice",
        "A set counts a send on a budget that it has made with that send.",
        "budgets.py",
        (("there = [subject for subject in sent if subject not in made]", "there = list(sent)"),),
        ("tests/test_sets.py::test_each_is_decided_as_if_it_were_alone",),
    ),
    Mutant(
        "send-that-came-to-nothing-counted",
        "A set leaves budgets of users who are unknown: whoever makes ids up fills the table.",
        "budgets.py",
        (("forgotten = made.difference(sent)", "forgotten = made.difference(made)"),),
        ("tests/test_sets.py::test_each_is_decided_as_if_it_were_alone",),
    ),
    Mutant(
        "purge-without-the-budgets",
        "PurgeUser misses a token that is replaced while it waits.",
        "sql/admin.sql",
        (
            (
                "delete from auth.one_time_tokens as t where t.user_id = any (%(user_ids)s::uuid[])",
                (
                    "delete from auth.one_time_tokens as t using auth.one_time_tokens as f"
                    " where t.id = f.id and f.user_id = any (%(user_ids)s::uuid[])"
                ),
            ),
            ("where b.user_id = any (%(user_ids)s::uuid[])\norder by", "where false\norder by"),
        ),
        ("tests/test_admin.py::test_purge_takes_what_is_replaced_meanwhile",),
    ),
    Mutant(
        "right-code-charged-when-the-check-fails",
        "A right code stays charged where the database fails after it.",
        "one_time_tokens.py",
        (
            (
                "        except DatabaseUnavailable:\n            with suppress(",
                "        except ZeroDivisionError:\n            with suppress(",
            ),
        ),
        ("tests/test_one_time_tokens.py::test_a_failure_after_the_right_code_costs_nothing[check]",),
    ),
    Mutant(
        "health-needs-admission",
        "A server that is busy looks like one that is dead.",
        "interceptors.py",
        (
            (
                "        elif call.kind == UNARY:\n            return await proceed(call)\n",
                "        elif call.kind == UNARY:\n            room, holder = places, call.caller\n",
            ),
        ),
        ("tests/test_overload.py::test_health_is_always_admitted",),
    ),
    Mutant(
        "argon2-on-the-event-loop",
        "While a code is hashed, no other call is served.",
        "hashing.py",
        (
            (
                "            self._executor.submit(self._work, asyncio.get_running_loop())\n",
                "            self._work(asyncio.get_running_loop())\n",
            ),
        ),
        ("tests/test_overload.py::test_the_event_loop_does_not_hash",),
    ),
    Mutant(
        "all-that-wait-charged-ahead",
        "Codes that wait to be compared are charged already, so that a server that dies costs each of them an attempt.",
        "hashing.py",
        (("self._turns.total() < self._most:", "self._turns.total() < 10**6:"),),
        ("tests/test_overload.py::test_codes_that_wait_are_not_charged",),
    ),
    Mutant(
        "locked-budget-of-a-code-taken-for-none",
        "While somebody else has locked a budget, a code is judged as if there were none.",
        "sql/one_time_tokens.sql",
        (("  l.id is null or b.user_id is null and exists (", "  l.id is null or false and exists ("),),
        ("tests/test_sql.py::test_codes_that_somebody_else_has_locked",),
    ),
    Mutant(
        "argon2-queue-without-bound",
        "Any number of codes waits to be hashed.",
        "hashing.py",
        (("Places(threads + queue)", "Places(10**9)"),),
        ("tests/test_overload.py::test_codes_beyond_the_queue_are_refused_at_once",),
    ),
    # The database
    Mutant(
        "doubt-told-as-certainty",
        "Of a COMMIT whose outcome nobody heard, the caller is told that nothing happened.",
        "db.py",
        (
            (
                "        return OutcomeUnknown()\n    if isinstance",
                "        return DatabaseUnavailable()\n    if isinstance",
            ),
        ),
        ("tests/test_faults.py::test_a_connection_is_lost_around_commit[after]",),
    ),
    Mutant(
        "synchronous-commit-not-set",
        "On a database with synchronous_commit off, what was acknowledged is lost in a crash.",
        "sql/db.sql",
        (("in ('off', 'local')", "in ('none')"),),
        ("tests/test_app.py::test_commits_are_on_disk_whatever_the_database_says",),
    ),
    Mutant(
        "fsync-not-asked",
        "The service starts on a database that loses what it acknowledged.",
        "sql/app.sql",
        (("current_setting('fsync') = 'off'", "false"),),
        ("tests/test_app.py::test_a_database_that_cannot_be_trusted_is_refused[fsync]",),
    ),
    # What is told
    Mutant(
        "exception-text-told",
        "The text of an exception, with rows and secrets in it, is sent to the client.",
        "interceptors.py",
        (
            (
                "        refusal = InternalError()\n",
                "        refusal = PlainStatus(grpc.StatusCode.INTERNAL, str(error))\n",
            ),
        ),
        ("tests/test_interceptors.py::test_a_bug_tells_the_client_nothing[raise_plain]",),
    ),
    Mutant(
        "secrets-logged",
        "Fields that the contract marks as secret are logged.",
        "logs.py",
        (("return bool(field.GetOptions().debug_redact)", "return False"),),
        ("tests/test_logs.py::test_what_is_shown_of_a_request",),
    ),
    Mutant(
        "audit-without-caller",
        "The log does not tell who made a call.",
        "interceptors.py",
        (('        "caller": call.caller,\n', ""),),
        ("tests/test_interceptors.py::test_the_line_of_a_call",),
    ),
)
