"""What a config asks of its exemplars: their form, how many of each a class keeps, and their copies."""

import itertools
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import replace

from compress.copies import CopiesAhead
from compress.cost import Cost
from compress.forms import form_named
from compress.options import parse_settings
from compress.presets import PRESETS
from compress.records import recorded_options
from utils.config.schema import Config, MethodInfo
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.memory.budget import FILL, check_budget, check_bytes, check_smallest, check_total, warn_of_small_classes
from utils.memory.share import ClassShare, Row


def exemplar_form(config: Config, data):
    """The form in which exemplars that are not real are kept: as it is on disk, where copies were made ahead."""
    options, resolution = config.regenerate_options, data.defaults.resolution
    try:
        form_named(config.syn_form, PRESETS[resolution])
    except UserError as error:
        raise UserError(f"syn_form: {error}") from error
    try:
        form = parse_settings(options, resolution, config.syn_form)[0]
        if config.regenerate == "ahead" and not options:
            options = shlex.join(recorded_options(replace(data.paths, files=form.files).folder("copies")))
            form = parse_settings(options, resolution, config.syn_form)[0] if options else form
        if form.needs_weights:
            form.settings()  # whether the weights are there
    except UserError as error:
        raise UserError(f"regenerate_options: {error}") from error
    return form


def quotas(config: Config, form) -> list[tuple[str, int]]:
    """How many exemplars a class has in each form, in order of choice."""
    numbers = (FILL if config.real_per_class is None else config.real_per_class), config.syn_per_class
    return [("real", numbers[0]), (form.name, FILL if numbers[1] == "fill" else numbers[1])]


def costs(form, paths: DatasetPaths) -> dict:
    """What exemplars cost and keep, by form."""
    return {"real": Cost(None, paths), form.name: Cost(form, paths)}


def check_exemplars(config: Config, method: MethodInfo, data, form, fabric, numbers: Mapping[str, int]):
    """Make sure, before any work, that the exemplars can be chosen, fit the budget and have, or can get, their copies.

    numbers: of exemplars, where this has been checked before, by a run that goes on.
    Returns the config with real_per_class filled in, and the copies, made ahead or to be made on demand; None where
    none is needed.
    """
    if config.memory_only and method.reads_old_images:
        raise UserError(f"memory_only: {method.name} trains on all images of old classes. Set it to false.")
    images = [of_class for target in range(data.nb_classes) if (of_class := data.train_images(target))]
    fewest = min(images, key=len, default=())
    if method.uses_memory and data.nb_phases > 1 and fewest and len(fewest) < method.least_exemplars:
        needs = f"{config.model_name} needs at least {method.least_exemplars} train images of each class"
        raise UserError(f"{fewest[0].parent} has {len(fewest)}: {needs}. Add images, or take the class away.")
    if numbers:
        config = replace(config, **numbers)
    elif method.uses_memory:
        config = within_budget(config, form, images, data.paths, method.least_exemplars)
    synthetic = config.syn_per_class if method.uses_memory else 0
    if form.deterministic:  # all copies of an image would be equal
        config = replace(config, augmentations_per_image=1)
    may_be_replaced = config.augmentation_prob > 0 and (
        config.real_per_class != 0 or config.augmentation_scope == "all"
    )
    needs_copies = (synthetic != 0 or may_be_replaced) and images  # else all is done
    from_memory = config.memory_only and method.uses_memory
    copies, nb_copies = None, config.augmentations_per_image
    if needs_copies and (config.regenerate == "on_demand" or from_memory):
        from compress.on_demand import OnDemand  # imports ControlNet: seconds that other runs need not spend

        copies = OnDemand(
            data.paths,
            config.regenerate_options if config.regenerate == "on_demand" else made_with(config, form, data.paths),
            resolution=data.defaults.resolution,
            form=form.name,
            copies=nb_copies,
            fabric=fabric,
        )
    form.release()
    if needs_copies and config.regenerate == "ahead" and (not from_memory or may_be_replaced):
        ahead = CopiesAhead(data.paths, form, list(itertools.chain(*images)), nb_copies)
        copies = copies or ahead  # with memory_only, new images have theirs ahead, and exemplars get theirs
    return config, copies


def made_with(config: Config, form, paths: DatasetPaths) -> str:
    """The options that give the copies that were made ahead once more.  Raises UserError where they are unknown."""
    options = recorded_options(paths.folder("copies"))
    if not options and form.needs_model:
        raise UserError(
            f"memory_only: how the copies in {paths.folder('copies')} were made is not recorded, so they can't be made "
            "again from the memory alone. Set regenerate=on_demand with regenerate_options."
        )
    return shlex.join(options) or config.regenerate_options


def within_budget(config: Config, form, images, paths: DatasetPaths, least: int) -> Config:
    """The config with the numbers of exemplars filled in that are left to the budget.

    images: of each class; least: exemplars of a class that the method needs.
    Raises UserError, with the arithmetic, where a typical class's exemplars don't fit.
    """
    of_form, asked = costs(form, paths), config.syn_per_class
    sizes = {of_class[0].parent.name: len(of_class) for of_class in images}
    typical = [of_class[len(of_class) // 2] for of_class in images]
    if config.budget_in == "bytes":
        of_quota = dict(quotas(config, form))
        median = {
            name: round(statistics.median(of_form[name].expected_bytes(image) for image in typical))
            for name, number in of_quota.items()
            if number
        }
        in_use, texts = [name for name, number in of_quota.items() if number], paths.class_texts(sizes)
        shares = [ClassShare.empty(i, label, texts[label], in_use) for i, label in enumerate(sizes)]
        index = max(map(_index_bytes, shares))
        check_bytes(quotas(config, form), config.memory_bytes_per_class, median, index, least)
        if asked == 0:
            check_smallest(images, config.memory_bytes_per_class, shares)
        return config
    units = {"real": 1.0, form.name: 1 / 24}
    if asked:
        of_first = [of_form[form.name].units(of_class[0]) for of_class in images]
        if None in of_first:
            raise UserError(
                f"syn_form: {form.name} has no count in units. Set budget_in=bytes and memory_bytes_per_class."
            )
        units[form.name] = statistics.median(of_first)
    real = config.real_per_class
    if asked == "fill":
        if not units[form.name]:
            config = replace(config, syn_per_class=max(sizes.values()))
        else:
            left = config.memory_per_class - (real or 0)
            config = replace(config, syn_per_class=max(0, int(left / units[form.name] + 1e-9)))
        real = real or 0
    if real is None:
        real = max(0, int(config.memory_per_class - asked * units[form.name] + 1e-9))
    config = replace(config, real_per_class=real)
    if real + config.syn_per_class < least:
        what = f"real_per_class + syn_per_class must be at least {least}"
        raise UserError(f"{config.model_name} needs exemplars of each class: {what}.")
    if config.fixed_memory:
        check_budget(quotas(config, form), config.memory_per_class, units)
        warn_of_small_classes(sizes, quotas(config, form))
    else:
        check_total(config.memory_size, len(images), quotas(config, form), units, least)
    return config


def _index_bytes(share: ClassShare) -> int:
    """Bytes that a class of one exemplar of each form takes beside the payloads (typical ones of 128 bytes or more)."""
    for each in share.forms:
        share = share.plus(each.form, Row(128, (32, 32), 24))
    return share.bytes - sum(each.payloads for each in share.forms)
