"""Train a small ControlLDM on a folder of pictures, as the bundled model was trained.

    python ControlNet/train.py ControlNet/models/cldm_tiny_train.yaml [key=value ...]

Four stages share one loop:
- autoencoder (a PatchAutoencoder takes none: its weights are principal components);
- text: the text encoder;
- diffusion: the UNet and the control network together, and the text encoder too where the model's config sets
  cond_stage_trainable;
- refine: the same with other settings, mostly at the noisiest timesteps, where sampling starts.

With `teacher=WEIGHTS` a fifth one, consistency, alone: it distils that model into one that makes the same pictures in 1
to 8 LCM steps without guidance (compress/run.py --model FILE --sampler lcm --steps 4 --guidance 1).

Every step's pictures, noise and timesteps are a function of (seed, stage, step) alone, so a killed run resumes from its
last checkpoint and ends with the same weights.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchvision_compat  # noqa: F401, I001  before lightning

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.model import ModelError, create_model, load_model
from ControlNet.cldm.weights import find_weights, refuse_resolvers
from ControlNet.ldm.autoencoder import PatchAutoencoder
from ControlNet.objectives import AutoencoderTask, ConsistencyTask, DiffusionTask, TextTask
from ControlNet.training_data import STAGES, Views, step_seed, user_path

TASKS = dict(zip(STAGES, (AutoencoderTask, TextTask, DiffusionTask, DiffusionTask, ConsistencyTask), strict=True))
FIXED_KEYS = [
    "seed", "precision", "teacher", "hint", "image_size", "texts", "negative_texts", "augmentation", "looseness",
]  # fmt: skip
"""Keys of the config, beside those of the stage, that a checkpoint's training must have in common with this one."""
MOST_READ = 64
"""Pictures whose content goes into the digest of `data`, beside the names and sizes of all."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, and move it into place: a power failure leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def content_digests(config: DictConfig, data: Views) -> dict[str, str | None]:
    """Keys of the config that name files -> a digest of what these hold; None where nothing is named."""
    pictures, step = hashlib.sha256(), -(-len(data.items) // MOST_READ)
    for i, (file, _) in enumerate(data.items):
        content = hashlib.sha256(file.read_bytes()).hexdigest() if i % step == 0 else ""
        pictures.update(f"{file.parent.name}/{file.name} {file.stat().st_size} {content}\n".encode(errors="replace"))
    names = {"class_names": config.class_names, "model": None if config.get("teacher") else config.model}
    read = {key: name and hashlib.sha256(user_path(name).read_bytes()).hexdigest() for key, name in names.items()}
    return {"data": pictures.hexdigest(), **read}


def check_settings(config: DictConfig, stage: str, data: Views, has_checkpoint: bool) -> None:
    """Record the stage's settings beside its checkpoint; raise ModelError where one of other settings is there.

    What a record of an earlier version does not hold is not compared.
    """
    file = user_path(config.output) / f"{stage}_settings.json"
    chosen: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, [*FIXED_KEYS, stage]), resolve=True)
    settings = {**chosen, **content_digests(config, data)}
    if has_checkpoint and file.exists():
        known = json.loads(file.read_text())
        known = {name: known.get(name) for name in settings if name in known or name in ("teacher", "hint")}
        differ = [name for name, value in known.items() if value != settings.get(name)]
        if differ:
            raise ModelError(
                f"{file.parent} has a checkpoint of the {stage} stage with other settings ({', '.join(differ)}): give "
                "this training another output=, or delete the checkpoint"
            )
    write_whole(file, lambda path: path.write_text(json.dumps(settings, indent=1)))


def make_optimizer(parameters: Sequence[Tensor], learning_rate: float, precision: str) -> torch.optim.AdamW:
    """AdamW; fused, except under a gradient scaler: then it unscales by itself, and gradients can't be clipped."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2, fused=precision != "16-mixed")


