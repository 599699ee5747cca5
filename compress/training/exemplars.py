"""What a config asks of its exemplars: their form, what they cost, how many a class keeps, and their copies."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.forms import Form, form_named
from compress.options import parse_settings
from compress.presets import PRESETS
from compress.records import recorded_options
from compress.training.copies import CopiesAhead, check_copies
from utils.config.schema import Config, MethodInfo
from utils.data.classes import DataManager
from utils.data.images import image_bits
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import (
    FILL,
    Quotas,
    check_budget,
    check_bytes,
    check_smallest,
    check_total,
    warn_of_small_classes,
)
from utils.memory.exemplars import ExemplarMemory
from utils.memory.forms import Copies
from utils.memory.packed import ClassShare, Row

if TYPE_CHECKING:
    from utils.devices import Fabric


class Cost:
    """What exemplars of one form cost and keep (`utils.memory.forms.ExemplarForm`).

    form: None for real exemplars, which are kept as they are.
    """

    def __init__(self, form: Form | None, paths: DatasetPaths):
        self.form = form
        self.paths = paths

    def settings(self) -> dict[str, Any]:
        return self.form.settings() if self.form else {}

    def units(self, image: Path) -> float | None:
        if self.form is None:
            return 1.0
        try:
            width, height, bits_per_pixel = image_bits(image)
            raw_bits = self.form.raw_bits(height, width, self.paths.find_kept(image))
        except OSError as error:
            raise _unreadable(error) from error
        return None if raw_bits is None else raw_bits / (width * height * bits_per_pixel)

    def kept(self, image: Path) -> bytes | None:
        if self.form is None:
            return image.read_bytes()
        path = self.paths.find_kept(image)
        if path is None:
            return None
        try:
            width, height, bits_per_pixel = image_bits(image)
            return self.form.payload(path.read_bytes(), (height, width), bits_per_pixel != 24)
        except OSError as error:
            raise UserError(f"{path}: {error}. Delete it; --repair of compress/run.py makes it again.") from error

    def kept_bytes(self, image: Path) -> int | None:
        if self.form is None:
            return image.stat().st_size
        kept = self.kept(image)
        return None if kept is None else len(kept)

    def expected_bytes(self, image: Path) -> int:
        """What has not been made yet is encoded in memory, unless its length is fixed."""
        on_disk = self.kept_bytes(image)
        if on_disk is not None:
            return on_disk
        assert self.form is not None
        try:
            return len(self.form.stand_in(image))
        except OSError as error:
            raise _unreadable(error) from error


def _unreadable(error: OSError) -> UserError:
    return UserError(f"cannot read image {error}. Replace the file or take it away.")


Numbers = tuple[int | None, int | Literal["fill"]]
"""real_per_class and syn_per_class."""


@dataclass(frozen=True)
class ExemplarPlan:
    """What the exemplars of a run are, decided before any training.

    config: with the numbers of exemplars filled in that were left to the budget; form: of those that are not real;
    paths: with the form's files; quotas: (form, exemplars of a class) in order of choice; costs: by form; made_ahead:
    train images whose copies were made by compress/run.py; on_demand: options of compress/run.py by which the run makes
    copies itself, None where it makes none.
    """

    config: Config
    form: Form
    paths: DatasetPaths
    quotas: Quotas
    costs: dict[str, Cost]
    made_ahead: Sequence[Path]
    on_demand: str | None

    def check_copies(self) -> None:
        """Raises UserError, with the command that makes them, where copies are missing that were to be made ahead."""
        check_copies(self.paths, self.form, self.made_ahead, self.config.augmentations_per_image)

    def find_copies(self, fabric: "Fabric") -> Copies | None:
        """The copies that the run reads; None where it reads none."""
        copies: Copies | None = None
        number = self.config.augmentations_per_image
        if self.on_demand is not None:
            from compress.training.on_demand import OnDemand  # imports ControlNet: other runs need not spend seconds

            copies = OnDemand(self.paths, self.on_demand, default=self.form, copies=number, fabric=fabric)
        elif self.made_ahead:
            copies = CopiesAhead(self.paths, self.form, self.made_ahead, number)
        self.form.release()
        return copies

    def empty_memory(self) -> ExemplarMemory:
        c = self.config
        return ExemplarMemory(
            self.paths,
            self.quotas,
            self.costs,
            c.memory_per_class,
            c.augmentations_per_image,
            total=None if c.fixed_memory else c.memory_size,
            bytes_budget=c.memory_bytes_per_class if c.budget_in == "bytes" else None,
            selection=c.exemplar_selection,
            seed=c.model_seed,
        )


def plan_exemplars(
    config: Config, data: DataManager, form: Form, method: MethodInfo, numbers: Numbers | None = None
) -> ExemplarPlan:
    """Make sure, before any work, that the exemplars can be chosen and fit the budget.

    Needs no torch, unless bytes of a form are counted that `needs_weights`.
    numbers: of exemplars, where this has been checked before, by a run that goes on.
    """
    if config.memory_only and method.reads_old_images:
        raise UserError(f"memory_only: {method.name} trains on all images of old classes. Set it to false.")
    paths = replace(data.paths, files=form.files)
    costs = {"real": Cost(None, paths), form.name: Cost(form, paths)}
    images = [class_images for target in range(data.nb_classes) if (class_images := data.train_images(target))]
    fewest = min(images, key=len, default=[])
    if method.uses_memory and data.nb_phases > 1 and fewest and len(fewest) < method.least_exemplars:
        needs = f"{config.model_name} needs at least {method.least_exemplars} train images of each class"
        raise UserError(f"{fewest[0].parent} has {len(fewest)}: {needs}. Add images, or take the class away.")
    if numbers:
        config = replace(config, real_per_class=numbers[0], syn_per_class=numbers[1])
    elif method.uses_memory and config.budget_in == "units":
        config = filled_in(config, form.name, images, costs[form.name], method.least_exemplars)
    if form.deterministic:  # all copies of an image would be equal
        config = replace(config, augmentations_per_image=1)
    real, synthetic = config.real_per_class, config.syn_per_class
    quotas = [("real", FILL if real is None else real), (form.name, FILL if synthetic == "fill" else synthetic)]
    if method.uses_memory and config.budget_in == "bytes" and not numbers:
        assert config.memory_bytes_per_class is not None  # load_config asks for it
        check_byte_budget(quotas, config.memory_bytes_per_class, costs, images, paths, method.least_exemplars)
    made_ahead, on_demand = copies_read(config, data, form, paths, method.uses_memory)
    return ExemplarPlan(config, form, paths, quotas, costs, made_ahead, on_demand)


def exemplar_form(config: Config, paths: DatasetPaths, resolution: str) -> Form:
    """The form in which exemplars that are not real are kept: as it is on disk, where copies were made ahead.

    resolution: the preset where the options name none.
    """
    try:
        form_named(config.syn_form, PRESETS[resolution])
    except UserError as error:
        raise UserError(f"syn_form: {error}") from error
    options = config.regenerate_options
    try:
        form = parse_settings(options, resolution, config.syn_form)[0]
        if config.regenerate == "ahead" and not options:
            options = shlex.join(recorded_options(replace(paths, files=form.files).folder("copies")))
            form = parse_settings(options, resolution, config.syn_form)[0] if options else form
        if form.needs_weights:
            form.settings()  # whether the weights are there
    except UserError as error:
        raise UserError(f"regenerate_options: {error}") from error
    return form


def filled_in(config: Config, form: str, images: Sequence[Sequence[Path]], cost: Cost, least: int) -> Config:
    """The config with the numbers of exemplars filled in that are left to a budget in units.

    form: of exemplars that are not real; images: of each class; least: exemplars of a class that the method needs.
    Raises UserError, with the arithmetic, where a typical class's exemplars don't fit.
    """
    sizes = {class_images[0].parent.name: len(class_images) for class_images in images}
    units = {"real": 1.0, form: 1 / 24}
    if config.syn_per_class:
        firsts = [cost.units(class_images[0]) for class_images in images]
        known = [number for number in firsts if number is not None]
        if len(known) < len(firsts):
            raise UserError(f"syn_form: {form} has no count in units. Set budget_in=bytes and memory_bytes_per_class.")
        units[form] = statistics.median(known)
    real = config.real_per_class
    if isinstance(config.syn_per_class, int):
        synthetic = config.syn_per_class
        if real is None:
            real = max(0, int(config.memory_per_class - synthetic * units[form] + 1e-9))
    else:  # "fill"
        real = real or 0
        left = config.memory_per_class - real
        synthetic = max(0, int(left / units[form] + 1e-9)) if units[form] else max(sizes.values())
    if real + synthetic < least:
        what = f"real_per_class + syn_per_class must be at least {least}"
        raise UserError(f"{config.model_name} needs exemplars of each class: {what}.")
    quotas = [("real", real), (form, synthetic)]
    if config.fixed_memory:
        check_budget(quotas, config.memory_per_class, units)
        warn_of_small_classes(sizes, quotas)
    else:
        assert config.memory_size is not None  # load_config asks for it
        check_total(config.memory_size, len(images), quotas, units, least)
    return replace(config, real_per_class=real, syn_per_class=synthetic)


def check_byte_budget(
    quotas: Quotas,
    budget: int,
    costs: Mapping[str, Cost],
    images: Sequence[Sequence[Path]],
    paths: DatasetPaths,
    least: int,
) -> None:
    """Raises UserError where a typical class's exemplars, or one real exemplar of the smallest, exceed the bytes."""
    typical = [class_images[len(class_images) // 2] for class_images in images]
    in_use = [name for name, number in quotas if number]
    median = {name: round(statistics.median(map(costs[name].expected_bytes, typical))) for name in in_use}
    labels = [class_images[0].parent.name for class_images in images]
    texts = paths.class_texts(labels)
    shares = [ClassShare.empty(i, label, texts[label], in_use) for i, label in enumerate(labels)]
    check_bytes(quotas, budget, median, max(map(_index_bytes, shares)), least)
    if in_use == ["real"]:
        check_smallest(images, budget, shares)


def _index_bytes(share: ClassShare) -> int:
    """Bytes that a class of one exemplar of each form takes beside the payloads (typical ones of 128 bytes or more)."""
    for each in share.forms:
        share = share.plus(each.form, Row(128, (32, 32), 24))
    return share.bytes - sum(each.payloads for each in share.forms)


def copies_read(
    config: Config, data: DataManager, form: Form, paths: DatasetPaths, uses_memory: bool
) -> tuple[list[Path], str | None]:
    """`made_ahead` and `on_demand` of an ExemplarPlan.  paths: the dataset, with the form's files.

    Raises UserError where copies that were made ahead are to be made again from the memory, and it is not known how.
    """
    images = [image for target in range(data.nb_classes) for image in data.train_images(target)]
    may_be_replaced = config.augmentation_prob > 0 and (
        config.real_per_class != 0 or config.augmentation_scope == "all"
    )
    has_synthetic = uses_memory and config.syn_per_class != 0
    if not images or not (has_synthetic or may_be_replaced):
        return [], None
    if config.regenerate == "on_demand":
        return [], config.regenerate_options
    if not (config.memory_only and uses_memory):
        return images, None
    recorded = recorded_options(paths.folder("copies"))
    if not recorded and form.needs_model:
        raise UserError(
            f"memory_only: how the copies in {paths.folder('copies')} were made is not recorded, so they can't be made "
            "again from the memory alone. Set regenerate=on_demand with regenerate_options."
        )
    # New images have theirs ahead, and exemplars get theirs from the memory.
    return images if may_be_replaced else [], shlex.join(recorded) or config.regenerate_options
