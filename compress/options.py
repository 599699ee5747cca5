"""The options of compress/run.py, and the Job that they describe."""

import argparse
import re
import shlex
from dataclasses import dataclass, fields, replace

from compress.forms import Form, examples, form_named
from compress.presets import FAST, PRESETS, SETTINGS, finite
from utils import cli
from utils.data.classes import typical_size
from utils.data.datasets import default_resolution
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError

MOST_COPIES = 1_000_000


@dataclass(frozen=True)
class Machine:
    """Which model, and how it runs: the options of the same names.  loras: files and scales."""

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

    paths: the dataset, with the form's files; options: that give this form and model, for records and messages;
    existing: what happens to files of other settings: "refuse", "replace" them, or "overwrite" all files.  The others
    are the options of their names.
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
        raise UserError(f"{message} (compress/run.py --help lists the options)")


def parse(arguments: list[str] | None) -> tuple[Job, str]:
    """(the job, the device) that the command line describes.  Raises UserError where it is wrong or impossible."""
    options = parser().parse_args(arguments)
    paths = DatasetPaths(data_dir(options.data_dir), options.dataset, options.keep_apart)
    if options.resolution == "auto":
        options.resolution = fitting_preset(paths)
    form, machine, words = _settings(options)
    job = Job(
        replace(paths, files=form.files),
        form,
        machine,
        copy_numbers=(0,) if form.deterministic else tuple(options.seeds),  # all others would be equal to it
        options=words,
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
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    _add_settings(parser, resolution, form)
    try:
        options = parser.parse_args(shlex.split(text))
    except ValueError as error:  # an unmatched quotation mark
        raise UserError(f"{text!r}: {error}") from error
    return *_settings(options), options.download


def _settings(options: argparse.Namespace) -> tuple[Form, Machine, tuple[str, ...]]:
    """(form, machine, options as they can be typed again, without the form's and without defaults)."""
    if options.preset == "fast":
        for name, value in FAST.items():
            if getattr(options, name) is None:
                setattr(options, name, value)  # recorded as if it had been given
    values = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    words = ["--resolution", options.resolution]
    for name, value in values.items():
        words += [SETTINGS[name].option, SETTINGS[name].words(value)]
    options.loras = tuple(options.loras)
    machine = Machine(**{each.name: getattr(options, each.name) for each in fields(Machine)})
    for name in ("model", "base"):
        if getattr(machine, name) != getattr(Machine, name):
            words += [f"--{name}", getattr(machine, name)]
    if machine.engine == "openvino":
        words += ["--engine", machine.engine]
    for file, scale in machine.loras:
        words += ["--lora", f"{file}:{scale:g}"]
    if machine.decoder is not None:
        words += ["--decoder", machine.decoder]
    form = form_named(options.form, PRESETS[options.resolution].changed(**values))
    return form.using(machine), machine, tuple(words)


def parser() -> argparse.ArgumentParser:
    """All options with their meanings."""
    parser = _Parser(
        prog=cli.program("compress/run.py"),
        description="Store train images in an exemplar form (edge map + class label) and regenerate copies from it.",
        epilog="Exit codes: 0 done; 1 some images failed, listed at the end; 2 the command is wrong; 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the data").add_argument
    add("--data-dir", metavar="D", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    add("--dataset", required=True, help="the dataset: its folder's name in the data folder")
    add("--classes", metavar="A,B", action="append", default=[], help="only these class labels (may be repeated)")
    add("--limit", metavar="N", type=cli.at_least(1), help="only the first N images of each class")
    seeds = "copies of an image: 5 makes numbers 0 to 4; 0,3,7 makes these; '3,' makes number 3 alone [5]"
    add("--seeds", metavar="K", type=copy_numbers, default=range(5), help=seeds)
    add("--shard", metavar="i/n", type=shard, default=(1, 1), help="only part i of n: 1/8 ... 8/8")
    add("--dry-run", action="store_true", help="say how much there is to do, and write nothing")
    existing = parser.add_argument_group(
        "files that are there (they are kept if they were made with the same settings)"
    )
    how = existing.add_mutually_exclusive_group()
    how.add_argument("--replace", action="store_true", help="make files of other settings again")
    how.add_argument("--overwrite", action="store_true", help="make all files again")
    look = existing.add_mutually_exclusive_group()
    look.add_argument("--verify", action="store_true", help="read every file and list what is wrong; needs no model")
    look.add_argument("--repair", action="store_true", help="the same, then make again what is wrong or missing")
    apart = "read and write edge_maps-NAME and exemplars-NAME; the trainer's key for them is variant=NAME"
    existing.add_argument("--keep-apart", metavar="NAME", default="", help=apart)
    machine = _add_settings(parser, resolution=None, form="edges")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    return parser


def _add_settings(parser: argparse.ArgumentParser, resolution: str | None, form: str) -> argparse._ArgumentGroup:
    """The options about settings and model.  resolution, form: where none is named; resolution None: one must be."""
    add = parser.add_argument_group("the settings").add_argument
    if resolution is None:
        auto = "the preset that fits the size of the images; auto chooses it"
        add("--resolution", required=True, choices=(*PRESETS, "auto"), help=auto)
    else:
        add("--resolution", default=resolution, choices=tuple(PRESETS))
    add("--form", default=form, help=f"what is kept of an image: {', '.join(examples())} [{form}]")
    fast = (
        f"fast: --sampler {FAST['sampler']} --steps {FAST['steps']} where they are not given; docs/benchmarks.md "
        "measures what that costs [paper]"
    )
    add("--preset", choices=("paper", "fast"), default="paper", help=fast)
    for setting in SETTINGS.values():
        add(setting.option, metavar=setting.metavar, type=setting.read, help=setting.help)
    machine = parser.add_argument_group("the model and the machine")
    add = machine.add_argument
    add("--model", default="sd15", help=(
        "sd15, tiny, a checkpoint's path (a .yaml beside it is its config), a folder in diffusers' layout, "
        "diffusers:FOLDER_OR_NAME for any other pipeline, or another generator's name [sd15]"
    ))  # fmt: skip
    add("--base", metavar="FILE", help=(
        "Stable Diffusion 1.5's weights (a diffusers: model's pipeline) for a --model that is a control network only"
    ))  # fmt: skip
    add("--lora", dest="loras", metavar="FILE[:SCALE]", type=lora, action="append", default=[], help=(
        "a LoRA that is merged into UNet and text encoder (may be repeated) [scale 1]"
    ))  # fmt: skip
    add("--decoder", metavar="FILE", help=(
        "a small autoencoder (TAESD's taesd_decoder, or diffusers' AutoencoderTiny) that decodes in place of the "
        "model's: worth it where steps are few"
    ))  # fmt: skip
    add("--download", action="store_true", help="fetch sd15's weights (5.7 GB) if they are not there")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help=(
        "what the networks compute in [bf16 where the device has it, else fp16/fp32]"
    ))  # fmt: skip
    add("--batch-size", metavar="N", type=cli.at_least(1), help="copies made at a time [by device]")
    add("--low-memory", action="store_true", help="keep on the GPU only the network that is at work")
    add("--engine", default="auto", choices=("auto", "torch", "compile", "openvino"), help=(
        "what runs the networks: torch; compile: torch.compile, minutes first, then faster (GPUs: CUDA graphs); "
        "openvino: CPUs, needs `pip install openvino` [torch]"
    ))  # fmt: skip
    add("--compile", dest="engine", action="store_const", const="compile", help="the same as --engine compile")
    return machine


def fitting_preset(paths: DatasetPaths) -> str:
    """The preset that the trainer assumes too: by the dataset's name, else by the size of a few images."""
    images = {label: paths.images(label) for label in paths.classes()}
    if not any(images.values()):
        raise UserError(f"no images in {paths.folder('train')}.")
    return default_resolution(paths.dataset, typical_size(images))


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
