"""The settings of the kept files and copies on disk, so that files of different settings are never mixed unnoticed.

A copy carries a mark in its JPEG comment: a digest of everything that it depends on beside its image and its number.
File and mark are one atomic write.  The settings behind the marks are written beside the class folders before the first
copy: `settings.json`, then `settings-2.json`, ... whenever the settings change.

    exemplars/settings.json            {"settings": {"prompt_template": ..., "sampling": {"steps": 20, ...}, ...},
                                        "class_texts": {"apple_pie": "apple pie", ...}}
    exemplars/apple_pie/1_seed00.jpg   comment: "ESCORT 3f2a9c81d0b7"

A settings file is written once, under a free number, and never changed, so processes that share the work can't
overwrite each other's.  The newest one counts for each class.  Kept files carry no mark, as their bytes count as
memory; their settings are in `edge_maps/settings.json`, and a file is checked by its size or against its image.
Where the generator encodes them too, these include the model, the precision and the class's text.

Precision is a setting: bf16 in place of fp32 changes almost half of a copy's pixels.  Device and batch size are none:
in fp32 they change a few pixels in ten thousand by one or two levels of 255, in bf16 some by a level or more.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path

from compress.forms import Form
from compress.presets import Preset, Sampling
from utils.data.images import temporary_prefix
from utils.data.paths import DatasetPaths
from utils.errors import UserError

MARK = "ESCORT"
MADE_BY = ("model", "precision", "edge_coder")
"""Settings that a record may lack, or that nobody has looked up; None, which equals any value.  Edge maps of versions
without a coder are pictures, which any version reads."""
MODELS = ("model", "autoencoder")
"""Settings that are the fingerprint of a model."""
DEFAULTS = {
    **{each.name: each.default for kind in (Preset, Sampling) for each in fields(kind) if each.default is not MISSING},
    **dict.fromkeys(MADE_BY),
    "quality": 95,  # of versions whose records don't say
}
"""The values of settings in records of versions that did not know them."""


class MadeOtherwise(UserError):
    """What is on disk was made with other settings than those asked for."""


class State(Enum):
    """What a folder's settings files say about a class, against what is asked for."""

    NEW = "no settings are known"
    SAME = "everything was made so"
    MIXED = "these settings are the newest, and there were others before: each file must be looked at"
    OTHER = "the newest settings are others"


