"""The settings of the kept files and copies on disk, so that files of different settings are never mixed unnoticed.

A copy carries a mark in its JPEG comment: a digest of everything that it depends on beside its image and its number.
The settings behind the marks are written beside the class folders before the first copy, and again whenever they
change, each time into a new file that is named by a digest of its content:

    exemplars/settings-0c6e2b9d41f7.json   {"number": 1, "settings": {"prompt_template": ..., "sampling": {...}, ...},
                                            "class_texts": {"apple_pie": "apple pie", ...}}
    exemplars/apple_pie/1_seed00.jpg       comment: "ESCORT 3f2a9c81d0b7"

Processes that share the work write equal files of one name.  The one of the highest number counts for each class; in
files of earlier versions (`settings.json`, `settings-2.json`, ...) the name has the number.  Kept files carry no mark,
as their bytes count as memory; they are compared with their image.

Precision is a setting: bf16 in place of fp32 changes almost half of a copy's pixels.  Device and batch size are none:
in fp32 they change a few pixels in ten thousand by one or two levels of 255, in bf16 some by a level or more.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from compress.forms import Form
from compress.options import Machine
from compress.presets import Preset, Sampling
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.files import write_atomically

MARK = "ESCORT"
ADDED = {
    **{each.name: each.default for kind in (Preset, Sampling) for each in fields(kind) if each.default is not MISSING},
    "quality": 95,
}
"""Settings that records of earlier versions may lack, and the values that these versions worked with."""
UNRECORDED = ("model", "precision", "edge_coder")
"""What earlier versions did not record: files without it are taken for those asked for.  Edge maps without a coder are
pictures, which any version reads."""


class MadeOtherwise(UserError):
    """What is on disk was made with other settings than those asked for."""


class State(Enum):
    """What a folder's settings files say about a class, against what is asked for."""

    NEW = "no settings are known"
    SAME = "everything was made so"
    MIXED = "these settings are the newest, and there were others before: each file must be looked at"
    OTHER = "the newest settings are others"


@dataclass(frozen=True)
class Recipe:
    """What makes a copy, beside its image, its number and its class's text.

    model: the weights' fingerprint; precision: as `choose_precision` returns it.  None for a form without a model.
    """

    form: Form
    model: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class SettingsFile:
    """One settings file.  texts: class label -> text, None where a class's text makes no difference."""

    number: int
    settings: dict[str, Any]
    texts: dict[str, str | None]
    options: tuple[str, ...]

    def flat(self, label: str) -> dict[str, Any]:
        """What made a class's files."""
        return _flat(self.settings, self.texts[label])


class Record:
    """The settings files of a folder of kept files or of copies, and the settings that are asked for.

    settings: as JSON has it; texts: class label -> text, None where a class's text makes no difference; options: of
    compress/run.py, recorded for messages.  Raises UserError for a settings file that can't be read.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], texts: Mapping[str, str | None], options: Sequence[str] = ()
    ):
        self.folder = folder
        self.settings = settings
        self.texts = texts
        self.options = options
        self.files = read_settings(folder)

    def wanted(self, label: str) -> dict[str, Any]:
        """The settings asked for of a class's files, flat."""
        return _flat(self.settings, self.texts.get(label, label))

    def newest(self, label: str) -> dict[str, Any] | None:
        """The newest recorded settings of a class's files, None where nothing is recorded."""
        return next(reversed(self._recorded(label)), None)

    def _recorded(self, label: str) -> list[dict[str, Any]]:
        """What made a class's files, oldest first."""
        return [file.flat(label) for file in self.files if label in file.texts]

    def state(self, label: str) -> State:
        wanted = self.wanted(label)
        alike = [_completed(recorded, wanted) == wanted for recorded in self._recorded(label)]
        if not alike:
            return State.NEW
        if not alike[-1]:
            return State.OTHER
        return State.SAME if all(alike) else State.MIXED

    def mark(self, label: str) -> str:
        """The JPEG comment of new copies of a class."""
        return f"{MARK} {_digest(self.wanted(label))}"

    def marks(self, label: str) -> frozenset[str]:
        """The marks of all copies of a class that count as made with these settings."""
        wanted = self.wanted(label)
        earlier = [recorded for recorded in self._recorded(label) if _completed(recorded, wanted) == wanted]
        return frozenset(f"{MARK} {_digest(settings)}" for settings in (wanted, *earlier))

    def differences(self, label: str) -> list[str]:
        """What differs between the newest settings on disk and those asked for, such as "steps 20 -> 50"."""
        newest, wanted = self.newest(label), self.wanted(label)
        if newest is None:
            return []
        before = _completed(newest, wanted)
        return [
            (f"text of class {label!r}:" if name == "class_text" else name.replace("_", " "))
            + f" {_value(before.get(name))} -> {_value(value)}"
            for name, value in wanted.items()
            if before.get(name) != value
        ]

    def note(self, labels: Iterable[str]) -> None:
        """Record that these classes' files are made with the settings asked for from now on, and those of which nothing
        is on disk, so that processes which share the work agree.

        Raises MadeOtherwise where another process has recorded other settings since this record was read.
        """
        before = {label: self.newest(label) for label in labels}
        self.files = read_settings(self.folder)
        missing = {label for label in before if self.newest(label) != self.wanted(label)}
        for label in missing:
            if self.newest(label) != before[label] and self.state(label) is State.OTHER:
                raise MadeOtherwise(
                    f"another process has begun to make files with other settings in {self.folder} "
                    f"({'; '.join(self.differences(label))})."
                )
        if not missing:
            return
        missing |= {label for label in self.texts if not self.newest(label) and not (self.folder / label).exists()}
        texts = {label: self.texts[label] for label in sorted(missing)}
        content: dict[str, Any] = {"number": self.files[-1].number + 1 if self.files else 1, "settings": self.settings}
        if self.options:
            content["options"] = list(self.options)
        content |= {"classes": list(texts)} if None in texts.values() else {"class_texts": texts}
        text = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")  # JSON's escapes
        name = f"settings-{hashlib.sha256(text).hexdigest()[:12]}.json"
        try:
            write_atomically(self.folder / name, lambda file: file.write(text))
        except OSError as error:
            raise UserError(f"can't write to {self.folder}: {error.strerror}.") from error
        self.files = read_settings(self.folder)


