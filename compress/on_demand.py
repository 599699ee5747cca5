"""Copies made while training goes on, of the chosen exemplars alone (the trainer's `regenerate: on_demand`)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from compress.plan import Plan, plan
from compress.presets import PRESETS
from compress.records import MadeOtherwise, Records, edge_map_size
from compress.regenerate import Regenerator
from ControlNet.cldm.model import ModelError, load_model
from utils.errors import UserError
from utils.images import image_bits
from utils.log import progress
from utils.paths import DatasetPaths


class OnDemand:
    """Called with train images, makes their edge maps and their copies 0 ... K-1 where these are missing.

    resolution: "high" or "low"; model: as `load_model` takes it; copies: K; size, steps, batch_size: None for the
    preset's own and for what suits the device.  The model is in memory only during a call: between calls the
    classifier has the device to itself.  Raises UserError, at once, for a model that can't be loaded and for copies on
    disk that were made with other settings.
    """

    def __init__(
        self,
        paths: DatasetPaths,
        *,
        resolution: str,
        model: str,
        copies: int,
        device: torch.device,
        size: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
    ):
        self.paths = paths
        self.preset = PRESETS[resolution].changed(size=size, steps=steps)
        self.model = model
        self.copies = copies
        self.device = device
        self.batch_size = batch_size
        # A wrong path and copies made otherwise show now, not after the first phase.
        self.fingerprint = getattr(self._load(torch.device("cpu")), "fingerprint", "")
        self._plan(image for label in paths.classes() for image in paths.images(label)[:1])

    def __call__(self, images: Sequence[Path]) -> None:
        """Raises UserError where a copy could not be made."""
        todo = self._plan(images)
        model = self._load(self.device) if todo.copies_missing else None
        regenerator = Regenerator(self.paths, self.preset, model, batch_size=self.batch_size)
        with progress(todo.copies_missing, "copies") as bar:
            result = regenerator.run(todo, bar.update)
        if result.failures:
            more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
            raise UserError(f"copies could not be made: {result.failures[0]}{more}")

    def _plan(self, images: Iterable[Path]) -> Plan:
        try:
            return plan(Records(self.paths, self.preset, self.fingerprint), images, range(self.copies))
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

    def _load(self, device: torch.device):
        try:
            return load_model(self.model, device)
        except ModelError as error:
            raise UserError(f"regenerate_model: {error}") from error