class Record:
    """The settings files of one folder, and the settings that are asked for.

    folder: of kept files or of copies; settings: as JSON has it; texts: class label -> text, None where a class's text
    makes no difference; options: of compress/run.py, recorded for messages.
    Raises UserError for a settings file that can't be read.
    """

    def __init__(self, folder: Path, settings: Mapping, texts: Mapping[str, str | None], options: Sequence[str] = ()):
        self.folder = folder
        self.settings = settings
        self.texts = texts
        self.options = options
        self.entries = self._read()

    def state(self, label: str) -> State:
        kinds = self._kinds(label)
        if not kinds:
            return State.NEW
        wanted = self._wanted(label)
        if not _alike(kinds[-1], wanted):
            return State.OTHER
        return State.SAME if all(_alike(kind, wanted) for kind in kinds) else State.MIXED

    def mark(self, label: str) -> str | None:
        """The JPEG comment of new copies of a class; None while model or precision is unknown."""
        wanted = self._wanted(label)
        # As recorded: an earlier version may have known fewer settings.
        kind = next((kind for kind in reversed(self._kinds(label)) if _alike(kind, wanted)), None)
        if kind is None or _knows_less(kind, wanted):
            kind = None if any(wanted.get(name, "") is None for name in MADE_BY) else wanted
        return kind and f"{MARK} {_digest(kind)}"

    def marks(self, label: str) -> frozenset[str]:
        """The marks of all copies of a class that count as made with these settings; empty while none is known."""
        wanted, newest = self._wanted(label), self.mark(label)
        recorded = {f"{MARK} {_digest(kind)}" for kind in self._kinds(label) if _alike(kind, wanted)}
        return frozenset(recorded | {newest} if newest else recorded)

    def differences(self, label: str) -> list[str]:
        """What differs between the newest settings on disk and those asked for, such as "steps 20 -> 50"."""
        kinds, wanted = self._kinds(label), self._wanted(label)
        return [
            f"{_words(name, label)} {_value(old)} -> {_value(value)}"
            for name, value in (wanted.items() if kinds else ())
            for old in [kinds[-1].get(name, DEFAULTS.get(name))]
            if not _alike({name: value}, {name: old})
        ]

    def note(self, labels: Iterable[str]) -> None:
        """Record that these classes' files are made with the settings asked for from now on.

        Classes of which nothing is on disk are recorded as well, so that processes which share the work agree.
        Raises MadeOtherwise where another process has recorded other settings since this record was read.
        """
        labels = set(labels)
        while True:
            before = {label: self._kinds(label)[-1:] for label in labels}
            self.entries = self._read()
            missing = set()
            for label in labels:
                newest = self._kinds(label)[-1:]
                alike = newest and _alike(newest[0], self._wanted(label))
                if alike and not _knows_less(newest[0], self._wanted(label)):
                    continue
                if newest != before[label] and not alike:
                    raise MadeOtherwise(
                        f"another process has begun to make files with other settings in {self.folder} "
                        f"({'; '.join(self.differences(label))})."
                    )
                missing.add(label)
            if not missing:
                return
            missing |= {label for label in self.texts if not self._kinds(label) and not (self.folder / label).exists()}
            self._add({label: self.texts[label] for label in sorted(missing)})

    def kinds(self, label: str) -> list[dict]:
        """All settings that a class's files may have: those recorded, oldest first, then those asked for."""
        return [*self._kinds(label), self._wanted(label)]

    def newest(self, label: str) -> dict | None:
        """The newest recorded settings of a class's files, None where nothing is recorded."""
        return next(reversed(self._kinds(label)), None)

    def wanted(self, label: str) -> dict:
        """The settings asked for of a class's files, flat."""
        return _without_text(self._wanted(label))

    def _wanted(self, label: str) -> dict:
        """The settings asked for; a model or precision that nobody has looked up is taken from the newest record."""
        wanted = _kind(self.settings, self.texts.get(label, label))
        for name in MADE_BY:
            if wanted.get(name, "") is None:
                wanted[name] = next((k[name] for k in reversed(self._kinds(label)) if k.get(name) is not None), None)
        return wanted

    def _kinds(self, label: str) -> list[dict]:
        """What made a class's files, oldest first."""
        return [_kind(entry["settings"], entry["texts"][label]) for entry in self.entries if label in entry["texts"]]

    def _read(self) -> list[dict]:
        entries, files = [], settings_files(self.folder)
        self._last = _number(files[-1].name) if files else 0
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                texts = content["class_texts"] if "class_texts" in content else dict.fromkeys(content["classes"])
                entries.append({**content, "settings": dict(content["settings"]), "texts": dict(texts)})
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{file}, which says how the files there were made, can't be read ({type(error).__name__}). "
                    "Take it away, and they are kept as they are."
                ) from error
        return entries

    def _add(self, texts: Mapping[str, str | None]) -> None:
        """Write the next settings file, unless somebody else does so first."""
        classes = {"classes": list(texts)} if None in texts.values() else {"class_texts": texts}
        options = {"options": list(self.options)} if self.options else {}
        content = {"settings": self.settings, **options, **classes}
        # The number after those that were read: if another process has taken it meanwhile, its file is read first.
        number = self._last + 1
        target = self.folder / ("settings.json" if number == 1 else f"settings-{number}.json")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=temporary_prefix(), suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:  # JSON's escapes
                    json.dump(content, file, indent=1, ensure_ascii=False)
                os.chmod(temporary, 0o644)
                _move_to_a_free_name(temporary, target)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"can't write to {self.folder}: {error.strerror}.") from error


class Records:
    """The settings asked for of a dataset's kept files and copies, and the recorded settings of those on disk.

    form: with the settings; model: the weights' fingerprint (`weights_fingerprint`, or a loaded model's `fingerprint`);
    precision: what `compress.generators.build.choose_precision` returns.  A model or precision of None is not compared.
    options: those of compress/run.py that give these settings.
    """

    def __init__(
        self,
        paths: DatasetPaths,
        form: Form,
        model: str | None = None,
        precision: str | None = None,
        options: Sequence[str] = (),
    ):
        self.paths = paths
        self.form = form
        self.precision = precision
        texts = paths.class_texts()
        made_by = {"model": model, "precision": precision} if form.needs_model else {}
        if form.encoded_by_generator:
            self.kept = Record(paths.folder("kept"), {**form.settings(), **made_by}, texts)
        else:
            self.kept = Record(paths.folder("kept"), form.settings(), dict.fromkeys(texts))
        options = [*options, *(["--precision", precision.partition("-")[0]] if precision and options else [])]
        self.copies = Record(paths.folder("copies"), {**form.copy_settings(), **made_by}, texts, options)


def recorded_options(folder: Path) -> list[str]:
    """The options of compress/run.py that gave the newest recorded settings; empty where they are not recorded."""
    entries = Record(folder, {}, {}).entries
    return list(entries[-1].get("options", ())) if entries else []


