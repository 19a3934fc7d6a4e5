"""Sets: calls of one kind that are in flight together share their trips to the database, and their commit.

The costly part of a call is its trip to the database and its commit, and both cost nearly the same for many calls as
for one. So calls that arrive while a set is under way wait for it, and go together in the next one. Who comes when
nothing is under way goes at once: there is no timer, and a lone caller waits for nobody. A busy event loop first takes
in the calls that have arrived already, until they are enough.

    calls   a b c d e f
    sets    [a]  [b c d]  [e f]        time ->

What makes that safe:

- A set is decided in one transaction, element by element: what is refused to one is nothing to its neighbours.
- Two calls that may be about the same thing, by their keys, are never in one set, nor in two that overlap.
- A row that somebody else has locked is passed over where a statement can, and its call goes alone, where it may wait.
- A set that fails as a whole is done again in halves, until the culprit is alone. One whose statement cannot pass a
  locked row over fails so, when it has waited a little.
- A call that hangs up before its set has begun is dropped, and nothing happens. From then on it is decided whole.
- A set that takes long does not hold up those behind it.

The queue is bounded by admission: each place in it is that of a call under way.

It knows nothing of what the sets are about.
"""

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeAlias, TypeVar

from service.call import Call, current_call, serve_together
from service.db import StatementFailed, leave_unheard
from service.errors import InternalError, OnetimeError
from service.metrics import SET_ELEMENTS

Element = TypeVar("Element")
Result = TypeVar("Result")

LARGEST: Final = 128
"""Elements in a set. Beyond that there is little left to share, and the first to arrive waits for the last."""

QUIET_TURNS: Final = 32
"""Turns of the event loop without a further call, after which a set begins. They take some 200 microseconds when there
is nothing to do. A call comes in several steps, with turns between them in which nothing is seen: with no such wait the
sets of 64 callers had 4 elements."""

ENOUGH: Final = 24
"""Calls with which a set begins at once. The event loop takes in the next ones while PostgreSQL decides these: by 64
callers it has a sixth more throughput so than with sets of 48, and less again with sets of 8."""

SLOW_S: Final = 0.1
"""After so long a set does not hold up others any more: its connection may be lost, or a row be locked for long."""


LATE_S: Final = 0.9
"""Who has waited for so long when the set fails is told so, and not decided anew as the others are: to wait once more,
for a connection and then for a lock, might take longer than a call may. Cut off in its middle, it would end in doubt.
"""


class Skipped(Exception):
    """Outcome of an element that is not decided: somebody else has locked its row. It is to go alone."""


Outcome: TypeAlias = Result | Exception
"""What becomes of an element: what its call returns, or what it raises."""


def each(decide: Callable[..., Result], *columns: Iterable[Any]) -> list[Outcome[Result]]:
    """Decide for each element, and take what it raises for its outcome: it is nobody else's."""
    outcomes: list[Outcome[Result]] = []
    for element in zip(*columns, strict=True):
        try:
            outcomes.append(decide(*element))
        except OnetimeError as error:
            # Without its traceback, whose frames hold it: it would wait for the garbage collector.
            outcomes.append(error.with_traceback(None))
        except Exception as error:  # noqa: BLE001 - it is raised again, where its call waits
            outcomes.append(error)
    return outcomes


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Element, Result]):
    """A call that waits for its outcome."""

    call: Call
    element: Element
    keys: frozenset[Hashable]
    outcome: asyncio.Future[Result]
    since: float = field(default_factory=time.monotonic)
    """When it came."""
    begun: bool = False
    """Whether its set has begun, so that it cannot be dropped any more."""

    def lasting(self) -> asyncio.Future[Result]:
        """Return the future of its outcome, which is another one if its caller has hung up, and so cancelled the first.

        asyncio.shield keeps two apart from the start, which costs each call a future and two callbacks.
        """
        if self.outcome.cancelled():
            self.outcome = asyncio.get_running_loop().create_future()
        return self.outcome


