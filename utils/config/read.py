"""From a JSON file and `key=value` overrides to a checked `Config`, or one line for each mistake."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from utils.config.schema import REMOVED, REQUIRED, Config, MethodInfo, all_keys, keys_of
from utils.data.datasets import Augmentation
from utils.errors import UserError
from utils.files import load_json

PYCIL_ONLY: dict[str, tuple[tuple | None, str]] = {
    "skip": ((False,), "phase 0 is trained, or reused from phase0_cache"),
    "debug": (None, "it only changes what PyCIL prints"),
    "min_lr": ((0,), "the cosine ends at 0"),
    "warmup": ((0,), "the learning rate starts at its full height"),
    "t_max": (None, "the cosine ends with the last epoch"),
    **{name: ((value,), "all copies are read") for name, value in REMOVED.items()},
}
"""Keys of PyCIL's files, or of earlier versions, that are no keys here: the values that mean what happens anyway
(None: all), and why.  A method's `Settings` may have a class variable `pycil_only` like this."""

PYCIL_SCHEDULE = {"init_epochs": "init_epoch", "milestones": "init_milestones", "decay": "init_lr_decay"}
"""PyCIL's names in a nested schedule, and ours where they differ."""

PYCIL_DATASETS: dict[str, tuple[str, Augmentation]] = {
    "cifar10_aa": ("cifar10", "autoaugment"),
    "cifar100_aa": ("cifar100", "autoaugment"),
    "imagenet100": ("imagenet100", "pycil"),
    "imagenet1000": ("imagenet1000", "pycil"),
}
"""PyCIL's names of datasets, spelt as there, that stand for a dataset and an augmentation."""

PILOTS_BACKBONES = {
    "pretrained_vit_b16_224": "timm/vit_base_patch16_224",
    "pretrained_vit_b16_224_in21k": "timm/vit_base_patch16_224.augreg_in21k",
    "vit_base_patch16_224_in21k": "timm/vit_base_patch16_224.augreg_in21k",
}
"""PILOT's and timm's earlier names of pretrained backbones, and timm's today; with `pretrained: true`."""


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
    file: str | Path, overrides: Sequence[str] = (), *, methods: Mapping[str, MethodInfo], backbones: Sequence[str]
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
        """The values of the entries, by their keys' types, with references such as ${dataset} replaced.

        choices: of keys whose type does not list them.
        """
        values: dict[str, Any] = {}
        known = {name: key.default for name, key in self.keys.items()}
        known |= {name: entry.value for name, entry in entries.items()}
        for name, entry in entries.items():
            try:
                if isinstance(entry.value, str) and "${" in entry.value:
                    value = _filled_in(entry.value, known, (name,))
                    entry = Entry(value, entry.origin, is_text=isinstance(value, str))
                kind = self.keys[name].annotation
                if entry.is_text and entry.value in ("null", "None") and types.NoneType in typing.get_args(kind):
                    values[name] = None
                else:  # the text of an override may stand for another type
                    values[name] = TypeAdapter(kind).validate_python(entry.value, strict=not entry.is_text)
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
        shared, method = keys_of(Config), self.methods[values["model_name"]]
        own = keys_of(method.settings) if method.settings else {}
        config = Config(**{name: value for name, value in values.items() if name in shared})
        if method.settings:
            config.settings = method.settings(**{name: value for name, value in values.items() if name in own})
        self._translate(config, entries)
        others = [name for name in entries if name not in shared and name not in own]
        self.notes += [f"{name} is no key of {method.name}; it changes nothing" for name in others]
        for message, names in conflicts(config, method):
            overrides = [entries[name].origin for name in names if name in entries and entries[name].is_text]
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
                ours = f"{config.dataset} with augmentation: {augmentation}"
                self.notes.append(f"dataset {name} is PyCIL's name of {ours}")
        if config.memory_size and "fixed_memory" not in entries:
            config.fixed_memory = False
            self.notes.append(f"fixed_memory is not given: all classes share memory_size = {config.memory_size} units")


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