def recorded_models(folder: Path, labels: Iterable[str]) -> set[tuple[str, ...]]:
    """The options that named the model when the newest files of each of these classes were made, where recorded."""
    entries = reversed(Record(folder, {}, {}).entries)
    newest: dict[str, Sequence[str]] = {}
    for entry in entries:
        newest = {**dict.fromkeys(entry["texts"], entry.get("options", ())), **newest}
    return {model_options(options) for label in labels if (options := newest.get(label))}


def model_options(options: Sequence[str]) -> tuple[str, ...]:
    """Of options of compress/run.py (name, value, name, value, ...), those that say which model makes the copies."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return tuple(word for pair in pairs if pair[0] in ("--model", "--base", "--lora", "--decoder") for word in pair)


def recorded_settings(folder: Path, labels: Iterable[str]) -> dict[str, dict | None]:
    """Class label -> the newest recorded settings of its files, flat; None where nothing is recorded."""
    record = Record(folder, {}, {})
    return {label: _without_text(record.newest(label)) for label in labels}


def read_mark(copy: Path) -> str | None:
    """The mark of a copy, from the beginning of its file; None for a file without one, or one that can't be read."""
    try:
        with copy.open("rb") as file:
            head = file.read(1024)  # a tenth of the time that decoding the header takes, for a million files
    except OSError:
        return None
    # In JPEG's comment segment, or in a PNG's text chunk.
    found = re.search(rb"(?:\xff\xfe\x00.|tEXtComment\x00)(ESCORT [0-9a-f]{12})", head, re.DOTALL)
    return found and found[1].decode()


def settings_files(folder: Path) -> list[Path]:
    """The settings files of a folder of kept files or of copies, oldest first."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(filter(_number, names), key=_number)]


def _number(name: str) -> int:
    """The place of a settings file among the others, 1, 2, ...; 0 for another file."""
    match = re.fullmatch(r"settings(?:-(\d+))?\.json", name)
    return int(match[1] or 1) if match else 0


def _move_to_a_free_name(source: str, target: Path) -> None:
    """Move a file, or leave it where it is if another process has taken the name."""
    try:
        os.link(source, target)  # unlike a rename, it fails where the target is there
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not target.exists():
            os.replace(source, target)


def _kind(settings: Mapping, text: str | None) -> dict:
    """What made a class's files, flat: of the two samplings only the one that a class of this text gets."""
    kind = {name: value for name, value in settings.items() if name not in ("sampling", "guess")}
    if text is not None:
        kind["class_text"] = text
    sampling = settings.get("guess") if text == "" else None
    return {**kind, **(sampling or settings.get("sampling") or {})}


def _without_text(kind: Mapping | None) -> dict | None:
    return kind and {name: value for name, value in kind.items() if name != "class_text"}


def _alike(kind: Mapping, other: Mapping) -> bool:
    """Equal, with DEFAULTS for what a version did not know; an unknown model, its config or precision equals any."""
    kind, other = {**DEFAULTS, **kind}, {**DEFAULTS, **other}
    for name in MADE_BY:
        if kind[name] is None or other[name] is None:
            kind[name] = other[name] = None
    for name in MODELS:
        if (kind.get(name) in _spellings(other.get(name))) or (other.get(name) in _spellings(kind.get(name))):
            kind[name] = other[name] = None
    return kind == other


def _knows_less(kind: Mapping, other: Mapping) -> bool:
    """Whether a record lacks a model, its config or a precision that is known by now."""
    return any(
        (old := kind.get(name)) != (new := other.get(name)) and (old is None or old in _spellings(new)[1:])
        for name in dict.fromkeys([*MADE_BY, *MODELS])
    )


def _spellings(model: str | None) -> list[str | None]:
    """A fingerprint (`ControlNet.cldm.weights.fingerprint`), and what earlier versions recorded: without its config."""
    match = re.fullmatch(r"([0-9a-f]{16})\.[0-9a-f]{8}(\+.*)?", model or "")
    return [model, match[1] + (match[2] or "")] if match else [model]


def _digest(kind: Mapping) -> str:
    plain = {name: float(value) if type(value) is int else value for name, value in kind.items()}  # 9 is 9.0
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _words(name: str, label: str) -> str:
    return f"text of class {label!r}:" if name == "class_text" else name.replace("_", " ")


def _value(value) -> str:
    text = repr(value) if isinstance(value, str) else "none" if value is None else f"{value}"
    return text if len(text) <= 40 else f"{text[:36]} ...{text[0]}"
