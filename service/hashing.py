"""Argon2 off the event loop: so many at once, so many waiting, and no more.

One check takes 20 ms and 19 MiB by default. On the event loop it would stop every other call; without a bound, a burst
of codes would take all memory. Callers share the places, and take turns: who comes with one code does not wait for
another's fifty.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.call import current_call
from service.crypto import NO_VERDICT
from service.errors import Overloaded
from service.metrics import ARGON2_BUSY, ARGON2_HASHES, ARGON2_QUEUED
from service.places import Places

T = TypeVar("T")


class Hashing:
    """The threads that hash. A class because it knows who waits for them."""

    def __init__(self, *, threads: int, queue: int) -> None:
        """Hash in so many threads; let so many more wait."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._places = Places(threads + queue)
        self._idle = threads
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits for a thread, by caller. The caller whose turn is next stands first."""

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for one hash. Take it before charging an attempt: a refusal then costs nothing.

        Raises:
            Overloaded: Every place is taken, or all of this caller's share.
        """
        caller = current_call.get().caller
        self._places.take(caller)
        try:
            yield
        finally:
            self._places.give_back(caller)

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in a thread, from within a `place`.

        Raises:
            Overloaded: Memory ran out, so that there is no verdict.
        """
        await self._turn(current_call.get().caller)
        ARGON2_HASHES.inc()
        loop = asyncio.get_running_loop()
        job = self._executor.submit(work)
        # When the work has ended, not when its caller has gone: a thread cannot be stopped, and its memory is in use.
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._pass_on))
        try:
            return await asyncio.wrap_future(job)
        except NO_VERDICT as error:
            raise Overloaded from error

    async def _turn(self, caller: str) -> None:
        """Wait until a thread is free for a caller."""
        if self._idle:
            self._idle -= 1
            ARGON2_BUSY.inc()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            with ARGON2_QUEUED.track_inprogress():
                await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # It had got a thread in that moment.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give a thread that has become free to the next who waits: callers in turn, each one's work in its order."""
        while self._waiting:
            caller = next(iter(self._waiting))
            turns = self._waiting.pop(caller)
            turn = turns.popleft()
            if turns:
                # Last in line for the next thread.
                self._waiting[caller] = turns
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._idle += 1
        ARGON2_BUSY.dec()

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._executor.shutdown()
