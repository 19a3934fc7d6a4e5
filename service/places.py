"""Places: how much may be under way at once, and how callers share it.

The bound is exact, and each place is refused or had at once. A caller may take one only while it holds fewer than four
times as many as are free. So a caller alone gets four fifths and no more, two who want all get four ninths each, and
there is always room for one who comes later (from five places on). No caller has a share that lies idle when it does
not come. This is the dynamic threshold by which Choudhury and Hahne (1998) let the queues of a switch share its memory.

It knows nothing of what is done in a place.
"""

from typing import Final

from service.errors import Overloaded

_SHARE: Final = 4
"""A caller holds at most so many times what is free."""


class Places:
    """So many places. A class because it counts them."""

    def __init__(self, number: int) -> None:
        """Start with all of them free."""
        self._number = number
        self._free = number
        self._held: dict[str, int] = {}

    def take(self, caller: str) -> None:
        """Take a place for a caller, to be given back.

        Raises:
            Overloaded: None is free, or this caller has its share.
        """
        held = self._held.get(caller, 0)
        if held >= _SHARE * self._free:
            raise Overloaded
        self._free -= 1
        self._held[caller] = held + 1

    def give_back(self, caller: str) -> None:
        """Free a place that a caller has taken."""
        self._free += 1
        self._held[caller] -= 1
        if not self._held[caller]:
            # Callers come and go; what is kept of them must not grow.
            del self._held[caller]

    def taken(self) -> int:
        """Return how many are taken."""
        return self._number - self._free
