"""One run of compress/run.py: look at the disk, make what is missing, report."""

import difflib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from compress.generators import Generator
from compress.generators.build import (
    OPENVINO_BF16,
    choose_precision,
    download,
    generator,
    model_fingerprint,
    recipe_of,
    warn_of_settings,
)
from compress.job import Data, Job, Machine
from compress.options import Action
from compress.plan import Plan, Survey, survey, to_plan
from compress.records import MadeOtherwise, Recipe, Records, State, model_options, newest_files
from compress.regenerate import Regenerator
from compress.share import PATIENCE, by_all, by_first, own_part, run_shared, together
from compress.summary import report, report_estimate, report_findings, report_plan
from compress.verify import Findings, look_around, verify
from utils.devices import accelerator, launch
from utils.errors import UserError
from utils.fabric import Fabric

DONE, SOME_FAILED = 0, 1
MIXING = "Make those again with --replace, or put this run's beside them with --keep-apart NAME."


def run(job: Job, action: Action) -> int:
    """Returns the exit code; raises UserError for what the user can mend.

    Of several processes each looks at its part of the disk and makes its part of the files; the first one talks.
    """
    fabric = launch(*accelerator(action.device), patience=PATIENCE)
    images, empty = together(fabric, lambda: select(job.data))
    if action.download and not action.verify:
        by_first(fabric, lambda: download(job.machine.model))
    expected = by_first(fabric, lambda: expected_recipe(job, fabric.device, images, action))
    if action.verify:
        records = Records(job.data.paths, expected, job.options)
        is_well = verify_and_report(fabric, records, images, job.data.copy_numbers).is_well
        return DONE if (is_well and not empty) or not fabric.is_global_zero else SOME_FAILED
    todo = together(fabric, lambda: find_work(fabric, job, expected, images, action))
    if fabric.is_global_zero:
        warn_of_settings(job.form, job.machine, job.data.paths.class_texts(), images)
        report_plan(todo, f"{job.data.paths.dataset}, {job.form.preset.name} resolution")
    if action.dry_run:
        return dry_run(job, todo, fabric)
    by_first(fabric, lambda: check_writable(todo))
    with generator_for(job, todo, fabric) as generate:
        start = time.perf_counter()
        regenerator = Regenerator(job.data.paths, job.form, generate, labels_to_recode(todo, action.repair))
        own = sum(len(task.copy_numbers) for task in own_part(fabric, todo.tasks))
        with progress_bar(own, "copy", fabric) as bar:
            result = run_shared(fabric, regenerator, todo, bar.update)
    if not fabric.is_global_zero:
        return DONE
    report(result, job.form.noun, empty, time.perf_counter() - start)
    return SOME_FAILED if result.failures or empty else DONE


def check_writable(todo: Plan) -> None:
    """Raises UserError, before a model is loaded, where the folders of what is missing can't be written to."""
    paths = todo.records.paths
    for mode, count in (("kept", todo.kept_missing), ("copies", todo.copies_missing)):
        folder = paths.folder(mode)
        try:
            if count:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"can't write to {folder}: {error.strerror}.") from error


def labels_to_recode(todo: Plan, repair: bool) -> set[str]:
    """The class labels whose kept files of earlier versions are to be coded anew.

    Files without a record, such as those of the published scripts, are left as they are unless a repair is asked for.
    """
    kept = todo.records.kept
    return {label for label in kept.texts if repair or kept.state(label) is not State.NEW}


def dry_run(job: Job, todo: Plan, fabric: Fabric) -> int:
    """Tell what the plan will take.  Without weights the copies are counted and their time is unknown."""
    if not fabric.is_global_zero:
        return DONE
    with ExitStack() as stack:
        try:
            generate, missing = stack.enter_context(generator_for(job, todo, fabric)), None
        except UserError as error:
            generate, missing = None, error
        report_estimate(Regenerator(job.data.paths, job.form, generate), todo, fabric.world_size)
    if missing:
        print(f"the time is unknown: {missing}")
    return DONE


@contextmanager
def generator_for(job: Job, todo: Plan, fabric: Fabric) -> Iterator[Generator | None]:
    """The generator that a plan takes, announced by the first process; None where it takes none."""
    if not todo.needs_generator:
        yield None
        return
    precision, engine = todo.records.recipe.precision, job.machine.engine
    with generator(job.form, job.machine, fabric.device, precision) as generate:
        if job.form.needs_model and fabric.is_global_zero:
            where = fabric.device if fabric.world_size == 1 else f"{fabric.world_size} processes ({fabric.device.type})"
            by = "" if engine in ("auto", "torch") else f" by {engine}"
            computes_in = (precision or "").partition("-")[0]
            print(
                f"model {job.machine.model} on {where}{by} in {computes_in}, {generate.batch_size} at a time",
                flush=True,
            )
        yield generate


