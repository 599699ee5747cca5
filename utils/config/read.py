"""From a JSON file and `key=value` overrides to a checked `Config`, or one line for each mistake."""

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from utils import json_files
from utils.config.foreign import PILOTS_BACKBONES, PYCIL_DATASETS, PYCIL_ONLY
from utils.config.mistakes import as_json, is_among, not_among, what_is_wrong
from utils.config.schema import REQUIRED, Config, Key, MethodInfo, all_keys, keys_of
from utils.config.types import alternatives
from utils.errors import UserError


class Given(NamedTuple):
    """A value as given.  origin: the file, or the override as typed; typed: false for the text of an override."""

    value: Any
    origin: str
    typed: bool


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
    given = {name: Given(value, str(file), True) for name, value in _flat(read_json(Path(file))).items()}
    problems: list[tuple[str, str]] = []
    for override in overrides:
        name, separator, text = override.partition("=")
        if separator and name:
            given[name] = Given(text, override, False)
        else:
            problems.append(("command line", f"{override!r} is not of the form key=value"))
    reading = _Reading(str(file), given, problems, methods, backbones)
    config = reading.config()
    if problems:
        lines = list(dict.fromkeys(f"{origin}: {problem}" for origin, problem in problems))
        count = "" if len(lines) == 1 else f"{len(lines)} problems in the config\n  "
        raise UserError(count + "\n  ".join(lines))
    return config


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """PyCIL's files that nest: the keys that they have by dataset, with a schedule among them, become keys."""
    by_dataset, dataset = values.get("configurations"), values.get("dataset")
    if not isinstance(by_dataset, dict) or not isinstance(by_dataset.get(str(dataset).lower()), dict):
        return values
    values = {key: value for key, value in values.items() if key != "configurations"}
    values |= by_dataset[str(dataset).lower()]
    if isinstance(schedule := values.get("scheduler"), dict):
        values |= {_SCHEDULER[key]: value for key, value in schedule.items() if key in _SCHEDULER}
        values["scheduler"] = {"MultiStep": "steps", "CosineAnnealing": "cosine"}.get(schedule.get("type"))
        values |= {key: value for key, value in schedule.items() if key not in (*_SCHEDULER, "type")}
    return values


_SCHEDULER = {
    "init_lr": "init_lr",
    "init_epochs": "init_epoch",
    "milestones": "init_milestones",
    "decay": "init_lr_decay",
}
"""PyCIL's names in a nested schedule, and ours."""