class Records:
    """The settings asked for of a dataset's kept files and copies, and those recorded of what is on disk."""

    def __init__(self, paths: DatasetPaths, recipe: Recipe, options: Sequence[str] = ()):
        self.paths = paths
        self.recipe = recipe
        self.form = recipe.form
        texts: dict[str, str | None] = dict(paths.class_texts())
        made_by = {"model": recipe.model, "precision": recipe.precision} if self.form.needs_model else {}
        if recipe.precision and options:
            options = [*options, "--precision", recipe.precision.partition("-")[0]]
        if self.form.encoded_by_generator:
            self.kept = Record(paths.folder("kept"), {**self.form.settings(), **made_by}, texts)
        else:
            self.kept = Record(paths.folder("kept"), self.form.settings(), dict.fromkeys(texts))
        self.copies = Record(paths.folder("copies"), {**self.form.copy_settings(), **made_by}, texts, options)


def names_in(folder: Path) -> list[str]:
    """What a folder holds, sorted; nothing where there is none.  One listing instead of one question a file."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def read_settings(folder: Path) -> list[SettingsFile]:
    """The settings files of a folder of kept files or of copies, oldest first.  Raises UserError."""
    files = []
    for name in names_in(folder):
        match = re.fullmatch(r"settings(?:-([0-9a-f]+))?\.json", name)
        if match is None:
            continue
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            texts = content["class_texts"] if "class_texts" in content else dict.fromkeys(content["classes"])
            number = content["number"] if "number" in content else int(match[1] or 1)
            settings, options = dict(content["settings"]), tuple(content.get("options", ()))
            files.append(SettingsFile(int(number), settings, dict(texts), options))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{folder / name}, which says how the files there were made, can't be read ({type(error).__name__}). "
                "Take it away, and they are kept as they are."
            ) from error
    return sorted(files, key=lambda file: file.number)


def newest_files(folder: Path, labels: Iterable[str]) -> dict[str, SettingsFile]:
    """Class label -> the settings file that counts for it, of those classes that have one.  Raises UserError."""
    newest = {label: file for file in read_settings(folder) for label in file.texts}
    return {label: newest[label] for label in labels if label in newest}


def recorded_options(folder: Path) -> list[str]:
    """The options of compress/run.py that gave the newest recorded settings; empty where they are not recorded."""
    files = read_settings(folder)
    return list(files[-1].options) if files else []


def model_options(options: Sequence[str]) -> tuple[str, ...]:
    """Of options of compress/run.py (name, value, name, value, ...), those that say which model makes the copies."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return tuple(word for pair in pairs if pair[0] in ("--model", "--base", "--lora", "--decoder") for word in pair)


def recorded_settings(folder: Path, labels: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """Class label -> the newest recorded settings of its files, flat; None where nothing is recorded."""
    labels = list(labels)
    newest = newest_files(folder, labels)
    return {label: _without_text(newest[label].flat(label)) if label in newest else None for label in labels}


def by_settings(settings: Iterable[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """[{"classes": number, "settings": {...} or None}], the most frequent first, of each class's settings."""
    counts = Counter(json.dumps(each and _without_text(each)) for each in settings)
    return [{"classes": count, "settings": json.loads(each)} for each, count in counts.most_common()]


def generator_of(form: Form, options: Sequence[str]) -> str | None:
    """The model's name or file by a Job's `options`, which leave out the default; None for a form without a model."""
    if not (form.needs_model or form.needs_weights):
        return None
    return options[options.index("--model") + 1] if "--model" in options else Machine.model


def read_mark(copy: Path) -> str | None:
    """The mark of a copy, from the beginning of its file; None for a file without one, or one that can't be read."""
    try:
        with copy.open("rb") as file:
            head = file.read(1024)  # a tenth of the time that decoding the header takes, for a million files
    except OSError:
        return None
    # In JPEG's comment segment, or in a PNG's text chunk.
    match = re.search(rb"(?:\xff\xfe\x00.|tEXtComment\x00)(ESCORT [0-9a-f]{12})", head, re.DOTALL)
    return match[1].decode() if match else None


def _flat(settings: Mapping[str, Any], text: str | None) -> dict[str, Any]:
    """What made a class's files, flat: of the two samplings only the one that a class of this text gets."""
    flat = {name: value for name, value in settings.items() if name not in ("sampling", "guess")}
    if text is not None:
        flat["class_text"] = text
    sampling = settings.get("guess") if text == "" else None
    return {**flat, **(sampling or settings.get("sampling") or {})}


def _without_text(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if name != "class_text"}


def _completed(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with what the version that wrote them did not record."""
    unknown = wanted.keys() - recorded.keys()
    added = {name: ADDED[name] for name in unknown if name in ADDED}
    return {**recorded, **added, **{name: wanted[name] for name in unknown if name in UNRECORDED}}


def _digest(flat: Mapping[str, Any]) -> str:
    plain = {name: float(value) if type(value) is int else value for name, value in flat.items()}  # 9 is 9.0
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _value(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "none" if value is None else f"{value}"
    return text if len(text) <= 40 else f"{text[:36]} ...{text[0]}"
