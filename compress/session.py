"""One run of compress/run.py: look at the disk, make what is missing, report."""

import difflib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from compress.generators import Generator, build
from compress.options import Job
from compress.plan import Plan, plan
from compress.records import MadeOtherwise, Recipe, Records, State, model_options, newest_files
from compress.regenerate import Regenerator, regenerate, total
from compress.summary import report, report_estimate, report_findings, report_plan
from compress.verify import Findings, look_around, verify
from utils.devices import Fabric, by_all, by_first, launch, own_part, together
from utils.errors import UserError

DONE, SOME_FAILED = 0, 1
MIXING = "Make those again with --replace, or put this run's beside them with --keep-apart NAME."

PATIENCE = timedelta(days=30)
"""How long a process may wait for the others, whose disks and GPUs may be slower."""


def run(job: Job, device: str) -> int:
    """Returns the exit code; raises UserError for what the user can mend.

    Of several processes each looks at its part of the disk and makes its part of the files; the first one talks.
    """
    fabric = launch(device, patience=PATIENCE)
    with together(fabric):
        images, empty = select(job)
        if job.download and not job.verify:
            by_first(fabric, lambda: build.download(job.machine.model))
        recipe = by_first(fabric, lambda: expected_recipe(job, fabric.device, images))
        records = Records(job.paths, recipe, job.options)
        if job.verify:
            is_well = verify_and_report(fabric, records, images, job.copy_numbers).is_well
            return DONE if (is_well and not empty) or not fabric.is_global_zero else SOME_FAILED
        todo = find_work(fabric, job, records, images)
    if fabric.is_global_zero:
        build.warn_of_settings(job.form, job.machine, job.paths.class_texts(), images)
        report_plan(todo, f"{job.paths.dataset}, {job.form.preset.name} resolution")
    if job.dry_run:
        if fabric.is_global_zero:
            dry_run(job, todo, fabric)
        return DONE
    by_first(fabric, lambda: check_writable(todo))
    # Files without a record, such as the published scripts', are coded anew in a repair alone.
    kept = todo.records.kept
    recode = {label for label in kept.texts if job.repair or kept.state(label) is not State.NEW}
    with build.generator(todo, job.machine, fabric.device) as generate:
        announce(generate, job, todo, fabric)
        start = time.perf_counter()
        own = sum(len(task.copy_numbers) for task in own_part(fabric, todo.tasks))
        with progress_bar(own, "copy", fabric) as bar:
            result = regenerate(todo, generate, fabric, bar.update, recode)
    if not fabric.is_global_zero:
        return DONE
    report(result, job.form.noun, empty, time.perf_counter() - start)
    return SOME_FAILED if result.failures or empty else DONE


def select(job: Job) -> tuple[list[Path], list[Path]]:
    """The train images to work on, and the class folders that hold none.

    Raises UserError for a missing folder, an unknown label, or where there is no image at all.
    """
    paths = job.paths
    known = paths.classes()
    labels = chosen_labels(job.classes, known) if job.classes else known
    images, empty = [], []
    for label in labels:
        class_images = paths.images(label)
        images += class_images[: job.limit]
        if not class_images:
            empty.append(paths.folder("train") / label)
    if not images:
        raise UserError(f"no images in {paths.folder('train')}: its class folders hold no file that Pillow could read.")
    i, n = job.shard
    return images[i - 1 :: n], empty


def chosen_labels(classes: Sequence[str], known: list[str]) -> list[str]:
    """The labels of --classes: each value is one label, or several with commas between them."""
    labels = set()
    for value in classes:
        labels |= {value} if value in known else {label.strip() for label in value.split(",") if label.strip()}
    for label in sorted(labels.difference(known)):
        near = difflib.get_close_matches(label, known, n=1)
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        hint = f"did you mean {near[0]!r}?" if near else f"the dataset has {some}"
        raise UserError(f"no class {label!r}: {hint}")
    return sorted(labels)


