"""The copies that a training run reads: whether they are there, what made them, whether they are still the same."""

import hashlib
import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compress.forms import Form
from compress.records import by_settings, generator_of, names_in, recorded_options, recorded_settings
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.forms import Copies

MOST_READ = 20_000
"""Copies whose content goes into a digest, spread evenly over the classes: a few seconds' work."""

THREADS = 16


class CopiesAhead(Copies):
    """Copies 0 ... K-1 of train images, made by compress/run.py before the training.

    images: the train images whose copies the run may read, which are all on disk (`check_copies`); copies: K.
    """

    def __init__(self, paths: DatasetPaths, form: Form, images: Sequence[Path], copies: int):
        labels = dict.fromkeys(image.parent.name for image in images)
        self.made_by = by_settings(recorded_settings(paths.folder("copies"), labels).values())
        options = recorded_options(paths.folder("copies"))
        self.generator = generator_of(form, options) if options else None
        self._digests = digests_of(paths, images, copies)

    def make(self, images: Sequence[Path], with_copies: bool) -> None:
        return None

    def digests(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """Of all copies, whichever images are exemplars."""
        return self._digests


def digests_of(paths: DatasetPaths, images: Iterable[Path], copies: int) -> dict[str, Any]:
    """What identifies copies 0 ... K-1 of `images`, as far as they are on disk.

    {"files": their number, "digest": of all, "classes": {label: [files, digest, times]}}.  A class's digest covers the
    name and size of each file, and the content of evenly spread files, of all where there are at most MOST_READ.  Else
    `times` is a digest of all modification times, "" where every file was read.
    """
    by_label: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_label[image.parent.name] += [paths.copy(image, k) for k in range(copies)]
    to_read = MOST_READ // max(len(by_label), 1)
    with ThreadPoolExecutor(THREADS) as pool:
        classes = dict(zip(by_label, pool.map(lambda files: _of_class(files, to_read), by_label.values()), strict=True))
    whole = hashlib.sha256(json.dumps([(label, *digest[:2]) for label, digest in classes.items()]).encode())
    nb_files = sum(digest[0] for digest in classes.values())
    return {"files": nb_files, "digest": whole.hexdigest()[:16], "classes": classes}


def _of_class(files: Sequence[Path], to_read: int) -> list[Any]:
    """[number of files, digest, digest of times]."""
    digest, times, nb_files = hashlib.sha256(), hashlib.sha256(), 0
    step = -(-len(files) // max(to_read, 1))
    for i, file in enumerate(files):
        try:
            status = file.stat()
            content = hashlib.sha256(file.read_bytes()).digest() if i % step == 0 else b""
        except OSError:
            continue
        nb_files += 1
        digest.update(os.fsencode(f"{file.name}\0{status.st_size}\0") + content)
        times.update(f"{status.st_mtime_ns} ".encode())
    return [nb_files, digest.hexdigest()[:16], times.hexdigest()[:16] if step > 1 else ""]


def check_copies(paths: DatasetPaths, form: Form, images: Iterable[Path], copies: int) -> None:
    """Raises UserError where one of the copies 0 ... K-1 of `images` is not on disk, with the command that makes them.

    form: with the settings to make them with where nothing is recorded.  Opens no file.
    """
    on_disk: dict[str, frozenset[str]] = {}
    missing, wanted = [], 0
    for image in images:
        label = image.parent.name
        if label not in on_disk:
            on_disk[label] = frozenset(names_in(paths.copies_folder(label)))
        wanted += copies
        missing += [(image, k) for k in range(copies) if paths.copy_name(image, k) not in on_disk[label]]
    if not missing:
        return
    # The command has the recorded settings of the copies that are there already.
    words = ["--data-dir", str(paths.data_dir), "--dataset", paths.dataset, "--seeds", str(copies)]
    if paths.variant:
        words += ["--keep-apart", paths.variant]
    if form.name != "edges":
        words += ["--form", form.name]
    words += recorded_options(paths.folder("copies")) or ["--resolution", form.preset.name]
    raise UserError(
        f"{len(missing)} of {wanted} copies are missing, the first is {paths.copy(*missing[0])}. Make them with:\n"
        f"python compress/run.py {shlex.join(words)}"
    )
