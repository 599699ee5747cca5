"""Decoded pictures, kept where all processes of a run find them: in memory, or in a file that further runs use too.

A `PixelCache` is one file, of memory alone (memfd) or on disk: a table of what it holds, then the pixels, row upon row.
Forked processes share it by its descriptor, others by its name.  Nothing in it is ever changed or moved: a process
looks things up without asking the others, and only adds to it under a lock.
"""

import fcntl
import hashlib
import logging
import math
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, features

from utils.data.augment import Prepare
from utils.data.images import read_prepared
from utils.errors import UserError

log = logging.getLogger(__name__)

_MAGIC = b"ESCORT pixels 1\n"
_HEADER = np.dtype([("magic", "S16"), ("capacity", "<u8"), ("slots", "<u8"), ("end", "<u8"), ("count", "<u8")])
_ENTRY = np.dtype([("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("crc", "<u8"), ("key", "<u8", 2)])
_TABLE = mmap.PAGESIZE  # where the table starts
_LEAST = 1 << 20  # bytes of the smallest cache


class PixelCache:
    """Pictures as H x W x 3 arrays of uint8, up to a number of bytes; those that come later are not kept.

    budget: bytes; file: where they are kept, for other processes and runs; None keeps them in memory, for this process
    and those that it forks.

    A picture is known by its path, size, time of change and preparation: one that has changed is another one.  Its
    pixels are checked by their sum when a process first looks at them, so that a file which a machine's crash has left
    half written does no harm.
    """

    def __init__(self, budget: int, file: Path | None = None):
        self.file = file
        self._fd = -1
        budget = max(int(budget), _LEAST)
        self._fd = _anonymous(budget) if file is None else _named(file, budget)
        self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        header = np.frombuffer(self._map, _HEADER, 1)[0]
        self._capacity, self._mask = int(header["capacity"]), int(header["slots"]) - 1
        self._header = np.frombuffer(self._map, _HEADER, 1)
        self._table = np.frombuffer(self._map, _ENTRY, self._mask + 1, _TABLE)
        self._full = False

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)

    def __reduce__(self):
        """Of use to another process where there is a file; in memory, that would be a second cache of the same size."""
        return (PixelCache, (self._capacity, self.file)) if self.file else (type(None), ())

    def __len__(self) -> int:
        return int(self._header["count"][0])

    @property
    def capacity(self) -> int:
        """Bytes."""
        return self._capacity

    def read(self, path: Path, prepare: Prepare) -> tuple[np.ndarray, bool]:
        """(What `read_prepared(path, prepare)` returns, whether it lies in the cache now and need not be read again).

        Raises UnreadableImage.
        """
        key = _key(path, prepare)
        if key is None:
            return read_prepared(path, prepare), False  # says what is wrong with it
        pixels = self._look_up(key)
        if pixels is None:
            read = read_prepared(path, prepare)
            if self._full:
                return read, False
            self._add(key, read)
            pixels = self._look_up(key)
            if pixels is None:
                return read, False
        return pixels, True

    def find(self, path: Path, prepare: Prepare) -> np.ndarray | None:
        """What is kept of a prepared picture, read-only; None if it is not kept."""
        key = _key(path, prepare)
        return None if key is None else self._look_up(key)

    def _slot(self, key: tuple[int, int]) -> tuple[int, bool]:
        """Where a key is, or belongs, and whether it is there."""
        slot = key[0] & self._mask
        while True:
            first, second = self._table["key"][slot].tolist()
            if (first, second) == key:
                return slot, True
            if first == second == 0:
                return slot, False
            slot = (slot + 1) & self._mask

    def _look_up(self, key: tuple[int, int]) -> np.ndarray | None:
        slot, there = self._slot(key)
        if not there:
            return None
        offset, height, width, crc, _ = self._table[slot].tolist()
        if offset + 3 * height * width > len(self._map):
            return None
        pixels = np.frombuffer(self._map, np.uint8, 3 * height * width, offset)
        return pixels.reshape(height, width, 3) if zlib.crc32(pixels) == crc else None

    def _add(self, key: tuple[int, int], pixels: np.ndarray) -> None:
        data = np.ascontiguousarray(pixels)
        height, width, _ = data.shape
        try:
            with self._locked():
                slot, there = self._slot(key)
                end, count = int(self._header["end"][0]), int(self._header["count"][0])
                if there:
                    return
                if end + data.nbytes > len(self._map) or 2 * count > self._mask:
                    raise OSError("it holds as much as it may")
                _write(self._fd, data, end)
                entry = np.array([(end, height, width, zlib.crc32(data), key)], _ENTRY)
                place = _TABLE + slot * _ENTRY.itemsize
                _write(self._fd, entry.view(np.uint8)[:24], place)
                counts = np.array([end + data.nbytes, count + 1], "<u8")
                _write(self._fd, counts.view(np.uint8), _HEADER.fields["end"][1])
                _write(self._fd, entry.view(np.uint8)[24:], place + 24)  # the key at last: readers ask nobody
        except OSError as error:
            self._full = True
            log.debug("no more pictures are cached: %s", error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)  # of the process, not of the descriptor, which is shared after a fork
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)


def open_cache(kind: str, gib: float, folder: Path, root: Path, processes: int = 1) -> PixelCache | None:
    """The cache of a run; None where there is to be none.

    kind: "none", "ram" or "disk"; gib: its budget in GiB, of which in memory half of what is free there is the most;
    folder: where a file of pixels lies; root: the dataset's folder; processes: those of this machine that train
    together: in memory, each has its share, a file they share.
    """
    if kind == "none" or gib == 0:
        return None
    budget = int(gib * 2**30)
    if kind == "ram":
        return PixelCache(min(budget, _free_memory() // 2) // processes)
    of = "\0".join([str(root.absolute()), Image.__version__, *(features.version(lib) or "" for lib in ("jpg", "webp"))])
    name = hashlib.sha256(of.encode()).hexdigest()[:16]  # decoders of other versions may round otherwise
    try:
        return PixelCache(budget, folder / f"{root.name}-{name}.pixels")
    except OSError as error:
        raise UserError(
            f"cache: no file of pixels can be made in {folder} ({error.strerror}). Choose another."
        ) from error


def _key(path: Path, prepare: Prepare) -> tuple[int, int] | None:
    """128 bits that tell a picture as it is now; None where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    text = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{prepare!r}"
    digest = hashlib.blake2b(os.fsencode(text), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _anonymous(budget: int) -> int:
    """A file that has no name and takes memory only for what is written to it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pixels")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    _lay_out(fd, budget)
    return fd


def _named(file: Path, budget: int) -> int:
    """The file, as it is or made anew where it has another budget or is none of ours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        fd = os.open(file, os.O_RDWR)
        if _fits(fd, budget):
            return fd
        os.close(fd)
        file.unlink(missing_ok=True)
    fd, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{os.getpid()}-", suffix=".tmp")
    try:
        _lay_out(fd, budget)
        os.chmod(temporary, 0o644)
        os.link(temporary, file)
    except FileExistsError:  # another process was faster: take its file
        os.close(fd)
        fd = os.open(file, os.O_RDWR)
    except BaseException:
        os.close(fd)
        raise
    finally:
        os.unlink(temporary)
    return fd


def _fits(fd: int, budget: int) -> bool:
    content = os.pread(fd, _HEADER.itemsize, 0)
    if len(content) < _HEADER.itemsize:
        return False
    header = np.frombuffer(content, _HEADER)[0]
    slots = int(header["slots"])
    size = _TABLE + slots * _ENTRY.itemsize + budget
    return (
        header["magic"] == _MAGIC.rstrip(b"\0")
        and int(header["capacity"]) == budget
        and slots == _nb_slots(budget)
        and os.fstat(fd).st_size == size
        and int(header["end"]) <= size
    )


def _nb_slots(budget: int) -> int:
    """Twice as many as there may be pictures of 32 x 32, so that few of them meet."""
    return 1 << math.ceil(math.log2(budget / 3072 * 2 + 2))


def _lay_out(fd: int, budget: int) -> None:
    slots = _nb_slots(budget)
    start = _TABLE + slots * _ENTRY.itemsize
    os.ftruncate(fd, start + budget)
    _write(fd, np.array([(_MAGIC, budget, slots, start, 0)], _HEADER).view(np.uint8), 0)


def _write(fd: int, data: np.ndarray, offset: int) -> None:
    """All of it; an OSError where the disk or the memory is full, which a write through the map would not survive."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _free_memory() -> int:
    """Bytes that this process may still take, as far as the system says; else a guess."""
    free = [8 << 30]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))]
    with suppress(OSError, ValueError):  # limits of a container or a job, each within those of the next
        group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/"))
        for folder in (group, *group.parents[:-3]):
            with suppress(OSError, ValueError):  # "max" is none
                limit = int((folder / "memory.max").read_text())
                free.append(limit - int((folder / "memory.current").read_text()))
    return max(min(free), 0)
