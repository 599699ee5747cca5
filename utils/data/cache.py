"""A cache of decoded pictures, shared by all processes of a machine: in memory, or in a file that later runs use too.

Both are one file, anonymous where it is in memory: a header, then a record for each picture, only ever appended.

    header    _MAGIC, then the offset at which the last record ends (uint64)
    record    key, height, width, checksum of the pixels (_RECORD), then the pixels

Why not a library: one shared tensor only holds pictures of one size, and lmdb needs a file even for pictures in memory
(containers often have 64 MB of /dev/shm).
"""

import fcntl
import hashlib
import logging
import mmap
import os
import socket
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image, features

from utils.data.augment import Prepare
from utils.data.images import read_prepared
from utils.errors import UserError
from utils.files import content_digest

log = logging.getLogger(__name__)

_MAGIC = b"ESCORT pixels 2\n"
_OPEN_FILES = Path("/proc/self/fd")  # where Linux shows the files that a process has open, for others to open them
_START = 24  # of the first record
_RECORD = struct.Struct("<16sIII")


class PictureCache:
    """Prepared pictures (H x W x 3, uint8) up to a number of bytes; once full, no more are added.

    budget: bytes; prepare: the first part of the dataset's transforms; file: for other processes and runs; None keeps
    pictures in memory, for this process and those that open `path`; contents: folder -> digest of what it holds
    (`content_digest`), for some folders.

    Records are appended under a lock, and each process has its own index of them.  The key is a picture's path, size,
    modification time, preparation and its folder's digest: a changed file gets a new record.  Checksums detect pixels
    that a crash of the machine has lost.
    """

    def __init__(
        self, budget: int, prepare: Prepare, file: Path | None = None, contents: Mapping[str, str] | None = None
    ):
        self.budget = budget
        self.prepare = prepare
        self.file = file
        self.contents = contents or {}
        self._full = False
        is_whole = self._open()
        if file is not None and not is_whole:
            file.unlink(missing_ok=True)  # others may have it open, so it is replaced, not truncated
            self._close()  # or its bytes would stay on the disk
            self._open()

    def __reduce__(self):
        if self.file is None and not _OPEN_FILES.is_dir():
            return type(None), ()  # None in another process, which then decodes each time
        return PictureCache, (self.budget, self.prepare, self.path, self.contents)

    @property
    def path(self) -> Path:
        """What other processes of this machine open; for a cache in memory, valid while this process lives."""
        return self.file or Path(f"/proc/{os.getpid()}/fd/{self._fd}")  # not there on macOS

    def __len__(self) -> int:
        self._scan()
        return len(self._index)

    def read(self, path: str | Path) -> tuple[np.ndarray, bool]:
        """(prepared picture, whether the cache holds it).  Raises UnreadableImage."""
        if (picture := self.find(path)) is not None:
            return picture, True
        picture = read_prepared(path, self.prepare)
        self._add(path, picture)
        cached = self.find(path)
        return (picture, False) if cached is None else (cached, True)

    def find(self, path: str | Path) -> np.ndarray | None:
        """The prepared picture from the cache, read-only; None if it is not there."""
        key = self._key(path)
        if key is not None and key not in self._index:
            self._scan()
        if key is None or key not in self._index:
            return None
        offset, height, width, checksum = self._index[key]
        picture = np.frombuffer(self._map, np.uint8, 3 * height * width, offset).reshape(height, width, 3)
        return picture if zlib.crc32(picture.data) == checksum else None

    def _open(self) -> bool:
        """Open the file, or make it, and index its records.  Returns whether it is whole."""
        if self.file is None:
            self._fd = _memory_file()
        else:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, self._fd)
        # key -> offset of pixels, height, width, checksum
        self._scanned, self._index = _START, dict[bytes, tuple[int, int, int, int]]()
        with self._locked():
            if os.fstat(self._fd).st_size == 0:
                _write(self._fd, _MAGIC + struct.pack("<Q", _START), 0)
            if os.fstat(self._fd).st_size < _START + self.budget:
                os.ftruncate(self._fd, _START + self.budget)
            self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
            self._scan()
            return self._map[: len(_MAGIC)] == _MAGIC and self._scanned == self._end()

    def _end(self) -> int:
        return struct.unpack_from("<Q", self._map, len(_MAGIC))[0]

    def _scan(self) -> None:
        """Index the records that any process has appended since the last call."""
        end = min(self._end(), len(self._map))  # a run with a larger budget writes beyond the map
        while self._scanned + _RECORD.size < end:
            key, height, width, checksum = _RECORD.unpack_from(self._map, self._scanned)
            offset = self._scanned + _RECORD.size
            if height == 0 or offset + 3 * height * width > end:
                return
            self._index[key] = offset, height, width, checksum
            self._scanned = offset + 3 * height * width

    def _add(self, path: str | Path, picture: np.ndarray) -> None:
        if self._full:
            return
        height, width, _ = picture.shape
        pixels = picture.tobytes()
        try:
            with self._locked():
                self._scan()
                key, end = self._key(path), self._scanned + _RECORD.size + len(pixels)
                if end > _START + self.budget or self._scanned != self._end():
                    self._full = True
                elif key is not None and key not in self._index:
                    record = _RECORD.pack(key, height, width, zlib.crc32(pixels))
                    _write(self._fd, record + pixels, self._scanned)
                    _write(self._fd, struct.pack("<Q", end), len(_MAGIC))
        except OSError as error:
            self._full = True
            log.warning("cache: no more pictures are added (%s)", error.strerror)

    def _key(self, path: str | Path) -> bytes | None:
        """128 bits that identify the file's present content; None if there is no such file."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return None
        text = f"{(full := os.path.abspath(path))}\0{status.st_size}\0{status.st_mtime_ns}\0{self.prepare!r}"
        text += self.contents.get(os.path.dirname(full), "")
        return hashlib.blake2b(os.fsencode(text), digest_size=16).digest()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)  # locks the process; a lock on the descriptor is shared by forked ones
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)


def open_cache(
    kind: str,
    gib: float,
    folder: Path,
    root: Path,
    prepare: Prepare,
    expected: int = 0,
    images: Iterable[Sequence[Path]] = (),
) -> PictureCache | None:
    """The cache of a run, or None.  To be called by all processes of a run.

    kind: "none", "ram" or "disk"; gib: its budget, in memory at most half of what is free; folder: of the file; root:
    the dataset's folder; expected: bytes of all pictures, to report how many fit; images: of each of the dataset's
    folders, of which a few are read to recognise the folder in a file of earlier runs.
    Raises UserError for a folder that can't be written to.
    """
    if kind == "none" or gib == 0:
        return None
    budget = min(int(gib * 2**30), 1 << 60)  # offsets in files have 64 bits
    if kind == "ram":
        budget = min(budget, _free_memory() // 2)
    if budget < expected:
        share = budget / expected
        log.info("cache: %.2g GiB hold %.2g %% of the pictures, the others are decoded each time", gib, 100 * share)
    if kind == "ram":
        if not _OPEN_FILES.is_dir():
            log.info("cache: worker processes have no part in it on this system; num_workers=0 or cache=disk uses it")
        return _in_memory(budget, prepare)
    contents = {os.path.abspath(files[0].parent): content_digest(files) for files in images if files}
    decoders = [Image.__version__, *(features.version(library) or "" for library in ("jpg", "webp"))]  # which round
    name = hashlib.sha256(os.fsencode("\0".join([str(root.absolute()), *decoders]))).hexdigest()[:16]
    try:
        return PictureCache(budget, prepare, folder / f"{root.name}-{name}.pixels", contents)
    except OSError as error:
        raise UserError(f"cache: {folder} can't be written to ({error.strerror}). Choose another folder.") from error


def _in_memory(budget: int, prepare: Prepare) -> PictureCache:
    """One cache for all processes of a run on this machine, made by the first of them."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return PictureCache(budget, prepare)
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    first = hosts.index(socket.gethostname())
    cache = PictureCache(budget, prepare) if dist.get_rank() == first else None
    paths: list[Path | None] = [None] * len(hosts)
    dist.all_gather_object(paths, None if cache is None else cache.path)
    if cache is None:
        try:
            cache = PictureCache(budget, prepare, paths[first])
        except OSError:  # another container, or a system without /proc: a cache of its own
            cache = PictureCache(budget // hosts.count(hosts[first]), prepare)
    dist.barrier()  # the first process must live until all have opened its memory
    return cache


def _memory_file() -> int:
    """An anonymous file, which takes memory only for what is written to it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(fd: int, data: bytes, offset: int) -> None:
    """Write all of it.  Raises OSError if disk or memory is full (writing through the map would raise SIGBUS)."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _free_memory() -> int:
    """Bytes of memory that this process may still allocate; 8 GiB if the system does not say."""
    free = [8 << 30]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))]
    with suppress(OSError, ValueError):  # limits of a container or a job, nested
        group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/"))
        for folder in (group, *group.parents[:-3]):
            with suppress(OSError, ValueError):  # "max" is none
                limit = int((folder / "memory.max").read_text())
                free.append(limit - int((folder / "memory.current").read_text()))
    return max(min(free), 0)