def fit(fabric: Fabric, model: ControlLDM, stage: str, config: DictConfig) -> None:
    """Train one stage of the model in place, resuming from its last checkpoint if there is one."""
    settings, output = config[stage], user_path(config.output)
    data = Views(config, stage)
    task = TASKS[stage](model, settings, data)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, settings.learning_rate, config.precision)
    warmup = max(1, min(100, settings.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, s / settings.steps)))
    )
    average = AveragedModel(task, multi_avg_fn=get_ema_multi_avg_fn(settings.get("ema_decay", 0.0)))
    state: dict[str, Any] = {"task": task, "average": average, "optimizer": optimizer, "schedule": schedule}
    state |= {"step": 0, "log": []}
    checkpoint = output / f"{stage}.ckpt"
    check_settings(config, stage, data, checkpoint.exists())
    if checkpoint.exists():
        state |= {k: v for k, v in fabric.load(checkpoint, state).items() if k in ("step", "log")}
        fabric.print(f"{stage}: going on from step {state['step']} of {settings.steps}")
    wrapped, optimizer = fabric.setup(task, optimizer)
    keys = [[(step, i) for i in range(settings.batch_size)] for step in range(state["step"], settings.steps)]
    workers = config.num_workers
    loader = DataLoader(data, batch_sampler=keys, num_workers=workers, persistent_workers=workers > 0)
    batches: Any = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    began, sums = time.time(), dict[str, list[Tensor]]()
    bar = tqdm(batches, stage, total=settings.steps, initial=state["step"])
    task.train()
    for batch in bar:
        step = state["step"]
        generator = torch.Generator().manual_seed(step_seed(config.seed, stage, step))
        losses = wrapped(*batch, generator)
        fabric.backward(losses["loss"])
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(task)
        state["step"] = step + 1
        for name, value in losses.items():
            sums.setdefault(name, []).append(value.detach())
        if state["step"] % config.checkpoint_every == 0 or state["step"] == settings.steps:
            means = {name: float(torch.stack(values).mean()) for name, values in sums.items()}
            seconds = state["log"][-1]["seconds"] if state["log"] else 0.0
            state["log"].append({"step": state["step"], "seconds": round(seconds + time.time() - began, 1), **means})
            bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
            began, sums = time.time(), {}
            write_whole(checkpoint, lambda path: fabric.save(path, state))
            losses_file, text = output / f"{stage}_losses.json", json.dumps(state["log"], indent=1)
            write_whole(losses_file, partial(Path.write_text, data=text))
    if settings.get("ema_decay"):
        task.load_state_dict(average.module.state_dict())


def first_pictures(config: DictConfig, count: int) -> Tensor:
    """The first pictures, count x 3 x S x S, that the autoencoder stage trains on."""
    data = Views(config, "autoencoder")
    return torch.stack([data[i // 16, i % 16][0] for i in range(count)])


@torch.no_grad()
def normalise_latents(model: ControlLDM, config: DictConfig) -> float:
    """Rescale the autoencoder so that its latents times scale_factor have unit variance.  Returns the factor."""
    autoencoder = model.first_stage_model.eval()
    batches = first_pictures(config, 256).to(model.device).split(16)
    factor = 1 / (model.scale_factor * torch.cat([autoencoder.encode(x).mode() for x in batches]).std().item())
    autoencoder.rescale(factor)
    return factor


def export(model: ControlLDM, path: Path, hint: str) -> None:
    """Write the weights as safetensors: float16, and float8 for the token embedding, most of a small model.

    hint: the config's; the file says it (`weights.trained_hint`).
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("token_embedding.weight"):
            tensor = tensor.to(torch.float8_e4m3fn)
        elif tensor.is_floating_point() and "." in name:  # names without a dot: the schedule's tables, kept in float32
            tensor = tensor.half()
        tensors[name] = tensor.cpu().contiguous()
    write_whole(path, lambda file: save_file(tensors, file, {"hint": hint}))


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        try:
            print(__doc__, flush=True)
        except BrokenPipeError:  # the reader has left; Python must not try to write to it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if arguments else 2
    try:
        config: Any = OmegaConf.merge(OmegaConf.load(user_path(arguments[0])), OmegaConf.from_dotlist(arguments[1:]))
        refuse_resolvers(config, "the training config")
        train(config)
    except (ModelError, OSError, OmegaConfBaseException, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch's writer, on a full disk
            raise
        print(f"error: a checkpoint in {config.output} could not be written: the disk may be full", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(config: DictConfig) -> None:
    output = user_path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    fabric = Fabric(accelerator="auto", devices=1, precision=config.precision)
    torch.manual_seed(config.seed)
    weights = user_path(config.weights)
    weights.parent.mkdir(parents=True, exist_ok=True)
    if config.get("teacher"):
        if user_path(config.teacher).resolve() == weights.resolve():
            raise ModelError(f"weights={weights} would replace the teacher: give the distilled weights another name")
        model = load_model(config.teacher, fabric.device)
        fit(fabric, model, "consistency", config)
    else:
        model = create_model(config.model).to(fabric.device)
        if isinstance(model.first_stage_model, PatchAutoencoder):
            model.first_stage_model.fit(first_pictures(config, 4096).to(fabric.device))
        else:
            fit(fabric, model, "autoencoder", config)
        factor = normalise_latents(model, config)
        fabric.print(f"latents scaled by {factor:.3f}")
        for stage in ("text", "diffusion", "refine"):
            fit(fabric, model, stage, config)
    export(model, weights, config.get("hint") or "edges")
    beside = weights.with_suffix(".yaml")
    if not beside.exists():  # where compress/run.py --model looks for it
        shutil.copy(find_weights(config.teacher).config if config.get("teacher") else user_path(config.model), beside)
    fabric.print(f"{weights}: {weights.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
