"""The options of compress/run.py, and the Job that they describe."""

import argparse
import re
import shlex
from dataclasses import dataclass, replace

from compress.forms import Form, examples, form_named
from compress.presets import FAST, PRESETS
from compress.settings import SETTINGS, finite
from utils import cli
from utils.data.classes import typical_size
from utils.data.datasets import default_resolution
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")

ENGINES = ("torch", "compile", "openvino")
"""What runs the networks."""

MOST_COPIES = 1_000_000


@dataclass(frozen=True)
class Machine:
    """Which model, and how it runs; the options of the same names.

    loras: files and scales; precision, engine: "auto" or a name.
    """

    model: str = "sd15"
    base: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    decoder: str | None = None
    precision: str = "auto"
    batch_size: int | None = None
    low_memory: bool = False
    engine: str = "auto"


@dataclass(frozen=True)
class Job:
    """What a run of compress/run.py, or of copies on demand, is asked to do.

    paths: the dataset, with the form's files; form: the settings, which are recorded; machine: what makes the copies;
    copy_numbers: of each image; options: that give these settings and this model, for records and messages; classes:
    labels, empty for all; limit: images of each class, the first ones, None for all; shard: (i, n), 1 <= i <= n, takes
    every n-th image; existing: what happens to files of other settings: "refuse", "replace" them, or "overwrite" all
    files.  The others are the options of their names.
    """

    paths: DatasetPaths
    form: Form
    machine: Machine
    copy_numbers: tuple[int, ...]
    options: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    existing: str = "refuse"
    dry_run: bool = False
    verify: bool = False
    repair: bool = False
    download: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


class _TextParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (compress/run.py --help lists the options)")


def parse(arguments: list[str] | None) -> tuple[Job, str]:
    """(the job, the device) that the command line describes.

    Leaves through SystemExit, with a message, where it is wrong.  Raises UserError for impossible settings.
    """
    options = parser().parse_args(arguments)
    paths = DatasetPaths(data_dir(options.data_dir), options.dataset, options.keep_apart)
    if options.resolution == "auto":
        options.resolution = fitting_preset(paths)
    machine = _machine(options)
    form = _form(options).using(machine)
    job = Job(
        replace(paths, files=form.files),
        form,
        machine,
        copy_numbers=(0,) if form.deterministic else tuple(options.seeds),  # all others would be equal to it
        options=_words(options),
        classes=tuple(options.classes),
        limit=options.limit,
        shard=options.shard,
        existing="replace" if options.replace else "overwrite" if options.overwrite else "refuse",
        dry_run=options.dry_run,
        verify=options.verify,
        repair=options.repair,
        download=options.download,
    )
    return job, options.device


def parse_settings(text: str, resolution: str, form: str = "edges") -> tuple[Form, Machine, tuple[str, ...], bool]:
    """(form, machine, options as a Job has them, whether to download) of the options in one text, as a config has it.

    It may hold the options about settings and model alone.  resolution, form: where it names none.
    Raises UserError for an option that is wrong or not one of these.
    """
    parser = _TextParser(prog="", add_help=False, allow_abbrev=False)
    _add_settings(parser, resolution, form)
    _add_machine(parser)
    try:
        options = parser.parse_args(shlex.split(text))
    except ValueError as error:  # an unmatched quotation mark
        raise UserError(f"{text!r}: {error}") from error
    machine = _machine(options)
    return _form(options).using(machine), machine, _words(options), options.download


