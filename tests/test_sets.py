import asyncio
import gc
import json
import logging
import re
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, LiteralString

import grpc.aio
import psycopg
import pytest
from calls import (
    ADDRESS,
    Client,
    Database,
    connected,
    ended,
    expire,
    new_id,
    open_channel,
    reason,
    refusal,
    serving,
    until,
    verification_row,
    wrong,
)
from conftest import PostgresServer, Serve, free_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer
from psycopg.rows import dict_row

from service import sets
from service.call import EVERYTHING, Call, calls_served, current_call
from service.cleanup import Cleanup
from service.config import Settings
from service.crypto import Keyring, new_key
from service.db import Database as Pool
from service.db import StatementFailed, Transaction, load_queries, skipping_locked
from service.email_verification import EmailVerifications
from service.errors import DatabaseUnavailable, OnetimeError, OutcomeUnknown, TokenExpired, TokenNotFound
from service.hashing import Hashing
from service.migrations import migrate
from service.one_time_tokens import OneTimeTokens
from service.sets import Outcome, Sets, Skipped, each

NEVER_S: Final = 3600.0
"""So long after its beginning a set is slow where a test is not about that."""

PROPERTY: Final = settings(deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


# Sets alone


@dataclass(frozen=True, slots=True)
class Element:
    """What a call brings: its name, and what it is about."""

    name: str
    keys: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class Begun:
    """A set that has begun, and ends when the test says so."""

    names: list[str]
    calls: list[str]
    """The calls that the task which decides it serves, and a task that it starts."""
    end: asyncio.Future[Sequence[Outcome[str]]]

    def answer(self, **outcomes: Exception) -> None:
        """Decide the set: each element is done, but for those whose outcomes are named."""
        self.end.set_result([outcomes.get(name, f"{name} done") for name in self.names])

    def fail(self, error: Exception) -> None:
        """Fail as a whole."""
        self.end.set_exception(error)


class Desk:
    """Where the sets of a test are decided. A class because it remembers them."""

    def __init__(self, largest: int = 128) -> None:
        """Make what the tests' calls go through."""
        self.begun: list[Begun] = []
        self.sets: Sets[Element, str] = Sets("tests", self._decide, keys=lambda element: element.keys, largest=largest)
        self.seen = 0

    async def _decide(self, elements: Sequence[Element]) -> Sequence[Outcome[str]]:
        served = [call.call_id for call in calls_served()]
        assert await asyncio.create_task(_served()) == served
        begun = Begun([element.name for element in elements], served, asyncio.get_running_loop().create_future())
        self.begun.append(begun)
        return await begun.end

    def call(self, name: str, *keys: str) -> asyncio.Task[str]:
        """Make a call, as a server does: in a task of its own."""
        return asyncio.create_task(called(name, partial(self.sets.run, Element(name, frozenset(keys)))))

    async def next(self) -> Begun:
        """Return the next set that begins."""
        await idle()
        self.seen += 1
        return self.begun[self.seen - 1]

    async def busy(self) -> Begun:
        """Make a call that goes at once; what comes while it is under way is queued."""
        call = self.call("busy")
        begun = await self.next()
        assert begun.names == ["busy"]
        call.add_done_callback(asyncio.Task.result)
        return begun

    async def none(self) -> None:
        """See that no other set begins."""
        await idle()
        assert [begun.names for begun in self.begun[self.seen :]] == []


async def _served() -> list[str]:
    return [call.call_id for call in calls_served()]


async def called(name: str, work: Callable[[], Coroutine[Any, Any, str]]) -> str:
    """Do the work of a call."""
    current_call.set(Call("onetime.v1.Tests", "Test", name))
    return await work()


async def idle() -> None:
    """Let all tasks go on until each of them waits for something."""
    for _ in range(sets.QUIET_TURNS + 20):
        await asyncio.sleep(0)


async def ends(*tasks: asyncio.Task[str]) -> list[str | BaseException]:
    """Return how calls have ended, all of which must have."""
    await idle()
    assert all(task.done() for task in tasks)
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of a test is slow, unless it says so."""
    monkeypatch.setattr(sets, "SLOW_S", NEVER_S)


@pytest.fixture
def desk() -> Desk:
    """Where the sets of this test are decided."""
    return Desk()


@contextmanager
def nothing_lost(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """See that no task and no future ends with an exception that nobody looks at."""
    lost: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: lost.append(context))
    yield
    gc.collect()
    assert lost == []


@contextmanager
def unheard() -> Iterator[list[tuple[str, str]]]:
    """Collect the audit lines of decisions that nobody heard: the call and its outcome."""
    lines: list[tuple[str, str]] = []

    class Collector(logging.Handler):
        """A class because logging asks for one."""

        def emit(self, record: logging.LogRecord) -> None:
            """Take a line."""
            line: Any = record.msg
            if isinstance(line, dict):
                assert (line["event"], line["heard"]) == ("audit", False)
                lines.append((line["call_id"], line["outcome"]))

    collector, log = Collector(), logging.getLogger("service.db")
    log.addHandler(collector)
    try:
        yield lines
    finally:
        log.removeHandler(collector)


async def test_a_lone_call_waits_for_no_clock(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that stands still, on which no timer ever fires, a lone call is decided, as a set of one."""
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    for name in ("a", "b"):
        call = desk.call(name)
        begun = await desk.next()
        assert begun.names == [name]
        begun.answer()
        assert await ends(call) == [f"{name} done"]
    await desk.none()


async def test_calls_that_come_meanwhile_go_together(desk: Desk) -> None:
    """What comes while a set is under way goes together in the next one, in its order, and not before."""
    first = await desk.busy()
    calls = [desk.call(name) for name in "bcd"]
    await desk.none()
    first.answer()
    second = await desk.next()
    assert second.names == ["b", "c", "d"]
    calls.append(desk.call("e"))
    await desk.none()
    second.answer()
    third = await desk.next()
    assert third.names == ["e"]
    third.answer()
    assert await ends(*calls) == [f"{name} done" for name in "bcde"]


async def test_a_set_begins_when_it_has_enough(desk: Desk) -> None:
    """Where one call comes after the other, and it is never quiet, a set does not wait for all of them."""
    first = await desk.busy()
    calls = [desk.call(str(number)) for number in range(2)]
    await desk.none()
    first.answer()
    for number in range(2, 2 * sets.ENOUGH):
        calls.append(desk.call(str(number)))
        await asyncio.sleep(0)
    second = await desk.next()
    assert sets.ENOUGH <= len(second.names) < sets.ENOUGH + 4  # a call takes some turns until it is in the queue
    await desk.none()
    second.answer()
    third = await desk.next()
    assert second.names + third.names == [str(number) for number in range(2 * sets.ENOUGH)]
    third.answer()
    assert await ends(*calls) == [f"{number} done" for number in range(2 * sets.ENOUGH)]


async def test_no_set_is_larger_than_the_largest() -> None:
    """What does not fit goes in the sets after the next one, in its order."""
    desk = Desk(largest=3)
    first = await desk.busy()
    calls = [desk.call(name) for name in "abcdefgh"]
    await desk.none()
    first.answer()
    for names in ("abc", "def", "gh"):
        begun = await desk.next()
        assert begun.names == list(names)
        begun.answer()
    assert await ends(*calls) == [f"{name} done" for name in "abcdefgh"]


async def test_who_shares_a_key_waits(desk: Desk) -> None:
    """Of calls about one thing each waits for the one before it, also while that one goes alone; others do not."""
    first = await desk.busy()
    calls = [desk.call("k1", "k"), desk.call("b"), desk.call("k2", "k", "l"), desk.call("l1", "l")]
    await desk.none()
    first.answer()
    second = await desk.next()
    assert second.names == ["k1", "b", "l1"]
    second.answer(k1=Skipped())
    alone = await desk.next()
    assert alone.names == ["k1"]
    calls += [desk.call("c"), desk.call("k3", "k")]
    third = await desk.next()
    assert third.names == ["c"]
    third.answer()
    await desk.none()
    alone.answer()
    for name in ("k2", "k3"):
        begun = await desk.next()
        assert begun.names == [name]
        begun.answer()
    assert await ends(*calls) == [f"{name} done" for name in ["k1", "b", "k2", "l1", "c", "k3"]]


async def test_an_error_of_one_is_its_own(desk: Desk) -> None:
    """What is refused to one is nothing to its neighbours, and a call that must go alone is decided then."""
    first = await desk.busy()
    calls = [desk.call(name) for name in "abcd"]
    await desk.none()
    first.answer()
    error, bug = TokenNotFound(), ValueError("a bug")
    (await desk.next()).answer(b=error, c=Skipped(), d=bug)
    alone = await desk.next()
    assert alone.names == ["c"]
    assert [call.done() for call in calls] == [True, True, False, True]
    expired = TokenExpired()
    alone.answer(c=expired)
    assert await ends(*calls) == ["a done", error, expired, bug]
    await desk.none()


def test_what_one_raises_is_its_outcome() -> None:
    """`each` decides all elements whatever one raises, and its errors of ours hold on to nothing."""

    def decide(number: int, name: str) -> str:
        if number == 1:
            raise TokenNotFound
        if number == 2:
            raise KeyError(name)
        return name

    first, second, third, fourth = each(decide, range(4), "abcd")
    assert (first, fourth) == ("a", "d")
    assert isinstance(second, TokenNotFound)
    assert second.__traceback__ is None
    assert isinstance(third, KeyError)


@pytest.mark.parametrize("error", [StatementFailed(), ValueError("a bug")], ids=["statement", "bug"])
async def test_a_set_that_fails_is_narrowed_down(desk: Desk, error: Exception) -> None:
    """A set that fails as a whole is done again in halves until the culprit is alone; all others get their results."""
    first = await desk.busy()
    calls = [desk.call(name) for name in "abcdefg"]
    await desk.none()
    first.answer()
    tried = []
    while not all(call.done() for call in calls):
        begun = await desk.next()
        tried.append("".join(begun.names))
        if "c" in begun.names:
            begun.fail(error)
        else:
            begun.answer()
        await idle()
    assert tried[0] == "abcdefg"
    assert "c" in tried
    # Twice for each time that seven can be halved.
    assert len(tried) <= 1 + 2 * 3
    assert await ends(*calls) == ["a done", "b done", error, *(f"{name} done" for name in "defg")]
    await desk.none()


@pytest.mark.parametrize("error", [DatabaseUnavailable(), OutcomeUnknown()], ids=lambda error: str(error.reason))
async def test_a_failure_of_the_database_is_everybodys(desk: Desk, error: OnetimeError) -> None:
    """What would fail each call alone, or may have taken effect, is not repeated; each call has an error of its own."""
    first = await desk.busy()
    calls = [desk.call(name) for name in "abcd"]
    await desk.none()
    first.answer()
    (await desk.next()).fail(error)
    await desk.none()
    outcomes = await ends(*calls)
    assert [type(outcome) for outcome in outcomes] == [type(error)] * 4
    assert [str(outcome) for outcome in outcomes] == [str(error)] * 4
    assert len({id(outcome) for outcome in outcomes}) == 4


async def test_who_waited_long_is_not_decided_anew(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where calls have waited long when their set fails, all are told, and none has to wait once more."""
    monkeypatch.setattr(sets, "LATE_S", -1.0)
    first = await desk.busy()
    calls = [desk.call(name) for name in "abc"]
    await desk.none()
    first.answer()
    (await desk.next()).fail(StatementFailed())
    assert all(isinstance(end, StatementFailed) for end in await ends(*calls))
    await desk.none()


async def test_who_waited_long_fails_nobody_else(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one call has waited long when its set fails, it is told; the others, who have not, are decided anew."""
    monkeypatch.setattr(sets, "LATE_S", 0.3)
    first = await desk.busy()
    old = desk.call("old", "k")
    await desk.none()
    await asyncio.sleep(0.4)
    calls = [desk.call(name) for name in "abcd"]
    first.answer()
    begun = await desk.next()
    assert begun.names == ["old", "a", "b", "c", "d"]
    begun.fail(StatementFailed())
    again = desk.call("again", "k")
    for names in (["a", "b"], ["c", "d"], ["again"]):
        begun = await desk.next()
        assert begun.names == names
        begun.answer()
    assert await ends(*calls, again) == ["a done", "b done", "c done", "d done", "again done"]
    assert isinstance((await ends(old))[0], StatementFailed)
    await desk.none()


async def test_a_key_is_free_as_soon_as_its_call_is_decided(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a slow set is decided in halves, who waits for a key of the first one does not wait for the second one."""
    first = await desk.busy()
    calls = [desk.call("a", "k"), desk.call("b"), desk.call("c"), desk.call("d")]
    await desk.none()
    monkeypatch.setattr(sets, "SLOW_S", 0.0)
    first.answer()
    begun = await desk.next()
    assert begun.names == ["a", "b", "c", "d"]
    waiting = desk.call("again", "k")
    begun.fail(StatementFailed())
    (await desk.next()).answer()
    await idle()
    names = {tuple(begun.names): begun for begun in desk.begun[desk.seen :]}
    assert set(names) == {("c", "d"), ("again",)}
    for begun in names.values():
        begun.answer()
    assert await ends(*calls, waiting) == ["a done", "b done", "c done", "d done", "again done"]


async def test_who_hangs_up_in_the_queue_is_dropped(desk: Desk) -> None:
    """A call that is cancelled before its set has begun is never decided, and there is nothing to record."""
    with nothing_lost(asyncio.get_running_loop()), unheard() as lines:
        first = await desk.busy()
        calls = [desk.call(name, "k") for name in "abc"]
        await desk.none()
        calls[1].cancel()
        await idle()
        assert calls[1].cancelled()
        first.answer()
        for name in "ac":
            begun = await desk.next()
            assert begun.names == [name]
            begun.answer()
        assert (await ends(*calls[::2])) == ["a done", "c done"]
        await desk.none()
        assert lines == []


async def test_who_hangs_up_later_is_decided(desk: Desk) -> None:
    """A call that is cancelled after its set has begun gets away at once, is decided, and what was decided is logged.

    Also where it goes alone in the end, and where its set fails.
    """
    with nothing_lost(asyncio.get_running_loop()), unheard() as lines:
        first = await desk.busy()
        calls = [desk.call(name, name) for name in "abcde"]
        await desk.none()
        first.answer()
        begun = await desk.next()
        for call in calls[1:]:
            call.cancel()
        await idle()
        assert [call.cancelled() for call in calls] == [False, *[True] * 4]
        assert lines == []
        begun.answer(c=TokenNotFound(), d=Skipped(), e=ValueError("a bug"))
        alone = await desk.next()
        assert (alone.names, lines) == (["d"], [("b", "OK"), ("c", "TOKEN_NOT_FOUND"), ("e", "INTERNAL")])
        last = desk.call("f", "d")
        await desk.none()
        alone.fail(OutcomeUnknown())
        begun = await desk.next()
        assert (begun.names, lines[3:]) == (["f"], [("d", "OUTCOME_UNKNOWN")])
        last.cancel()
        begun.fail(DatabaseUnavailable())
        await idle()
        assert last.cancelled()
        assert lines[4:] == [("f", "DATABASE_UNAVAILABLE")]


async def test_a_look_that_nobody_hears_is_no_decision() -> None:
    """Where nothing is decided but only looked at, there is no audit line for what nobody heard."""
    end = asyncio.Event()

    async def look(elements: Sequence[Element]) -> Sequence[Outcome[str]]:
        await end.wait()
        return [TokenNotFound() for _ in elements]

    looks: Sets[Element, str] = Sets("tests", look, keys=lambda _: (), decides=False)
    with nothing_lost(asyncio.get_running_loop()), unheard() as lines:
        call = asyncio.create_task(called("a", partial(looks.run, Element("a"))))
        await idle()
        call.cancel()
        end.set()
        await idle()
        assert call.cancelled()
        assert lines == []


async def test_a_slow_set_holds_up_nobody(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next set begins when one has become slow, and when that ends no more than one prompt set is under way."""
    monkeypatch.setattr(sets, "SLOW_S", 0)
    slow = await desk.busy()
    monkeypatch.setattr(sets, "SLOW_S", NEVER_S)
    calls = [desk.call("c")]
    prompt = await desk.next()
    assert prompt.names == ["c"]
    calls += [desk.call(name) for name in "de"]
    await desk.none()
    slow.answer()
    await desk.none()
    calls.append(desk.call("f"))
    await desk.none()
    prompt.answer()
    last = await desk.next()
    assert last.names == ["d", "e", "f"]
    calls.append(desk.call("g"))
    await desk.none()
    last.answer()
    (await desk.next()).answer()
    assert await ends(*calls) == [f"{name} done" for name in "cdefg"]


async def test_what_waits_goes_when_a_set_becomes_slow(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was queued before a set became slow begins then, but for what is about the same as it."""
    monkeypatch.setattr(sets, "SLOW_S", 0.05)
    calls = [desk.call("a", "a")]
    slow = await desk.next()
    monkeypatch.setattr(sets, "SLOW_S", NEVER_S)
    calls += [desk.call("a2", "a"), desk.call("b")]
    async with asyncio.timeout(20):
        while len(desk.begun) < 2:  # noqa: ASYNC110 - it begins by a timer
            await asyncio.sleep(0.001)
    second = await desk.next()
    assert second.names == ["b"]
    second.answer()
    await desk.none()
    slow.answer()
    (await desk.next()).answer()
    assert await ends(*calls) == ["a done", "a2 done", "b done"]


async def test_a_set_serves_its_calls_and_no_others(desk: Desk) -> None:
    """The task that decides a set serves the calls of that set, and so do the tasks that it starts."""
    first = await desk.busy()
    calls = [desk.call(name) for name in "bcd"]
    await desk.none()
    first.answer()
    second = await desk.next()
    second.answer(c=Skipped())
    alone = await desk.next()
    alone.answer()
    await ends(*calls)
    assert [begun.calls for begun in (first, second, alone)] == [["busy"], ["b", "c", "d"], ["c"]]
    assert calls_served() == ()


# Sets alone, at random


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call of a history does. Times are turns of the event loop."""

    keys: frozenset[str]
    arrives: int
    takes: int
    """How long its set takes, if no other of the set takes longer."""
    ends: str
    """ok; error: its own; skip: it must go alone; statement, bug: its set fails; database, doubt: as a whole."""
    hangs_up: int | None
    """How long after its arrival."""


PLANS: Final = st.builds(
    Plan,
    keys=st.frozensets(st.sampled_from("xyz"), max_size=2),
    arrives=st.integers(0, 40),
    takes=st.integers(0, 6),
    ends=st.sampled_from(["ok", "ok", "ok", "ok", "error", "skip", "skip", "statement", "bug", "database", "doubt"]),
    hangs_up=st.none() | st.integers(0, 12),
)


class History:
    """Calls as they were planned, and what became of them. A class because its sets and its calls share it."""

    def __init__(self, plans: Sequence[Plan], largest: int) -> None:
        """Take the plans; a call is named by the number of its plan."""
        self.plans = [*plans]
        self.sets: Sets[int, str] = Sets(
            "tests", self._decide, keys=lambda number: self.plans[number].keys, largest=largest
        )
        self.largest = largest
        self.begun: set[int] = set()
        self.open: set[int] = set()
        """What has begun, and is not decided yet."""
        self.first_tries = 0
        """Sets under way that were not left by another set."""
        self.most_first_tries = 0
        self.decided: Counter[int] = Counter()
        self.together: dict[int, frozenset[int]] = {}
        """The sets that failed as a whole, by their elements."""

    async def _decide(self, numbers: Sequence[int]) -> Sequence[Outcome[str]]:
        assert len(set(numbers)) == len(numbers) <= self.largest
        again = self.begun & set(numbers)
        assert again in (set(), set(numbers))
        if not again:
            assert list(numbers) == sorted(numbers, key=lambda number: (self.plans[number].arrives, number))
            self.first_tries += 1
            self.most_first_tries = max(self.most_first_tries, self.first_tries)
        assert again <= self.open
        self.begun.update(numbers)
        self.open.update(numbers)
        keys = [key for number in self.open for key in self.plans[number].keys]
        assert len(set(keys)) == len(keys), "two that share a key are decided at the same time"
        try:
            for _ in range(max(self.plans[number].takes for number in numbers)):
                await asyncio.sleep(0)
            return self._outcomes(numbers)
        finally:
            self.first_tries -= not again

    def _outcomes(self, numbers: Sequence[int]) -> Sequence[Outcome[str]]:
        ends = {number: self.plans[number].ends for number in numbers}
        alone = len(numbers) == 1
        for end, culprit in (("statement", StatementFailed()), ("bug", ValueError("a bug"))):
            if end in ends.values():
                if alone:
                    self._settled(numbers)
                raise culprit
        for end, whole in (("database", DatabaseUnavailable()), ("doubt", OutcomeUnknown())):
            if end in ends.values():
                self.together.update(dict.fromkeys(numbers, frozenset(numbers)))
                self._settled(numbers)
                raise whole
        skipped = [number for number in numbers if ends[number] == "skip" and not alone]
        self._settled(number for number in numbers if number not in skipped)
        return [
            Skipped() if number in skipped else KeyError(number) if ends[number] == "error" else f"{number} done"
            for number in numbers
        ]

    def _settled(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.decided[number] += 1
            self.open.remove(number)

    async def live(self) -> list[str | BaseException]:
        """Make all calls, and return how they ended."""
        calls = []
        for turn in range(1 + max(plan.arrives + (plan.hangs_up or 0) for plan in self.plans)):
            for number, plan in enumerate(self.plans):
                if plan.arrives == turn:
                    calls.append((number, asyncio.create_task(called(str(number), partial(self.sets.run, number)))))
                if plan.hangs_up is not None and plan.arrives + plan.hangs_up == turn:
                    dict(calls)[number].cancel()
            await asyncio.sleep(0)
        ended = await asyncio.gather(
            *(call for _, call in sorted(calls, key=lambda each: each[0])), return_exceptions=True
        )
        async with asyncio.timeout(20):
            while self.open:  # noqa: ASYNC110 - what nobody hears
                await asyncio.sleep(0)
        await idle()
        return ended

    def check(self, number: int, end: str | BaseException) -> None:
        """See that a call ended as what it was decided to be."""
        plan = self.plans[number]
        if number in self.together:
            wanted = {self.plans[other].ends for other in self.together[number]}
            kinds = {"database": DatabaseUnavailable, "doubt": OutcomeUnknown}
            assert type(end) in [kind for word, kind in kinds.items() if word in wanted]
        elif plan.ends in ("ok", "skip"):
            assert end == f"{number} done"
        else:
            kind = {"error": KeyError, "statement": StatementFailed, "bug": ValueError}[plan.ends]
            assert type(end) is kind
            assert plan.ends != "error" or (isinstance(end, BaseException) and end.args == (number,))


@PROPERTY
@given(st.lists(PLANS, min_size=1, max_size=25), st.integers(1, 8), st.booleans())
def test_histories(plans: list[Plan], largest: int, slow: bool) -> None:  # noqa: FBT001 - hypothesis passes it
    """Whatever calls arrive, share, take, fail and hang up.

    Each is decided once, or dropped before its set has begun; each hears its own outcome, or it is on record; no two
    that share a key are decided at the same time; a second set begins while one is under way only if that is slow;
    nothing stays behind.
    """

    async def live() -> None:
        with nothing_lost(asyncio.get_running_loop()), unheard() as lines:
            history = History(plans, largest)
            ended = await history.live()
            assert slow or history.most_first_tries <= 1
            assert not history.open
            heard = {number for number, end in enumerate(ended) if not isinstance(end, asyncio.CancelledError)}
            for number, end in enumerate(ended):
                assert history.decided[number] == (number in history.begun)
                if number in heard:
                    assert number in history.begun
                    history.check(number, end)
            # An error object is no two calls'.
            errors = [id(end) for end in ended if isinstance(end, BaseException)]
            assert len(set(errors)) == len(errors)
            assert sorted(int(call) for call, _ in lines) == sorted(history.begun - heard)
            # Whose keys were still in use would never begin.
            history.plans.append(Plan(frozenset("xyz"), 99, 0, "ok", None))
            async with asyncio.timeout(20):
                assert await called("last", partial(history.sets.run, len(plans))) == f"{len(plans)} done"

    gc.freeze()  # so that only what the history leaves is collected, which is many times faster
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sets, "SLOW_S", 0 if slow else NEVER_S)
            # Fewer than it takes the last ones to hang up, so that some do so while they are decided.
            patch.setattr(sets, "QUIET_TURNS", 8)
            asyncio.run(live())
    finally:
        gc.unfreeze()


# Sets of real calls

MANY: Final = 1000
"""Sends that a user may cause here, where tests are not about that."""

NEIGHBOURS: Final = 12
WAITING: Final = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
PAUSED: Final = "select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"
TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Host:
    """A host's database, which two servers share, and all tests of this module: each takes users of its own."""

    url: str
    targets: tuple[str, str]
    pages: tuple[str, str]
    """Where their metrics are."""


@pytest.fixture(scope="module")
def host(postgres_18: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host whose users are its own, and whose one-time tokens refer to them too.

    At the end: none of the tests made a deadlock, of which callers would have been told DATABASE_UNAVAILABLE.
    """
    folder = tmp_path_factory.mktemp("servers")
    metrics = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    limits = {"sends_per_window": MANY, "sends_per_day": MANY, "code_hashing": "hmac"}
    with postgres_18.database() as url:
        with connected(url) as database:
            database.execute("create table public.users (id uuid primary key, name text)")
            asyncio.run(_migrate(url))
            database.execute("alter table auth.one_time_tokens add foreign key (user_id) references public.users (id)")
            _make_pauses(database)
        with (
            serving(url, folder, metrics_listen=metrics[0], **limits) as one,
            serving(url, folder, metrics_listen=metrics[1], **limits) as other,
        ):
            log_start = postgres_18.log.stat().st_size
            yield Host(url, (one, other), (f"http://{metrics[0]}/metrics", f"http://{metrics[1]}/metrics"))
            with postgres_18.log.open("rb") as log:
                log.seek(log_start)
                assert b"deadlock detected" not in log.read()


async def _migrate(url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        await migrate(connection)


def _make_pauses(database: Database) -> None:
    """Let tests stop whoever writes to a table, in the middle of the statement."""
    database.execute("create table public.pauses (table_name name, seconds float8)")
    database.execute("""
        create function public.pause() returns trigger language plpgsql as $$
        begin
          perform pg_sleep(p.seconds) from public.pauses as p where p.table_name = tg_table_name;
          return null;
        end
        $$
    """)
    for table in ("auth.one_time_tokens", "onetime.budgets"):
        database.execute(
            f"create trigger pause before insert on {table} for each statement execute function public.pause()"
        )


@pytest.fixture
def database(host: Host) -> Iterator[Database]:
    """A connection to the host's database."""
    with connected(host.url) as connection:
        yield connection


@pytest.fixture
async def clients(host: Host) -> AsyncIterator[list[Client]]:
    """A client of each server."""
    async with AsyncExitStack() as stack, asyncio.timeout(TIMEOUT_S):
        channels = [await stack.enter_async_context(open_channel(target)) for target in host.targets]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        yield [Client(channel) for channel in channels]


@pytest.fixture
def client(clients: list[Client]) -> Client:
    """A client of the first server."""
    return clients[0]


def add_users(database: Database, count: int) -> list[str]:
    """Make users of the host."""
    ids = [new_id() for _ in range(count)]
    database.execute("insert into public.users (id) select unnest(%s::uuid[])", [ids])
    return ids


def metric(page: str, name: str) -> float:
    """Return the value of a time series of a server."""
    with urllib.request.urlopen(page, timeout=10) as answer:  # noqa: S310 - our own, over HTTP
        found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def begun(page: str, kind: str) -> tuple[float, float]:
    """Return how many sets of a kind have begun, and with how many calls."""
    count, total = (metric(page, f'onetime_set_elements_{name}{{kind="{kind}"}}') for name in ("count", "sum"))
    return count, total


def shared(host: Host, kind: str) -> float:
    """Return how many calls of a kind went in a set that another one had been put in before them."""
    count, total = begun(host.pages[0], kind)
    return total - count


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of call that goes in sets: what is there before it, and how it is made."""

    name: str
    """As metrics have it."""
    rpc: str
    prepare: Callable[[Client, str], Coroutine[Any, Any, Any]]
    """For a user of the host."""
    call: Callable[[Client, Any, str], Coroutine[Any, Any, Any]]
    """With what was prepared, and a request_id."""
    done: LiteralString
    """Counts what the call has done for a user."""

    def __str__(self) -> str:
        """Name the test."""
        return self.name


async def _issued(client: Client, user: str) -> str:
    await client.issue(user)
    return user


async def _nothing(client: Client, user: str) -> str:
    del client
    return user


VERIFY: Final = Kind(
    "verify",
    "VerifyCode",
    lambda client, user: client.start(user),
    lambda client, started, request_id: client.verify(started, request_id=request_id),
    "select from public.email_verification_tokens where user_id = %s and used_at is not null",
)
CONSUME: Final = Kind(
    "consume",
    "ConsumeToken",
    lambda client, user: client.issue(user),
    lambda client, issued, request_id: client.consume(issued, request_id=request_id),
    "select where not exists (select from auth.one_time_tokens where user_id = %s)",
)
CHARGE: Final = Kind(
    "charge",
    "ConsumeToken",
    lambda client, user: client.issue(user, digits=6),
    lambda client, issued, request_id: client.consume(issued, request_id=request_id),
    "select where not exists (select from auth.one_time_tokens where user_id = %s)",
)
ISSUE: Final = Kind(
    "issue",
    "IssueToken",
    _issued,
    lambda client, user, request_id: client.issue(user, request_id=request_id),
    "select from onetime.budgets where user_id = %s and cardinality(sends) = 2",
)
START: Final = Kind(
    "start",
    "StartEmailVerification",
    _nothing,
    lambda client, user, request_id: client.start(user, request_id=request_id),
    "select from public.email_verification_tokens where user_id = %s",
)

RECEIPT: Final = "insert into onetime.receipts (caller, rpc, request_id, fingerprint) select 'anonymous', %(rpc)s, %(request_id)s, ''"  # fmt: skip # noqa: E501
BUDGET: Final = "select from onetime.budgets where user_id = %(user)s for update"
TOKEN: Final = "select from auth.one_time_tokens where user_id = %(user)s for update"
TOKEN_STATE: Final = "select from onetime.one_time_token_states where user_id = %(user)s for update"
VERIFICATION: Final = "select from public.email_verification_tokens where user_id = %(user)s for update"
VERIFICATION_STATE: Final = (
    "select from onetime.email_verification_states where id in"
    " (select id from public.email_verification_tokens where user_id = %(user)s) for update"
)
NEW_BUDGET: Final = "insert into onetime.budgets (user_id, purpose) values (%(user)s, 'email_verification')"
USER: Final = "select from public.users where id = %(user)s for update"

LOCKS: Final[dict[str, tuple[Kind, LiteralString]]] = {
    "verify-verification": (VERIFY, VERIFICATION),
    "verify-state": (VERIFY, VERIFICATION_STATE),
    "verify-budget": (VERIFY, BUDGET),
    "verify-receipt": (VERIFY, RECEIPT),
    "consume-token": (CONSUME, TOKEN),
    "consume-state": (CONSUME, TOKEN_STATE),
    "consume-receipt": (CONSUME, RECEIPT),
    "charge-token": (CHARGE, TOKEN),
    "charge-state": (CHARGE, TOKEN_STATE),
    "charge-budget": (CHARGE, BUDGET),
    "charge-receipt": (CHARGE, RECEIPT),
    "issue-budget": (ISSUE, BUDGET),
    "issue-token": (ISSUE, TOKEN),
    "issue-receipt": (ISSUE, RECEIPT),
    "start-budget": (START, NEW_BUDGET),
    "start-user": (START, USER),
    "start-receipt": (START, RECEIPT),
}


@dataclass(frozen=True, slots=True)
class Crowd:
    """Calls that arrive together, those of the first two users about rows that the test has locked."""

    users: list[str]
    request_ids: list[str]
    calls: list[asyncio.Task[Any]]
    again: Callable[[int], Coroutine[Any, Any, Any]]
    """Repeats a call."""


@asynccontextmanager
async def crowd(host: Host, client: Client, kind: Kind, lock: LiteralString) -> AsyncIterator[Crowd]:
    """Make many calls of a kind while the rows of the first two are locked, until the end of this context.

    The first call goes alone and waits, so that the others have all arrived when the next set begins.
    """
    with connected(host.url) as database:
        users = add_users(database, 2 + NEIGHBOURS)
    made = await asyncio.gather(*(kind.prepare(client, user) for user in users))
    request_ids = [new_id() for _ in users]

    def call(number: int) -> Coroutine[Any, Any, Any]:
        return kind.call(client, made[number], request_ids[number])

    with connected(host.url) as holder, holder.transaction(force_rollback=True):
        for user, request_id in zip(users[:2], request_ids[:2], strict=True):
            params = {"user": user, "request_id": request_id, "rpc": kind.rpc}
            assert holder.execute(lock, params).rowcount == 1
        yield Crowd(users, request_ids, [asyncio.create_task(call(number)) for number in range(len(users))], call)


@pytest.mark.parametrize("name", LOCKS)
async def test_a_locked_row_holds_up_its_own_call_only(
    host: Host, client: Client, database: Database, name: str
) -> None:
    """Calls that go with one whose row is locked are answered while it is; that one is when the lock has gone."""
    kind, lock = LOCKS[name]
    before = shared(host, kind.name)
    async with crowd(host, client, kind, lock) as calls:
        await asyncio.gather(*calls.calls[2:])
        assert not any(call.done() for call in calls.calls[:2])
    await asyncio.gather(*calls.calls)
    assert shared(host, kind.name) - before >= NEIGHBOURS // 2
    for user in calls.users:
        assert database.execute(kind.done, [user]).rowcount == 1


async def test_a_row_that_stays_locked(host: Host, client: Client, database: Database) -> None:
    """Where the lock does not go in time, its calls are told so, nothing has happened, and they can be repeated."""

    async def one(name: str) -> None:
        kind, lock = LOCKS[name]
        async with crowd(host, client, kind, lock) as calls:
            await asyncio.gather(*calls.calls[2:])
            assert [await reason(call) for call in calls.calls[:2]] == ["DATABASE_UNAVAILABLE"] * 2
            for user, request_id in zip(calls.users[:2], calls.request_ids[:2], strict=True):
                assert database.execute(kind.done, [user]).rowcount == 0
                assert (
                    database.execute("select from onetime.receipts where request_id = %s", [request_id]).rowcount == 0
                )
        await asyncio.gather(*(calls.again(number) for number in range(2)))
        for user in calls.users:
            assert database.execute(kind.done, [user]).rowcount == 1

    await asyncio.gather(*map(one, ("verify-state", "consume-token", "issue-token", "start-user")))


# What each is told, and what is left of it


@dataclass(slots=True)
class Case:
    """A call of a set, and what is about it."""

    call: Callable[[], Coroutine[Any, Any, Any]]
    users: list[str]
    request_id: str = ""


async def _verify_cases(client: Client, database: Database) -> dict[str, Case]:
    """Give a verification in each state, and guesses at it, new ones and repeated ones."""
    names = ["right", "wrong", "expired", "used", "cancelled", "exhausted", "repeat", "repeat-wrong", "reused"]
    names += ["unnamed", "unknown", "limited", "last"]
    users = dict(zip(names, add_users(database, len(names)), strict=True))
    started = dict(zip(names, await asyncio.gather(*map(client.start, users.values())), strict=True))
    started["unknown"].email_verification_token = "A" * len(started["right"].email_verification_token)
    codes = {name: started[name].code for name in names}
    ids = {name: new_id() for name in names} | {"unnamed": ""}
    codes["wrong"] = codes["repeat-wrong"] = wrong(codes["wrong"])
    codes["repeat-wrong"] = wrong(started["repeat-wrong"].code)
    expire(database, started["expired"])
    await client.verify(started["used"])
    await client.cancel(started["cancelled"])
    for number in range(5):
        await reason(client.verify(started["exhausted"], wrong(codes["exhausted"], by=number + 1)))
    await client.verify(started["repeat"], request_id=ids["repeat"])
    await reason(client.verify(started["repeat-wrong"], codes["repeat-wrong"], request_id=ids["repeat-wrong"]))
    await reason(client.verify(started["reused"], wrong(codes["reused"]), request_id=ids["reused"]))
    database.execute(
        "update onetime.budgets set failures = array_fill(clock_timestamp(), array[10]) where user_id = %s",
        [users["limited"]],
    )
    return {
        name: Case(partial(client.verify, started[name], codes[name], request_id=ids[name]), [users[name]], ids[name])
        for name in names
    }


async def _consume_cases(client: Client, database: Database) -> dict[str, Case]:
    """Give a link in each state, and uses of it, new ones and repeated ones."""
    names = ["right", "expired", "used", "repeat", "reused", "unnamed", "unknown", "revoked", "last"]
    users = dict(zip(names, add_users(database, len(names)), strict=True))
    issued = dict(zip(names, await asyncio.gather(*map(client.issue, users.values())), strict=True))
    ids = {name: new_id() for name in names} | {"unnamed": ""}
    expire(database, issued["expired"])
    await client.consume(issued["used"])
    await client.revoke(users["revoked"])
    await client.consume(issued["repeat"], request_id=ids["repeat"])
    (other,) = add_users(database, 1)
    await client.consume(await client.issue(other), request_id=ids["reused"])
    issued["unknown"].secret = "A" * len(issued["right"].secret)
    return {
        name: Case(partial(client.consume, issued[name], request_id=ids[name]), [users[name]], ids[name])
        for name in names
    }


async def _charge_cases(client: Client, database: Database) -> dict[str, Case]:
    """Give a code in each state, and guesses at it, new ones and repeated ones."""
    names = ["right", "wrong", "expired", "used", "exhausted", "repeat", "repeat-wrong", "reused", "unnamed"]
    names += ["by-address", "wrong-unnamed", "unknown", "unknown-unnamed", "limited", "last"]
    users = dict(zip(names, add_users(database, len(names)), strict=True))
    issued = {
        name: await client.issue(user, digits=6, relates_to=f"{user}@example.com") for name, user in users.items()
    }
    codes = {name: each.secret for name, each in issued.items()}
    ids = {name: "" if name.endswith("unnamed") else new_id() for name in names}
    for name in ("wrong", "repeat-wrong", "wrong-unnamed"):
        codes[name] = wrong(codes[name])
    expire(database, issued["expired"])
    await client.consume(issued["used"])
    for number in range(5):
        await reason(client.consume(issued["exhausted"], wrong(codes["exhausted"], by=number + 1)))
    await client.consume(issued["repeat"], request_id=ids["repeat"])
    await reason(client.consume(issued["repeat-wrong"], codes["repeat-wrong"], request_id=ids["repeat-wrong"]))
    await reason(client.consume(issued["reused"], wrong(codes["reused"]), request_id=ids["reused"]))
    await client.revoke(users["unknown"])
    await client.revoke(users["unknown-unnamed"])
    database.execute(
        "update onetime.budgets set failures = array_fill(clock_timestamp(), array[10]) where user_id = %s",
        [users["limited"]],
    )
    return {
        name: Case(
            partial(client.consume, issued[name], codes[name], by_address=name == "by-address", request_id=ids[name]),
            [users[name]],
            ids[name],
        )
        for name in names
    }


async def _issue_cases(client: Client, database: Database) -> dict[str, Case]:
    """Give users in each state, and tokens to be issued to them, for new ones and repeated ones."""
    return await _make_cases(database, client.issue, "recovery_token")


async def _start_cases(client: Client, database: Database) -> dict[str, Case]:
    """Give users in each state, and verifications to be started for them, new ones and repeated ones."""
    return await _make_cases(database, client.start, "email_verification")


async def _make_cases(
    database: Database, make: Callable[..., Coroutine[Any, Any, Any]], purpose: str
) -> dict[str, Case]:
    names = ["new", "unknown", "repeat", "reused", "unnamed", "limited", "other", "unknown-unnamed", "last"]
    users = dict(zip(names, add_users(database, len(names)), strict=True))
    ids = {name: new_id() for name in names} | {"unnamed": "", "unknown-unnamed": ""}
    users["unknown"], users["unknown-unnamed"] = new_id(), new_id()
    await make(users["repeat"], request_id=ids["repeat"])
    await make(users["other"])
    await make(users["other"], request_id=ids["reused"])
    database.execute(
        "insert into onetime.budgets (user_id, purpose, sends)"
        " values (%s, %s, array_fill(clock_timestamp(), array[%s]))",
        [users["limited"], purpose, MANY],
    )
    return {name: Case(partial(make, users[name], request_id=ids[name]), [users[name]], ids[name]) for name in names}


CASES: Final = {
    VERIFY: _verify_cases,
    CONSUME: _consume_cases,
    CHARGE: _charge_cases,
    ISSUE: _issue_cases,
    START: _start_cases,
}
PLUGS: Final = {VERIFY: VERIFICATION, CONSUME: TOKEN, CHARGE: TOKEN, ISSUE: TOKEN, START: USER}
"""What holds up a call of each kind."""

LEFT: Final = """
    select
      (
        select json_agg(json_build_array(t.token_type, s.failed_attempts, s.caller, s.ttl) order by t.token_type)
        from auth.one_time_tokens as t
        left join onetime.one_time_token_states as s on s.token_id = t.id
        where t.user_id = any (%(users)s::uuid[])
      ) as tokens,
      (select count(*) from onetime.one_time_token_states as s where s.user_id = any (%(users)s::uuid[])) as states,
      (
        select json_agg(json_build_array(
          t.used_at is not null, t.deleted_at is not null, t.code_sent, s.failed_attempts, s.caller, s.delivery
        ) order by t.created_at)
        from public.email_verification_tokens as t
        left join onetime.email_verification_states as s on s.id = t.id
        where t.user_id = any (%(users)s::uuid[])
      ) as verifications,
      (
        select json_agg(json_build_array(
          b.purpose, cardinality(b.failures), b.failures_in_a_row, cardinality(b.sends)
        ) order by b.purpose)
        from onetime.budgets as b
        where b.user_id = any (%(users)s::uuid[])
      ) as budgets,
      (
        select json_agg(json_build_array(p.caller, p.rpc, p.row_id is null, p.answer is null) order by p.rpc)
        from onetime.receipts as p
        where p.request_id::text = %(request_id)s
      ) as receipts
"""
"""What is left of a case, without its times and names."""


async def told(case: Case) -> str:
    """Return all that a call is told that is not about its own names and times."""
    try:
        await case.call()
    except grpc.aio.AioRpcError as error:
        refused = refusal(error)
        return f"{refused.reason or refused.status} {dict(refused.metadata)} {refused.sentence}"
    return "OK"


def left(database: Database, case: Case) -> object:
    """Return what is left of a case."""
    return database.execute(LEFT, {"users": case.users, "request_id": case.request_id}).fetchall()


@pytest.mark.parametrize("kind", CASES, ids=str)
async def test_each_is_decided_as_if_it_were_alone(host: Host, client: Client, database: Database, kind: Kind) -> None:
    """A set of all there is, refused and accepted: each is told and leaves what it is told and leaves on its own."""
    alone = await CASES[kind](client, database)
    answers = {name: await told(case) for name, case in alone.items()}
    rows = {name: left(database, case) for name, case in alone.items()}
    together = await CASES[kind](client, database)
    assert [left(database, case) for case in together.values()] != [*rows.values()]
    before = shared(host, kind.name)
    async with crowd(host, client, kind, PLUGS[kind]) as calls:
        shuffled = sorted(together.items(), key=lambda each: each[0])
        ended = await asyncio.gather(*(told(case) for _, case in shuffled))
    await asyncio.gather(*calls.calls)
    assert shared(host, kind.name) - before >= len(together) // 2
    assert {name: answer for (name, _), answer in zip(shuffled, ended, strict=True)} == answers
    assert {name: left(database, case) for name, case in together.items()} == rows
    # There was something of each.
    assert len(set(answers.values())) >= 4
    assert list(answers.values()).count("OK") >= 3


@pytest.mark.parametrize("kind", [ISSUE, START], ids=str)
async def test_a_user_who_is_deleted_meanwhile(client: Client, database: Database, host: Host, kind: Kind) -> None:
    """Of users whom the host deletes between the look and the insert nothing is stored; the others get theirs."""
    users = add_users(database, 12)
    gone = users[:3]
    with connected(host.url) as other:
        with other.transaction():
            other.execute("delete from public.users where id = any (%s)", [gone])
            calls = [asyncio.create_task(ended(kind.call(client, user, new_id()))) for user in users]
            await until(lambda: database.execute(WAITING).rowcount > 0)
            # As soon as the first of them waits: the others are looked at before and after.
        outcomes = dict(zip(users, await asyncio.gather(*calls), strict=True))
    assert outcomes == {user: "USER_NOT_FOUND" if user in gone else "OK" for user in users}
    nobody = Case(partial(_nothing, client, ""), [new_id()])
    assert left(database, Case(nobody.call, gone)) == left(database, nobody)


# Limits and counts


async def repeated(call: Callable[[], Coroutine[Any, Any, Any]]) -> str:
    """Tell how a call ended; make it again where nothing happened, since one of many may wait too long for its turn."""
    while (word := await ended(call())) == "DATABASE_UNAVAILABLE":
        pass
    return word


async def test_wrong_codes_for_one_user_in_one_set(host: Host, client: Client, database: Database) -> None:
    """Wrong codes for one user that come together are judged one after the other, and counted each."""
    for _ in range(5):
        held, user = add_users(database, 2)
        busy, *started = [await client.start(held), *[await client.start(user) for _ in range(5)]]
        with connected(host.url) as holder, holder.transaction(force_rollback=True):
            holder.execute(
                "select from public.email_verification_tokens where id = %s for update", [busy.verification.id]
            )
            # The set of this one waits, and the others go together when it is slow.
            alone = asyncio.create_task(client.verify(busy))
            await asyncio.sleep(0.02)
            words = await asyncio.gather(*(ended(client.verify(each, wrong(each.code))) for each in started))
        await alone
        assert words == ["CODE_MISMATCH"] * 5
        (budget,) = database.execute(
            "select cardinality(failures) as failures, failures_in_a_row from onetime.budgets where user_id = %s",
            [user],
        ).fetchall()
        assert budget == {"failures": 5, "failures_in_a_row": 5}


async def test_wrong_codes_for_one_user(clients: list[Client], database: Database) -> None:
    """Of any number of wrong codes at once, for many verifications of one user, ten are compared and counted."""
    (user,) = add_users(database, 1)
    started = [await clients[0].start(user) for _ in range(8)]
    calls = [
        partial(clients[number % 2].verify, each, wrong(each.code, by=1 + number // 8))
        for number, each in enumerate(started * 5)
    ]
    counts = Counter(await asyncio.gather(*map(repeated, calls)))
    assert counts["CODE_MISMATCH"] == 10
    assert counts.keys() <= {"CODE_MISMATCH", "TOO_MANY_FAILURES", "ATTEMPTS_EXHAUSTED"}
    (budget,) = database.execute(
        "select cardinality(failures) as failures, failures_in_a_row from onetime.budgets where user_id = %s", [user]
    ).fetchall()
    assert budget == {"failures": 10, "failures_in_a_row": 10}
    attempts = [verification_row(database, each)["failed_attempts"] for each in started]
    assert sum(attempts) == 10
    assert max(attempts) <= 5
    assert await ended(clients[0].verify(started[0])) in ("TOO_MANY_FAILURES", "ATTEMPTS_EXHAUSTED")


COUNTS: Final = """
    select
      coalesce(max(cardinality(b.sends)) filter (where b.purpose = 'recovery_token'), 0) as issued,
      coalesce(max(cardinality(b.sends)) filter (where b.purpose = 'email_verification'), 0) as started,
      (
        select count(*)
        from auth.one_time_tokens as t
        join onetime.one_time_token_states as s on s.token_id = t.id
        where t.user_id = %(user)s and t.token_type = 'recovery_token'
      ) as tokens,
      (select count(*) from public.email_verification_tokens as t where t.user_id = %(user)s) as verifications
    from onetime.budgets as b
    where b.user_id = %(user)s
"""
"""What was counted for a user, and what there is."""


async def test_calls_of_all_kinds_and_callers_who_hang_up(
    host: Host, clients: list[Client], database: Database
) -> None:
    """Of three hundred calls every third hangs up, at any moment: no second success, and all counts are exact."""
    users = add_users(database, 20)
    links = await asyncio.gather(*(clients[0].issue(user, ott.TOKEN_TYPE_CONFIRMATION) for user in users))
    started = await asyncio.gather(*map(clients[1].start, add_users(database, 20)))
    calls: list[tuple[tuple[str, int], Callable[[], Coroutine[Any, Any, Any]]]] = []
    for number in range(20):
        for turn in range(3):
            client = clients[turn % 2]
            calls += [
                (("use", number), partial(client.consume, links[number], request_id=new_id() if turn else "")),
                (("right", number), partial(client.verify, started[number])),
                (("wrong", number), partial(client.verify, started[number], wrong(started[number].code, by=turn + 1))),
                (("issue", number), partial(client.issue, users[number])),
                (("start", number), partial(client.start, users[number], request_id=new_id() if turn else "")),
            ]
    calls.sort(key=lambda each: hash((each[0], id(each[1]))) % 1009)
    tasks = [asyncio.create_task(repeated(call)) for _, call in calls]
    for number, task in enumerate(tasks[::3]):
        asyncio.get_running_loop().call_later(0.004 * (number * 61 % 100), task.cancel)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    # Those who are served though they have hung up.
    await until(lambda: not any(metric(page, "onetime_calls_under_way") for page in host.pages))
    heard = Counter((kind, number, str(end)) for ((kind, number), _), end in zip(calls, ended, strict=True))
    assert {end for _, _, end in heard} <= {"OK", "", "TOKEN_NOT_FOUND", "TOKEN_USED", "CODE_MISMATCH"}
    assert sum(count for (_, _, end), count in heard.items() if not end) > 20
    for number, user in enumerate(users):
        consumed, used = heard["use", number, "OK"], heard["right", number, "OK"]
        assert consumed <= 1
        assert used <= 1
        if heard["use", number, "TOKEN_NOT_FOUND"] or consumed:
            assert (
                database.execute("select from auth.one_time_tokens where id = %s", [links[number].token.id]).rowcount
                == 0
            )
        row = verification_row(database, started[number])
        if heard["right", number, "TOKEN_USED"] or heard["wrong", number, "TOKEN_USED"] or used:
            assert row["used_at"] is not None
        mismatches = heard["wrong", number, "CODE_MISMATCH"]
        assert mismatches <= row["failed_attempts"] <= mismatches + heard["wrong", number, ""]
        (failures,) = database.execute(
            "select cardinality(failures) as count from onetime.budgets where user_id = %s", [row["user_id"]]
        ).fetchall()
        assert failures["count"] == row["failed_attempts"]
        (made,) = database.execute(COUNTS, {"user": user}).fetchall()
        assert made["tokens"] == min(made["issued"], 1)
        assert made["verifications"] == made["started"]
        for kind, sends in (("issue", made["issued"]), ("start", made["started"])):
            assert heard[kind, number, "OK"] <= sends <= heard[kind, number, "OK"] + heard[kind, number, ""]


# Lost connections, and time that is over


@pytest.mark.parametrize(
    ("table", "ends"), [("budgets", "OK"), ("one_time_tokens", "OUTCOME_UNKNOWN")], ids=["before", "in the commit"]
)
async def test_a_set_whose_connection_is_lost(
    host: Host, client: Client, database: Database, table: str, ends: str
) -> None:
    """What was lost before its COMMIT was sent is done again; then all are told that nobody knows, and can find out."""
    users = add_users(database, 12)
    ids = [new_id() for _ in users]
    sets_before, calls_before = begun(host.pages[0], "issue")

    def all_stopped() -> bool:
        number, total = begun(host.pages[0], "issue")
        return total - calls_before == 12 and database.execute(PAUSED).rowcount == number - sets_before < 12

    with pausing(database, table, 3):
        calls = [
            asyncio.create_task(ended(client.issue(user, request_id=request_id)))
            for user, request_id in zip(users, ids, strict=True)
        ]
        await until(all_stopped)
    database.execute(PAUSED.replace("select", "select pg_terminate_backend(pid)"))
    assert await asyncio.gather(*calls) == [ends] * 12
    for _ in range(2):
        retries = [
            repeated(partial(client.issue, user, request_id=request_id))
            for user, request_id in zip(users, ids, strict=True)
        ]
        assert await asyncio.gather(*retries) == ["OK"] * 12
    for user, request_id in zip(users, ids, strict=True):
        ((row),) = database.execute(LEFT, {"users": [user], "request_id": request_id}).fetchall()
        assert len(row["tokens"]) == row["states"] == len(row["receipts"]) == 1
        assert row["budgets"] == [["recovery_token", 0, 0, 1]]


@contextmanager
def pausing(database: Database, table: str, seconds: float) -> Iterator[None]:
    """Let whoever inserts into a table stop for some seconds in the middle of it."""
    database.execute("insert into public.pauses values (%s, %s)", [table, seconds])
    try:
        yield
    finally:
        database.execute("delete from public.pauses")


async def test_calls_that_are_cut_off_in_the_commit(serve: Serve, host: Host, database: Database) -> None:
    """Calls of a set whose time is over in the middle of the commit are all told, and how it ended is on record."""
    users = add_users(database, 10)
    async with serve(host.url, call_timeout="800ms", log_level="error") as server, server.channel() as channel:
        client = Client(channel)
        await client.list(users[0])
        with pausing(database, "one_time_tokens", 2):
            calls = [asyncio.create_task(ended(client.issue(user))) for user in users]
            await until(lambda: begun(server.metrics_url, "issue")[1] == 10)
        assert await asyncio.gather(*calls) == ["OUTCOME_UNKNOWN"] * 10

        assert begun(server.metrics_url, "issue")[0] <= 3

        def unheard_of() -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in server.log.read_text("utf-8").splitlines() if line.startswith("{")]
            return [line for line in lines if line.get("heard") is False]

        await until(lambda: len(unheard_of()) == 10)
        assert {line["outcome"] for line in unheard_of()} == {"OK"}
        assert sorted(line["user_id"] for line in unheard_of()) == sorted(users)


# What is counted


async def test_each_call_of_a_set_counts_as_a_write(host: Host, database: Database) -> None:
    """Calls that go together bring the chance of a clean-up of as many calls alone, and metrics tell of them."""
    writes: list[int] = []
    settings = Settings(database_url=host.url)
    ring, hashing = Keyring([new_key()]), Hashing(threads=1, queue=1)
    pool = Pool(host.url, pool_size=2, after_write=writes.append)
    await pool.open()
    try:
        tokens = OneTimeTokens(settings, pool, ring, ring.code_hasher(None), hashing)
        verifications = EmailVerifications(settings, pool, ring, adds_users=False, on_mail=None)
        users = add_users(database, 30)
        unused: Any = None

        async def calls(work: Iterable[Callable[[], Coroutine[Any, Any, Any]]]) -> list[Any]:
            async def one(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:  # noqa: ANN401 - a response
                current_call.set(Call("onetime.v1.Tests", "Test", "1", permissions=EVERYTHING))
                return await call()

            writes.clear()
            done = await asyncio.gather(*(asyncio.create_task(one(each)) for each in work))
            assert sum(writes) == len(done) == 30
            assert len(writes) <= 10
            return done

        def issue(user: str) -> ott.IssueTokenRequest:
            return ott.IssueTokenRequest(user_id=user, token_type=ott.TOKEN_TYPE_RECOVERY, relates_to=ADDRESS)

        def start(user: str) -> ev.StartEmailVerificationRequest:
            return ev.StartEmailVerificationRequest(user_id=user, return_code=ev.ReturnCode())

        issued = await calls(partial(tokens.IssueToken, issue(user), unused) for user in users)
        started = await calls(partial(verifications.StartEmailVerification, start(user), unused) for user in users)
        await calls(
            partial(
                tokens.ConsumeToken,
                ott.ConsumeTokenRequest(token_type=ott.TOKEN_TYPE_RECOVERY, link_secret=each.secret),
                unused,
            )
            for each in issued
        )
        await calls(
            partial(
                verifications.VerifyCode,
                ev.VerifyCodeRequest(email_verification_token=each.email_verification_token, code=each.code),
                unused,
            )
            for each in started
        )
    finally:
        await pool.close()
        hashing.close()


def test_the_chance_of_a_clean_up_is_that_of_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many writes at once start a sweep as often as they would one by one: by 1 - 0.9^n."""
    chances: list[float] = []

    def never(probability: float) -> bool:
        chances.append(probability)
        return False

    monkeypatch.setattr("service.cleanup.chance", never)
    cleanup = Cleanup(Settings())
    for writes in (1, 2, 10, 128):
        cleanup.maybe(writes)
    assert chances == pytest.approx([1 - 0.9**writes for writes in (1, 2, 10, 128)])


# Plans

ROWS: Final = 20_000
HOT: Final = [
    ("receipts", "claim_receipts"),
    ("receipts", "settle_receipts"),
    ("receipts", "drop_receipts"),
    ("budgets", "lock_budgets"),
    ("budgets", "read_budgets"),
    ("budgets", "claim_budgets"),
    ("budgets", "drop_budgets"),
    ("budgets", "spend_sends"),
    ("budgets", "charge_budgets"),
    ("budgets", "end_runs"),
    ("budgets", "forget_failures"),
    *(("one_time_tokens", name) for name in load_queries("one_time_tokens")),
    *(("email_verification", name) for name in load_queries("email_verification")),
    ("outbox", "queue_mails"),
    ("outbox", "requeue_mails"),
    ("outbox", "end_mails"),
]
SKIPPING: Final = {("one_time_tokens", "consume_links"), ("email_verification", "lock_verifications")}
PER_ELEMENT: Final = 60
"""Blocks that a statement may look at for each element, of a few indexes and tables."""


def prepared(database: Database, stem: str, name: str, *, skips: bool) -> tuple[str, list[str]]:
    """Prepare a statement by its name; return that, and the names of its parameters in their order."""
    query = load_queries(stem)[name]
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", query)))
    converted = PostgresQuery(Transformer(database))
    converted.convert(skipping_locked(query) if skips else query, dict.fromkeys(names))
    plan = f"{stem}_{name}_{skips}".lower()
    database.execute(b"prepare " + plan.encode() + b" as " + converted.query)
    return plan, names


def explained(database: Database, plan: str, values: Sequence[object], options: str = "") -> Mapping[str, Any]:
    """Return the plan of a prepared statement, with what it does if the options say so; that is undone."""
    listed = f"({', '.join(['%s'] * len(values))})" if values else ""
    with database.transaction(force_rollback=True), psycopg.ClientCursor(database, row_factory=dict_row) as cursor:
        (row,) = cursor.execute(f"explain ({options} format json) execute {plan}{listed}".encode(), values).fetchall()
    result: Mapping[str, Any] = row["QUERY PLAN"][0]["Plan"]
    return result


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give all nodes of a plan."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


@pytest.fixture(scope="module", params=["never analysed", "analysed"])
def grown(
    request: pytest.FixtureRequest, postgres_18: PostgresServer, template_url: str
) -> Iterator[tuple[Database, dict[tuple[str, str, bool], tuple[str, list[str]]]]]:
    """A session whose statements were planned while all tables were empty, and that nothing makes plan anew."""
    with postgres_18.database(template_url) as url, connected(url) as database:
        for table in TABLES:
            database.execute(f"alter table {table} set (autovacuum_enabled = false)")
        if request.param == "analysed":
            database.execute(f"vacuum (analyze) {', '.join(TABLES)}")
        limits = {"statement_timeout": "0", "lock_timeout": "0", "idle_timeout": "0"}
        database.execute(load_queries("db")["configure_session"], limits)
        plans = {}
        for stem, name in HOT:
            for skips in sorted({False, (stem, name) in SKIPPING}):
                plan, names = plans[stem, name, skips] = prepared(database, stem, name, skips=skips)
                values = parameters(names, [{}])
                explained(database, plan, values)
        with connected(url) as other:
            grow(other)
        yield database, plans


TABLES: Final[tuple[LiteralString, ...]] = (
    "auth.one_time_tokens",
    "public.users",
    "public.email_verification_tokens",
    "onetime.one_time_token_states",
    "onetime.email_verification_states",
    "onetime.receipts",
    "onetime.budgets",
    "onetime.outbox",
)


def grow(database: Database) -> None:
    """Write many rows of each kind, each number in all of them."""
    row_id = "lpad(to_hex(n), 32, '0')::uuid"
    database.execute(f"""
        with number as (
          select n, {row_id} as id, clock_timestamp() - interval '1 min' as made from generate_series(1, {ROWS}) as n
        ), tokens as (
          insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)
          select
            id, id, 'recovery_token', case n % 2 when 0 then 'otl1.k.' else 'otc1.k.' end || n, n || '@example.org',
            made at time zone 'utc', made at time zone 'utc'
          from number
        ), states as (
          insert into onetime.one_time_token_states (user_id, token_type, token_id, ttl, caller)
          select id, 'recovery_token', id, interval '1 h', 'tests' from number
        ), budgets as (
          insert into onetime.budgets (user_id, purpose, sends)
          select id, purpose, array[made] from number, unnest(array['recovery_token', 'email_verification']) as purpose
        ), receipts as (
          insert into onetime.receipts (caller, rpc, request_id, fingerprint)
          select 'tests', 'ConsumeToken', id, '' from number
        ), mails as (
          insert into onetime.outbox (verification_id, message_id, sealed_address, locale)
          select id, id, '', '' from number
        ), verifications as (
          insert into onetime.email_verification_states (token_hash, id, caller, delivery)
          select 'ev1.k.' || lpad(n::text, 128, '0'), id, 'tests', 'send_email' from number
        )
        insert into public.users (id) select id from number
    """)
    database.execute(f"""
        insert into public.email_verification_tokens (id, user_id, email_verification_token, code)
        select {row_id}, {row_id}, 'ev1.k.' || lpad(n::text, 128, '0'), '123456' from generate_series(1, {ROWS}) as n
    """)


def parameters(names: Sequence[str], elements: Sequence[Mapping[str, object]]) -> list[object]:
    """Return the parameters of a statement, by their names."""
    scalars = {"keep": 50}
    return [scalars[name] if name in scalars else [element.get(name) for element in elements] for name in names]


def element(stem: str, name: str, number: int) -> Mapping[str, object]:
    """Return the parameters of an element about the rows of a number; beyond the last one there are none."""
    row_id, unknown = uuid.UUID(int=number), number > ROWS
    verification = stem == "email_verification"
    kind = "otc1" if number % 2 else "otl1"
    token_hash = f"ev1.k.{number:0128d}" if verification else f"{kind}.k.{number}"
    made = {
        "ords": number,
        "ids": row_id,
        "user_ids": row_id,
        "purposes": "email_verification",
        "token_types": "recovery_token",
        "token_hashes": token_hash,
        "relates_to": f"{number}@example.org",
        "ttls": 900.0,
        "callers": "tests",
        "rpcs": "ConsumeToken",
        "request_ids": None if name == "consume_links" else row_id,
        "fingerprints": "",
        "row_ids": row_id,
        "verification_ids": row_id,
        "message_ids": row_id,
        "sealed_addresses": b"x",
        "deliveries": "return_code",
        "sealed_codes": "123456",
        "locales": "",
    }
    new = number + 10 * ROWS
    if name == "start_verifications":
        made |= {"ids": uuid.UUID(int=new), "token_hashes": f"ev1.k.{new:0128d}", "user_ids": uuid.UUID(int=1)}
    elif name in ("issue_tokens", "queue_mails"):
        made |= {"ids": uuid.UUID(int=new), "verification_ids": uuid.UUID(int=new)}
    elif name == "refresh_verifications":
        made |= {"token_hashes": f"ev1.k.{new:0128d}"}
    elif name in ("find_verifications", "lock_verifications") and number % 2:
        made |= {"ids": None}
    elif name == "lock_codes" and number % 4 == 1:
        made |= {"user_ids": None}
    if unknown and name == "consume_links":
        made |= {"request_ids": row_id}
    return made


@pytest.mark.parametrize(("stem", "name"), HOT, ids=[f"{stem}.{name}" for stem, name in HOT])
def test_plans_that_were_made_for_empty_tables(
    grown: tuple[Database, dict[tuple[str, str, bool], tuple[str, list[str]]]], stem: str, name: str
) -> None:
    """What is prepared while the tables are empty serves when they are full: no table or index is read whole."""
    database, plans = grown
    for skips in sorted({False, (stem, name) in SKIPPING}):
        plan, names = plans[stem, name, skips]
        for numbers in ([4001], [4003], [4004], [ROWS + 1], [ROWS + 2], [ROWS + 4], range(7000, 7020)):
            values = parameters(names, [element(stem, name, number) for number in numbers])
            read = explained(database, plan, values, "analyze, buffers, ")
            assert int(read["Shared Hit Blocks"] + read["Shared Read Blocks"]) <= PER_ELEMENT * len(numbers)
            assert not [node for node in nodes(read) if node["Node Type"] == "Seq Scan"]


async def test_a_failure_spoils_no_statement(migrated_url: str) -> None:
    """A statement that goes in a trip with one that fails works ever after, also if it was just to be prepared."""

    async def refused(transaction: Transaction) -> None:
        await transaction.fetch("select 1 as one", {})

    wanted = ("select %(number)s::int as number", {"number": 1})
    for times in range(8):
        pool = Pool(migrated_url, pool_size=1)
        await pool.open()
        try:
            # Psycopg does not heed a rollback if it has seen one before, when there was nothing prepared.
            await pool.run(refused)
            for _ in range(times):
                await pool.commit(wanted)
            with pytest.raises(psycopg.errors.DivisionByZero):
                await pool.commit(("select 1 / %(number)s::int as number", {"number": 0}), wanted)
            for _ in range(8):
                assert await pool.commit(wanted) == [[{"number": 1}]]
        finally:
            await pool.close()
