"""Pictures by a diffusers pipeline with a ControlNet or an image input: `--model diffusers:FOLDER_OR_NAME`.

FOLDER holds a whole pipeline (model_index.json), or a control network only, and `--base` names the pipeline that it
steers.  A NAME is one of Hugging Face's hub that was fetched before (`hf download NAME`): nothing is fetched here.
The pipeline's own scheduler samples.
"""

import gc
import hashlib
import inspect
import json
import logging
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from compress.forms import Request
from compress.generators import NoPicture
from compress.generators.controlnet import DTYPES, Halving, default_batch_size
from compress.options import Machine
from compress.presets import Preset, Sampling
from ControlNet.cldm.model import ModelError, load_state_dict
from utils.errors import UserError
from utils.files import load_json

WEIGHTS = (r"\w+(-\d+-of-\d+)?\.safetensors", r"\w+\.fp16(-\d+-of-\d+)?\.safetensors", r"\w+(-\d+-of-\d+)?\.bin")
"""Names of a network's weight files, of which the first kind that is there is loaded."""

VALUES = 64
"""Of a tensor that are read for the fingerprint."""

log = logging.getLogger(__name__)


class PipelineGenerator(Halving):
    """Makes the pictures of copies.

    preset: with the default sampler; machine: `model` is "diffusers:" and the pipeline's folder or name, `precision`
    one of DTYPES.  Each copy has a random generator of its own, on the CPU.  A form that keeps no edge map or starts
    from a picture takes the pipeline's relative for that task, of the same networks, where diffusers has one.
    Raises UserError for what a pipeline can't do.
    """

    def __init__(self, preset: Preset, machine: Machine, device: torch.device):
        _check_settings(preset.sampling, machine)
        self.preset = preset
        self.device = torch.device(device)
        self.low_memory = machine.low_memory and self.device.type == "cuda"
        self._loaded = _load(machine)
        self._pipelines: dict[tuple[bool, bool], Any] = {}
        self._dtype = DTYPES[machine.precision]
        networks: Any = nn.ModuleList(part for part in self._loaded.components.values() if isinstance(part, nn.Module))
        networks.device, networks.dtype = self.device, self._dtype
        self.batch_size = machine.batch_size or default_batch_size(networks)

    @staticmethod
    def fingerprint(machine: Machine) -> str:
        """A digest of a pipeline's configs and weights, and its class.  Raises UserError where it is not on this
        machine."""
        folders, digest = _folders(machine), hashlib.sha256()
        for folder in folders:
            for part in _parts(folder):
                _add_part(digest, part, folder)
        return f"{digest.hexdigest()[:16]}.{'+'.join(_class_name(folder) for folder in folders)}"

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Request], steps: int | None = None) -> list[np.ndarray | NoPicture]:
        """See `Generator`; NoPicture also for one that the pipeline's safety checker held back.

        Raises UserError for what the pipeline can't do.
        """
        return self._in_parts(batch, batch[0].condition.size, lambda part: self._pictures(part, steps))

    def close(self) -> None:
        """Let go of the networks."""
        self._loaded = None
        self._pipelines.clear()
        gc.collect()

    def _pictures(self, batch: Sequence[Request], steps: int | None) -> list[np.ndarray | NoPicture]:
        """Pictures of at most batch_size requests."""
        requests = self._filled(batch)
        condition, sampling = requests[0].condition, self.preset.sampling_for(requests[0].text)
        height, width = condition.size
        pipeline = self._pipeline(condition.hint is not None, condition.start is not None)
        steps = steps or sampling.steps
        if condition.start is not None:
            steps = max(steps, math.ceil(1 / sampling.start_strength))  # one that is made, at least
        arguments = {
            "prompt": [self.preset.prompt_text(request.text) for request in requests],
            "negative_prompt": [self.preset.negative_prompt] * len(requests),
            "num_inference_steps": steps,
            "guidance_scale": sampling.guidance,
            "controlnet_conditioning_scale": sampling.strength,
            "guess_mode": not sampling.unconditional_control,
            "strength": sampling.start_strength,
            "height": height,
            "width": width,
            "generator": [torch.Generator().manual_seed(request.seed) for request in requests],
            "output_type": "np",
        }
        arguments = {name: value for name, value in arguments.items() if name in _parameters(pipeline)}
        hint_name, start_name = _inputs(pipeline)
        if hint_name:
            arguments[hint_name] = [_picture(request.condition.hint) for request in requests]
        if start_name:
            arguments[start_name] = [_picture(request.condition.start) for request in requests]
        try:
            output = pipeline(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"{type(pipeline).__name__} refuses its input: {_first_line(error)}") from error
        pictures = output.images[: len(batch)]
        if pictures.shape[1:] != (height, width, 3):
            made = " x ".join(map(str, pictures.shape[1:]))
            raise UserError(f"{type(pipeline).__name__} makes {made} where {height} x {width} x 3 is asked for: --size")
        held_back = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
        return [self._checked(*each) for each in zip(pictures, held_back, strict=False)]

    def _checked(self, picture: np.ndarray, is_held_back: bool) -> np.ndarray | NoPicture:
        if is_held_back:
            return NoPicture("the pipeline's safety checker held the picture back")
        if not np.isfinite(picture).all():
            advice = "lower --guidance" if self._dtype == torch.float32 else "use --precision fp32"
            return NoPicture(f"in {self._dtype} the pipeline's picture holds values that are no numbers: {advice}")
        return (picture * 255).round().astype(np.uint8)

    def _pipeline(self, has_hint: bool, has_start: bool) -> Any:
        """The pipeline for copies with an edge map and with a start, on the device."""
        key = has_hint, has_start
        if key not in self._pipelines:
            pipeline = _for_task(self._loaded, has_hint, has_start)
            pipeline.set_progress_bar_config(disable=True)
            try:
                if self.low_memory:
                    pipeline.enable_model_cpu_offload(device=self.device)
                else:
                    pipeline.to(self.device)
            except torch.OutOfMemoryError as error:
                message = f"the pipeline does not fit on {self.device}: use --low-memory or --precision bf16."
                raise UserError(message) from error
            except ImportError as error:
                raise UserError("--low-memory with a pipeline needs another package: pip install accelerate") from error
            self._pipelines[key] = pipeline
        return self._pipelines[key]


