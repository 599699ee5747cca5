"""From a JSON file and `key=value` overrides to a checked `Config`, or one line for each mistake."""

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from utils.config.checks import conflicts
from utils.config.foreign import PILOTS_BACKBONES, PYCIL_DATASETS, PYCIL_ONLY, PYCIL_SCHEDULE
from utils.config.schema import REQUIRED, Config, Key, MethodInfo, all_keys, keys_of
from utils.errors import UserError
from utils.files import load_json


class Entry(NamedTuple):
    """A key's value as it was written.

    origin: the file, or the override as typed; is_text: whether the value is the text of an override.
    """

    value: Any
    origin: str
    is_text: bool = False

    @property
    def shown(self) -> str:
        return self.value if self.is_text else as_json(self.value)


def load_config(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Mapping[str, MethodInfo],
    backbones: Sequence[str],
) -> Config:
    """The config of a JSON file with `key=value` overrides on top, checked.

    methods: the methods by name, with their own keys; backbones: the allowed values of convnet_type.
    Values may refer to other keys, as in "outputs/${dataset}".
    Raises UserError that lists every problem found, each with the file or the override it is in.
    """
    entries = {name: Entry(value, str(file)) for name, value in _flat(read_json(Path(file))).items()}
    reading = _Reading(str(file), methods)
    for override in overrides:
        name, separator, text = override.partition("=")
        if separator and name:
            entries[name] = Entry(text, override, is_text=True)
        else:
            reading.problems.append(f"command line: {override!r} is not of the form key=value")
    entries = reading.rename(entries)
    values = reading.validate(entries, {"model_name": tuple(methods), "convnet_type": tuple(backbones)})
    reading.raise_problems()
    return reading.build(values, entries)


def read_json(file: Path) -> dict[str, Any]:
    """A config file's one JSON object.  Raises UserError that says where it is not one."""
    if not file.exists():
        raise UserError(f"no config file {file}; exps/config.json is one to start from.")
    values = load_json(file)
    if not isinstance(values, dict):
        raise UserError(f'{file} must hold one JSON object, like {{"dataset": "Food101", ...}}.')
    return values


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """PyCIL's files that nest: the keys that they have by dataset, with a schedule among them, become keys."""
    by_dataset, dataset = values.get("configurations"), str(values.get("dataset")).lower()
    if not isinstance(by_dataset, dict) or not isinstance(by_dataset.get(dataset), dict):
        return values
    values = {key: value for key, value in values.items() if key != "configurations"} | by_dataset[dataset]
    if isinstance(schedule := values.get("scheduler"), dict):
        kind = schedule.pop("type", "")
        values |= {PYCIL_SCHEDULE.get(str(key), str(key)): value for key, value in schedule.items()}
        values["scheduler"] = {"MultiStep": "steps", "CosineAnnealing": "cosine"}.get(kind)
    return values