def expected_recipe(job: Job, device: torch.device, images: Sequence[Path]) -> Recipe:
    """What has made the files on disk, if they are this job's: `recipe_of`, but with the precision of the copies on
    disk where it is left to the machine; and with their model where the weights are not at hand.

    Raises UserError where then the recorded options name another model, or none and the user names one.
    """
    form, machine = job.form, job.machine
    if not form.needs_model or job.existing != "refuse":
        return build.recipe_of(form, machine, device, job.dry_run)
    folder, labels = job.paths.folder("copies"), dict.fromkeys(image.parent.name for image in images)
    newest = newest_files(folder, labels)
    recorded = next(iter(newest.values())).settings if newest else {}
    precision = machine.precision
    if precision == "auto":
        precision = recorded.get("precision") or build.choose_precision(precision, device, machine.engine)
    elif precision == "bf16" and machine.engine == "openvino":
        precision = build.OPENVINO_BF16
    try:
        return Recipe(form, build.model_fingerprint(machine), precision)
    except UserError as error:
        models = {model_options(file.options) for file in newest.values() if file.options}
        named = model_options(job.options)
        if models == {named} or (not models and (job.dry_run or not named)):
            return Recipe(form, recorded.get("model"), precision)
        others = " and ".join(shlex.join(options) or "--model sd15" for options in sorted(models - {named}))
        made = f"copies in {folder} were made with {others}; for the model asked for now: " if others else ""
        raise UserError(f"{made}{error}") from error


def find_work(fabric: Fabric, job: Job, records: Records, images: list[Path]) -> Plan:
    """The plan for these images, which is the same in all processes.

    records: by the expected recipe.  Where something is to be made, it is compared with this machine's recipe.
    Raises UserError where files on disk were made with other settings, and the options don't say what to do with them.
    """
    numbers, findings = job.copy_numbers, Findings()
    try:
        todo = plan(records, images, numbers, job.existing, fabric)
        if job.repair:
            findings = verify_and_report(fabric, records, images, numbers)
        if job.existing == "refuse" and findings.repairs(todo).needs_generator:
            recipe = by_first(fabric, lambda: build.recipe_of(job.form, job.machine, fabric.device, job.dry_run))
            recipe = replace(recipe, model=recipe.model or records.recipe.model)  # of a dry run without weights
            if recipe != records.recipe:
                todo = plan(Records(job.paths, recipe, job.options), images, numbers, job.existing, fabric)
    except MadeOtherwise as error:
        raise UserError(f"{error}.\n{MIXING}") from error
    return findings.repairs(todo)


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


def dry_run(job: Job, todo: Plan, fabric: Fabric) -> None:
    """Tell what the plan will take.  Without weights the copies are counted and their time is unknown."""
    with ExitStack() as stack:
        generate, missing = None, None
        try:
            generate = stack.enter_context(build.generator(todo, job.machine, fabric.device))
        except UserError as error:
            missing = error
        announce(generate, job, todo, fabric)
        report_estimate(Regenerator(todo, generate), fabric.world_size)
    if missing:
        print(f"the time is unknown: {missing}")


def announce(generate: Generator | None, job: Job, todo: Plan, fabric: Fabric) -> None:
    """Print, in the first process, which model makes the copies, where and how."""
    if generate is None or not job.form.needs_model or not fabric.is_global_zero:
        return
    where = fabric.device if fabric.world_size == 1 else f"{fabric.world_size} processes ({fabric.device.type})"
    by = "" if job.machine.engine in ("auto", "torch") else f" by {job.machine.engine}"
    precision = (todo.records.recipe.precision or "").partition("-")[0]
    print(f"model {job.machine.model} on {where}{by} in {precision}, {generate.batch_size} at a time", flush=True)


def verify_and_report(fabric: Fabric, records: Records, images: list[Path], copy_numbers: Sequence[int]) -> Findings:
    """What is wrong with the kept files and copies of these images, told by the first process and returned in all."""
    own = own_part(fabric, images)
    with progress_bar(len(own), "image", fabric) as bar:
        parts = by_all(fabric, lambda: verify(records, own, copy_numbers, bar.update))
    findings = total([*parts, look_around(records, dict.fromkeys(image.parent.name for image in images))])
    if fabric.is_global_zero:
        report_findings(findings, records.form.noun)
    return findings


def progress_bar(total: int, unit: str, fabric: Fabric) -> tqdm:
    """With the time left; in a log file, a line every half minute.  Of several processes the first one shows its part,
    which is about as large as any other's."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    quiet = not total or not fabric.is_global_zero
    return tqdm(disable=quiet, total=total, unit=unit, dynamic_ncols=True, mininterval=seconds, smoothing=0.05)
