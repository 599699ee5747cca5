"""Copies made while training goes on, of the chosen exemplars alone (the trainer's `regenerate: on_demand`)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.copies import Copies, by_settings, fingerprint
from compress.machine import choose_precision, download, make_regenerator
from compress.machine import fingerprint as weights_of
from compress.options import chosen_preset, parse_settings
from compress.plan import Plan, plan
from compress.records import MadeOtherwise, Records, edge_map_size
from utils.data.images import image_bits
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.log import progress


class OnDemand(Copies):
    """Copies 0 ... K-1 of exemplars, made where they are missing while training goes on.

    options: settings, model and machine as compress/run.py takes them, in one text, "" for its defaults; resolution:
    the preset where they name none; copies: K; device: where copies are made.  The model is in memory only during a
    call: between calls the classifier has the device to itself.
    Raises UserError, at once, for options that are wrong, a model that can't be loaded, and copies on disk that were
    made with other settings.
    """

    def __init__(self, paths: DatasetPaths, options: str, *, resolution: str, copies: int, device: torch.device):
        self.paths = paths
        self.copies = copies
        self.device = device
        try:
            self.options = parse_settings(options, resolution)
            self.preset = chosen_preset(self.options)
            if self.options.download:
                download(self.options.model)
            # A wrong path, and below copies of other settings, show now and not after the first phase.
            self.model = weights_of(self.options)
            self.precision = choose_precision(self.options.precision, device)
        except UserError as error:
            raise UserError(f"regenerate_options: {error}") from error
        todo = self._plan((image for label in paths.classes() for image in paths.images(label)[:1]), copies)
        self.made_by = by_settings(todo.records.copies.wanted(label) for label in paths.classes())
        self._fingerprint: tuple[Sequence[Path], dict[str, Any]] = ([], fingerprint(paths, [], copies))

    def fingerprint(self, exemplars: Sequence[Path]) -> dict[str, Any]:
        """Of these exemplars' copies."""
        if self._fingerprint[0] != exemplars:
            self._fingerprint = (list(exemplars), fingerprint(self.paths, exemplars, self.copies))
        return self._fingerprint[1]

    def make(self, images: Sequence[Path], with_copies: bool = True) -> int:
        """Raises UserError where an edge map or a copy could not be made."""
        todo = self._plan(images, self.copies if with_copies else 0)
        precision = self.precision if todo.copies_missing else None
        regenerator = make_regenerator(self.options, self.paths, self.preset, self.device, precision)
        with progress(todo.copies_missing, "copies") as bar:
            result = regenerator.run(todo, bar.update)
        if result.failures:
            more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
            raise UserError(f"a prompt or a copy could not be made: {result.failures[0]}{more}")
        if result.copies_made:
            self._fingerprint = ([], fingerprint(self.paths, [], self.copies))
        return result.copies_made

    def _plan(self, images: Iterable[Path], copies: int) -> Plan:
        try:
            return plan(Records(self.paths, self.preset, self.model, self.precision), images, range(copies))
        except MadeOtherwise as error:
            raise UserError(
                f"{error}\nGive this experiment copies of its own with variant=NAME, "
                "or make those again with compress/run.py --replace."
            ) from error

    def prompt_cost(self, image: Path) -> float:
        """Units that an image's prompt will cost: bits of its edge map, made or to be made, over bits of the image."""
        try:
            width, height, depth = image_bits(image)
            edge_map = self.paths.find_edge_map(image)
            if edge_map is not None:
                map_width, map_height, _ = image_bits(edge_map)
            else:
                map_height, map_width = edge_map_size(self.preset, height, width)
        except OSError as error:
            raise UserError(f"cannot read image {error}. Replace the file or take it away.") from error
        return map_width * map_height / (width * height * depth)
