"""Train a class-incremental learner whose memory holds prompts beside images.

    python main.py --config exps/config.json [key=value ...]

The config is read and checked; then the data; then, before any training, whether the exemplars fit the budget and
their copies are there.  For each seed (a class order) the method learns phase after phase, and results are written
after each of them.
"""

import argparse
import copy
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models import catalogue
from models.use import command as use
from utils import cli
from utils import log as logs
from utils.config.read import load_config
from utils.config.schema import Config, accelerator, as_dict
from utils.config.show import help_text
from utils.data.paths import DatasetPaths, data_dir, datasets, find_dataset
from utils.data.published import FETCHED, class_lists, curate_command, labels
from utils.errors import UserError
from utils.results.output import Output, seed_folder
from utils.results.records import CLASSIFIERS, ClassOrder, ResultsFile

log = logging.getLogger("main")

CLASS_KEYS = ("shuffle", "init_cls", "increment", "class_order", "class_sort", "augmentation", "val_per_class")
"""Keys that decide which classes a phase has and how their images are read."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv), stopped="the same command goes on from the last checkpoint, if there is one")


def command(argv: Sequence[str] | None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in use.COMMANDS:
        return use.run(argv)
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train a class-incremental learner whose memory holds prompts beside images.",
        epilog="Using a trained network: main.py predict | evaluate | export RUN (--help says more).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=cli.path, help="a JSON config; exps/config.json is the paper's experiment"
    )
    parser.add_argument("--help-config", action="store_true", help="list every config key and exit")
    parser.add_argument(
        "--list", choices=("methods", "backbones", "datasets", "forms"), help="list what there is and exit"
    )
    parser.add_argument("--show-config", action="store_true", help="print the checked config as JSON and exit")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the config; also --key value"
    )
    arguments = parser.parse_intermixed_args(cli.options_as_overrides(parser, argv))
    methods, backbones = catalogue.methods(), catalogue.backbones()
    if arguments.help_config:
        print(help_text(methods, backbones))
    elif arguments.list:
        values = dict(override.partition("=")[::2] for override in arguments.overrides)
        print(cli.visible("\n".join(what_there_is(arguments.list, values.get("data_dir")))))
    elif arguments.config is None:
        raise UserError("no config: python main.py --config exps/config.json [key=value ...]")
    else:
        config = load_config(arguments.config, arguments.overrides, methods=methods, backbones=backbones)
        if arguments.show_config:
            print(json.dumps(as_dict(config), indent=2, ensure_ascii=False))
        else:
            run(config)
    return None


def what_there_is(kind: str, folder: str | None) -> Iterable[str]:
    """The names of the methods, backbones, exemplar forms, or datasets: those in a data folder, and published lists."""
    if kind == "datasets":
        there = datasets(data_dir(folder))
        others = {**dict.fromkeys(FETCHED, ""), **{name: f" {len(labels(name))} classes," for name in class_lists()}}
        to_make = {name: classes for name, classes in others.items() if name not in there}
        return there + [f"{name}:{known} not there; {curate_command(name)} makes it" for name, known in to_make.items()]
    if kind == "forms":
        from compress.forms import examples

        return examples()
    return catalogue.methods() if kind == "methods" else catalogue.backbones()


def run(config: Config) -> ResultsFile:
    """The experiment.  Returns what it writes to results.json."""
    config, paths = dataset_of(config)
    # torch and what needs it are imported here: a config with a mistake, or a missing dataset, is answered at once.
    from compress.exemplars import check_exemplars, exemplar_form
    from exps.report.page import write_page
    from exps.report.screen import table
    from models.method import fresh_backbone, network_input
    from utils.data.cache import open_cache
    from utils.data.classes import DataManager
    from utils.devices import check_compiler, launch
    from utils.results.history import check_loggers

    check_loggers(config.logger)
    fabric = launch(*accelerator(config.device), config.precision)
    if config.batch_size < fabric.world_size:
        raise UserError(
            f"batch_size {config.batch_size} is less than one image for each of {fabric.world_size} processes."
        )
    classes = {key: getattr(config, key) for key in CLASS_KEYS}
    how = {"network_input": network_input(config), "old_may_be_gone": config.memory_only}
    first = DataManager(paths, seed=config.seed[0], **how, **classes)
    shuffled = config.shuffle and config.class_order is None
    orders = {seed: first.reordered(seed) if shuffled else copy.copy(first) for seed in config.seed}
    any_order = orders[config.seed[0]]
    numbers = gone_images(config, orders) if config.memory_only else {}
    form = exemplar_form(config, any_order)
    for data in orders.values():
        data.paths = replace(paths, files=form.files)
    method = catalogue.methods()[config.model_name]
    config, copies = check_exemplars(config, method, any_order, form, fabric, numbers)
    if config.pretrained or any_order.network_input:
        fresh_backbone(config, any_order)
    if config.compile:
        check_compiler(fabric.device)
    if config.phase0_cache:
        check_folder("phase0_cache", Path(config.phase0_cache))
    output = Output(config, Path(config.output_dir), write_page)
    if fabric.is_global_zero:
        output.claim()
    logs.start(output.folder / "log.txt", quiet=not fabric.is_global_zero)
    for note in config.notes:
        log.info("%s", note)

    cache = Path(config.phase0_cache) if config.phase0_cache else output.folder / "phase0_cache"
    prepare = any_order.train_transform.prepare
    where = Path(os.path.abspath(cache)).parent / "pixel_cache"  # "." has no name that could be replaced
    expected, images = any_order.decoded_bytes, any_order.folders
    pixels = open_cache(config.cache, config.cache_gib, where, paths.root, prepare, expected, images)
    try:
        for seed, data in orders.items():
            results = run_class_order(config, data, seed, fabric, output, cache, pixels, form, copies)
    except KeyboardInterrupt as stop:
        kept = any(output.folder.glob("seed*/checkpoints/*.pt"))
        stop.going_on = "the same command " + ("goes on from the last checkpoint" if kept else "begins anew")
        raise
    fabric.barrier()  # wait until rank 0 has written: an early exit looks like a crash to the others
    shown = table({config.model_name: (output.folder, results.compared())})
    log.info("\n%s\n\nresults: %s", shown, output.folder / "results.json")
    return results


def dataset_of(config: Config) -> tuple[Config, DatasetPaths]:
    """The config with the name of the dataset's folder, and the dataset.  Raises UserError where it is not there."""
    folder = data_dir(config.data_dir)
    config = replace(config, dataset=find_dataset(folder, config.dataset))
    paths = DatasetPaths(folder, config.dataset, config.variant)
    for mode in ("test",) if config.memory_only else ("train", "test"):
        paths.classes(mode)
    return config, paths


