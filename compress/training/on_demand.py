"""Copies made while training goes on, of the chosen exemplars alone (the trainer's `regenerate: on_demand`)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.forms import Form
from compress.generators import build
from compress.options import Job, parse_settings
from compress.plan import Plan, plan
from compress.records import MadeOtherwise, Records, by_settings, generator_of
from compress.regenerate import regenerate
from compress.training.copies import Copies, digests_of
from utils.data.paths import DatasetPaths
from utils.devices import Fabric, by_first, own_part
from utils.errors import UserError
from utils.log import progress


class OnDemand(Copies):
    """Copies 0 ... K-1 of exemplars, made where they are missing while training goes on.

    options: settings, model and machine as compress/run.py takes them, in one text, "" for its defaults; default: the
    form, with its preset, where they name none; copies: K; fabric: the processes, which share the work.  The model is
    in memory only during a call: between calls the classifier has the device to itself.
    Raises UserError, at once, for options that are wrong, a model that can't be used, and copies on disk that were
    made with other settings.
    """

    def __init__(self, paths: DatasetPaths, options: str, *, default: Form, copies: int, fabric: Fabric):
        self.fabric = fabric
        try:
            form, machine, words, download = parse_settings(options, default.preset.name, default.name)
            if download:
                build.download(machine.model)
            self.generator = generator_of(form, words)
            self.job = Job(paths, form, machine, tuple(range(copies)), words)
            # A wrong path, and below copies of other settings, show now and not after the first phase.
            self.recipe = fabric.broadcast(build.recipe_of(form, machine, fabric.device))
        except UserError as error:
            raise UserError(f"regenerate_options: {error}") from error
        some = [image for label in paths.classes() for image in paths.images(label)[:1]]
        if fabric.is_global_zero:
            build.warn_of_settings(form, machine, paths.class_texts(), some)
        todo = self._plan(paths, some, with_copies=True)
        self.made_by = by_settings(map(todo.records.copies.wanted, paths.classes()))
        self._digests: tuple[list[Path], dict[str, Any]] | None = None

    def make(self, images: Sequence[Path], with_copies: bool = True) -> int:
        """See `Copies.make`.  images: of which a memory's archive may have others than the dataset.

        Raises UserError where something could not be made.
        """
        by_root: dict[Path, list[Path]] = {}
        for image in images:
            by_root.setdefault(image.parents[2], []).append(image)
        return sum(self._make(root, root_images, with_copies) for root, root_images in by_root.items())

    def _make(self, root: Path, images: Sequence[Path], with_copies: bool) -> int:
        """The same, for images of one dataset folder."""
        fabric, job = self.fabric, self.job
        paths = replace(job.paths, data_dir=root.parent)
        todo = by_first(fabric, lambda: self._plan(paths, images, with_copies))
        own = sum(len(task.copy_numbers) for task in own_part(fabric, todo.tasks))
        with (
            build.generator(todo, job.machine, fabric.device) as generate,
            progress(own, "copies", quiet=not fabric.is_global_zero) as bar,
        ):
            result = regenerate(todo, generate, fabric, bar.update)
        if result.failures:
            more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
            raise UserError(f"an exemplar could not be stored or regenerated: {result.failures[0]}{more}")
        self._digests = None
        return result.copies_made

    def digests(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """Of these exemplars' copies."""
        if self._digests is None or self._digests[0] != exemplars:
            self._digests = list(exemplars), digests_of(self.job.paths, exemplars, len(self.job.copy_numbers))
        return self._digests[1]

    def _plan(self, paths: DatasetPaths, images: Sequence[Path], with_copies: bool) -> Plan:
        try:
            records = Records(paths, self.recipe, self.job.options)
            return plan(records, images, self.job.copy_numbers if with_copies else ())
        except MadeOtherwise as error:
            raise UserError(
                f"{error}\nGive this experiment copies of its own with variant=NAME, "
                "or make those again with compress/run.py --replace."
            ) from error
