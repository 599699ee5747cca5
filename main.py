"""Train a class-incremental learner whose memory holds prompts beside images.

    python main.py --config exps/config.json [key=value ...]

The config is read and checked; then the data; then, before any training, whether the exemplars fit the budget and
their copies are there.  For each seed (a class order) the method learns phase after phase, and results are written
after each of them.
"""

import argparse
import copy
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import catalogue
from models.use import command as use
from utils import cli
from utils import log as logs
from utils.config.schema import Config, as_dict
from utils.config.show import help_text
from utils.data.classes import DataManager
from utils.data.datasets import FETCHED, class_lists, curate_command, published_labels
from utils.data.paths import DatasetPaths, data_dir, datasets, find_dataset
from utils.errors import UserError
from utils.files import check_folder
from utils.results.output import Output, seed_folder
from utils.results.records import ClassOrder, Phase, ResultsFile

if TYPE_CHECKING:
    from compress.training.copies import Copies
    from compress.training.exemplars import ExemplarPlan, Numbers
    from utils.data.cache import PictureCache
    from utils.devices import Fabric

log = logging.getLogger("main")


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv), stopped="the same command goes on from the last checkpoint, if there is one")


def command(argv: Sequence[str] | None) -> int | None:
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in use.COMMANDS:
        return use.run(words)
    parser = argparse.ArgumentParser(
        prog=cli.program("main.py"),
        description="Train a class-incremental learner whose memory holds prompts beside images.",
        epilog="Using a trained network: main.py predict | evaluate | export RUN (--help says more).",
        allow_abbrev=False,
    )
    config_help = "a JSON config; exps/config.json is the paper's experiment"
    parser.add_argument("--config", metavar="FILE", type=cli.path, help=config_help)
    parser.add_argument("--help-config", action="store_true", help="list every config key and exit")
    kinds = ("methods", "backbones", "datasets", "forms")
    parser.add_argument("--list", choices=kinds, help="list what there is and exit")
    parser.add_argument("--show-config", action="store_true", help="print the checked config as JSON and exit")
    override_help = "replaces a key of the config; also --key value"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=override_help)
    arguments = parser.parse_intermixed_args(cli.options_as_overrides(parser, words))
    if arguments.help_config:
        print(help_text(catalogue.methods(), catalogue.backbones()))
    elif arguments.list:
        values = dict(override.partition("=")[::2] for override in arguments.overrides)
        list_what_there_is(arguments.list, values.get("data_dir"))
    elif arguments.config is None:
        file = next((word for word in arguments.overrides if word.endswith(".json")), "exps/config.json")
        raise UserError(f"no config: python main.py --config {file} [key=value ...]")
    else:
        config = catalogue.read_config(arguments.config, arguments.overrides)
        if arguments.show_config:
            print(json.dumps(as_dict(config), indent=2, ensure_ascii=False))
        else:
            run(config)
    return None


def list_what_there_is(kind: str, folder: str | None) -> None:
    """Print the methods, backbones, exemplar forms, or datasets: those in a data folder, and published lists."""
    if kind == "methods":
        configs = {file.stem: f"exps/{file.name}" for file in (Path(__file__).parent / "exps").glob("*.json")}
        rows = []
        for name, info in catalogue.methods().items():
            rows.append([name, "yes" if info.uses_memory else "no", configs.get(name, "-"), info.paper])
        cli.show_table(("method", "exemplars", "config", "paper"), rows, left=4)
        return
    names: Iterable[str] = catalogue.backbones()
    if kind == "datasets":
        on_disk = datasets(data_dir(folder))
        sizes = dict.fromkeys(FETCHED, "")
        sizes |= {name: f" {len(published_labels(name) or ())} classes," for name in class_lists()}
        missing = [name for name in sizes if name not in on_disk]
        names = [*on_disk, *(f"{name}:{sizes[name]} not there; {curate_command(name)} makes it" for name in missing)]
    if kind == "forms":
        from compress.forms import examples

        names = examples()
    print(cli.visible("\n".join(names)))


def run(config: Config) -> None:
    """The experiment: one class order after another, then the table of their results."""
    experiment = prepare(config)
    try:
        for seed in experiment.orders:
            experiment.run(seed)
    except KeyboardInterrupt as stop:
        began = any(experiment.output.folder.glob("seed*/checkpoints/*.pt"))
        going_on = "goes on from the last checkpoint" if began else "begins anew"
        stop.going_on = f"the same command {going_on}"  # type: ignore[attr-defined]  # `utils.cli` says so
        raise
    experiment.fabric.barrier()  # wait until rank 0 has written: an early exit looks like a crash to the others
    experiment.show()


