"""Train a class-incremental learner whose memory holds prompts beside pictures.

    python main.py --config exps/config.json [key=value ...]

Read the config, look at the data, check that exemplars fit the budget and that their copies are there; then, for each
seed (a class order), let the method learn phase after phase, and write down what came of it.
"""

import argparse
import functools
import itertools
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import torchvision_compat  # noqa: F401  (before torchvision and Lightning: lets a CUDA wheel load beside a CPU torch)
from compress.copies import Copies, CopiesAhead
from convs.resnet import CONVNETS
from models import METHODS
from models.base import fresh_backbone
from utils import log as logs
from utils.config import schema as configs
from utils.config.schema import Config
from utils.data.cache import open_cache
from utils.data.classes import DataManager
from utils.data.paths import DatasetPaths, data_dir
from utils.devices import check_compiler, launch
from utils.errors import UserError
from utils.memory.budget import check_budget, check_class_sizes, check_total, prompt_cost
from utils.memory.exemplars import ExemplarMemory
from utils.results import report
from utils.results.history import History

log = logging.getLogger("main")

CHOICES = {"model_name": tuple(METHODS), "convnet_type": CONVNETS}


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code: 0 done, 2 the command, the config or the data is wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a JSON config; exps/config.json is the paper's experiment")
    parser.add_argument("--help-config", action="store_true", help="list every config key and leave")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the config")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leave:  # argparse has said what is wrong
        return int(leave.code or 0)
    logs.tolerate_odd_names()
    try:
        if arguments.help_config:
            print(configs.help_text(CHOICES))
            return 0
        if arguments.config is None:
            raise UserError("no config: python main.py --config exps/config.json [key=value ...]")
        run(configs.load_config(arguments.config, arguments.overrides, CHOICES))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(config: Config) -> dict:
    """The experiment.  Returns what it writes to results.json (`utils.results.report` describes it)."""
    fabric = launch(*configs.accelerator(config.device), config.precision)
    if config.batch_size < fabric.world_size:
        raise UserError(
            f"batch_size {config.batch_size} is less than an image for each of {fabric.world_size} processes."
        )
    paths = DatasetPaths(data_dir(config.data_dir), config.dataset, config.variant)
    orders = {seed: open_data(config, paths, seed) for seed in config.seed}
    copies = check_exemplars(config, next(iter(orders.values())), fabric.device)
    if config.pretrained:
        fresh_backbone(config, next(iter(orders.values())))
    if config.compile:
        check_compiler(fabric.device)
    if config.phase0_cache:
        check_folder("phase0_cache", Path(config.phase0_cache))
    output = open_output(config, write=fabric.is_global_zero)
    cache = Path(config.phase0_cache) if config.phase0_cache else output / "phase0_cache"
    logs.start(output / "log.txt", quiet=not fabric.is_global_zero)
    local = getattr(fabric.strategy, "num_processes", 1)
    pixels = open_cache(config.cache, config.cache_gib, cache.with_name("pixel_cache"), paths.root, local)

    runs = []
    for seed, data in orders.items():
        data.pixels = pixels
        what = f"{config.dataset}, {config.model_name}, {config.convnet_type}, seed {seed}"
        log.info("%s: %s", what, phases_in_words(data))
        if not METHODS[config.model_name].uses_memory and config.syn_per_class:
            log.info("%s keeps no exemplars: the memory's keys change nothing", config.model_name)
        memory = ExemplarMemory(
            paths,
            config.real_per_class,
            config.syn_per_class,
            config.memory_per_class,
            config.augmentations_per_image,
            total=None if config.fixed_memory else config.memory_size,
            selection=config.exemplar_selection,
            seed=config.model_seed,
            cost=getattr(copies, "prompt_cost", None),
        )
        folder = output / f"seed{seed}"
        history = History(folder, tensorboard=config.tensorboard) if fabric.is_global_zero else None
        learn = METHODS[config.model_name]
        learner = learn(config, data, memory, fabric, folder / "checkpoints", cache, copies, history)
        write = functools.partial(write_down, config, output, runs, seed, data) if fabric.is_global_zero else None
        records = learner.run(after_phase=write)
        if records and records[-1]["copies_on_demand"] is not None:
            log.info(copies_saved(config, data, records))
        if write:
            write(records)
        runs.append(report.run_entry(seed, data.class_names, records, data.nb_phases))
        results = report.results(configs.as_dict(config), runs)
        if write:
            report.plot({config.model_name: results}, output / "accuracy.png")
    fabric.barrier()  # whoever ended now would seem to have died to those that are still writing
    log.info("\n%s\n\nresults: %s", report.table({config.model_name: results}), output / "results.json")
    return results


