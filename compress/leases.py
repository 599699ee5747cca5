"""Work dealt out as it is done: processes take numbered chunks through files in a folder that they share.

    3.lease   chunk 3 is being worked on; the file's time is renewed while its process lives
    3.done    chunk 3 is done

A fast process takes more chunks than a slow one.  A chunk whose lease has not been renewed for LIFETIME seconds goes to
another process: the first one has died.  Only file operations that are atomic on local and network disks are used.
"""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LIFETIME = 120.0
"""Seconds after which a lease that was not renewed has lapsed."""

BEAT = 15.0
"""Seconds between renewals."""


class Chunks:
    """One process's view of the chunks 0 ... count - 1.

    folder: shared by the processes and theirs alone; rank, world_size: of this process, which begins at a place of its
    own; clock: seconds, by which file times are set and compared; None for the clock of the disk's computer.
    """

    def __init__(self, folder: Path, count: int, rank: int, world_size: int, clock: Callable[[], float] | None = None):
        self.folder = folder
        self.rank = rank
        self.count = count
        self._clock = clock or self._disk_time
        self._set_time = clock
        self._mine: set[int] = set()
        start = rank * count // max(world_size, 1)
        self._open = deque([*range(start, count), *range(start)])  # not known to be done, in the order of asking
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_over(self) -> bool:
        """Whether all chunks are known to be done, or are this process's own."""
        return not self._open

    def take(self) -> int | None:
        """A chunk to work on; None where each is done or another process's: all are, or ask again later."""
        now = self._clock()
        for _ in range(len(self._open)):
            chunk = self._open.popleft()
            if self._file(chunk, "done").exists():
                continue
            if self._claim(chunk, now):
                self._mine.add(chunk)
                return chunk
            self._open.append(chunk)
        return None

    def done(self, chunk: int) -> None:
        """This process has finished a chunk."""
        self._file(chunk, "done").touch()
        self._file(chunk, "lease").unlink(missing_ok=True)
        self._mine.discard(chunk)

    def renew(self) -> None:
        """Keep this process's leases; to be called every BEAT seconds."""
        for chunk in list(self._mine):
            with suppress(FileNotFoundError):  # done meanwhile, or taken over: then it is made twice, and equal
                self._touch(self._file(chunk, "lease"))

    def _claim(self, chunk: int, now: float) -> bool:
        lease = self._file(chunk, "lease")
        try:
            age = now - lease.stat().st_mtime
        except FileNotFoundError:
            age = None
        if age is not None:
            if age < LIFETIME:
                return False
            lapsed = self.folder / f"{chunk}.lapsed-{self.rank}"
            try:
                os.rename(lease, lapsed)  # of several that try, one succeeds
            except FileNotFoundError:
                return False
            lapsed.unlink()
        try:
            os.close(os.open(lease, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        if self._file(chunk, "done").exists():  # between the first look and the claim
            lease.unlink()
            return False
        self._touch(lease)
        return True

    def _file(self, chunk: int, kind: str) -> Path:
        return self.folder / f"{chunk}.{kind}"

    def _touch(self, file: Path) -> None:
        os.utime(file, (self._set_time(),) * 2 if self._set_time else None)

    def _disk_time(self) -> float:
        """The time by the clock that stamps the leases: that of another computer, for a network disk."""
        own = self.folder / f"clock-{self.rank}"
        own.touch()
        os.utime(own)
        return own.stat().st_mtime