def _check_settings(sampling: Sampling, machine: Machine) -> None:
    """Raises UserError for settings of our own model that a pipeline does not have."""
    is_set = {
        "--sampler": sampling.sampler != Sampling.sampler,
        "--eta": sampling.eta != Sampling.eta,
        "--reuse-every": sampling.reuse_every != Sampling.reuse_every,
        "--guidance-window": (sampling.guidance_from, sampling.guidance_until) != (0, 1),
        "--lora": bool(machine.loras),
        "--decoder": bool(machine.decoder),
        "--engine": machine.engine not in ("auto", "torch"),
    }
    if any(is_set.values()):
        options = ", ".join(option for option, wrong in is_set.items() if wrong)
        raise UserError(f"--model diffusers: samples by the pipeline's own scheduler: leave out {options}.")


def _folders(machine: Machine) -> list[Path]:
    """The folders of --model and of --base.  Raises UserError unless there are a pipeline and, before it, maybe a
    control network."""
    name = machine.model.partition(":")[2]
    if not name:
        raise UserError("--model diffusers:FOLDER_OR_NAME names a pipeline's folder, or its name on the hub.")
    folder = _folder(name)
    if (folder / "model_index.json").is_file():
        if machine.base:
            raise UserError(f"{folder} is a whole pipeline: leave out --base.")
        return [folder]
    if not machine.base:
        raise UserError(f"{folder} holds a {_class_name(folder)} only: --base FOLDER_OR_NAME names its pipeline.")
    return [folder, _folder(machine.base)]


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:  # not fetched; not of the form OWNER/NAME
        raise UserError(f"no pipeline at {name}: name its folder, or fetch it with `hf download {name}`.") from error


def _class_name(folder: Path) -> str:
    """That of a pipeline or of a network."""
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            return str(load_json(folder / name).get("_class_name", "?"))
    raise UserError(f"{folder} is no folder of diffusers': it has neither model_index.json nor config.json.")


def _parts(folder: Path) -> list[Path]:
    """The folders of a pipeline's networks, tokenizers and scheduler, and its own before them."""
    if not (folder / "model_index.json").is_file():
        return [folder]
    index = load_json(folder / "model_index.json")
    names = [name for name, kind in index.items() if isinstance(kind, list) and any(kind)]
    return [folder, *(folder / name for name in sorted(names) if (folder / name).is_dir())]


def _weight_files(part: Path) -> list[Path]:
    for kind in WEIGHTS:
        if files := sorted(file for file in part.iterdir() if re.fullmatch(kind, file.name)):
            return files
    return []