def run_class_order(config, data, seed: int, fabric, output: Output, cache: Path, pixels, form, copies) -> ResultsFile:
    """One seed's phases.  Returns the results of all seeds so far."""
    from compress.exemplars import costs, quotas
    from models.run import Run
    from models.trainer import Trainer
    from utils.memory.exemplars import ExemplarMemory
    from utils.results.history import History

    what = f"{config.dataset}, {config.model_name}, {config.convnet_type}, seed {seed}"
    log.info("%s: %s", what, phases_in_words(data))
    method = catalogue.load(config.model_name)
    if not method.uses_memory and config.syn_per_class:
        log.info("%s keeps no exemplars: the memory's keys change nothing", config.model_name)
    memory = ExemplarMemory(
        data.paths,
        quotas(config, form),
        costs(form, data.paths),
        config.memory_per_class,
        config.augmentations_per_image,
        total=None if config.fixed_memory else config.memory_size,
        bytes_budget=config.memory_bytes_per_class if config.budget_in == "bytes" else None,
        selection=config.exemplar_selection,
        seed=config.model_seed,
    )

    written: dict[int, ResultsFile] = {}  # by number of phases

    def write(records: Sequence[dict]) -> ResultsFile:
        if len(records) not in written:
            order = ClassOrder.of_training(seed, data.class_names, records, data.nb_phases)
            have = [c for c in CLASSIFIERS if all(record.get(c) is not None for record in records)]
            confusions = {c: [record[c]["confusion"] for record in records] for c in have}
            warn_of_one_class(records[-1], data.class_names)
            written[len(records)] = output.write(order, confusions) if first else ResultsFile.of({}, [order])
        return written[len(records)]

    first, folder = fabric.is_global_zero, output.seed_folder(seed)
    with output.working_on(seed, alone=first):
        history = History(folder, loggers=config.logger) if first else None
        class_order = Run(config, data, memory, fabric, folder / "checkpoints", cache, pixels, copies, history)
        records = Trainer(method, class_order).fit(after_phase=write)
        if config.regenerate == "on_demand" and records and records[-1]["copies_on_demand"] is not None:
            log.info(copies_saved(config, data, records))
        return write(records)


