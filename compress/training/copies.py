"""The copies that a training run reads: whether they are there, what made them, whether they are still the same."""

import abc
import hashlib
import json
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compress.forms import Form
from compress.options import Machine
from compress.records import recorded_options, recorded_settings
from utils.data.paths import DatasetPaths
from utils.errors import UserError

MOST_READ = 20_000
"""Copies whose content goes into a digest, spread evenly over the classes: a few seconds' work."""

THREADS = 16


class Copies(abc.ABC):
    """What the trainer knows of copies: how to get them, and what identifies those that it uses.

    exemplars: the train images whose copies are read at present.
    """

    made_by: list[dict[str, Any]]
    """See `by_settings`."""
    generator: str | None = None
    """The model that made them, by its name or file as compress/run.py takes it; None where none did or it is not
    recorded."""

    @abc.abstractmethod
    def make(self, images: Sequence[Path], with_copies: bool) -> int | None:
        """Make what is missing of these images' edge maps and, with_copies, copies.  Returns the number of copies made,
        None where copies are made ahead."""

    @abc.abstractmethod
    def digests(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """See `digests_of`."""

    def state(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        return {"made_by": self.made_by, "fingerprint": self.digests(exemplars)}

    def summary(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """For results.json: made_by, generator, files (the number of copies) and digest."""
        made_by = {"made_by": self.made_by, "generator": self.generator}
        return made_by | {key: value for key, value in self.digests(exemplars).items() if key != "classes"}

    def check(self, state: Mapping[str, Any], exemplars: Sequence[Path]) -> None:
        """Raises UserError, naming what differs, where the copies are not those of a checkpoint's `state`."""
        _check_unchanged(state, self.state(exemplars))


class CopiesAhead(Copies):
    """Copies 0 ... K-1 of train images, made by compress/run.py before the training.

    paths: the dataset; form: of the exemplars; images: the train images whose copies the run may read; copies: K.
    Raises UserError, with the command that makes them, where one is missing.
    """

    def __init__(self, paths: DatasetPaths, form: Form, images: Sequence[Path], copies: int):
        check_copies(paths, form, images, copies)
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


def generator_of(form: Form, options: Sequence[str]) -> str | None:
    """The model's name or file by a Job's `options`, which leave out the default; None for a form without a model."""
    if not (form.needs_model or form.needs_weights):
        return None
    return options[options.index("--model") + 1] if "--model" in options else Machine.model


def by_settings(settings: Iterable[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """What made the copies, from each class's settings (`copy_settings`, flat), None where nothing is recorded.

    [{"classes": number, "settings": {...} or None}], the most frequent settings first.
    """
    counts = Counter(json.dumps(each) for each in settings)
    return [{"classes": count, "settings": json.loads(each)} for each, count in counts.most_common()]


def digests_of(paths: DatasetPaths, images: Iterable[Path], copies: int) -> dict[str, Any]:
    """What identifies copies 0 ... K-1 of `images`, as far as they are on disk.

    {"files": their number, "digest": of all, "classes": {label: [files, digest, times]}}.  A class's digest covers the
    name and size of each file, and the content of evenly spread files: of all where there are at most MOST_READ, which
    is then exact.  Else `times` is a digest of all modification times, "" where every file was read.
    """
    by_label: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_label[image.parent.name] += [paths.copy(image, k) for k in range(copies)]
    to_read = MOST_READ // max(len(by_label), 1)
    with ThreadPoolExecutor(THREADS) as pool:
        classes = dict(zip(by_label, pool.map(lambda files: _of_class(files, to_read), by_label.values()), strict=True))
    whole = hashlib.sha256(json.dumps([(label, *of_class[:2]) for label, of_class in classes.items()]).encode())
    return {
        "files": sum(of_class[0] for of_class in classes.values()),
        "digest": whole.hexdigest()[:16],
        "classes": classes,
    }


def _of_class(files: Sequence[Path], to_read: int) -> list[Any]:
    """[number of files, digest, digest of times]."""
    digest, times, found = hashlib.sha256(), hashlib.sha256(), 0
    step = -(-len(files) // max(to_read, 1))
    for i, file in enumerate(files):
        try:
            status = file.stat()
            content = hashlib.sha256(file.read_bytes()).digest() if i % step == 0 else b""
        except OSError:
            continue
        found += 1
        digest.update(os.fsencode(f"{file.name}\0{status.st_size}\0") + content)
        times.update(f"{status.st_mtime_ns} ".encode())
    return [found, digest.hexdigest()[:16], times.hexdigest()[:16] if step > 1 else ""]


def _check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the copies that a run began with, as `Copies.state` describes them, with those on disk.

    Files whose names, sizes and sampled contents agree may have other times where all of them have: the folder was
    copied.  Raises UserError, naming what differs.
    """
    old, new = before["fingerprint"]["classes"], now["fingerprint"]["classes"]
    changed = [label for label in old if label not in new or old[label][:2] != new[label][:2]]
    touched = [label for label in old if label in new and old[label][2] != new[label][2]]
    if len(touched) < len(old):
        changed = [label for label in old if label in changed or label in touched]
    changed += [label for label in new if label not in old]
    if not changed:
        return
    details = ", ".join([f"the first is {changed[0]!r}", *_differences(before["made_by"], now["made_by"])])
    raise UserError(
        f"the copies of {len(changed)} of {len(new | old)} classes are not those that this run began with ({details}). "
        "Put the old ones back, or choose another output_dir."
    )


def _differences(before: Sequence[Mapping], now: Sequence[Mapping]) -> list[str]:
    """Such as "steps 20 -> 50", between the settings of most classes."""
    if not before or not now or None in (old := before[0]["settings"], new := now[0]["settings"]):
        return []
    names = dict.fromkeys([*old, *new])
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return [f"{name.replace('_', ' ')} {one!r} -> {other!r}" for name, (one, other) in pairs.items() if one != other]


def check_copies(paths: DatasetPaths, form: Form, images: Iterable[Path], copies: int) -> None:
    """Raises UserError where one of the copies 0 ... K-1 of `images` is not on disk, with the command that makes them.

    Lists the folder of each class once, and opens no file.
    """
    on_disk: dict[str, frozenset[str]] = {}
    wanted, missing, first = 0, 0, None
    for image in images:
        label = image.parent.name
        if label not in on_disk:
            folder = paths.copies_folder(label)
            on_disk[label] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        wanted += copies
        gaps = [k for k, name in enumerate(paths.copy_names(image, copies)) if name not in on_disk[label]]
        missing += len(gaps)
        if gaps and first is None:
            first = paths.copy(image, gaps[0])
    if first is not None:
        raise UserError(
            f"{missing} of {wanted} copies are missing, the first is {first}. Make them with:\n"
            f"{command(paths, form, copies)}"
        )


def command(paths: DatasetPaths, form: Form, copies: int) -> str:
    """The command that makes copies 0 ... K-1, with the recorded settings of those that are there already.

    form: with the settings to make them with where nothing is recorded.
    """
    words = ["--data-dir", str(paths.data_dir), "--dataset", paths.dataset, "--seeds", str(copies)]
    if paths.variant:
        words += ["--keep-apart", paths.variant]
    if form.name != "edges":
        words += ["--form", form.name]
    words += recorded_options(paths.folder("copies")) or ["--resolution", form.preset.name]
    return f"python compress/run.py {shlex.join(words)}"
