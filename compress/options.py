"""The options of compress/run.py."""

import argparse
import math
import re
import shlex

from compress.presets import PRESETS, SAMPLERS, Preset
from utils.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")

MOST_COPIES = 1_000_000


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


class _TextParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (compress/run.py --help lists the options)")


def parser() -> argparse.ArgumentParser:
    """All options with their meanings."""
    parser = _Parser(
        prog="compress/run.py",
        description="Compress train images into prompts (edge map + class label) and regenerate copies from them.",
        epilog="Exit codes: 0 done; 1 some images failed, listed at the end; 2 the command is wrong; 130 interrupted.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("the data")
    data.add_argument("--data-dir", metavar="D", help="folder of all datasets [$ESCORT_DATA_DIR, else ./data]")
    data.add_argument("--dataset", required=True, help="the dataset: its folder's name in the data folder")
    data.add_argument("--classes", metavar="A,B", action="append", help="only these class labels (may be repeated)")
    data.add_argument("--limit", metavar="N", type=at_least_one, help="only the first N images of each class")
    data.add_argument(
        "--seeds",
        metavar="K",
        type=copy_numbers,
        default=range(5),
        help="copies of an image: 5 makes numbers 0 to 4; 0,3,7 makes these; '3,' makes number 3 alone [5]",
    )
    data.add_argument("--shard", metavar="i/n", type=shard, default=(1, 1), help="only part i of n: 1/8 ... 8/8")
    data.add_argument("--dry-run", action="store_true", help="say how much there is to do, and write nothing")
    there = parser.add_argument_group("what is there already (it is kept, if it was made with the same settings)")
    how = there.add_mutually_exclusive_group()
    how.add_argument("--replace", action="store_true", help="make again what was made with other settings")
    how.add_argument("--overwrite", action="store_true", help="make everything again")
    look = there.add_mutually_exclusive_group()
    look.add_argument("--verify", action="store_true", help="read every file and list what is wrong; needs no model")
    look.add_argument("--repair", action="store_true", help="the same, then make again what is wrong or missing")
    there.add_argument(
        "--keep-apart",
        metavar="NAME",
        default="",
        help="read and write edge_maps-NAME and exemplars-NAME; the trainer's key for them is variant=NAME",
    )
    add_settings(parser, resolution=None)
    machine = add_machine(parser)
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    return parser


def add_settings(parser: argparse.ArgumentParser, resolution: str | None) -> None:
    """The options that say what a copy is.  resolution: the preset where none is named; None: one must be."""
    settings = parser.add_argument_group("the settings")
    settings.add_argument(
        "--resolution",
        required=resolution is None,
        default=resolution,
        choices=tuple(PRESETS),
        help="the preset for the data's kind",
    )
    settings.add_argument("--size", metavar="N", type=at_least_one, help="shorter side of the generated pictures")
    settings.add_argument("--sampler", choices=tuple(SAMPLERS), help="how latents are sampled [ddim]")
    settings.add_argument("--steps", metavar="N", type=at_least_one, help="steps of the sampler")
    settings.add_argument("--guidance", metavar="X", type=finite, help="scale of classifier-free guidance")
    settings.add_argument("--prompt-template", metavar="TEXT", help="such as 'a photo of {label}'")
    settings.add_argument("--negative-prompt", metavar="TEXT", help="text of what copies should not be like")
    settings.add_argument("--quality", metavar="Q", type=at_least_one, help="JPEG quality of copies, 1 to 100 [75]")


def add_machine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that say which model makes the copies, and how."""
    machine = parser.add_argument_group("the model and the machine")
    machine.add_argument(
        "--model",
        default="sd15",
        help="sd15, tiny, a checkpoint's path (a .yaml beside it is its config), or a diffusers folder [sd15]",
    )
    machine.add_argument(
        "--base",
        metavar="FILE",
        help="Stable Diffusion 1.5's weights, for a --model that holds a control network alone",
    )
    machine.add_argument("--download", action="store_true", help="fetch sd15's weights (5.7 GB) if they are not there")
    machine.add_argument(
        "--precision", default="auto", choices=("auto", *PRECISIONS), help="[bf16 or fp16 on a GPU, fp32 on a CPU]"
    )
    machine.add_argument("--batch-size", metavar="N", type=at_least_one, help="copies made at a time [by device]")
    machine.add_argument("--low-memory", action="store_true", help="keep on the GPU only the network that is at work")
    machine.add_argument("--compile", action="store_true", help="torch.compile: minutes first, then faster")
    return machine


def parse_settings(text: str, resolution: str) -> argparse.Namespace:
    """The options about copies and model alone, from one text, as a config holds them.

    resolution: the preset where none is named.  Raises UserError for an option that is wrong or not one of these.
    """
    parser = _TextParser(prog="", add_help=False, allow_abbrev=False)
    add_settings(parser, resolution)
    add_machine(parser)
    try:
        return parser.parse_args(shlex.split(text))
    except ValueError as error:  # a quotation mark without its partner
        raise UserError(f"{text!r}: {error}") from error


def chosen_preset(options: argparse.Namespace) -> Preset:
    """The settings: a preset, and what the options change of it.  Raises UserError for what can't be."""
    return PRESETS[options.resolution].changed(
        size=options.size,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        prompt_template=options.prompt_template,
        negative_prompt=options.negative_prompt,
        quality=options.quality,
    )


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


def shard(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of the parts 1/n ... n/n")
    return int(match[1]), int(match[2])


def at_least_one(text: str) -> int:
    """A whole number of 1 or more."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finite(text: str) -> float:
    """A number, neither infinite nor NaN."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number
