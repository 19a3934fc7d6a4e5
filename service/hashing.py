"""Argon2 off the event loop: so many at once, so many waiting, and no more.

One check takes 20 ms and 19 MiB by default. On the event loop it would stop every other call; without a bound, a burst
of codes would take all memory.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.crypto import NO_VERDICT
from service.errors import Overloaded

T = TypeVar("T")


class Hashing:
    """The threads that hash. A class because it counts what waits for them."""

    def __init__(self, *, threads: int, queue: int) -> None:
        """Hash in so many threads; let so many more wait."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._free = threads + queue

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for one hash. Take it before charging an attempt: a refusal then costs nothing.

        Raises:
            Overloaded: Every place is taken.
        """
        if self._free == 0:
            raise Overloaded
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in a thread, from within a `place`.

        Raises:
            Overloaded: Memory ran out, so that there is no verdict.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except NO_VERDICT as error:
            raise Overloaded from error

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._executor.shutdown()