def warn_of_one_class(record: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Say so where a phase's classifier takes all test images for one class: it has learnt nothing, or diverged."""
    for classifier in ("cnn", "nme"):
        if record[classifier] is None:
            continue
        predicted = np.asarray(record[classifier]["confusion"]).sum(axis=0)
        if len(predicted) > 1 and predicted.max() == predicted.sum():
            log.warning(
                "phase %d: the %s takes all %d test images for %r. Its training may have diverged (see epochs.csv): a "
                "lower learning rate, or more epochs, may help.",
                record["phase"],
                {"cnn": "head (CNN)", "nme": "nearest mean (NME)"}[classifier],
                predicted.sum(),
                class_names[predicted.argmax()],
            )


def gone_images(config: Config, orders: Mapping[int, Any]) -> dict[str, int]:
    """Of a run that goes on, where train images of old classes are gone: the numbers of exemplars that it began with.

    orders: the class orders' data; those with gone images get the typical size of a picture from their checkpoints.
    Raises UserError where images of classes are gone that are still to be learned.
    """
    from models import checkpoint

    numbers = {}
    for seed, data in orders.items():
        folder = seed_folder(Path(config.output_dir), seed) / "checkpoints"
        done = checkpoint.saved_phases(folder)
        if data.check_phases(done[-1] + 1 if done else 0):
            state = checkpoint.load(checkpoint.phase_path(folder, done[-1]), checkpoint.AFTER_PHASE)
            data.picture_size = tuple(state["picture_size"])
            numbers = {key: state["config"][key] for key in ("real_per_class", "syn_per_class")}
    return numbers


def check_folder(key: str, folder: Path) -> None:
    """Make a folder that will be needed.  Raises UserError where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {folder} can't be written to ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{key}: {folder} can't be written to.")


def copies_saved(config: Config, data, records: Sequence[dict]) -> str:
    """Such as "copies on demand: 320 made, against 4,000 of all train images made ahead (92.0 % saved)"."""
    made = sum(record["copies_on_demand"] for record in records)
    ahead = config.augmentations_per_image * sum(len(data.train_images(target)) for target in range(data.nb_classes))
    saved = f"{1 - made / max(ahead, 1):.1%} saved"
    return f"copies on demand: {made:,} made, against {ahead:,} of all train images made ahead ({saved})"


def phases_in_words(data) -> str:
    """Such as "11 phases of 51, 5, ..., 5 classes"."""
    sizes = [str(len(data.phase_targets(phase))) for phase in range(data.nb_phases)]
    shown = sizes if len(sizes) <= 4 else [*sizes[:2], "...", sizes[-1]]
    return f"{len(sizes)} phase{'s' * (len(sizes) > 1)} of {', '.join(shown)} classes"


if __name__ == "__main__":
    sys.exit(main())
