"""The phases of a run: training, exemplars, evaluation, checkpoints.  The epoch loop is `models.training.epochs`'s."""

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convs.blocks import fold_adapters
from convs.resnet import nb_parameters
from models.training import phase0
from models.training.checkpoint import Checkpoints, fitting, phase_path
from models.training.epochs import Progress, train_stage
from models.training.method import Method
from models.training.run import Run
from utils.errors import UserError
from utils.memory import archive
from utils.results.metrics import nearest_mean_scores, phase_metrics
from utils.results.records import CLASSIFIERS, Metrics, Phase, Training

log = logging.getLogger(__name__)


class Trainer:
    """Takes a method through the phases of a run.

    records: of the finished phases; class_means: of the phase that was evaluated last (`Method.class_means`).
    """

    def __init__(self, method: type[Method], run: Run):
        self.run, self.config, self.data = run, run.config, run.data
        run.reset_gradient_scale()
        self.method = method(run)
        self.records: list[Phase] = []
        self.checkpoints = Checkpoints(run)
        self.class_means: Tensor | None = None
        self.seconds_before = 0.0  # what killed processes spent on the present phase's training
        self.archive_bytes: int | None = None  # of the memory after the phase that was done last

    # The phases

    def fit(self, after_phase: Callable[[list[Phase]], object] | None = None) -> list[Phase]:
        """Train every phase that is not done yet.  Returns the records of all, in order.

        after_phase: called with the records so far when a phase is done and safe on disk, and where all were before.
        """
        within = self.load()
        if after_phase and len(self.records) == self.data.nb_phases:
            after_phase(self.records)
        for phase in range(len(self.records), self.data.nb_phases):
            record = self.do_phase(phase, within)
            self.records.append(record)
            within = None
            if self.run.history:  # before the checkpoint: a run that goes on from it finds the phase's history whole
                self.run.history.add_phase(record)
            self.save_phase()
            self._log_results(record)
            if after_phase:
                after_phase(self.records)
        return self.records

    def do_phase(self, phase: int, within: Mapping[str, Any] | None = None) -> Phase:
        """One phase's record.  within: the checkpoint within the phase, None to start at its beginning."""
        start = time.perf_counter()
        made = self._make_copies_of_new_images(phase)
        self.start_phase(phase)
        training = self.train(within)
        self.run.seed_torch(phase + 1)  # whether the training was done here, or before the run was killed
        self.method.after_training()
        self.run.broadcast_network(self.method.network)  # what each process has worked out may differ in the last bits
        trained = time.perf_counter()
        copies = self.choose_exemplars()
        chosen = time.perf_counter()
        scores = self.evaluate()
        memory = {**self.run.memory.report(), "archive_bytes": self.archive_bytes}
        now = time.perf_counter()
        start -= self.seconds_before
        seconds = {"train": trained - start, "exemplars": chosen - trained, "evaluate": now - chosen}
        return Phase.model_validate(
            {
                "phase": phase,
                "classes_seen": self.method.nb_seen,
                **scores,
                "memory": memory,
                "parameters": nb_parameters(self.method.evaluated),
                "training": training,
                "copies_on_demand": None if copies is None and not made else (copies or 0) + made,
                "copies": self.run.copies.summary(self.run.exemplars_with_copies()) if self.run.copies else None,
                "seconds": {**seconds, "total": now - start},
            }
        )

    def start_phase(self, phase: int) -> None:
        """Make the method ready for a phase's classes."""
        method, targets = self.method, self.data.phase_targets(phase)
        method.phase, method.within_phase = phase, {}
        method.nb_old, method.nb_new, method.nb_seen = targets.start, len(targets), targets.stop
        if phase > 0:
            fold_adapters(method.network)
        if method.keeps_old_network and phase > 0:
            method.old_network = copy.deepcopy(method.network).requires_grad_(False).eval()
        self.run.seed_torch(phase + 1)
        self.grow(len(targets))
        method.before_training()

    def grow(self, nb_new: int) -> None:
        """Make room for new classes in the network, on its device."""
        self.method.network.grow(nb_new)
        self.run.network_to_device(self.method.network)

    # Checkpoints

    def load(self) -> dict[str, Any] | None:
        """Take up the last finished phase.  Returns the checkpoint within the next one, None where there is none.

        Raises UserError where a checkpoint is of another config, other classes or other copies.
        """
        done, within = self.checkpoints.load()
        if done is not None:
            self._load_phase(done)
        copies, next_phase = (within or done or {}).get("copies"), len(self.records)
        if copies and self.run.copies and next_phase < self.data.nb_phases:
            images = self.run.exemplars_with_copies()
            if within is not None:
                self._make_copies_of_new_images(next_phase)
                images += self.run.new_images_with_copies(next_phase)
            self.run.copies.check(copies, images)
        return within

    def _load_phase(self, state: Mapping[str, Any]) -> None:
        run, method = self.run, self.method
        with fitting(phase_path(run.folder, state["phase"])):
            method.restore(state)
            run.memory.load_state_dict(state["memory"])
            self.records = [Phase.from_state(record, self.data.class_names) for record in state["records"]]
        if len(self.records) < self.data.nb_phases and method.uses_memory:
            if self.config.memory_only:
                self._take_from_archive(state["phase"])
            self._make_kept_files()  # what was deleted since then
            self._make_missing(with_copies=True)

    def save_phase(self) -> None:
        """Save the phase that has just been done."""
        method = self.method
        self.checkpoints.save_phase(
            {
                "phase": method.phase,
                "network": method.network.state_dict(),
                "class_means": self.class_means,
                "memory": self.run.memory.state_dict(),
                "method": method.state,
                "records": [record.state() for record in self.records],
                "copies": self._copies_state(),
            }
        )

    def _copies_state(self, new_images: Sequence[Path] = ()) -> dict[str, Any] | None:
        if self.run.copies is None:
            return None
        return self.run.copies.state([*self.run.exemplars_with_copies(), *new_images])

    # Training

    def train(self, within: Mapping[str, Any] | None = None) -> Training:
        """Train the present phase's stages, unless this training was done before.

        within: see `do_phase`.
        """
        method, phase = self.method, self.method.phase
        if phase > 0 and method.uses_memory and not self.run.memory.items():
            keys = "memory_per_class, memory_size or memory_bytes_per_class"
            raise UserError(f"{method.describe('training')}: there is not one exemplar. Raise {keys}.")
        cached = phase0.path_of(self.run, method) if phase == 0 else None
        if cached and (before := phase0.load(self.run, method, cached)) is not None:
            self.seconds_before = 0.0 if before.reused else before.seconds
            return before
        progress = Progress()
        if within is not None:
            progress, method.within_phase = Progress.restored(within, self.run.fabric), within["within_phase"]
        self.seconds_before = time.perf_counter() - progress.began
        progress.epochs_before = sum(stage.epochs for record in self.records for stage in record.training.stages)
        progress.copies = self._copies_state(self.run.new_images_with_copies(phase))
        for number, stage in enumerate(method.stages()):
            method.before_stage(stage)
            if number >= len(progress.stages):
                progress.stages.append(train_stage(self.run, method, self.checkpoints, stage, progress))
        first = progress.stages[0] if progress.stages else None
        training = Training(
            epochs=first.epochs if first else 0,
            loss=first.loss if first else None,
            accuracy=first.accuracy if first else None,
            stages=progress.stages,
            seconds=time.perf_counter() - progress.began,
            reused=False,
        )
        if cached:
            phase0.save(self.run, method, training, cached)
        return training

    # Exemplars

    def choose_exemplars(self) -> int | None:
        """Choose among all real images of the new classes, then make copies, if they are read again.

        Returns the number of copies made, None where all are made ahead.
        """
        method, memory = self.method, self.run.memory
        if not method.uses_memory:
            return None
        finished = frozenset(self.run.exemplars_with_copies())
        targets = self.data.phase_targets(method.phase)
        images = [self.data.train_images(target) for target in targets]
        features = self.run.features(method.evaluated, images, method.describe("choosing exemplars"))
        memory.update(dict(zip(targets, images, strict=True)), features, method.exemplar_units)
        self._make_kept_files(finished)
        if self.run.fabric.is_global_zero:
            self.archive_bytes = archive.write(memory, self._archive_path(method.phase))
        if self.config.memory_only:
            self._take_from_archive(method.phase)
        read_again = method.phase + 1 < self.data.nb_phases or self.config.nme
        return self._make_missing(finished, with_copies=read_again)

    def _make_copies_of_new_images(self, phase: int) -> int:
        """Make what is missing of the copies of a phase's new images.  Returns the number of copies made."""
        images = self.run.new_images_with_copies(phase)
        return (self.run.copies.make(images, with_copies=True) or 0) if self.run.copies and images else 0

    def _make_kept_files(self, finished: Collection[Path] = ()) -> None:
        """Make the exemplars' missing kept files, and drop the exemplars that do not fit by their true sizes."""
        if self.run.copies is not None:
            self._make_missing(finished, with_copies=False)
            self.run.memory.enforce_budget()

    def _make_missing(self, finished: Collection[Path] = (), *, with_copies: bool) -> int | None:
        """Make what is missing of the exemplars' kept files, and of their copies if these are asked for.

        finished: exemplars that have theirs.  Returns the number of copies made, None where all are made ahead.
        """
        if self.run.copies is None:
            return None
        images = [image for image in self.run.exemplars_with_copies() if image not in finished]
        return self.run.copies.make(images, with_copies)

    def _archive_path(self, phase: int) -> Path:
        return self.run.folder.parent / "memory" / f"phase{phase:02d}.memory"

    def _take_from_archive(self, phase: int) -> None:
        """From now on the exemplars are those of a phase's archive, unpacked beside it."""
        run, path = self.run, self._archive_path(phase)
        data_dir = path.with_name("unpacked")
        if run.fabric.is_global_zero:
            archive.unpack(path, run.memory, data_dir)
        run.fabric.barrier()
        run.memory.move(replace(self.data.paths, data_dir=data_dir).folder("train"))

    # Evaluation

    def evaluate(self) -> dict[str, Metrics | None]:
        """How good the method's classifiers are on the test images of all classes seen."""
        run, method = self.run, self.method
        images = [image for target in range(method.nb_seen) for image in self.data.test_images(target)]
        outputs = run.predict(method.evaluated, images, method.describe("evaluating"))
        scores = {"cnn": outputs.logits, **method.further_scores(images, outputs)}
        self.class_means = method.class_means() if self.config.nme else None
        if self.class_means is not None:
            scores["nme"] = nearest_mean_scores(outputs.features, self.class_means)
        return {"nme": None, **{name: self._metrics(rows) for name, rows in scores.items()}}

    def _metrics(self, scores: Tensor) -> Metrics:
        """scores: for the test images of all classes seen, by target."""
        targets = torch.tensor([t for t in range(self.method.nb_seen) for _ in self.data.test_images(t)])
        ends = [self.data.seen_targets(phase).stop for phase in range(self.method.phase + 1)]
        return Metrics.from_state(phase_metrics(scores, targets, ends), self.data.class_names)

    def _log_results(self, record: Phase) -> None:
        memory, parts = record.memory, []
        for name, metrics in record.classifiers.items():
            old = "" if metrics.old is None else f"old {metrics.old:.1f}, new {metrics.new:.1f}, "
            parts.append(f"{CLASSIFIERS[name]} {metrics.top1:.1f} % ({old}top-5 {metrics.top5:.1f})")
        units = "" if memory.units_total is None else f"{memory.units_total:.1f} units, "
        parts.append(f"memory {units}{memory.bytes_total:,} bytes")
        parts.append(f"{record.seconds.total:.1f} s")
        log.info("%s: %s", self.method.describe(f"{self.method.nb_seen} classes"), "; ".join(parts))
