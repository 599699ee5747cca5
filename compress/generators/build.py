"""The model and the generator that a job asks for."""

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from compress.forms import Form
from compress.generators import Direct, Generator, generator_named
from compress.generators.controlnet import DTYPES, PictureGenerator
from compress.options import Machine
from compress.plan import Plan
from compress.records import Recipe
from ControlNet.cldm import openvino_engine
from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.model import ModelError, load_model, weights_fingerprint
from ControlNet.cldm.weights import download_sd15, trained_hint
from ControlNet.ldm.schedule import ddim_timesteps
from ControlNet.ldm.text import MAX_LENGTH, nb_tokens
from utils.data.images import image_bits
from utils.errors import UserError

log = logging.getLogger(__name__)

OPENVINO_BF16 = "bf16-openvino"
"""What copies remember as their precision where OpenVINO makes them in bf16: it rounds in other places than torch."""

HINTS = {"edges": "edge maps", "thumb": "thumbnails"}
"""What control networks are trained on, in words."""


def choose_engine(engine: str, device: torch.device, low_memory: bool = False) -> str:
    """What runs the networks, with "auto" resolved.  Raises UserError for what can't do it here."""
    if engine == "openvino":
        if device.type != "cpu" or low_memory:
            raise UserError(
                "--engine openvino is for CPUs, without --low-memory: take --device cpu, or --engine torch."
            )
        if not openvino_engine.is_installed():
            raise UserError("--engine openvino needs a package that is not installed: pip install openvino")
    return "torch" if engine == "auto" else engine


def choose_precision(precision: str, device: torch.device, engine: str = "auto") -> str:
    """The precision, with "auto" resolved: bf16 where the device computes in it, else fp16 on a GPU, fp32 on a CPU.

    Raises UserError for one that the engine does not have here.
    """
    if choose_engine(engine, device) == "openvino":
        has_bf16 = openvino_engine.computes_bf16()
        if precision == "fp16" or (precision == "bf16" and not has_bf16):
            raise UserError(f"--engine openvino does not compute in {precision} on this CPU: take --precision fp32.")
        return "fp32" if precision == "fp32" or not has_bf16 else OPENVINO_BF16
    if precision != "auto":
        return precision
    if device.type == "cpu":  # without AMX or AVX512-BF16, bf16 takes about 20 times as long as fp32
        capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch don't say
        return "bf16" if capable.get("amx_bf16") or capable.get("avx512_bf16") else "fp32"
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


def model_fingerprint(machine: Machine) -> str:
    """The fingerprint of the model's weights, without loading them.  Raises UserError where they can't be used."""
    if kind := generator_named(machine.model):
        made_by = kind.fingerprint
        return made_by(machine) if callable(made_by) else made_by
    try:
        return weights_fingerprint(machine.model, machine.base, machine.loras, machine.decoder)
    except ModelError as error:
        raise _refused(machine, error) from error


def _refused(machine: Machine, error: ModelError) -> UserError:
    """The error of a model that can't be used; a whole pipeline of diffusers' may run by diffusers."""
    if (Path(machine.model).expanduser() / "model_index.json").is_file():
        return UserError(f"{error}\ndiffusers may run it: --model diffusers:{machine.model}")
    return UserError(str(error))


def recipe_of(form: Form, machine: Machine, device: torch.device, without_weights: bool = False) -> Recipe:
    """What makes copies here.  Raises UserError where there are no weights, unless they may be missing."""
    if not form.needs_model:
        return Recipe(form)
    precision = choose_precision(machine.precision, device, machine.engine)
    try:
        return Recipe(form, model_fingerprint(machine), precision)
    except UserError:
        if not without_weights:
            raise
        return Recipe(form, None, precision)