class _Reading:
    """One config on its way: each step takes what the one before left, and adds to `problems`."""

    def __init__(
        self,
        file: str,
        given: Mapping[str, Given],
        problems: list[tuple[str, str]],
        methods: Mapping[str, MethodInfo],
        backbones: Sequence[str],
    ):
        self.file = file
        self.problems = problems
        self.choices = {"model_name": tuple(methods), "convnet_type": tuple(backbones)}
        self.notes: list[str] = []
        self.broken: set[str] = set()  # keys whose value has been refused; checks that need one are left out
        name = given["model_name"].value if "model_name" in given else None
        self.method = methods.get(name) if isinstance(name, str) else None
        own = self.method.settings if self.method else None
        self.own_keys = keys_of(own) if own else {}
        self.keys = {**all_keys(methods.values()), **keys_of(Config), **self.own_keys}
        self.pycil_only = dict(PYCIL_ONLY)
        for other in methods.values():
            self.pycil_only |= getattr(other.settings, "pycil_only", {})
        self.given = self._by_our_names(given)

    def config(self) -> Config:
        values = {name: key.default for name, key in self.keys.items()}
        for name, entry in self._resolved().items():
            values[name] = self._checked(self.keys[name], entry)
        shared = keys_of(Config)
        for name in shared:
            if values[name] is REQUIRED:
                self.refuse(f"{name} is not given: {self.keys[name].meaning}", name)
                self.broken.add(name)
        config = Config(**{name: values[name] for name in shared})
        if self.method and self.method.settings:
            config.settings = self.method.settings(**{name: values[name] for name in self.own_keys})
        self._name_of_dataset(config)
        self._kind_of_memory(config)
        for name in self.given:
            if self.method and name not in shared and name not in self.own_keys and name not in self.broken:
                self.notes.append(f"{name} is no key of {self.method.name}; it changes nothing")
        self._check(config)
        config.notes = tuple(self.notes)
        if not self.problems:
            _fill_in(config)
        return config

    def _name_of_dataset(self, config: Config) -> None:
        """Some of PyCIL's names stand for a dataset and `augmentation`."""
        name = str(config.dataset)
        if name.lower().endswith("_aa"):
            name = name.lower()
        if name not in PYCIL_DATASETS:
            return
        config.dataset, augmentation = PYCIL_DATASETS[name]
        if "augmentation" not in self.given:
            config.augmentation = augmentation
            self.notes.append(f"dataset {name} is PyCIL's name of {config.dataset} with augmentation: {augmentation}")

    def _kind_of_memory(self, config: Config) -> None:
        """As in PyCIL, classes share memory_size unless fixed_memory says otherwise."""
        if config.memory_size and "fixed_memory" not in self.given:
            config.fixed_memory = False
            self.notes.append(f"fixed_memory is not given: all classes share memory_size = {config.memory_size} units")

    def refuse(self, message: str, *names: str) -> None:
        """Add a problem, unless a key that it is about has been refused already."""
        if self.broken.isdisjoint(names):
            origins = [self.given[name].origin for name in names if name in self.given]
            overrides = [origin for origin in origins if origin != self.file]
            self.problems.append(((overrides or [self.file])[0], message))

    def _by_our_names(self, given: Mapping[str, Given]) -> dict[str, Given]:
        """PyCIL's other names become ours; unknown keys are refused, or noted where they mean nothing."""
        ours = {other: name for name, key in self.keys.items() for other in key.also}
        found: dict[str, Given] = {}
        for name, entry in given.items():
            key = ours.get(name, name) if name not in self.keys else name
            if key in self.keys:
                if key in found and (found[key].origin == self.file) == (entry.origin == self.file):
                    self.problems.append((entry.origin, f"{key} is given twice, once as {name}; keep one"))
                if key not in found or entry.origin != self.file:
                    found[key] = entry
            elif name in self.pycil_only:
                allowed, reason = self.pycil_only[name]
                if allowed is None or entry.value in (allowed if entry.typed else [*map(as_json, allowed)]):
                    self.notes.append(f"{name} is PyCIL's and changes nothing here: {reason}")
                else:
                    only = " or ".join(map(as_json, allowed))
                    self.problems.append((entry.origin, f"{name} can only be {only} here: {reason}"))
            else:
                near = difflib.get_close_matches(name, [*self.keys, *ours], n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else "; python main.py --help-config lists the keys"
                self.problems.append((entry.origin, f"unknown key {name!r}{hint}"))
        return found

    def _resolved(self) -> dict[str, Given]:
        """The values, with references such as ${dataset} replaced."""
        known = {name: key.default for name, key in self.keys.items() if key.default is not REQUIRED}
        known |= {name: entry.value for name, entry in self.given.items()}
        resolved = dict(self.given)
        for name, entry in self.given.items():
            if isinstance(entry.value, str) and "${" in entry.value:
                try:
                    value = _filled_in(entry.value, known, (name,))
                    resolved[name] = entry._replace(value=value, typed=not isinstance(value, str))
                except ValueError as error:
                    self.refuse(f"{name}: {as_json(entry.value)} can't be read: {error}", name)
                    self.broken.add(name)
                    del resolved[name]
        return resolved

    def _checked(self, key: Key, entry: Given) -> Any:
        """The value as its key's type, or the default where it is refused."""
        value, choices = entry.value, self.choices.get(key.name)
        if not entry.typed and value in ("null", "None") and _may_be_null(key.annotation):
            value = None
        try:
            value = TypeAdapter(key.annotation).validate_python(value, strict=entry.typed)
            if choices is None or is_among(value, choices):
                return value
            message = not_among(choices, as_json(value), PILOTS_BACKBONES.get(value) or _of_timm(value, choices))
        except ValidationError as error:
            message = what_is_wrong(key.annotation, error, as_json(value) if entry.typed else value)
        self.refuse(f"{key.name} {message}", key.name)
        self.broken.add(key.name)
        return key.default

    def _check(self, config: Config) -> None:
        """What is wrong with the values together, as far as can be told without the data."""
        uses_memory = self.method.uses_memory if self.method else True
        real, synthetic, budget = config.real_per_class, config.syn_per_class, config.memory_per_class
        if config.init_epoch == 0 and not config.pretrained:
            self.refuse("init_epoch must be at least 1, unless pretrained is true", "init_epoch", "pretrained")
        in_bytes = config.budget_in == "bytes"
        if in_bytes and not (config.memory_bytes_per_class and config.fixed_memory):
            message = "budget_in: bytes needs memory_bytes_per_class, and fixed_memory: true"
            self.refuse(message, "budget_in", "memory_bytes_per_class", "fixed_memory")
        if in_bytes and real is None and synthetic != 0:
            message = "real_per_class must be given where budget_in is bytes and syn_per_class is not 0"
            self.refuse(message, "real_per_class", "syn_per_class", "budget_in")
        if synthetic == "fill" and not config.fixed_memory:
            message = 'syn_per_class: "fill" needs fixed_memory: true; with a shared budget it is a ratio'
            self.refuse(message, "syn_per_class", "fixed_memory")
        if uses_memory and not config.fixed_memory and not config.memory_size:
            message = "memory_size must be given where fixed_memory is false: the units that all classes share"
            self.refuse(message, "fixed_memory", "memory_size", "model_name")
        # A prompt's cost depends on the images, and main.py checks it with them; that of real exemplars is known here.
        if uses_memory and config.fixed_memory and not in_bytes and real is not None and real > budget:
            message = (
                f"real_per_class: {real} real exemplars cost {real} units, more than memory_per_class = {budget:g}"
            )
            self.refuse(message, "real_per_class", "memory_per_class", "fixed_memory")
        self._check_backbone(config)
        parts, size = config.accumulate_batches, config.batch_size
        if parts > size:
            message = f"accumulate_batches: a batch of {size} images can't be processed in {parts} parts"
            self.refuse(message, "accumulate_batches", "batch_size")
        probability, keys = config.augmentation_prob, ("syn_per_class", "augmentation_prob")
        if (synthetic != 0 or probability > 0) and config.augmentations_per_image < 1:
            message = "augmentations_per_image must be at least 1 where syn_per_class or augmentation_prob is above 0"
            self.refuse(message, "augmentations_per_image", *keys)
        if config.val_per_class and config.memory_only:
            message = "val_per_class: memory_only may lose the train images that are held out; set one of them"
            self.refuse(message, "val_per_class", "memory_only")
        if uses_memory and self.method and config.fixed_memory and real is not None:
            least = self.method.least_exemplars
            message = f"real_per_class + syn_per_class must be at least {least}: {self.method.name} needs exemplars"
            if synthetic != "fill" and real + synthetic < least:
                self.refuse(message, "real_per_class", "syn_per_class", "model_name", "fixed_memory")
        if (config.class_order or not config.shuffle) and len(config.seed) > 1:  # the runs would be equal
            given = "class_order is" if config.class_order else "shuffle: false gives"
            message = f"{given} one order of classes; seed must be one number, not {config.seed}"
            self.refuse(message, "class_order" if config.class_order else "shuffle", "seed")
        if hasattr(config.settings, "check"):
            for message in config.settings.check(config):
                self.refuse(message, "model_name", message.partition(":")[0])

    def _check_backbone(self, config: Config) -> None:
        of_library = "/" in str(config.convnet_type)  # which may not be given
        if self.method and self.method.needs_stages and of_library:
            message = f"{self.method.name} needs the stages of a ResNet: set convnet_type to resnet18, resnet32, ..."
            self.refuse(message, "convnet_type", "model_name")
        if config.image_size and not of_library:
            self.refuse("image_size is for convnet_type torchvision/... and timm/...", "image_size", "convnet_type")
        if config.freeze_backbone and config.backbone_lrate:
            message = "backbone_lrate: freeze_backbone leaves the backbone without a learning rate; set one of them"
            self.refuse(message, "backbone_lrate", "freeze_backbone")


_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def _filled_in(text: str, known: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """A text with the values of other keys in place of ${key}; a text that is one reference becomes that key's value.

    names: the key that the text belongs to, and those that have led to it.  Raises ValueError.
    """

    def value_of(reference: re.Match) -> Any:
        if (name := reference[1]) not in known:  # ${oc.env:NAME} among them, which could publish a secret
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


def read_json(file: Path) -> dict[str, Any]:
    """A config file's one JSON object.  Raises UserError that says where it is not one."""
    if not file.exists():
        raise UserError(f"no config file {file}; exps/config.json is one to start from.")
    values = json_files.read(file)
    if not isinstance(values, dict):
        raise UserError(f'{file} must hold one JSON object, like {{"dataset": "Food101", ...}}.')
    return values


def _of_timm(value: Any, choices: Sequence[str]) -> str | None:
    """The name with which timm's network is asked for, where the value is PILOT's name or lacks the library's."""
    plain = str(value).removeprefix("pretrained_")
    return f"timm/{plain}" if "timm/NAME" in choices and plain.startswith(("vit_", "deit_", "swin_")) else None


def _may_be_null(annotation: Any) -> bool:
    return types.NoneType in alternatives(annotation)