def _add_part(digest: Any, part: Path, folder: Path) -> None:
    """Add to a digest what a network's or tokenizer's folder holds: its configs without versions and paths, and each
    tensor's name, shape and some values in float16."""
    for file in sorted(part.glob("*.json")):
        if not file.name.endswith(".index.json"):
            config = load_json(file)
            if "config" in file.name or file.name == "model_index.json":
                drop = [name for name in config if name.startswith("_") and name != "_class_name"]
                for name in (*drop, "transformers_version", "torch_dtype", "dtype"):
                    config.pop(name, None)
            digest.update(f"{part.relative_to(folder)}/{file.name} {json.dumps(config, sort_keys=True)}".encode())
    if (part / "model_index.json").is_file():  # beside a pipeline's may lie single files that are not loaded
        return
    for file in _weight_files(part):
        try:
            tensors = load_state_dict(file)
        except ModelError as error:
            raise UserError(str(error)) from error
        for name, tensor in sorted(tensors.items()):
            values = tensor.detach().flatten()
            some = values[:: max(1, len(values) // VALUES)].to("cpu", torch.float16)
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + some.numpy().tobytes())


def _load(machine: Machine) -> Any:
    """The pipeline that a machine names, on the CPU.  Raises UserError where it can't be loaded."""
    folders = _folders(machine)
    diffusers = _library()
    try:
        if len(folders) == 1:
            return _from_folder(diffusers.DiffusionPipeline, folders[0], machine)
        network = getattr(diffusers, _class_name(folders[0]), None)
        if network is None:
            raise UserError(f"{folders[0]} holds a {_class_name(folders[0])}, which this diffusers does not have.")
        control = _from_folder(network, folders[0], machine)
        return _from_folder(diffusers.AutoPipelineForText2Image, folders[1], machine, controlnet=control)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        where = " and ".join(map(str, folders))
        raise UserError(f"can't load {where}: {_first_line(error)}") from error


def _from_folder(kind: Any, folder: Path, machine: Machine, **parts: Any) -> Any:
    weights = [file for part in _parts(folder) for file in _weight_files(part)]
    variant = "fp16" if weights and all(".fp16" in file.name for file in weights) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of releases that call it dtype
        return kind.from_pretrained(
            str(folder), torch_dtype=DTYPES[machine.precision], variant=variant, local_files_only=True, **parts
        )


def _library() -> Any:
    """diffusers, quiet.  Raises UserError where it is not installed."""
    try:
        import torchvision_compat  # noqa: F401, I001
        import diffusers
        import transformers
    except ImportError as error:
        raise UserError("--model diffusers: needs a package that is not installed: pip install diffusers") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers


def _for_task(loaded: Any, has_hint: bool, has_start: bool) -> Any:
    """The pipeline itself where it takes these inputs, else its relative that does.  Raises UserError."""
    name = type(loaded).__name__
    wanted = has_hint, has_start
    if "Union" in name or "mask_image" in _parameters(loaded):
        raise UserError(f"{name} takes more than an edge map and a picture: name a pipeline without mask and mode.")
    if tuple(map(bool, _inputs(loaded))) == wanted:
        return loaded
    diffusers = _library()
    kind = diffusers.AutoPipelineForImage2Image if has_start else diffusers.AutoPipelineForText2Image
    keeps = {"controlnet": loaded.controlnet if has_hint else None} if getattr(loaded, "controlnet", None) else {}
    try:
        pipeline = kind.from_pipe(loaded, **keeps)
    except ValueError:
        pipeline = loaded
    if tuple(map(bool, _inputs(pipeline))) != wanted:
        lacks = "an edge map" if has_hint else "no edge map"
        if has_start:
            lacks += " and a picture to start from"
        hint = " (--model diffusers:CONTROLNET --base PIPELINE adds a control network)" if has_hint else ""
        raise UserError(f"the form's copies are made from {lacks}, which {name} does not take{hint}.")
    return pipeline


def _parameters(pipeline: Any) -> set[str]:
    return set(inspect.signature(type(pipeline).__call__).parameters)


def _inputs(pipeline: Any) -> tuple[str | None, str | None]:
    """Names of the arguments that take the condition and the picture to start from; None for one that it lacks."""
    names = _parameters(pipeline)
    if "control_image" in names:
        return "control_image", "image" if "image" in names else None
    if getattr(pipeline, "controlnet", None) is not None:
        return "image" if "image" in names else None, None
    return None, "image" if "image" in names else None


def _picture(pixels: np.ndarray | None) -> Image.Image:
    assert pixels is not None  # requests of one group are alike in having one
    return Image.fromarray(pixels).convert("RGB")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


GENERATORS = {"diffusers": PipelineGenerator}