def load(machine: Machine, device: torch.device, precision: str) -> ControlLDM:
    """The model.  precision: what `choose_precision` returns.  Raises UserError where it can't be loaded."""
    home = torch.device("cpu") if machine.low_memory else device  # from where the part at work visits the device
    try:
        dtype = DTYPES.get(precision, torch.float32)
        return load_model(machine.model, home, dtype, machine.base, machine.loras, machine.decoder)
    except ModelError as error:
        raise _refused(machine, error) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"the model does not fit on {device}: use --low-memory or --precision bf16.") from error


@contextmanager
def generator(todo: Plan, machine: Machine, device: torch.device) -> Iterator[Generator | None]:
    """The generator that a plan takes, None where it takes none.

    On leaving, its model is freed, and so is the one that the form has loaded to encode.
    """
    if not todo.needs_generator:
        yield None
        return
    recipe = todo.records.recipe
    made = make_generator(recipe.form, machine, device, recipe.precision)
    try:
        yield made
    finally:
        if hasattr(made, "close"):
            made.close()
        recipe.form.release()
        gc.collect()  # the first model of a process is held by the frames of transformers' import
        if device.type == "cuda":
            torch.cuda.empty_cache()


def make_generator(form: Form, machine: Machine, device: torch.device, precision: str | None) -> Generator:
    """The generator of a form's copies, with its model loaded where it needs one.

    precision: what `choose_precision` returns; None for a form without a model.
    """
    if not form.needs_model:
        return Direct()
    assert precision is not None
    if kind := generator_named(machine.model):
        return kind(form.preset, replace(machine, precision=precision), device)
    return PictureGenerator(
        form.preset,
        load(machine, device, precision),
        batch_size=machine.batch_size,
        engine=choose_engine(machine.engine, device, machine.low_memory),
        precision=precision.partition("-")[0],
        low_memory=machine.low_memory,
        device=device,
    )


def warn_of_settings(form: Form, machine: Machine, texts: Mapping[str, str], images: Iterable[Path] = ()) -> None:
    """Log what a user might not expect of the settings.

    texts: of the classes, by label; images: train images, of which the first one stands for all.
    """
    if not form.needs_model or generator_named(machine.model):
        return
    if machine.model == "tiny" and any(map(_is_no_digit, islice(images, 1))):
        log.warning(
            "--model tiny has seen handwritten digits only: its copies of colour or large pictures show nothing. "
            "Take --model sd15 or a model of your own (docs/own_controlnet.md)"
        )
    trained = trained_hint(machine.model)
    if form.hint and trained and trained.partition("@")[0] != form.hint:
        log.warning(
            "the control network of --model %s was trained on %s: copies of the form %s will show little. %s",
            *(machine.model, HINTS[trained.partition("@")[0]], form.name, "docs/forms.md says what each form needs"),
        )
    sampling = form.preset.sampling
    if sampling.guidance == 0:
        log.warning(
            "--guidance 0 follows the negative prompt alone, as published; recipes of distilled models that say 0 mean "
            "--guidance 1"
        )
    if sampling.sampler == "ddim" and (count := len(ddim_timesteps(sampling.steps))) != sampling.steps:
        log.warning(
            "--steps %d of ddim makes %d steps, as published: its timesteps are 1000 // %d apart",
            *(sampling.steps, count, sampling.steps),
        )
    most, prompts = MAX_LENGTH - 2, [form.preset.prompt_text(text) for text in texts.values()]
    template, *counts = nb_tokens([form.preset.prompt_text(""), *prompts])
    cut = [(label, count) for label, count in zip(texts, counts, strict=True) if count > most]
    if cut:
        label, count = cut[0]
        culprit = f"--prompt-template ({template} tokens)" if template > count - template else "class_names.json"
        message = "%d prompts have more than %d tokens and are cut, such as that of class %r: shorten %s"
        log.warning(message, len(cut), most, label, culprit)


def _is_no_digit(image: Path) -> bool:
    try:
        width, height, bits_per_pixel = image_bits(image)
    except OSError:  # the run itself will list it
        return False
    return bits_per_pixel == 24 or min(width, height) > 64