def _filled_in(text: str, known: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """A text with the values of other keys in place of ${key}; a text that is one reference becomes that key's value.

    names: the key that the text belongs to, and those that have led to it.  Raises ValueError.
    """

    def value_of(reference: re.Match) -> Any:
        name = reference[1]
        value = known.get(name, REQUIRED)
        if value is REQUIRED:  # ${oc.env:NAME} among them, which could publish a secret
            raise ValueError(f"{reference[0]} is no other key's value, such as ${{dataset}}")
        if name in names:
            raise ValueError(f"{' -> '.join([*names, name])} refers to itself")
        return _filled_in(value, known, (*names, name)) if isinstance(value, str) else value

    if whole := _REFERENCE.fullmatch(text):
        return value_of(whole)
    filled = _REFERENCE.sub(lambda reference: str(value_of(reference)), text)
    if "${" in _REFERENCE.sub("", text):
        raise ValueError("a reference has the form ${key}")
    return filled


def conflicts(c: Config, method: MethodInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(message, the keys that it is about): what is wrong with values together, as far as can be told without data."""
    yield from _memory_conflicts(c, method)
    is_library = "/" in c.convnet_type
    if method.needs_stages and is_library:
        message = f"{method.name} needs the stages of a ResNet: set convnet_type to resnet18, resnet32, ..."
        yield message, ("convnet_type", "model_name")
    if c.image_size and not is_library:
        yield "image_size is for convnet_type torchvision/... and timm/...", ("image_size", "convnet_type")
    if c.freeze_backbone and c.backbone_lrate:
        message = "backbone_lrate: freeze_backbone leaves the backbone without a learning rate; set one of them"
        yield message, ("backbone_lrate", "freeze_backbone")
    if c.init_epoch == 0 and not c.pretrained:
        yield "init_epoch must be at least 1, unless pretrained is true", ("init_epoch", "pretrained")
    if (parts := c.accumulate_batches) > c.batch_size:
        message = f"accumulate_batches: a batch of {c.batch_size} images can't be processed in {parts} parts"
        yield message, ("accumulate_batches", "batch_size")
    if (c.syn_per_class != 0 or c.augmentation_prob > 0) and c.augmentations_per_image < 1:
        message = "augmentations_per_image must be at least 1 where syn_per_class or augmentation_prob is above 0"
        yield message, ("augmentations_per_image", "syn_per_class", "augmentation_prob")
    if c.val_per_class and c.memory_only:
        message = "val_per_class: memory_only may lose the train images that are held out; set one of them"
        yield message, ("val_per_class", "memory_only")
    if (c.class_order or not c.shuffle) and len(c.seed) > 1:  # the runs would be equal
        key, words = ("class_order", "class_order is") if c.class_order else ("shuffle", "shuffle: false gives")
        yield f"{words} one order of classes; seed must be one number, not {c.seed}", (key, "seed")
    for message in c.settings.check(c) if hasattr(c.settings, "check") else ():
        yield message, ("model_name", message.partition(":")[0])


def _memory_conflicts(c: Config, method: MethodInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    real, synthetic, in_bytes, least = c.real_per_class, c.syn_per_class, c.budget_in == "bytes", method.least_exemplars
    if in_bytes and not (c.memory_bytes_per_class and c.fixed_memory):
        message = "budget_in: bytes needs memory_bytes_per_class, and fixed_memory: true"
        yield message, ("budget_in", "memory_bytes_per_class", "fixed_memory")
    if in_bytes and real is None and synthetic != 0:
        message = "real_per_class must be given where budget_in is bytes and syn_per_class is not 0"
        yield message, ("real_per_class", "syn_per_class", "budget_in")
    if synthetic == "fill" and not c.fixed_memory:
        message = 'syn_per_class: "fill" needs fixed_memory: true; with a shared budget it is a ratio'
        yield message, ("syn_per_class", "fixed_memory")
    if method.uses_memory and not c.fixed_memory and not c.memory_size:
        message = "memory_size must be given where fixed_memory is false: the units that all classes share"
        yield message, ("fixed_memory", "memory_size", "model_name")
    if not method.uses_memory or not c.fixed_memory or real is None:
        return
    # What a prompt costs depends on the images, and is checked with them; the cost of real exemplars is known here.
    if not in_bytes and real > (budget := c.memory_per_class):
        message = f"real_per_class: {real} real exemplars cost {real} units, more than memory_per_class = {budget:g}"
        yield message, ("real_per_class", "memory_per_class", "fixed_memory")
    if synthetic != "fill" and real + synthetic < least:
        message = f"real_per_class + syn_per_class must be at least {least}: {method.name} needs exemplars"
        yield message, ("real_per_class", "syn_per_class", "model_name", "fixed_memory")


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