class Sets(Generic[Element, Result]):
    """The calls of one kind. A class because they share a queue."""

    def __init__(
        self,
        kind: str,
        decide: Callable[[Sequence[Element]], Awaitable[Sequence[Outcome[Result]]]],
        *,
        keys: Callable[[Element], Iterable[Hashable]],
        decides: bool = True,
        largest: int = LARGEST,
    ) -> None:
        """Take what decides a set.

        Args:
            kind: Its name in the metrics.
            decide: Returns an outcome for each element. Of one element alone it must not be `Skipped`: there it waits.
            keys: What an element is about. No two that share one are decided at the same time.
            decides: Whether what becomes of an element is on record though its caller has gone; not of a mere look.
            largest: Elements in a set.
        """
        self._sizes = SET_ELEMENTS.labels(kind)
        self._decide = decide
        self._keys = keys
        self._decides = decides
        self._largest = largest
        self._queue: list[_Waiting[Element, Result]] = []
        self._in_use: set[Hashable] = set()
        """The keys of all that has begun."""
        self._gathering = False
        """Whether a set is about to begin."""
        self._last_alone = True
        """Whether the last set was of one."""
        self._prompt = False
        """Whether a set is under way that is not slow."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, element: Element) -> Result:
        """Decide an element, together with others, and return its result or raise its error.

        A caller that is cancelled gets away at once. If its set has begun by then, it is decided all the same.
        """
        outcome: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(current_call.get(), element, frozenset(self._keys(element)), outcome)
        self._queue.append(waiting)
        self._gather()
        try:
            return await outcome
        except asyncio.CancelledError:
            if waiting.begun:
                leave_unheard(waiting.lasting(), decides=self._decides)
            else:
                self._queue.remove(waiting)
            raise

    def _gather(self) -> None:
        """Begin the next set as soon as the event loop has nothing more for it."""
        if self._gathering or self._prompt or not self._queue:
            return
        if self._last_alone and len(self._queue) == 1:
            # Nobody else comes.
            self._begin()
        else:
            self._gathering = True
            asyncio.get_running_loop().call_soon(self._turn, 0, 0)

    def _turn(self, before: int, quiet: int) -> None:
        now = len(self._queue)
        quiet = quiet + 1 if now == before else 0
        if quiet < QUIET_TURNS and now < min(ENOUGH, self._largest):
            asyncio.get_running_loop().call_soon(self._turn, now, quiet)
        else:
            self._gathering = False
            self._begin()

    def _begin(self) -> None:
        """Begin the next set, unless one is under way that is not slow."""
        if self._prompt:
            return
        chosen: list[_Waiting[Element, Result]] = []
        left: list[_Waiting[Element, Result]] = []
        for waiting in self._queue:
            if len(chosen) < self._largest and self._in_use.isdisjoint(waiting.keys):
                self._in_use |= waiting.keys
                waiting.begun = True
                chosen.append(waiting)
            else:
                left.append(waiting)
        self._queue = left
        if chosen:
            self._last_alone = len(chosen) == 1
            self._sizes.observe(len(chosen))
            self._prompt = True
            self._start(self._serve(chosen))

    def _start(self, work: Any) -> None:  # noqa: ANN401 - a coroutine
        # In a context of its own: it belongs to none of the calls.
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, chosen: Sequence[_Waiting[Element, Result]]) -> None:
        """Decide a set, and then begin the next one; where it takes long, that does not wait for it."""
        passed = False

        def let_pass() -> None:
            nonlocal passed
            passed = True
            self._prompt = False
            self._begin()

        slow = asyncio.get_running_loop().call_later(SLOW_S, let_pass)
        await self._settle(chosen)
        if not passed:
            slow.cancel()
            self._prompt = False
            self._gather()

    async def _settle(self, chosen: Sequence[_Waiting[Element, Result]]) -> None:
        """Decide a set, and tell each call what became of it."""
        serve_together([waiting.call for waiting in chosen])
        outcomes: Sequence[Outcome[Result]]
        try:
            outcomes = await self._decide([waiting.element for waiting in chosen])
        except Exception as error:  # noqa: BLE001 - it is raised again, where the calls wait
            if len(chosen) > 1 and (isinstance(error, StatementFailed) or not isinstance(error, OnetimeError)):
                await self._divide(chosen, error)
                return
            outcomes = [error] if len(chosen) == 1 else [copy.copy(error) for _ in chosen]
        if len(outcomes) != len(chosen):
            # A bug of ours. Whoever waits must not wait for ever.
            outcomes = [InternalError() for _ in chosen]
        self._tell(chosen, outcomes)

    async def _divide(self, chosen: Sequence[_Waiting[Element, Result]], error: Exception) -> None:
        """Decide a set that failed in halves: one of them is at fault, and the others must not suffer from it."""
        known, now = isinstance(error, OnetimeError), time.monotonic()
        late = [waiting for waiting in chosen if known and now - waiting.since > LATE_S]
        self._tell(late, [copy.copy(error) for _ in late])
        left = [waiting for waiting in chosen if waiting not in late]
        middle = len(left) // 2
        for half in (left[:middle], left[middle:]):
            if len(half) == 1:
                # It holds up nobody but those who are about the same.
                self._start(self._settle(half))
            elif half:
                await self._settle(half)

    def _tell(self, chosen: Sequence[_Waiting[Element, Result]], outcomes: Sequence[Outcome[Result]]) -> None:
        """Tell calls what became of them; but those that were left out of their set go alone, where they may wait."""
        for waiting, outcome in zip(chosen, outcomes, strict=True):
            if isinstance(outcome, Skipped):
                self._start(self._settle([waiting]))
                continue
            self._in_use -= waiting.keys
            if isinstance(outcome, Exception):
                waiting.lasting().set_exception(outcome)
            else:
                waiting.lasting().set_result(outcome)
        # Somebody may have waited for their keys only.
        self._gather()
