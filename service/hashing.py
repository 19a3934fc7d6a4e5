"""Argon2 off the event loop: so many at once, so many waiting, and no more.

One check takes 20 ms and 19 MiB by default. On the event loop it would stop every other call; without a bound, a burst
of codes would take all memory. Callers share the places, and take turns: who comes with one code does not wait for
another's fifty.

A code is charged before it is compared, and settled after that, each with trips to the database. So turns are given
ahead of the threads, lest these wait for trips, and last until all is settled. Where many codes wait, threads go on
with what is ready, and tell of what is done when little is left: so it is settled together, and the next ones, whose
turn it is then, are charged together; and the event loop is not woken, and does not hold up the threads, for each code.
"""

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from service.call import current_call
from service.crypto import NO_VERDICT
from service.errors import Overloaded
from service.metrics import ARGON2_BUSY, ARGON2_HASHES, ARGON2_QUEUED
from service.places import Places
from service.sets import Outcome, each

T = TypeVar("T")

TURNS: Final = 12
"""Turns for each thread, and one for each caller who would have none. So many codes at most are charged and not yet
settled: if the server dies, each has cost its user an attempt."""

LEFT: Final = 2
"""Codes for each thread that wait for it when those before are told of. They are hashed while these are settled, and
the next ones charged. The first of those before has waited for the last one then: for some 200 ms at most."""


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
        self._most = TURNS * threads
        self._left = LEFT * threads
        self._turns: Counter[str] = Counter()
        """How many were given and are not over, by caller."""
        self._giving = False
        """Whether the event loop is about to give turns."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits for a turn, by caller. The caller who is next stands first."""
        self._lock = threading.Lock()
        """Held for those below, which the threads and the event loop share."""
        self._ready: dict[str, deque[_Job]] = {}
        """What waits for a thread, by caller. The caller who is next stands first."""
        self._done: list[tuple[_Job, Outcome[Any]]] = []
        """What the threads have done, and not told of yet."""
        self._idle = threads
        self._queued = 0
        """What no thread has taken yet, and may still."""
        ARGON2_BUSY.set_function(lambda: threads - self._idle)
        ARGON2_QUEUED.set_function(lambda: self._queued)

    @contextlib.asynccontextmanager
    async def turn(self, *, behind: asyncio.Lock | None = None) -> AsyncIterator[Run]:
        """Wait for a turn to hash, and hold it: `async with hashing.turn() as run`.

        Whoever charges an attempt does it within: a refusal then costs nothing.

        Args:
            behind: Waited for before the turn, in a place of the queue, and held as long as the turn.

        Raises:
            Overloaded: At once. Every place is taken, or all of this caller's share.
        """
        caller = current_call.get().caller
        self._places.take(caller)
        jobs: list[_Job] = []

        async def run(work: Callable[[], T]) -> T:
            job = _Job(caller, work)
            jobs.append(job)
            self._add(job)
            try:
                result: T = await job.outcome
            except asyncio.CancelledError:
                self._take_back(job)
                raise
            except NO_VERDICT as error:
                raise Overloaded from error
            return result

        self._queue(1)
        try:
            async with behind or contextlib.nullcontext():
                await self._wait(caller)
                try:
                    yield run
                finally:
                    self._end_turn(caller)
        finally:
            if not any(job.begun for job in jobs):
                self._queue(-1)
            self._places.give_back(caller)

    def _queue(self, change: int) -> None:
        with self._lock:
            self._queued += change

    async def _wait(self, caller: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        self._give_turns_soon()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # It was given in that moment.
                self._end_turn(caller)
            raise

    def _end_turn(self, caller: str) -> None:
        self._turns[caller] -= 1
        if not self._turns[caller]:
            # Callers come and go; what is kept of them must not grow.
            del self._turns[caller]
        self._give_turns_soon()

    def _give_turns_soon(self) -> None:
        """Give turns when all that end in this turn of the event loop have ended."""
        if not self._giving:
            self._giving = True
            asyncio.get_running_loop().call_soon(self._give_turns)

    def _give_turns(self) -> None:
        """Give a turn to each caller who has none; and to all others, or to many at a time, of callers in turn."""
        self._giving = False
        there = {caller: [turn for turn in turns if not turn.cancelled()] for caller, turns in self._waiting.items()}
        self._waiting = {caller: deque(turns) for caller, turns in there.items() if turns}
        for caller in [caller for caller in self._waiting if not self._turns[caller]]:
            self._give_turn(caller)
        given, waiting = self._turns.total(), sum(map(len, self._waiting.values()))
        # An idle thread has turns given too: those that there are may all wait for rows that somebody else has locked.
        if self._idle or given <= self._most // 2 or given + waiting <= self._most:
            while self._waiting and self._turns.total() < self._most:
                self._give_turn(next(iter(self._waiting)))

    def _give_turn(self, caller: str) -> None:
        """Give a caller's next call a turn."""
        turns = self._waiting.pop(caller)
        turns.popleft().set_result(None)
        if turns:
            # Last in line for the next one.
            self._waiting[caller] = turns
        self._turns[caller] += 1

    def _add(self, job: _Job) -> None:
        """Have a job done by a thread that is idle, or by the next one that is."""
        with self._lock:
            self._ready.setdefault(job.caller, deque()).append(job)
            idle = self._idle > 0
            if idle:
                self._idle -= 1
        if idle:
            self._executor.submit(self._work, asyncio.get_running_loop())

    def _take_back(self, job: _Job) -> None:
        """Let nobody begin a job, unless somebody has."""
        with self._lock:
            if not job.begun:
                self._ready[job.caller].remove(job)
                if not self._ready[job.caller]:
                    del self._ready[job.caller]

    def _take(self) -> _Job | None:
        """Return what a thread is to do next, of the callers in turn; None if that is nothing."""
        if not self._ready:
            self._idle += 1
            return None
        caller = next(iter(self._ready))
        jobs = self._ready.pop(caller)
        job = jobs.popleft()
        if jobs:
            # Last in line for the next thread.
            self._ready[caller] = jobs
        job.begun = True
        self._queued -= 1
        return job

    def _is_to_be_told(self) -> bool:
        """Tell whether little is left to do or much is done, or a caller's last job, which waits for nobody else's."""
        if any(job.caller not in self._ready for job, _ in self._done):
            return True
        little = sum(map(len, self._ready.values())) <= self._left
        return len(self._done) >= (self._left if little else self._most - self._left)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do what is ready, in a thread, until nothing is, and tell the event loop what has come of it."""
        while True:
            with self._lock:
                done: list[tuple[_Job, Outcome[Any]]] = []
                if self._is_to_be_told():
                    done, self._done = self._done, done
                job = self._take()
            if done:
                loop.call_soon_threadsafe(self._tell, done)
            if job is None:
                return
            (outcome,) = each(lambda work: work(), [job.work])
            with self._lock:
                self._done.append((job, outcome))

    def _tell(self, done: Sequence[tuple[_Job, Outcome[Any]]]) -> None:
        """Tell callers what has come of their work, those who are still there."""
        ARGON2_HASHES.inc(len(done))
        for job, outcome in done:
            if job.outcome.cancelled():
                continue
            if isinstance(outcome, Exception):
                job.outcome.set_exception(outcome)
            else:
                job.outcome.set_result(outcome)

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._executor.shutdown()