def find_work(fabric: Fabric, job: Job, expected: Recipe, images: list[Path], action: Action) -> Plan:
    """The plan for these images, which is the same in all processes.

    Where something is to be made, by a recipe of this machine, files that another one made are others.
    Raises UserError where files on disk were made with other settings, and the options don't say what to do with them.
    """
    try:
        todo = shared_plan(fabric, job, expected, images)
        findings = Findings()
        if action.repair:
            findings = verify_and_report(fabric, todo.records, images, job.data.copy_numbers)
        if job.existing == "refuse" and findings.repairs(todo).needs_generator:
            recipe = by_first(fabric, lambda: recipe_of(job.form, job.machine, fabric.device, action.dry_run))
            recipe = replace(recipe, model=recipe.model or expected.model)  # of a dry run without weights
            if recipe != expected:
                todo = shared_plan(fabric, job, recipe, images)
    except MadeOtherwise as error:
        raise UserError(f"{error}.\n{MIXING}") from error
    return findings.repairs(todo)


def shared_plan(fabric: Fabric, job: Job, recipe: Recipe, images: list[Path]) -> Plan:
    """`plan`, for which each process looks at its part of the classes."""
    records = Records(job.data.paths, recipe, job.options)
    own_labels = set(own_part(fabric, list(dict.fromkeys(image.parent.name for image in images))))
    own = [image for image in images if image.parent.name in own_labels]
    numbers, surveys = job.data.copy_numbers, Survey()
    for part in by_all(fabric, lambda: survey(records, own, numbers, job.existing)):
        surveys.add(part)
    return to_plan(records, images, numbers, surveys)


def expected_recipe(job: Job, device: torch.device, images: Sequence[Path], action: Action) -> Recipe:
    """What has made the files on disk, if they are this job's.

    That is `recipe_of`, but where the precision is left to the machine, that of the copies on disk is meant; and where
    the weights are not at hand, the model of these copies, if the recorded options name the same.
    Raises UserError where the recorded options name another model, or none and the user names one.
    """
    form, machine = job.form, job.machine
    if not form.needs_model or job.existing != "refuse":
        return recipe_of(form, machine, device, action.dry_run)
    folder, labels = job.data.paths.folder("copies"), dict.fromkeys(image.parent.name for image in images)
    newest = newest_files(folder, labels)
    recorded = next(iter(newest.values())).settings if newest else {}
    precision = named_precision(machine) or recorded.get("precision")
    if precision is None:
        precision = choose_precision(machine.precision, device, machine.engine)
    try:
        return Recipe(form, model_fingerprint(machine), precision)
    except UserError as error:
        models = {model_options(file.options) for file in newest.values() if file.options}
        named = model_options(job.options)
        if models == {named} or (not models and (action.dry_run or not named)):
            return Recipe(form, recorded.get("model"), precision)
        others = " and ".join(shlex.join(options) or "--model sd15" for options in sorted(models - {named}))
        made = f"copies in {folder} were made with {others}; for the model asked for now: " if others else ""
        raise UserError(f"{made}{error}") from error


def named_precision(machine: Machine) -> str | None:
    """The precision that the user has named, as copies record it; None for "auto"."""
    if machine.engine == "openvino" and machine.precision == "bf16":
        return OPENVINO_BF16
    return None if machine.precision == "auto" else machine.precision


def verify_and_report(fabric: Fabric, records: Records, images: list[Path], copy_numbers: Sequence[int]) -> Findings:
    """What is wrong with the kept files and copies of these images, told by the first process and returned in all."""
    own = own_part(fabric, images)
    with progress_bar(len(own), "image", fabric) as bar:
        parts = by_all(fabric, lambda: verify(records, own, copy_numbers, bar.update))
    findings = look_around(records, dict.fromkeys(image.parent.name for image in images))
    for part in parts:
        findings.add(part)
    position = {image: i for i, image in enumerate(images)}
    findings.tasks.sort(key=lambda task: position[task.image])
    if fabric.is_global_zero:
        report_findings(findings, records.form.noun)
    return findings


def progress_bar(total: int, unit: str, fabric: Fabric | None = None) -> tqdm:
    """With the time left; in a log file, a line every half minute.  Of several processes the first one shows its part,
    which is about as large as any other's."""
    seldom = 0.1 if sys.stderr.isatty() else 30
    is_other = fabric is not None and fabric.world_size > 1 and not fabric.is_global_zero
    return tqdm(
        disable=not total or is_other,
        total=total,
        unit=unit,
        dynamic_ncols=True,
        mininterval=seldom,
        smoothing=0.05,
    )


def select(data: Data) -> tuple[list[Path], list[Path]]:
    """The train images to work on, and the class folders that hold none.

    Raises UserError for a missing folder, an unknown label, or where there is no image at all.
    """
    paths = data.paths
    known = paths.classes()
    labels = chosen_labels(data.classes, known) if data.classes else known
    images, empty = [], []
    for label in labels:
        class_images = paths.images(label)
        images += class_images[: data.limit]
        if not class_images:
            empty.append(paths.folder("train") / label)
    if not images:
        raise UserError(f"no images in {paths.folder('train')}: its class folders hold no file that Pillow could read.")
    i, n = data.shard
    return images[i - 1 :: n], empty


def chosen_labels(classes: Sequence[str], known: list[str]) -> list[str]:
    """The labels of --classes: each value is one label, or several with commas between them."""
    labels = []
    for value in classes:
        labels += [value] if value in known else [label.strip() for label in value.split(",") if label.strip()]
    for label in labels:
        if label not in known:
            near = difflib.get_close_matches(label, known, n=1)
            some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
            hint = f"did you mean {near[0]!r}?" if near else f"the dataset has {some}"
            raise UserError(f"no class {label!r}: {hint}")
    return sorted(set(labels))
