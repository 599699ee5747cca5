"""Every key of a config: its type, default, meaning and source, in one place.

`Config` has the keys that all methods share.  A method's own keys are the fields of its `Settings` dataclass, written
with the same types and the same `setting`; `utils.config.read` reads and checks both alike.
"""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from utils.config import types as t
from utils.data.datasets import Augmentation

SECTIONS = {
    "prefix": "The experiment",
    "real_per_class": "Exemplars, prompts and copies",
    "model_seed": "The schedule",
    "precision": "The machine",
}
"""Titles of groups of keys, by the first key of each."""


REQUIRED: Any = dataclasses.MISSING


def setting(default: Any, meaning: str, *, source: str = "ours", result: bool = True, also: Sequence[str] = ()) -> Any:
    """One key: a dataclass field with its default and meaning.  Its annotation is its type and range.

    source: where the key comes from; result: whether two runs that differ in it may end with different numbers;
    also: PyCIL's other names for it.
    """
    metadata = {"default": default, "meaning": meaning, "source": source, "result": result, "also": tuple(also)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def pycil(default: Any, meaning: str, **options: Any) -> Any:
    """A key of PyCIL."""
    return setting(default, meaning, source="PyCIL", **options)


def paper(default: Any, meaning: str) -> Any:
    """A key of ESCORT's paper."""
    return setting(default, meaning, source="ESCORT's paper")


def local(default: Any, meaning: str) -> Any:
    """A key that does not change a run's numbers."""
    return setting(default, meaning, result=False)


@dataclass(kw_only=True)
class Config:
    """A checked config: the keys that all methods share, and in `settings` the method's own."""

    # The experiment, with PyCIL's keys
    prefix: t.Text = pycil("", "a name for the run, to use in other keys as ${prefix}", result=False)
    dataset: t.FolderName = pycil(REQUIRED, "the dataset's folder in data_dir")
    memory_size: t.Natural | None = pycil(None, "units that all classes share, where fixed_memory is false")
    memory_per_class: t.NonNegative = paper(20.0, "B: memory budget of a class, in units of one real image")
    budget_in: Literal["units", "bytes"] = setting(
        "units", "what a class's budget counts: raw bits, as the paper (memory_per_class), or true bytes"
    )
    memory_bytes_per_class: t.Count | None = setting(
        None, "budget_in bytes: a class's budget, files as they are kept and its text counted"
    )
    fixed_memory: bool = pycil(
        True,
        "each class has its own budget; false: all seen share memory_size, real : syn_per_class is a ratio; where it "
        "is not given and memory_size is: false, as in PyCIL",
    )
    exemplar_selection: Literal["herding", "random", "closest"] = setting("herding", "how exemplars are chosen")
    shuffle: bool = pycil(True, "shuffle the class order with seed")
    init_cls: t.Count = pycil(REQUIRED, "classes of phase 0")
    increment: t.Increments = pycil(
        REQUIRED,
        "classes of each later phase; a list: of phase 1, 2, ..., its last number repeats; the last phase takes what "
        "is left; 0: there is none, as init_cls is all classes",
    )
    class_order: t.ClassOrder | None = setting(
        None,
        "the classes in the order of a run, as labels or as places in the sorted labels, in place of shuffle; or a "
        "file of them, .json (a list) or .txt (one a line); or a published list, ImageNet100",
    )
    val_per_class: t.Natural = setting(
        0,
        "train images of each class that are held out of training and of the choice of exemplars, and evaluated in "
        "place of the test images: to choose settings without these",
    )
    class_sort: Literal["text", "number"] = setting(
        "text", "how class labels are sorted: as text, as PyCIL does, or by the numbers in them (2 before 10)"
    )
    model_name: str = pycil(REQUIRED, "the method")
    convnet_type: str = pycil(REQUIRED, "the backbone", also=["backbone_type"])
    pretrained: t.YesOrFile = setting(
        False,
        "start from pretrained weights: those that the library has downloaded earlier (torch's cache; timm's: Hugging "
        "Face's), or those of a file (.pth, .safetensors); nothing is downloaded",
    )
    image_size: t.Count | None = setting(
        None, "torchvision/... and timm/...: side of the pictures that the backbone takes; null: the library's"
    )
    freeze_backbone: bool = setting(False, "the backbone keeps its initial weights; only heads are trained")
    backbone_lrate: t.Positive | None = setting(
        None, "learning rate of the backbone in all phases, which decays as the heads' does; null: theirs"
    )
    device: t.Device = pycil(
        "auto",
        '"auto", "cpu", "cuda", or CUDA devices as PyCIL writes them: ["0"], ["0", "1"]; [-1] is the CPU',
        result=False,
    )
    seed: t.Seeds = pycil([1993], "class orders, a run each; mean and spread are reported", result=False)

    # ESCORT
    real_per_class: t.Natural | None = paper(
        None, "R: exemplars of a class kept as images; null: as many as the budget holds"
    )
    syn_per_class: t.Natural | Literal["fill"] = paper(
        0, 'S: exemplars of a class kept as prompts; "fill": as many as the rest of the budget holds'
    )
    augmentations_per_image: t.Natural = paper(5, "K: copies regenerated from each prompt")
    # exps/config.json takes 0.4.  Training on copies of the new images too closes the gap between what a class looks
    # like when it is new (images) and when it is old (copies).  At K = 5 each copy then makes 8 % of an image's reads
    # (14 times in 170 epochs, enough to be learnt from), while the image itself still makes most of them (60 %).
    augmentation_prob: t.Probability = paper(
        0.0, "p: probability that a real image is replaced by one of its copies when it is read"
    )
    augmentation: Augmentation = setting(
        "pescr",
        "in training. Large images: random crop and flip, with pescr and autoaugment also brightness and AutoAugment, "
        "with pycil brightness for ImageNet1000; small ones: crop, flip and brightness, with autoaugment also "
        "AutoAugment and Cutout. none: the test transform. PyCIL's names of datasets bring their own: cifar100_aa "
        "autoaugment, imagenet100 and imagenet1000, spelt so, pycil",
    )
    augmentation_scope: Literal["all", "exemplars"] = setting("all", "which real images p applies to")
    regenerate: Literal["ahead", "on_demand"] = setting(
        "ahead",
        "copies made beforehand by compress/run.py, or while training: before each phase of its new images, where p "
        "applies to them, and after it of the chosen exemplars",
    )
    memory_only: bool = local(
        False,
        "later phases read exemplars only from the memory's file (memory/phaseNN.memory), as if the folders of old "
        "classes were gone: they may be deleted after a phase; copies are made again from what the file keeps",
    )
    variant: t.Text = setting("", "edge maps and copies that compress/run.py --keep-apart made under this name")
    syn_form: t.Text = setting(
        "edges", "form in which synthetic exemplars are kept: edges, text, webp:10@64, ... (compress/run.py --form)"
    )
    regenerate_options: t.Text = setting(
        "", 'on_demand: settings, model and machine, as options of compress/run.py: "--model tiny --steps 10"'
    )

    nme: bool = setting(True, "evaluate the nearest mean of exemplars beside the head, where there are exemplars")

    # The schedule (PyCIL keeps these in its method files)
    model_seed: t.Natural = setting(1993, "initial weights, batch order, augmentation, choice of copies")
    batch_size: t.Count = pycil(128, "images of a training step, over all devices together", also=["init_batch_size"])
    accumulate_batches: t.Count = setting(
        1, "parts in which a batch is processed one after another, so that large ones fit; one step for all of them"
    )
    momentum: t.Fraction = pycil(0.9, "SGD's momentum")
    init_epoch: t.Natural | None = pycil(
        None, "phase 0: epochs; null: the method's own", also=["init_epochs", "trained_epoch"]
    )
    init_lr: t.Positive | None = pycil(None, "phase 0: learning rate; null: the method's own")
    init_milestones: t.Epochs | None = pycil(
        None, "phase 0: epochs after which the rate decays; null: the method's own"
    )
    init_lr_decay: t.Positive = pycil(0.1, "phase 0: factor of each decay")
    init_weight_decay: t.NonNegative | None = pycil(None, "phase 0: weight decay; null: the method's own")
    epochs: t.Count | None = pycil(
        None,
        "later phases: epochs; null: the method's own",
        also=["boosting_epochs", "tuned_epoch", "expansion_epochs"],
    )
    lrate: t.Positive | None = pycil(
        None, "later phases: learning rate; null: the method's own", also=["lr", "finetune_lr"]
    )
    milestones: t.Epochs | None = pycil(
        None, "later phases: epochs after which the rate decays; null: the method's own"
    )
    scheduler: t.Scheduler | None = setting(
        None,
        "how the rate falls, at milestones or along half a cosine; null: at milestones where they are given, else as "
        "the method does",
    )
    lrate_decay: t.Positive = pycil(0.1, "later phases: factor of each decay")
    weight_decay: t.NonNegative | None = pycil(None, "later phases: weight decay; null: the method's own")
    T: t.Positive = pycil(2.0, "temperature of knowledge distillation")

    # The machine
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = setting("32-true", "arithmetic of training")
    compile: bool = setting(False, "torch.compile the network, again in each phase: takes minutes, for GPUs")
    num_workers: t.Natural = pycil(8, "processes that read images (at most one a core is used)", result=False)
    cache: Literal["none", "ram", "disk"] = local(
        "ram",
        "where decoded images are kept, for all phases and processes; disk: pixel_cache beside phase0_cache, for "
        "later runs too",
    )
    cache_gib: t.NonNegative = local(
        4.0, "GiB of that; in memory at most half of what is free. Images beyond are decoded each time"
    )
    data_dir: t.Folder | None = local(None, "the folder of all datasets; null: $ESCORT_DATA_DIR, else ./data")
    output_dir: t.Folder | None = local(
        None, "where results go; null: outputs/<dataset>-<model_name>-<convnet_type>-<init_cls>+<increment>"
    )
    phase0_cache: t.Folder | None = local(
        None, "trained phase-0 networks, shared by runs that agree on them; null: phase0_cache in output_dir"
    )
    logger: t.Loggers = local(
        ["tensorboard", "csv"],
        "where curves go: tensorboard (event files), csv (epochs.csv, always written), wandb (Weights & Biases, in "
        "the project that $WANDB_PROJECT names)",
    )
    keep_checkpoints: t.Natural = local(1, "how many phases' checkpoints are kept per seed; 0 keeps all")
    checkpoint_every: t.NonNegative = local(
        600.0, "seconds of training between checkpoints within a phase, of which one is kept; 0: none"
    )

    settings: Any = None
    """The method's own keys: an instance of its `Settings`, None where it has none."""
    notes: tuple[str, ...] = ()
    """What reading the config has to say, such as keys of PyCIL that mean nothing here."""


class MethodInfo(NamedTuple):
    """What reading a config has to know of a method.

    paper: which it is from; settings: its `Settings` dataclass, None where it has no keys of its own; uses_memory:
    whether it keeps exemplars; least_exemplars: how many of each class it needs at least; needs_stages: whether its
    backbone must be a ResNet of `convs`; reads_old_images: whether later phases train on images of old classes that are
    no exemplars.
    """

    name: str
    paper: str = ""
    settings: type | None = None
    uses_memory: bool = True
    least_exemplars: int = 1
    needs_stages: bool = False
    reads_old_images: bool = False


class Key(NamedTuple):
    """One key as `setting` describes it."""

    name: str
    annotation: Any
    default: Any
    meaning: str
    source: str
    result: bool
    also: tuple[str, ...]


def keys_of(schema: type) -> dict[str, Key]:
    """The keys of a dataclass, by name; fields without a meaning are none."""
    hints = typing.get_type_hints(schema, include_extras=True)
    fields = [field for field in dataclasses.fields(schema) if field.metadata]
    return {field.name: Key(field.name, hints[field.name], **field.metadata) for field in fields}


def all_keys(methods: Iterable[MethodInfo]) -> dict[str, Key]:
    """The shared keys and those of some methods; a name that several methods have stands for the first one's."""
    keys = keys_of(Config)
    for method in methods:
        if method.settings is not None:
            keys = {**keys_of(method.settings), **keys}
    return keys


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain data, fit for JSON: shared and own keys in one flat dict."""
    values = dataclasses.asdict(config)
    own, _ = values.pop("settings") or {}, values.pop("notes")
    return {**values, **own}


REMOVED = {"copies_kept": "all", "copy_candidates": None}
"""Keys that earlier versions had, each with the value that means what happens now."""


def differences(ours: Config | Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys that may change a run's numbers and in which a config and an older one differ, with both values.

    ours: checked, or what `as_dict` makes of it; theirs: from a file.  A key that the older one lacks is compared as
    its default, which is not known of a method's own keys where ours is a dict; a required key has none.  Names of
    datasets that differ in case alone are one (`utils.data.paths.find_dataset`).
    """
    keys = keys_of(Config)
    if isinstance(ours, Config):
        keys |= keys_of(type(ours.settings)) if ours.settings is not None else {}
        ours = as_dict(ours)
    theirs = {key: value for key, value in theirs.items() if key not in REMOVED or value != REMOVED[key]}
    theirs = {**{name: key.default for name, key in keys.items() if key.default is not REQUIRED}, **theirs}
    lines = []
    for name in {**ours, **theirs}:
        mine, other = (json.dumps(values[name]) if name in values else "not given" for values in (ours, theirs))
        same = mine.lower() == other.lower() if name == "dataset" else ours.get(name) == theirs.get(name)
        if mine != other and not same and (name not in keys or keys[name].result):
            lines.append(f"{name}: {other} -> {mine}")
    return lines