def parser() -> argparse.ArgumentParser:
    """All options with their meanings."""
    parser = _Parser(
        prog=cli.program("compress/run.py"),
        description="Store train images in an exemplar form (edge map + class label) and regenerate copies from it.",
        epilog="Exit codes: 0 done; 1 some images failed, listed at the end; 2 the command is wrong; 130 interrupted.",
        allow_abbrev=False,
    )
    _add_data(parser)
    _add_existing(parser)
    _add_settings(parser, resolution=None, form="edges")
    machine = _add_machine(parser)
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("the data")
    data.add_argument("--data-dir", metavar="D", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    data.add_argument("--dataset", required=True, help="the dataset: its folder's name in the data folder")
    data.add_argument(
        "--classes", metavar="A,B", action="append", default=[], help="only these class labels (may be repeated)"
    )
    data.add_argument("--limit", metavar="N", type=cli.at_least(1), help="only the first N images of each class")
    data.add_argument(
        "--seeds",
        metavar="K",
        type=copy_numbers,
        default=range(5),
        help="copies of an image: 5 makes numbers 0 to 4; 0,3,7 makes these; '3,' makes number 3 alone [5]",
    )
    data.add_argument("--shard", metavar="i/n", type=shard, default=(1, 1), help="only part i of n: 1/8 ... 8/8")
    data.add_argument("--dry-run", action="store_true", help="say how much there is to do, and write nothing")


def _add_existing(parser: argparse.ArgumentParser) -> None:
    existing = parser.add_argument_group(
        "files that are there (they are kept if they were made with the same settings)"
    )
    how = existing.add_mutually_exclusive_group()
    how.add_argument("--replace", action="store_true", help="make files of other settings again")
    how.add_argument("--overwrite", action="store_true", help="make all files again")
    look = existing.add_mutually_exclusive_group()
    look.add_argument("--verify", action="store_true", help="read every file and list what is wrong; needs no model")
    look.add_argument("--repair", action="store_true", help="the same, then make again what is wrong or missing")
    existing.add_argument(
        "--keep-apart",
        metavar="NAME",
        default="",
        help="read and write edge_maps-NAME and exemplars-NAME; the trainer's key for them is variant=NAME",
    )


def _add_settings(parser: argparse.ArgumentParser, resolution: str | None, form: str) -> None:
    """The options that copies depend on.  resolution, form: where none is named; resolution None: one must be."""
    settings = parser.add_argument_group("the settings")
    settings.add_argument(
        "--resolution",
        required=resolution is None,
        default=resolution,
        choices=(*PRESETS, *(["auto"] if resolution is None else [])),
        help="the preset that fits the size of the images" + ("; auto chooses it" if resolution is None else ""),
    )
    settings.add_argument("--form", default=form, help=f"what is kept of an image: {', '.join(examples())} [{form}]")
    settings.add_argument(
        "--preset",
        choices=("paper", "fast"),
        default="paper",
        help=f"fast: --sampler {FAST['sampler']} --steps {FAST['steps']} where they are not given; docs/benchmarks.md "
        "measures what that costs [paper]",
    )
    for setting in SETTINGS:
        settings.add_argument(setting.option, metavar=setting.metavar, type=setting.read, help=setting.help)


def _add_machine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that say which model makes the copies, and how."""
    machine = parser.add_argument_group("the model and the machine")
    machine.add_argument(
        "--model",
        default="sd15",
        help="sd15, tiny, a checkpoint's path (a .yaml beside it is its config), a folder in diffusers' layout, "
        "diffusers:FOLDER_OR_NAME for any other pipeline, or another generator's name [sd15]",
    )
    machine.add_argument(
        "--base",
        metavar="FILE",
        help="Stable Diffusion 1.5's weights (a diffusers: model's pipeline) for a --model that is a control network "
        "only",
    )
    machine.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        type=lora,
        action="append",
        default=[],
        help="a LoRA that is merged into UNet and text encoder (may be repeated) [scale 1]",
    )
    machine.add_argument(
        "--decoder",
        metavar="FILE",
        help="a small autoencoder (TAESD's taesd_decoder, or diffusers' AutoencoderTiny) that decodes in place of the "
        "model's: worth it where steps are few",
    )
    machine.add_argument("--download", action="store_true", help="fetch sd15's weights (5.7 GB) if they are not there")
    machine.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="what the networks compute in [bf16 where the device has it, else fp16/fp32]",
    )
    machine.add_argument("--batch-size", metavar="N", type=cli.at_least(1), help="copies made at a time [by device]")
    machine.add_argument("--low-memory", action="store_true", help="keep on the GPU only the network that is at work")
    machine.add_argument(
        "--engine",
        default="auto",
        choices=("auto", *ENGINES),
        help="what runs the networks: torch; compile: torch.compile, minutes first, then faster (GPUs: CUDA graphs); "
        "openvino: CPUs, needs `pip install openvino` [torch]",
    )
    machine.add_argument(
        "--compile", dest="engine", action="store_const", const="compile", help="the same as --engine compile"
    )
    return machine


def _words(options: argparse.Namespace) -> tuple[str, ...]:
    """The options as they can be typed again, without the form's and without defaults."""
    words = ["--resolution", options.resolution]
    for setting in SETTINGS:
        value = getattr(options, setting.name)
        if value is not None:
            words += [setting.option, setting.words(value)]
    if options.model != Machine.model:
        words += ["--model", options.model]
    if options.base is not None:
        words += ["--base", options.base]
    if options.engine == "openvino":
        words += ["--engine", options.engine]
    for file, scale in options.lora:
        words += ["--lora", f"{file}:{scale:g}"]
    if options.decoder is not None:
        words += ["--decoder", options.decoder]
    return tuple(words)


def fitting_preset(paths: DatasetPaths) -> str:
    """The preset that the trainer assumes too: by the dataset's name, else by the size of a few images."""
    images = {label: paths.images(label) for label in paths.classes()}
    if not any(images.values()):
        raise UserError(f"no images in {paths.folder('train')}.")
    return default_resolution(paths.dataset, typical_size(images))


def _form(options: argparse.Namespace) -> Form:
    if options.preset == "fast":
        for name, value in FAST.items():
            if getattr(options, name) is None:
                setattr(options, name, value)  # recorded as if it had been given
    preset = PRESETS[options.resolution].changed(**{each.name: getattr(options, each.name) for each in SETTINGS})
    return form_named(options.form, preset)


def _machine(options: argparse.Namespace) -> Machine:
    names = ("model", "base", "decoder", "precision", "batch_size", "low_memory", "engine")
    return Machine(**{name: getattr(options, name) for name in names}, loras=tuple(options.lora))


def copy_numbers(text: str) -> list[int]:
    """ "5" -> 0 to 4; "0,3,7" -> exactly these; "3," -> number 3 alone."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of copies nor a list like 0,3,7")
    numbers = [int(number) for number in text.split(",") if number.strip()]
    if max(numbers) > MOST_COPIES:
        raise argparse.ArgumentTypeError(f"copy numbers go up to {MOST_COPIES:,}, {max(numbers)} is too large")
    if "," in text:
        return list(dict.fromkeys(numbers))
    if numbers == [0]:
        raise argparse.ArgumentTypeError("0 copies are none: 1 makes copy number 0")
    return list(range(numbers[0]))


def lora(text: str) -> tuple[str, float]:
    """ "FILE" or "FILE:SCALE" -> (file, scale)."""
    file, _, scale = text.rpartition(":")
    try:
        return (file, finite(scale)) if file else (text, 1.0)
    except argparse.ArgumentTypeError:
        return text, 1.0


def shard(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of the parts 1/n ... n/n")
    return int(match[1]), int(match[2])
