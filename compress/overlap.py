"""Work in threads, with bounded memory and in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager


def map_ahead(pool: Executor, function: Callable, items: Iterable, window: int) -> Iterator:
    """function(item) for each item, in order; the pool works at most `window` items ahead of who takes the values.

    What a call raises is raised here, at its place.
    """
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Budget:
    """Lets threads hold at most `limit` of something together; what is larger than that is held alone."""

    def __init__(self, limit: int):
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + amount <= self.limit)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()
