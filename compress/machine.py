"""The model and the machine that the options ask for."""

import argparse
import re

import torch

from compress.presets import Preset
from compress.regenerate import Regenerator
from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.download import download_sd15
from ControlNet.cldm.model import ModelError, load_model, weights_fingerprint
from utils.data.paths import DatasetPaths
from utils.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def accelerator(device: str) -> tuple[str, int | list[int]]:
    """--device as Lightning Fabric's (accelerator, devices).  Raises UserError for what is none."""
    index = re.fullmatch(r"cuda:(\d+)", device)
    if index:
        return "cuda", [int(index[1])]
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is auto, cpu, cuda or cuda:N, not {device!r}.")
    return device, 1


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision, with "auto" resolved: bf16 on a GPU that computes in it, fp16 on older GPUs, fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "fp32"
    # V100, T4 and RTX 20 only emulate bf16.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def download(spec: str) -> None:
    """Fetch the official weights, unless they are there.  Raises UserError."""
    if spec != "sd15":
        raise UserError(f"--download fetches the weights of --model sd15, and not of {spec}.")
    try:
        download_sd15()
    except ModelError as error:
        raise UserError(str(error)) from error


def fingerprint(options: argparse.Namespace) -> str:
    """That of the model's weights, without loading them.  Raises UserError where they can't be used."""
    try:
        return weights_fingerprint(options.model, options.base)
    except ModelError as error:
        raise UserError(str(error)) from error


def load(options: argparse.Namespace, device: torch.device, precision: str) -> ControlLDM:
    """The model.  precision: "fp32", "bf16" or "fp16".  Raises UserError where it can't be loaded."""
    dtype = PRECISIONS[precision]
    home = torch.device("cpu") if options.low_memory else device  # from where the part at work visits the device
    try:
        return load_model(options.model, home, dtype, options.base)
    except ModelError as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"the model does not fit on {device}: use --low-memory or --precision bf16.") from error


def make_regenerator(
    options: argparse.Namespace, paths: DatasetPaths, preset: Preset, device: torch.device, precision: str | None
) -> Regenerator:
    """The regenerator that the options ask for.  precision: of the model; None: no copy is missing, load no model."""
    return Regenerator(
        paths,
        preset,
        None if precision is None else load(options, device, precision),
        batch_size=options.batch_size,
        compile=options.compile,
        low_memory=options.low_memory,
        device=device,
    )