def prepare(config: Config) -> "Experiment":
    """Check what follows from config and data together, and take possession of the output folder."""
    from compress.training.exemplars import exemplar_form, plan_exemplars
    from exps.report.page import write_page

    data_folder = data_dir(config.data_dir)
    config = replace(config, dataset=find_dataset(data_folder, config.dataset))
    folder = Path(config.output_dir or "")  # which load_config fills in
    check_folder("output_dir", folder)
    if config.phase0_cache:
        check_folder("phase0_cache", Path(config.phase0_cache))
    orders = class_orders(config, DatasetPaths(data_folder, config.dataset, config.variant))
    data = orders[config.seed[0]]
    numbers = gone_images(folder, orders) if config.memory_only else None
    form = exemplar_form(config, data.paths, data.resolution)
    fabric = start(config) if form.needs_weights else None  # a form's model runs on the config's device
    exemplars = plan_exemplars(config, data, form, catalogue.methods()[config.model_name], numbers)
    config = exemplars.config
    output = Output(config, folder, write_page)
    exemplars.check_copies()

    # Here torch is imported, which takes seconds: what is wrong with the config or the files has been answered at once.
    from models.training.method import fresh_backbone, network_input
    from utils.data.cache import open_cache
    from utils.devices import check_compiler
    from utils.results.history import check_loggers

    check_loggers(config.logger)
    fabric = fabric or start(config)
    library_input = network_input(config.convnet_type, config.image_size)
    for order in orders.values():
        order.paths, order.network_input = exemplars.paths, library_input
    copies = exemplars.find_copies(fabric)
    if config.pretrained or library_input:
        fresh_backbone(config, data)
    if config.compile:
        check_compiler(fabric.device)
    if fabric.is_global_zero:
        output.claim()
    logs.start(folder / "log.txt", quiet=not fabric.is_global_zero)
    for note in config.notes:
        log.info("%s", note)
    phase0_cache = Path(config.phase0_cache) if config.phase0_cache else folder / "phase0_cache"
    pixel_cache = Path(os.path.abspath(phase0_cache)).parent / "pixel_cache"  # "." has no name that could be replaced
    transform, size = data.defaults.train_transform.prepare, data.decoded_bytes
    pixels = open_cache(config.cache, config.cache_gib, pixel_cache, data.paths.root, transform, size, data.folders)
    return Experiment(config, orders, exemplars, copies, fabric, output, phase0_cache, pixels)


def start(config: Config) -> "Fabric":
    """The processes of the run, on its device.  Raises UserError."""
    from utils.devices import launch

    fabric = launch(config.device, config.precision)
    if config.batch_size < fabric.world_size:
        raise UserError(
            f"batch_size {config.batch_size} is less than one image for each of {fabric.world_size} processes."
        )
    return fabric


@dataclass
class Experiment:
    """What the class orders of a run share.

    orders: the data in each class order, by seed; copies: those that are read, or None; phase0_cache: the folder of
    trained phase-0 networks; pixels: decoded images, None where none are kept; results: of all class orders so far.
    """

    config: Config
    orders: Mapping[int, DataManager]
    exemplars: "ExemplarPlan"
    copies: "Copies | None"
    fabric: "Fabric"
    output: Output
    phase0_cache: Path
    pixels: "PictureCache | None"
    results: ResultsFile | None = None

    def run(self, seed: int) -> None:
        """One class order's phases."""
        from models.training.run import Run
        from models.training.trainer import Trainer
        from utils.results.history import History

        config, data, fabric = self.config, self.orders[seed], self.fabric
        what = f"{config.dataset}, {config.model_name}, {config.convnet_type}, seed {seed}"
        log.info("%s: %s", what, phases_in_words(data))
        method = catalogue.load(config.model_name)
        if not method.uses_memory and config.syn_per_class:
            log.info("%s keeps no exemplars: the memory's keys change nothing", config.model_name)
        folder, memory, copies = seed_folder(self.output.folder, seed), self.exemplars.empty_memory(), self.copies
        with self.output.working_on(seed, alone=fabric.is_global_zero):
            history = History(folder, loggers=config.logger) if fabric.is_global_zero else None
            folders = folder / "checkpoints", self.phase0_cache
            class_order = Run(config, data, fabric, memory, *folders, copies, history, pixels=self.pixels)
            records = Trainer(method, class_order).fit(after_phase=lambda records: self.write(seed, records))
        if config.regenerate == "on_demand" and records and records[-1].copies_on_demand is not None:
            log.info(copies_saved(config, data, records))

    def write(self, seed: int, records: Sequence[Phase]) -> None:
        """Write the records of a class order's phases so far."""
        if not self.fabric.is_global_zero:
            return
        data = self.orders[seed]
        warn_of_one_class(records[-1], data.class_names)
        self.results = self.output.write(ClassOrder.of(seed, data.class_names, records, data.nb_phases))

    def show(self) -> None:
        """Print the results, and write them to the log file, where the table is independent of the terminal's width."""
        from exps.report.tables import show

        if self.results is None:  # the first process alone has them
            return
        runs, plain = {self.config.model_name: (self.output.folder, self.results.compared())}, io.StringIO()
        show(runs)
        show(runs, plain)
        log.debug("\n%s", plain.getvalue())
        log.info("results: %s", self.output.folder / "results.json")