def open_data(config: Config, paths: DatasetPaths, seed: int) -> DataManager:
    """The classes in one seed's order."""
    return DataManager(
        paths,
        shuffle=config.shuffle,
        seed=seed,
        init_cls=config.init_cls,
        increment=config.increment,
        augmentation=config.augmentation,
    )


def check_exemplars(config: Config, data: DataManager, device: torch.device) -> Copies | None:
    """Make sure, before any work, that the exemplars can be chosen, fit the budget and have, or can get, their copies.

    Returns the copies, made ahead or to be made on demand; None where none is needed.
    """
    real, synthetic = config.real_per_class, config.syn_per_class
    if not METHODS[config.model_name].uses_memory:
        real = synthetic = 0
    elif real == synthetic == 0:
        raise UserError(f"{config.model_name} needs exemplars: real_per_class + syn_per_class must be at least 1.")
    images = [data.train_images(target) for target in range(data.nb_classes)]
    sizes = {name: len(of_class) for name, of_class in zip(data.class_names, images, strict=True)}
    if config.fixed_memory:
        check_class_sizes(sizes, real, synthetic)
    replaced = config.augmentation_prob > 0 and (real > 0 or config.augmentation_scope == "all")
    needs_copies = synthetic > 0 or replaced
    copies = on_demand = None
    if needs_copies and config.regenerate == "on_demand":
        from compress.on_demand import OnDemand  # brings ControlNet with it: seconds that other runs need not spend

        copies = on_demand = OnDemand(
            data.paths,
            config.regenerate_options,
            resolution=data.defaults.resolution,
            copies=config.augmentations_per_image,
            device=device,
        )
    elif needs_copies:
        copies = CopiesAhead(data.paths, list(itertools.chain(*images)), config.augmentations_per_image)
    cost = on_demand.prompt_cost if on_demand else lambda image: prompt_cost(image, data.paths.find_edge_map(image))
    typical = statistics.median(cost(of_class[0]) for of_class in images)
    if config.fixed_memory:
        check_budget(real, synthetic, config.memory_per_class, typical)
    elif real or synthetic:
        check_total(config.memory_size, data.nb_classes, real, synthetic, typical)
    return copies


def check_folder(key: str, folder: Path) -> None:
    """Make a folder that will be needed.  Raises UserError where it can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {folder} can't be written to ({error.strerror}).") from None


def open_output(config: Config, *, write: bool) -> Path:
    """The folder of results, with the config as used.  Raises UserError where another experiment lives there."""
    output = Path(config.output_dir)
    file = output / "config.json"
    ours = configs.as_dict(config)
    if file.is_file():
        try:
            theirs = configs.read_json(file)
        except UserError as error:
            raise UserError(f"{error} Choose another output_dir, or delete that file.") from None
        if differing := configs.differences(ours, theirs):
            raise UserError(
                f"{output} holds another experiment ({'; '.join(differing)}). Choose another output_dir, or delete it."
            )
    try:
        if write:
            report.write_json(file, ours)
    except OSError as error:
        raise UserError(f"output_dir: {output} can't be written to ({error.strerror}).") from None
    return output


def write_down(
    config: Config, output: Path, runs: Sequence[Mapping], seed: int, data: DataManager, records: Sequence[Mapping]
) -> None:
    """Results so far, over what was there: of the seeds that are done, `runs`, and of the phases of one more."""
    runs = [*runs, report.run_entry(seed, data.class_names, records, data.nb_phases)]
    for record in records:
        confusion = output / f"seed{seed}" / f"confusion_phase{record['phase']:02d}.csv"
        report.write_confusion(confusion, record["cnn"]["confusion"], data.class_names)
    report.write_json(output / "results.json", report.results(configs.as_dict(config), runs))
    report.write_phases(output / "phases.csv", runs)


def copies_saved(config: Config, data: DataManager, records: Sequence[Mapping]) -> str:
    """Such as "copies on demand: 320 made, against 4,000 of all train images made ahead (92.0 % saved)"."""
    made = sum(record["copies_on_demand"] for record in records)
    ahead = config.augmentations_per_image * sum(len(data.train_images(target)) for target in range(data.nb_classes))
    saved = f"{1 - made / ahead:.1%} saved"
    return f"copies on demand: {made:,} made, against {ahead:,} of all train images made ahead ({saved})"


def phases_in_words(data: DataManager) -> str:
    """Such as "11 phases of 51, 5, ..., 5 classes"."""
    sizes = [str(len(data.phase_targets(phase))) for phase in range(data.nb_phases)]
    shown = sizes if len(sizes) <= 4 else [*sizes[:2], "...", sizes[-1]]
    return f"{len(sizes)} phase{'s' * (len(sizes) > 1)} of {', '.join(shown)} classes"


if __name__ == "__main__":
    sys.exit(main())
