"""Argon2 off the event loop: so many at once, so many waiting, and no more.

One check takes 20 ms and 19 MiB by default. On the event loop it would stop every other call; without a bound, a burst
of codes would take all memory. Callers share the places, and take turns: who comes with one code does not wait for
another's fifty.

A code is charged before it is compared, which takes a trip to the database. So turns are given a little ahead of the
threads, lest these wait for trips; and several at a time, so that where many wait, their charges share one.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from service.call import current_call
from service.crypto import NO_VERDICT
from service.errors import Overloaded
from service.metrics import ARGON2_BUSY, ARGON2_HASHES, ARGON2_QUEUED
from service.places import Places

T = TypeVar("T")

FEWEST: Final = 2
"""Turns for each thread, those in the threads included. When there are no more, further ones are given."""

MOST: Final = 4
"""Turns for each thread, to which it is filled up then: what one caller's code waits for when others come with many."""


class Run(Protocol):
    """Hashes in a thread, in a turn. Once in each turn."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Run work, and return its result.

        Raises:
            Overloaded: Memory ran out, so that there is no verdict.
        """


class Hashing:
    """The threads that hash. A class because it knows who waits for them."""

    def __init__(self, *, threads: int, queue: int) -> None:
        """Hash in so many threads; let so many more wait."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._places = Places(threads + queue)
        self._threads = threads
        self._turns = 0
        """How many were given and are not over."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits for a turn, by caller. The caller who is next stands first."""

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Run]:
        """Wait for a turn to hash, and hold it: `async with hashing.turn() as run`.

        Whoever charges an attempt does it within: a refusal then costs nothing.

        Raises:
            Overloaded: At once. Every place is taken, or all of this caller's share.
        """
        caller = current_call.get().caller
        self._places.take(caller)
        jobs: list[Future[Any]] = []

        async def run(work: Callable[[], T]) -> T:
            job = self._executor.submit(_counted, work)
            jobs.append(job)
            try:
                return await asyncio.wrap_future(job)
            except NO_VERDICT as error:
                raise Overloaded from error

        ARGON2_QUEUED.inc()
        try:
            await self._wait(caller)
            try:
                yield run
            finally:
                self._end(jobs)
        finally:
            if not jobs or jobs[0].cancelled():
                # Otherwise its work says so, as it begins.
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
                self._end([])
            raise

    def _end(self, jobs: list[Future[Any]]) -> None:
        """End a turn: when its work has ended, not when its caller has gone. A thread cannot be stopped."""
        if jobs and not jobs[0].done():
            loop = asyncio.get_running_loop()
            jobs[0].add_done_callback(lambda _: loop.call_soon_threadsafe(self._end, []))
            return
        self._turns -= 1
        self._give_turns()

    def _give_turns(self) -> None:
        """Give turns, if there are few: callers in turn, each one's work in its order."""
        if self._turns > FEWEST * self._threads:
            return
        while self._waiting and self._turns < MOST * self._threads:
            caller = next(iter(self._waiting))
            turns = self._waiting.pop(caller)
            turn = turns.popleft()
            if turns:
                # Last in line for the next one.
                self._waiting[caller] = turns
            if not turn.cancelled():
                self._turns += 1
                turn.set_result(None)

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._executor.shutdown()


def _counted(work: Callable[[], T]) -> T:
    ARGON2_QUEUED.dec()
    ARGON2_HASHES.inc()
    with ARGON2_BUSY.track_inprogress():
        return work()
