"""Argon2 off the event loop: so many at once, so many waiting, and no more.

One check takes 20 ms and 19 MiB by default. On the event loop it would stop every other call; without a bound, a burst
of codes would take all memory. Callers share the places, and take turns: who comes with one code does not wait for
another's fifty.

A code is charged before it is compared, which takes a trip to the database. So turns are given a little ahead of the
threads, lest these wait for trips; and several at a time, so that where many wait, their charges share one. For the
same reason a thread takes a few codes of one caller at a time where many wait, and tells of them together: so they are
settled together, and the event loop is not woken, and does not hold up the threads, for each of them.
"""

import asyncio
import contextlib
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from service.call import current_call
from service.crypto import NO_VERDICT
from service.errors import Overloaded
from service.metrics import ARGON2_BUSY, ARGON2_HASHES, ARGON2_QUEUED
from service.places import Places
from service.sets import Outcome, each

T = TypeVar("T")

FEWEST: Final = 3
"""Turns for each thread, those in the threads included. When there are no more, further ones are given."""

MOST: Final = 6
"""Turns for each thread, to which it is filled up then. A caller who has none gets one beyond."""

LONGEST: Final = 3
"""Codes of one caller that a thread takes at a time."""


class Run(Protocol):
    """Hashes in a thread, in a turn. Once in each turn."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Run work, and return its result.

        Raises:
            Overloaded: Memory ran out, so that there is no verdict.
        """


@dataclass(slots=True, eq=False)
class _Job:
    """What is to be hashed in a turn."""

    caller: str
    work: Callable[[], Any]
    outcome: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    begun: bool = False
    """Whether a thread has taken it."""


class Hashing:
    """The threads that hash. A class because it knows who waits for them."""

    def __init__(self, *, threads: int, queue: int) -> None:
        """Hash in so many threads; let so many more wait."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._places = Places(threads + queue)
        self._threads = threads
        self._idle = threads
        self._turns: Counter[str] = Counter()
        """How many were given and are not over, by caller."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits for a turn, by caller. The caller who is next stands first."""
        self._ready: dict[str, list[_Job]] = {}
        """What waits for a thread, by caller. The caller who is next stands first."""
        self._begins = False
        """Whether what is ready is about to be given to threads."""

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Run]:
        """Wait for a turn to hash, and hold it: `async with hashing.turn() as run`.

        Whoever charges an attempt does it within: a refusal then costs nothing.

        Raises:
            Overloaded: At once. Every place is taken, or all of this caller's share.
        """
        caller = current_call.get().caller
        self._places.take(caller)
        jobs: list[_Job] = []

        async def run(work: Callable[[], T]) -> T:
            job = _Job(caller, work)
            jobs.append(job)
            self._ready.setdefault(caller, []).append(job)
            self._begin_soon()
            try:
                result: T = await job.outcome
            except NO_VERDICT as error:
                raise Overloaded from error
            return result

        ARGON2_QUEUED.inc()
        try:
            await self._wait(caller)
            try:
                yield run
            finally:
                if not any(job.begun for job in jobs):
                    # Otherwise it is over when the work is, whether its caller has gone or not: a thread cannot be
                    # stopped.
                    self._end_turns(caller, 1)
        finally:
            if not any(job.begun for job in jobs):
                ARGON2_QUEUED.dec()
            self._places.give_back(caller)

    async def _wait(self, caller: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        self._give_turns()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # It was given in that moment.
                self._end_turns(caller, 1)
            raise

    def _end_turns(self, caller: str, number: int) -> None:
        self._turns[caller] -= number
        if not self._turns[caller]:
            # Callers come and go; what is kept of them must not grow.
            del self._turns[caller]
        self._give_turns()

    def _give_turns(self) -> None:
        """Give a turn to each caller who has none; and if there are few, further ones to callers in turn."""
        for caller in [caller for caller in self._waiting if not self._turns[caller]]:
            self._give_turn(caller)
        if self._turns.total() <= FEWEST * self._threads:
            while self._waiting and self._turns.total() < MOST * self._threads:
                self._give_turn(next(iter(self._waiting)))

    def _give_turn(self, caller: str) -> None:
        """Give a caller's next call a turn, if it is still there."""
        turns = self._waiting.pop(caller)
        turn = turns.popleft()
        if turns:
            # Last in line for the next one.
            self._waiting[caller] = turns
        if not turn.cancelled():
            self._turns[caller] += 1
            turn.set_result(None)

    def _begin_soon(self) -> None:
        """Give threads what is ready when all that becomes ready now is."""
        if not self._begins:
            self._begins = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Give each idle thread its part of what is ready, of one caller: nobody waits for another's part."""
        self._begins = False
        loop = asyncio.get_running_loop()
        part = min(math.ceil(sum(map(len, self._ready.values())) / self._threads), LONGEST)
        while self._idle and self._ready:
            caller = next(iter(self._ready))
            all_of = self._ready.pop(caller)
            if all_of[part:]:
                # Last in line for the next thread.
                self._ready[caller] = all_of[part:]
            jobs = [job for job in all_of[:part] if not job.outcome.cancelled()]
            if not jobs:
                continue
            for job in jobs:
                job.begun = True
            self._idle -= 1
            ARGON2_QUEUED.dec(len(jobs))
            hashed = self._executor.submit(_hash, [job.work for job in jobs])
            hashed.add_done_callback(lambda done, jobs=jobs: loop.call_soon_threadsafe(self._tell, jobs, done))  # type: ignore[misc] # its default

    def _tell(self, jobs: Sequence[_Job], hashed: Future[list[Outcome[Any]]]) -> None:
        """Tell callers what has come of their work, those who are still there."""
        self._idle += 1
        for job, outcome in zip(jobs, hashed.result(), strict=True):
            if job.outcome.cancelled():
                continue
            if isinstance(outcome, Exception):
                job.outcome.set_exception(outcome)
            else:
                job.outcome.set_result(outcome)
        self._end_turns(jobs[0].caller, len(jobs))
        self._begin()

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._executor.shutdown()


def _hash(work: Sequence[Callable[[], Any]]) -> list[Outcome[Any]]:
    ARGON2_HASHES.inc(len(work))
    with ARGON2_BUSY.track_inprogress():
        return each(lambda one: one(), work)