def class_orders(config: Config, paths: DatasetPaths) -> dict[int, DataManager]:
    """The data in the class order of each seed."""
    first = DataManager(
        paths,
        shuffle=config.shuffle,
        seed=config.seed[0],
        init_cls=config.init_cls,
        increment=config.increment,
        class_order=config.class_order,
        class_sort=config.class_sort,
        augmentation=config.augmentation,
        val_per_class=config.val_per_class,
        old_may_be_gone=config.memory_only,
    )
    shuffled = config.shuffle and config.class_order is None
    return {seed: first.reordered(seed) if shuffled else copy.copy(first) for seed in config.seed}


def warn_of_one_class(record: Phase, class_names: Sequence[str]) -> None:
    """Say so where a phase's classifier takes all test images for one class: it has learnt nothing, or diverged."""
    for name, metrics in (("head (CNN)", record.cnn), ("nearest mean (NME)", record.nme)):
        predicted = np.zeros(0) if metrics is None else np.asarray(metrics.confusion).sum(axis=0)
        if len(predicted) > 1 and predicted.max() == predicted.sum():
            log.warning(
                "phase %d: the %s takes all %d test images for %r. Its training may have diverged (see epochs.csv): a "
                "lower learning rate, or more epochs, may help.",
                *(record.phase, name, predicted.sum(), class_names[int(predicted.argmax())]),
            )


def gone_images(folder: Path, orders: Mapping[int, DataManager]) -> "Numbers | None":
    """The numbers of real and synthetic exemplars that a run began with, if train images of old classes are gone since.

    folder: the run's; orders: the class orders' data; those with gone images get the typical size of a picture from
    their checkpoints.
    Raises UserError where images of classes are gone that are still to be learned.
    """
    from models.training import checkpoint

    numbers = None
    for seed, data in orders.items():
        checkpoints = seed_folder(folder, seed) / "checkpoints"
        done = checkpoint.saved_phases(checkpoints)
        if data.check_phases(done[-1] + 1 if done else 0):
            state = checkpoint.load(checkpoint.phase_path(checkpoints, done[-1]), checkpoint.AFTER_PHASE)
            data.picture_size = tuple(state["picture_size"])
            numbers = state["config"]["real_per_class"], state["config"]["syn_per_class"]
    return numbers


def copies_saved(config: Config, data: DataManager, records: Sequence[Phase]) -> str:
    """Such as "copies on demand: 320 made, against 4,000 of all train images made ahead (92.0 % saved)"."""
    made = sum(record.copies_on_demand or 0 for record in records)
    ahead = config.augmentations_per_image * sum(len(data.train_images(target)) for target in range(data.nb_classes))
    saved = f"{1 - made / max(ahead, 1):.1%} saved"
    return f"copies on demand: {made:,} made, against {ahead:,} of all train images made ahead ({saved})"


def phases_in_words(data: DataManager) -> str:
    """Such as "11 phases of 51, 5, ..., 5 classes"."""
    sizes = [str(len(data.phase_targets(phase))) for phase in range(data.nb_phases)]
    listed = sizes if len(sizes) <= 4 else [*sizes[:2], "...", sizes[-1]]
    return f"{len(sizes)} phase{'' if len(sizes) == 1 else 's'} of {', '.join(listed)} classes"


if __name__ == "__main__":
    sys.exit(main())
