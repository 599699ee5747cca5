"""A trained network, with the classes and transforms of its run, from a run's output folder."""

import re
import shlex
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models import catalogue
from models.networks import Outputs
from models.training import checkpoint
from models.training.method import network_input
from models.training.run import Predictor
from utils.data.classes import PhasedClasses, phase_starts
from utils.devices import launch
from utils.errors import UserError
from utils.results.output import check_is_run, seed_folder


class Learner:
    """What a run had learnt by the end of a phase.

    folder: the run's output folder; seed: the class order, None for the first; phase: None for the last one kept;
    device: as the config's key of that name; classifier: "head" or "nme", whose `confidences` are asked for.
    Raises UserError where there is no such checkpoint, or no class means for nme.

    `network` maps normalised pictures to `models.networks.Outputs`; `class_names` are those of its logits, in order;
    `class_means` (classes x D) are the nearest-mean classifier's, None where the run has none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int | None = None,
        phase: int | None = None,
        device: str = "auto",
        classifier: Literal["head", "nme"] | None = None,
    ):
        self.folder = folder
        self.seed, self.phase = _choose(folder, seed, phase)
        path = checkpoint.phase_path(seed_folder(folder, self.seed) / "checkpoints", self.phase)
        state = checkpoint.load(path, checkpoint.AFTER_PHASE)
        if "picture_size" not in state:
            raise UserError(f"{path} was written by an earlier version, which did not keep the pictures' size.")
        config = self.config = catalogue.read_config(folder / "config.json", [f"device={device}"])
        on_gpu = torch.cuda.is_available() and config.device != "cpu"
        precision = "32-true" if config.precision == "16-mixed" and not on_gpu else config.precision
        fabric = launch(config.device, precision)
        self.data = PhasedClasses(
            config.dataset,
            state["class_names"],
            phase_starts(len(state["class_names"]), config.init_cls, config.increment),
            tuple(state["picture_size"]),
            config.augmentation,
            network_input(config.convnet_type, config.image_size),
        )
        self.predictor = Predictor(config, self.data, fabric)
        with checkpoint.fitting(path):
            network = catalogue.load(config.model_name).trained_network(config, self.data, state)
        self.predictor.network_to_device(network)
        self.network = network.evaluated.eval()
        self.class_means: Tensor | None = state.get("class_means")
        self.by_means = classifier == "nme"
        if self.by_means and self.class_means is None:
            raise UserError(f"--classifier nme: {path} has no class means ({config.model_name}, nme={config.nme}).")
        self.class_names = self.data.class_names[: self.network.nb_classes]
        what = f"{config.model_name}, {config.convnet_type}, {len(self.class_names)} classes"
        self.description = f"{what}, phase {self.phase} of seed {self.seed}: {path}"

    def confidences(self, outputs: Outputs) -> Tensor:
        """Of the classifier, B x classes, float32: softmax of the logits, or cosines to the class means (-1 for a class
        that has none)."""
        if not self.by_means or self.class_means is None:
            return outputs.logits.float().softmax(dim=1)
        means = self.class_means.to(outputs.features)
        cosines = F.normalize(outputs.features) @ means.T
        return cosines.masked_fill(~means.any(dim=1), -1.0).float()


def _choose(folder: Path, seed: int | None, phase: int | None) -> tuple[int, int]:
    """The class order and phase of a checkpoint that is there."""
    check_is_run(folder)
    seeds = [int(match[1]) for entry in folder.iterdir() if (match := re.fullmatch(r"seed(\d+)", entry.name))]
    checkpoints = {number: seed_folder(folder, number) / "checkpoints" for number in sorted(seeds)}
    saved = {n: phases for n, path in checkpoints.items() if (phases := checkpoint.saved_phases(path))}
    if not saved:
        command = f"python main.py --config {shlex.quote(str(folder / 'config.json'))}"
        raise UserError(f"{folder} has no finished phase: train it with {command}")
    if seed is None:
        seed = next(iter(saved))
    if seed not in saved:
        raise UserError(f"--seed: {folder} has no finished phase of {seed}, only of {', '.join(map(str, saved))}.")
    if phase is None:
        phase = saved[seed][-1]
    if phase not in saved[seed]:
        kept = f"only of {', '.join(map(str, saved[seed]))}"
        raise UserError(f"--phase: the network of {phase} is not kept, {kept} (keep_checkpoints=0 keeps all).")
    return seed, phase
