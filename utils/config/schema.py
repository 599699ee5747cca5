"""A run's configuration: every key with its type, default, meaning and source in one place, read from JSON and checked
at once.

The keys are PyCIL's where PyCIL has one, plus ESCORT's and those that PyCIL hides in its method files.
"""

# ruff: noqa: RUF009  (_key is dataclasses.field with a meaning)
import dataclasses
import difflib
import json
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import UserError

PYCIL = "PyCIL"
ESCORT = "ESCORT's paper"


def _key(
    default: Any, meaning: str, *, source: str = "ours", result: bool = True, choices: Sequence[str] | None = None
) -> Any:
    """One key.  source: where it comes from; result: whether two runs that differ in it may end with different numbers.

    A method file's settings in PyCIL are its keys here, with its values as defaults.
    """
    metadata = {"meaning": meaning, "source": source, "result": result, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """Every key of a config file.  A key without a default must be given."""

    # The experiment, in PyCIL's words
    prefix: str = _key("", "a name for the run, free to use in other keys as ${prefix}", result=False, source=PYCIL)
    dataset: str = _key(MISSING, "the dataset's folder in data_dir", source=PYCIL)
    memory_size: int | None = _key(None, "units of all classes together, where fixed_memory is false", source=PYCIL)
    memory_per_class: float = _key(20.0, "B: memory budget of a class, in units of one real image", source=ESCORT)
    fixed_memory: bool = _key(
        True,
        "whether each class has its own budget; false: all seen share memory_size, real : syn_per_class is a ratio",
        source=PYCIL,
    )
    exemplar_selection: str = _key("herding", "how exemplars are chosen", choices=("herding", "random", "closest"))
    shuffle: bool = _key(True, "shuffle the class order with seed", source=PYCIL)
    init_cls: int = _key(MISSING, "classes of phase 0", source=PYCIL)
    increment: int = _key(MISSING, "classes of each further phase; the last one takes what is left", source=PYCIL)
    model_name: str = _key(MISSING, "the method", source=PYCIL)
    convnet_type: str = _key(MISSING, "the backbone", source=PYCIL)
    pretrained: bool = _key(False, "start from torchvision's ImageNet weights, where torch's cache has them")
    device: Any = _key(
        "auto",
        '"auto", "cpu", "cuda", or CUDA devices as PyCIL writes them: ["0"], ["0", "1"]',
        result=False,
        source=PYCIL,
    )
    seed: list[int] = _key([1993], "class orders: one run each, mean and spread reported", result=False, source=PYCIL)

    # ESCORT
    real_per_class: int = _key(20, "R: exemplars of a class that are kept as pictures", source=ESCORT)
    syn_per_class: int = _key(0, "S: exemplars of a class that are kept as prompts", source=ESCORT)
    augmentations_per_image: int = _key(5, "K: copies that are regenerated from a prompt", source=ESCORT)
    # exps/config.json takes 0.4.  Training on copies of the new images too closes the gap between what a class looks
    # like when it is new (pictures) and when it is old (copies).  At K = 5 each copy then makes 8 % of an image's reads
    # (14 times in 170 epochs, enough to be learnt from), while the picture itself still makes most of them (60 %).
    augmentation_prob: float = _key(
        0.0, "p: probability that a real image is replaced by a copy of it when it is read", source=ESCORT
    )
    augmentation: str = _key(
        "pescr",
        "large images in training. pescr: random crop, flip, brightness, AutoAugment; pycil: crop and flip, and for "
        "ImageNet1000 brightness",
        choices=("pescr", "pycil"),
    )
    augmentation_scope: str = _key("all", "which real images p is for", choices=("all", "exemplars"))
    regenerate: str = _key(
        "ahead",
        "copies made beforehand by compress/run.py, or after each phase for the chosen exemplars alone",
        choices=("ahead", "on_demand"),
    )
    variant: str = _key("", "edge maps and copies that compress/run.py --keep-apart made under this name")
    regenerate_options: str = _key(
        "", 'on_demand: settings, model and machine, as options of compress/run.py: "--model tiny --steps 10"'
    )

    # The schedule (PyCIL keeps these in its method files)
    model_seed: int = _key(1993, "initial weights, order of the batches, augmentation, choice of copies")
    batch_size: int = _key(128, "images of a training step, over all devices together", source=PYCIL)
    accumulate_batches: int = _key(
        1, "parts in which a batch is worked off, one after another, so that large ones fit; the step is that of all"
    )
    momentum: float = _key(0.9, "SGD's momentum", source=PYCIL)
    init_epoch: int = _key(200, "phase 0: epochs", source=PYCIL)
    init_lr: float = _key(0.1, "phase 0: learning rate", source=PYCIL)
    init_milestones: list[int] = _key([60, 120, 170], "phase 0: epochs after which the rate decays", source=PYCIL)
    init_lr_decay: float = _key(0.1, "phase 0: factor of each decay", source=PYCIL)
    init_weight_decay: float = _key(5e-4, "phase 0: weight decay", source=PYCIL)
    epochs: int = _key(170, "later phases: epochs", source=PYCIL)
    lrate: float = _key(0.1, "later phases: learning rate", source=PYCIL)
    milestones: list[int] | None = _key(
        None, "later phases: epochs after which the rate decays; null takes the method's own", source=PYCIL
    )
    scheduler: str | None = _key(
        None,
        "how the rate falls: at milestones or along half a cosine; null takes the method's own",
        choices=("steps", "cosine"),
    )
    lrate_decay: float = _key(0.1, "later phases: factor of each decay", source=PYCIL)
    weight_decay: float = _key(2e-4, "later phases: weight decay", source=PYCIL)

    # The methods' own (PyCIL's names, where it has them)
    T: float = _key(2.0, "temperature of knowledge distillation", source=PYCIL)
    lwf_lambda: float = _key(3.0, "LwF: weight of distillation", source="LwF in PyCIL")
    ewc_lambda: float = _key(1000.0, "EWC: weight of the penalty", source="EWC in PyCIL")
    fishermax: float = _key(1e-4, "EWC: greatest importance of a weight", source="EWC in PyCIL")
    gem_margin: float = _key(
        0.5, "GEM: least weight of each earlier phase in a step that had to be corrected", source="the GEM paper's code"
    )
    gem_memory_batch: int = _key(64, "GEM: exemplars of each earlier phase in a step")
    split_ratio: float = _key(
        0.1, "BiC: share of the exemplars that is held out for the bias layers", source="BiC in PyCIL"
    )
    lambda_c_base: float = _key(5.0, "PODNet: weight of POD-spatial", source="PODNet in PyCIL")
    lambda_f_base: float = _key(1.0, "PODNet: weight of POD-flat", source="PODNet in PyCIL")
    nb_proxy: int = _key(10, "PODNet: proxies of a class", source="PODNet in PyCIL")
    ft_epochs: int = _key(20, "PODNet: epochs of tuning the classifier on balanced classes", source="PODNet in PyCIL")
    ft_lrate: float = _key(0.005, "PODNet: learning rate of that", source="PODNet in PyCIL")
    beta1: float = _key(
        0.96, "FOSTER: how strongly boosting favours classes of few images, 0 to below 1", source="FOSTER in PyCIL"
    )
    beta2: float = _key(0.97, "FOSTER: the same of compression", source="FOSTER in PyCIL")
    lambda_okd: float = _key(1.0, "FOSTER: weight of distillation while boosting", source="FOSTER in PyCIL")
    oofc: str = _key(
        "ft",
        "FOSTER: the new classes' weights on old features: tuned, or all zero",
        choices=("ft", "az"),
        source="FOSTER in PyCIL",
    )
    compression_epochs: int = _key(130, "FOSTER: epochs of compression; boosting has epochs", source="FOSTER in PyCIL")
    is_teacher_wa: bool = _key(False, "FOSTER: align the head's weights before compression", source="FOSTER in PyCIL")
    is_student_wa: bool = _key(False, "FOSTER: align the head's weights after compression", source="FOSTER in PyCIL")
    wa_value: float = _key(
        1.0,
        "FOSTER: of those alignments, new norms over old ones for each old class a new one",
        source="FOSTER in PyCIL",
    )
    sinkhorn: float = _key(0.464, "Coil: regularisation of optimal transport", source="Coil in PyCIL")
    norm_term: float = _key(3.0, "Coil: p of the norm between class means", source="Coil in PyCIL")
    calibration_term: float = _key(
        1.5, "Coil: length of new classifiers at their start, over the old ones'", source="Coil in PyCIL"
    )
    reg_term: float = _key(1e-3, "Coil: weight of both transports", source="Coil in PyCIL")

    # The machine
    precision: str = _key("32-true", "arithmetic of training", choices=("32-true", "bf16-mixed", "16-mixed"))
    compile: bool = _key(False, "torch.compile the network that learns, anew in each phase: minutes first, for GPUs")
    num_workers: int = _key(8, "processes that read images (at most one a core is used)", result=False, source=PYCIL)
    cache: str = _key(
        "ram",
        "where decoded pictures are kept, for all phases and processes; disk: pixel_cache beside phase0_cache, for "
        "further runs too",
        result=False,
        choices=("none", "ram", "disk"),
    )
    cache_gib: float = _key(
        4.0, "GiB of that; in memory at most half of what is free. Pictures beyond are decoded each time", result=False
    )
    data_dir: str | None = _key(None, "the folder of all datasets; null: $ESCORT_DATA_DIR, else ./data", result=False)
    output_dir: str = _key("outputs", "where the run leaves its results", result=False)
    phase0_cache: str | None = _key(
        None,
        "trained phase-0 networks, shared by runs that agree on them; null: phase0_cache in output_dir",
        result=False,
    )
    tensorboard: bool = _key(True, "write TensorBoard's event files beside epochs.csv", result=False)
    keep_checkpoints: int = _key(1, "how many phases' checkpoints are kept for each seed; 0 keeps all", result=False)
    checkpoint_every: float = _key(
        600.0, "seconds of training between checkpoints within a phase, of which one is kept; 0: none", result=False
    )


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)
_SHORT = {str: "text", int: "whole number", float: "number", bool: "true, false", list[int]: "whole numbers"}
_SHORT |= {types.NoneType: "null", Any: "text, list"}
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[int]: "a list of whole numbers",
    types.NoneType: "null",
}