class _Reading:
    """What is known while a config is read: the keys, and the problems and notes so far."""

    def __init__(self, file: str, methods: Mapping[str, MethodInfo]):
        self.file = file
        self.methods = methods
        self.keys = all_keys(methods.values())
        self.problems: list[str] = []
        self.notes: list[str] = []

    def raise_problems(self) -> None:
        if lines := list(dict.fromkeys(self.problems)):
            count = "" if len(lines) == 1 else f"{len(lines)} problems in the config\n  "
            raise UserError(count + "\n  ".join(lines))

    def rename(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The entries by our names of keys.  Unknown keys are problems, or notes where they mean nothing here."""
        method = self.methods.get(str(entries["model_name"].value)) if "model_name" in entries else None
        if method and method.settings:
            self.keys |= keys_of(method.settings)  # where another method has a key of the same name
        ours = {other: name for name, key in self.keys.items() for other in key.also}
        pycil_only = dict(PYCIL_ONLY)
        for info in self.methods.values():
            pycil_only |= getattr(info.settings, "pycil_only", {})
        renamed: dict[str, Entry] = {}
        for name, entry in entries.items():
            key = name if name in self.keys else ours.get(name, name)
            if key in self.keys:
                if key in renamed and renamed[key].is_text == entry.is_text:
                    self.problems.append(f"{entry.origin}: {key} is given twice, once as {name}; keep one")
                if key not in renamed or entry.is_text:
                    renamed[key] = entry
            elif name in pycil_only:
                allowed, reason = pycil_only[name]
                if allowed is None or entry.value in (map(as_json, allowed) if entry.is_text else allowed):
                    self.notes.append(f"{name} is PyCIL's and changes nothing here: {reason}")
                else:
                    only = " or ".join(map(as_json, allowed))
                    self.problems.append(f"{entry.origin}: {name} can only be {only} here: {reason}")
            else:
                near = _did_you_mean(name, [*self.keys, *ours])
                hint = near or "; python main.py --help-config lists the keys"
                self.problems.append(f"{entry.origin}: unknown key {name!r}{hint}")
        return renamed

    def validate(self, entries: Mapping[str, Entry], choices: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The values of all keys, by their types, with references such as ${dataset} replaced.

        choices: of keys whose type does not list them.
        """
        values = {name: key.default for name, key in self.keys.items()}
        known = {**values, **{name: entry.value for name, entry in entries.items()}}
        for name, entry in entries.items():
            try:
                entry = _resolved(name, entry, known)
                values[name] = _validated(self.keys[name], entry)
                if name in choices and not _is_among(values[name], choices[name]):
                    listed, near = ", ".join(choices[name]), _did_you_mean(values[name], choices[name])
                    self.problems.append(f"{entry.origin}: {name} must be one of {listed}, not {entry.shown}{near}")
            except ValidationError as error:
                self.problems.append(f"{entry.origin}: {name}{_in_words(error, entry)}")
            except ValueError as error:
                self.problems.append(f"{entry.origin}: {name}: {entry.shown} can't be read: {error}")
        for name, key in keys_of(Config).items():
            if key.default is REQUIRED and name not in entries:
                self.problems.append(f"{self.file}: {name} is not given: {key.meaning}")
        return values

    def build(self, values: Mapping[str, Any], entries: Mapping[str, Entry]) -> Config:
        """The config of valid values.  Raises UserError where they do not go together."""
        config, method = Config(**{name: values[name] for name in keys_of(Config)}), self.methods[values["model_name"]]
        own = keys_of(method.settings) if method.settings else {}
        if method.settings:
            config.settings = method.settings(**{name: values[name] for name in own})
        self._translate(config, entries)
        others = [name for name in entries if name not in keys_of(Config) and name not in own]
        self.notes += [f"{name} is no key of {method.name}; it changes nothing" for name in others]
        for message, names in conflicts(config, method):
            origins = [entries[name].origin for name in names if name in entries]
            overrides = [origin for origin in origins if origin != self.file]
            self.problems.append(f"{(overrides or [self.file])[0]}: {message}")
        self.raise_problems()
        config.notes = tuple(self.notes)
        _fill_in(config)
        return config

    def _translate(self, config: Config, entries: Mapping[str, Entry]) -> None:
        """What PyCIL's configs say by the name of a dataset, and by having a memory_size."""
        name = config.dataset.lower() if config.dataset.lower().endswith("_aa") else config.dataset
        if name in PYCIL_DATASETS:
            config.dataset, augmentation = PYCIL_DATASETS[name]
            if "augmentation" not in entries:
                config.augmentation = augmentation
                self.notes.append(
                    f"dataset {name} is PyCIL's name of {config.dataset} with augmentation: {augmentation}"
                )
        if config.memory_size and "fixed_memory" not in entries:
            config.fixed_memory = False
            self.notes.append(f"fixed_memory is not given: all classes share memory_size = {config.memory_size} units")


def _validated(key: Key, entry: Entry) -> Any:
    """The value as its key's type; the text of an override may stand for another type.  Raises ValidationError."""
    if entry.is_text and entry.value in ("null", "None") and types.NoneType in typing.get_args(key.annotation):
        return None
    return TypeAdapter(key.annotation).validate_python(entry.value, strict=not entry.is_text)


def _in_words(error: ValidationError, entry: Entry) -> str:
    """pydantic's message, such as " must be a valid integer, not 12.5"; what is wrong in a list has its index."""
    faults = [(fault, [part for part in fault["loc"] if isinstance(part, int)]) for fault in error.errors()]
    fault, index = max(faults, key=lambda pair: len(pair[1]))
    faults = [pair for pair in faults if pair[1] == index]  # of a union one for each type
    words = [fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be") for fault, _ in faults]
    text = re.sub(", (unable to|got a) [^,]*", "", " or ".join(dict.fromkeys(words)).replace(" or must be", " or"))
    value = as_json(fault["input"]) if index else entry.shown
    return "".join(f"[{i}]" for i in index) + f" {text}" + (", not " if text.startswith("must") else ": ") + value


def _is_among(value: str, choices: Sequence[str]) -> bool:
    """Whether a value is one of the choices; "timm/NAME" stands for whatever has a name after "timm/"."""
    prefixes = [choice.removesuffix("NAME") for choice in choices if choice.endswith("/NAME")]
    return value in choices or any(value.startswith(prefix) and value != prefix for prefix in prefixes)


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    """A hint at the nearest choice, or at timm's name of a network; "" where there is none."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if "timm/NAME" in choices and (word in PILOTS_BACKBONES or re.match(r"(pretrained_)?(vit|deit|swin)_", word)):
        near = [PILOTS_BACKBONES.get(word, f"timm/{word.removeprefix('pretrained_')}")]
    return f"; did you mean {near[0]!r}?" if near else ""


def as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + "..."


_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def _resolved(name: str, entry: Entry, known: Mapping[str, Any]) -> Entry:
    """A key's entry with references replaced; known: the values of all keys.  Raises ValueError."""
    if not isinstance(entry.value, str) or "${" not in entry.value:
        return entry
    value = _filled_in(entry.value, known, (name,))
    return Entry(value, entry.origin, is_text=isinstance(value, str))


def _filled_in(text: str, known: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """A text with the values of other keys in place of ${key}; a text that is one reference becomes that key's value.

    names: the key that the text belongs to, and those that have led to it.  Raises ValueError.
    """

    def value_of(reference: re.Match) -> Any:
        if (name := reference[1]) not in known or known[
            name
        ] is REQUIRED:  # ${oc.env:NAME} among them, which could publish a secret
            raise ValueError(f"{reference[0]} is no other key's value, such as ${{dataset}}")
        if name in names:
            raise ValueError(f"{' -> '.join([*names, name])} refers to itself")
        value = known[name]
        return _filled_in(value, known, (*names, name)) if isinstance(value, str) else value

    if whole := _REFERENCE.fullmatch(text):
        return value_of(whole)
    filled = _REFERENCE.sub(lambda reference: str(value_of(reference)), text)
    if "${" in _REFERENCE.sub("", text):
        raise ValueError("a reference has the form ${key}")
    return filled


def _fill_in(config: Config) -> None:
    """Defaults that follow from other keys."""
    if config.real_per_class is None and config.syn_per_class == 0 and config.budget_in == "units":
        # With a shared budget it is only a ratio, real : synthetic.
        config.real_per_class = int(config.memory_per_class) or int(not config.fixed_memory)
    if config.output_dir is None:
        increments = config.increment if isinstance(config.increment, list) else [config.increment]
        phases = "+".join(map(str, [config.init_cls, *increments]))
        backbone = config.convnet_type.replace("/", "-")
        config.output_dir = f"outputs/{config.dataset}-{config.model_name}-{backbone}-{phases}"