def load_config(
    file: str | Path, overrides: Sequence[str] = (), choices: Mapping[str, Sequence[str]] | None = None
) -> Config:
    """The config of a JSON file with `key=value` overrides on top, checked.

    choices: further allowed values by key (the methods, the backbones), which this package can't know by itself.
    Values may refer to other keys, as in "outputs/${dataset}".
    Raises UserError that lists every problem found.
    """
    values = read_json(Path(file))
    problems: list[str] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            problems.append(f"{override!r} is not of the form key=value")
            continue
        try:
            values[key] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except Exception as error:  # PyYAML's and OmegaConf's parsers have many of their own
            problems.append(f"{key}: {text!r} can't be read ({_first_line(error)})")
    if isinstance(values.get("seed"), int | str) and not isinstance(values["seed"], bool):
        values["seed"] = [values["seed"]]

    merged: DictConfig = OmegaConf.structured(Config)
    broken = set()
    for key, value in values.items():
        problem = _unknown(key) if key not in _FIELDS else _wrong_type(key, value)
        if problem is None:
            try:
                merged = OmegaConf.merge(merged, {key: value})
                continue
            except OmegaConfBaseException as error:  # a reference to another key that is not written like one
                problem = f"{key}: {_as_json(value)} can't be read ({_first_line(error)})"
        problems.append(problem)
        broken.add(key)
    config = Config()
    for key in _FIELDS:
        if key in broken:
            continue  # said already; its default stands in, so that the other checks still run
        try:
            if OmegaConf.is_missing(merged, key):
                problems.append(f"{key} is not given: {_FIELDS[key].metadata['meaning']}")
                broken.add(key)
                continue
            value = merged[key]
            setattr(config, key, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value)
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {_first_line(error)}")
            broken.add(key)
    problems += _check(config, broken, choices or {})
    if problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems\n  "
        raise UserError(f"{file}: {count}" + "\n  ".join(problems))
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A file's one JSON object.  Raises UserError that says where it is not one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_key_twice)
    except FileNotFoundError:
        raise UserError(f"no config file {file}; exps/config.json is one to start from.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8: byte {error.start} is {error.object[error.start]:#04x}.") from None
    except (ValueError, RecursionError) as error:  # a key given twice, endless digits, endless brackets
        raise UserError(f"{file} is no config: {error}.") from None
    except OSError as error:
        raise UserError(f"{file} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f'{file} must hold one JSON object, like {{"dataset": "Food101", ...}}.')
    return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON would take the last one without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is given {keys.count(twice)} times; keep one")
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; README.md lists the keys.")


def _wrong_type(key: str, value: Any) -> str | None:
    """What is wrong with a value's type, or None.  Strict: "128" or true is no number."""
    if isinstance(value, str) and "${" in value:
        return None  # resolved, and checked by OmegaConf, when all keys are there
    kinds = _kinds(key)
    if any(_fits(kind, value) for kind in kinds):
        return _unfit_text(key, value) if isinstance(value, str) else None
    return f"{key} must be {' or '.join(_WORDS[kind] for kind in kinds)}, not {_as_json(value)}"


def _kinds(key: str) -> tuple:
    return typing.get_args(_TYPES[key]) if isinstance(_TYPES[key], types.UnionType) else (_TYPES[key],)


def _unfit_text(key: str, value: str) -> str | None:
    """What is wrong with a text that can't be a file's name or part of one, or None."""
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return f"{key} has half a character in it, which no file's name can have: {json.dumps(value)}"
    return f"{key} has a zero byte in it, which no file's name can have: {json.dumps(value)}" if "\0" in value else None


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _fits(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if kind == list[int]:
        return isinstance(value, list) and all(_fits(int, entry) for entry in value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # neither NaN nor infinite
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check(config: Config, broken: set[str], choices: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong with the values, as far as can be told without the data.

    broken: keys whose value has been refused already; a check that reads one of them is left out.
    """
    problems: list[str] = []

    def refuse(wrong: bool, message: str, *keys: str) -> None:
        if wrong and not broken.intersection(keys):
            problems.append(message)

    def at_least(minimum: float, *keys: str) -> None:
        for key in keys:
            value = getattr(config, key)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            wrong = key not in broken and any(number < minimum for number in numbers)
            refuse(wrong, f"{key} must be at least {minimum}, not {value}", key)

    at_least(1, "init_cls", "increment", "batch_size", "accumulate_batches", "epochs", "milestones", "init_milestones")
    at_least(0 if config.pretrained else 1, "init_epoch")
    at_least(0, "real_per_class", "syn_per_class", "augmentations_per_image", "memory_per_class", "memory_size")
    at_least(0, "seed", "model_seed", "num_workers", "keep_checkpoints", "momentum", "weight_decay")
    at_least(0, "init_weight_decay", "checkpoint_every", "cache_gib")
    at_least(1, "gem_memory_batch", "nb_proxy", "ft_epochs", "compression_epochs", "norm_term")
    at_least(0, "lwf_lambda", "ewc_lambda", "fishermax", "gem_margin", "lambda_c_base", "lambda_f_base", "lambda_okd")
    at_least(0, "beta1", "beta2", "split_ratio", "reg_term")
    for key in ("beta1", "beta2", "split_ratio"):
        value = getattr(config, key)
        refuse(value >= 1, f"{key} must be below 1, not {value}", key)
    for key in (
        *("init_lr", "lrate", "init_lr_decay", "lrate_decay", "T"),
        *("ft_lrate", "wa_value", "sinkhorn", "calibration_term"),
    ):
        value = getattr(config, key)
        refuse(value <= 0, f"{key} must be above 0, not {value}", key)
    refuse(config.momentum >= 1, f"momentum must be below 1, not {config.momentum}", "momentum")

    allowed = {key: field.metadata["choices"] for key, field in _FIELDS.items() if field.metadata["choices"]}
    for key, names in {**allowed, **choices}.items():
        value = getattr(config, key)
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        wrong = value is not None and value not in names
        refuse(wrong, f"{key} must be one of {', '.join(names)}, not {value!r}{hint}", key)

    wrong = Path(config.dataset).name != config.dataset or config.dataset in ("", "..")
    refuse(wrong, f"dataset must be the name of a folder in data_dir, not {config.dataset!r}", "dataset")
    wrong = len(set(config.seed)) < max(len(config.seed), 1)
    refuse(wrong, f"seed must list one or more different numbers, not {config.seed}", "seed")
    message = f"seed must be below 2^32, as numpy.random.seed takes it, not {config.seed}"
    refuse(max(config.seed, default=0) >= 2**32, message, "seed")
    for key in ("output_dir", "phase0_cache", "data_dir"):
        refuse(getattr(config, key) == "", f'{key} must name a folder ("." is the present one), not ""', key)
    wrong = config.device not in ("auto", "cpu", "cuda") and _cuda_devices(config.device) is None
    device = _as_json(config.device)
    refuse(wrong, f'device must be "auto", "cpu", "cuda" or CUDA devices like ["0"], not {device}', "device")
    message = "memory_size must be given where fixed_memory is false: the units that all classes share"
    refuse(not config.fixed_memory and not config.memory_size, message, "fixed_memory", "memory_size")

    real, synthetic, budget = config.real_per_class, config.syn_per_class, config.memory_per_class
    # A prompt's cost depends on the images, and main.py checks it with them; that of real exemplars is known already.
    message = f"real_per_class: {real} real exemplars cost {real} units, more than memory_per_class = {budget:g}"
    refuse(config.fixed_memory and real > budget, message, "real_per_class", "memory_per_class", "fixed_memory")

    parts, size = config.accumulate_batches, config.batch_size
    message = f"accumulate_batches: a batch of {size} images can't be worked off in {parts} parts"
    refuse(parts > size > 0, message, "accumulate_batches", "batch_size")

    message = "real_per_class + syn_per_class must be at least 2: bic holds one exemplar of each class out"
    wrong = config.model_name == "bic" and config.fixed_memory and real + synthetic == 1
    refuse(wrong, message, "model_name", "fixed_memory", "real_per_class", "syn_per_class")
    wrong = config.model_name == "gem" and config.precision == "16-mixed"
    message = "precision: 16-mixed scales gradients, which gem compares with others; take bf16-mixed or 32-true"
    refuse(wrong, message, "model_name", "precision")
    wrong = config.model_name == "gem" and config.compile
    message = (
        "compile: gem takes several gradients of one pass, which a compiled network does not keep; set it to false"
    )
    refuse(wrong, message, "model_name", "compile")

    probability = config.augmentation_prob
    refuse(not 0 <= probability <= 1, f"augmentation_prob must lie in 0..1, not {probability}", "augmentation_prob")
    message = "augmentations_per_image must be at least 1 where syn_per_class or augmentation_prob is above 0"
    needs_copies = synthetic > 0 or probability > 0
    refuse(needs_copies and config.augmentations_per_image < 1, message, "augmentations_per_image")
    wrong = config.regenerate == "on_demand" and probability > 0 and config.augmentation_scope == "all"
    advice = 'set augmentation_scope to "exemplars" or augmentation_prob to 0'
    message = f"regenerate: on_demand makes copies of exemplars only; {advice}"
    refuse(wrong, message, "regenerate", "augmentation_prob", "augmentation_scope")
    return problems


def _cuda_devices(device: Any) -> list[int] | None:
    """None where these are none, or one is named twice."""
    texts = [str(entry) for entry in (device if isinstance(device, list) else [device])]
    numbers = [int(text) for text in texts if text.isdecimal()]
    return numbers if numbers and len(set(numbers)) == len(texts) else None


def accelerator(device: Any) -> tuple[str, int | list[int]]:
    """A checked `device` key as Lightning Fabric's (accelerator, devices)."""
    if device in ("auto", "cpu", "cuda"):
        return device, 1
    return "cuda", _cuda_devices(device)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys that may change a run's numbers and in which two configs (as dicts) differ, with both values.

    A key that one of them lacks is younger than it, and its default is how things were before.
    """
    before = {**as_dict(Config()), **dict.fromkeys({*ours, *theirs} - {*_FIELDS}, "(not there)")}
    ours, theirs = {**before, **ours}, {**before, **theirs}
    return [
        f"{key}: {json.dumps(theirs[key])} -> {json.dumps(ours[key])}"
        for key in ours
        if ours[key] != theirs[key] and (key not in _FIELDS or _FIELDS[key].metadata["result"])
    ]


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain data, fit for JSON."""
    return dataclasses.asdict(config)


def default_of(key: str) -> Any:
    """A key's default; OmegaConf's MISSING where it must be given."""
    field = _FIELDS[key]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def help_text(choices: Mapping[str, Sequence[str]] | None = None) -> str:
    """All keys with type, default, meaning and source, one a line."""
    lines = [f"{'key':24} {'type':20} {'default':18} meaning [source]"]
    for key, field in _FIELDS.items():
        default = "(required)" if default_of(key) == MISSING else json.dumps(default_of(key))
        kind = ", ".join(_SHORT[kind] for kind in _kinds(key))
        names = field.metadata["choices"] or (choices or {}).get(key)
        meaning = field.metadata["meaning"] + (f": {', '.join(names)}" if names else "")
        lines.append(f"{key:24} {kind:20} {default:18} {meaning} [{field.metadata['source']}]")
    return "\n".join(lines)
