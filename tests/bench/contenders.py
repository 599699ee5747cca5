"""What `bench_controlnet.py` compares: the published way, ours, and diffusers' pipeline, on the same weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from compress.forms import Request
from compress.generators.controlnet import PictureGenerator
from compress.presets import Preset
from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.model import create_empty_model
from ControlNet.sampling import fresh_noise, make_schedule, sample_ddim

Contender = Callable[[Preset, Sequence[Request], int], list[np.ndarray]]
"""Settings, requests and a number of steps -> pictures."""


def random_state(config: Path, device: str) -> dict[str, Tensor]:
    """Weights that keep activations near unit size: normal numbers over the square root of the fan-in."""
    with torch.device(device):
        model = create_empty_model(config)
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(device)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        scale = 0.5 if "embedding" in name else parameter[0].numel() ** -0.5
        for part in parameter.data.view(-1).split(len(numbers)):
            torch.mul(numbers[: len(part)], scale, out=part)
    return model.state_dict()


def build(config: Path, state: Mapping[str, Tensor], device: str, dtype: torch.dtype) -> ControlLDM:
    """A model of these weights, which it shares where device and dtype are theirs; tables stay float32."""
    model = create_empty_model(config)
    moved = {
        name: tensor.to(device, dtype if tensor.is_floating_point() and "." in name else tensor.dtype)
        for name, tensor in state.items()
    }
    model.load_state_dict(moved, assign=True)
    return model.eval().requires_grad_(False)


# --- contenders --------------------------------------------------------------------------------------------------


@contextmanager
def plain_attention() -> Iterator[None]:
    """softmax(Q K^T / sqrt(d)) V, with the scores in memory, in place of torch's fused attention."""
    fused = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *masks, **options) -> Tensor:
        if masks or options:
            return fused(q, k, v, *masks, **options)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def initial_noise(job: Request) -> Tensor:
    """The noise that the generator starts a copy from."""
    height, width = job.condition.size
    return torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(job.seed))


def published(model: ControlLDM) -> Contender:
    """The published scripts' loop, on their interface.  DDIM alone."""

    def picture(preset: Preset, job: Request, steps: int) -> np.ndarray:
        hint = torch.from_numpy(job.condition.hint).to(model.device).float()[None, None].repeat(1, 3, 1, 1) / 255
        cond, uncond = (
            {"c_concat": [hint], "c_crossattn": [model.get_learned_conditioning([text])]}
            for text in (preset.prompt_text(job.text), preset.negative_prompt)
        )
        schedule = make_schedule("ddim", model, steps)

        def denoise(x: torch.Tensor, i: int) -> torch.Tensor:
            t = torch.full((1,), schedule.timesteps[i], device=model.device)
            eps, eps_uncond = model.apply_model(x, t, cond), model.apply_model(x, t, uncond)
            return eps_uncond + preset.sampling.guidance * (eps - eps_uncond)

        x = sample_ddim(denoise, initial_noise(job).to(model.device), schedule, fresh_noise(None))
        decoded = model.decode_first_stage(x)[0].permute(1, 2, 0)
        return (decoded * 127.5 + 127.5).clamp(0, 255).byte().cpu().numpy()

    def pictures(preset: Preset, jobs: Sequence[Request], steps: int) -> list[np.ndarray]:
        with torch.no_grad(), plain_attention():
            return [picture(preset, job, steps) for job in jobs]

    return pictures


def ours(generator: PictureGenerator) -> Contender:
    def pictures(preset: Preset, jobs: Sequence[Request], steps: int) -> list[np.ndarray]:
        generator.preset, generator.batch_size = preset, len(jobs)
        return generator(jobs, steps)

    return pictures


def diffusers_pipeline(config: Path, model: ControlLDM) -> Contender:
    """diffusers' pipeline on the model's weights.  Its progress bar and its checker are off."""
    from diffusers import StableDiffusionControlNetPipeline

    from tests.diffusers_models import diffusers_networks
    from tests.diffusers_schedulers import scheduler

    pipeline = StableDiffusionControlNetPipeline(
        **diffusers_networks(OmegaConf.load(config), model.state_dict()),
        tokenizer=None,
        scheduler=scheduler("ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    contexts: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        for text in texts:
            if text not in contexts:
                contexts[text] = model.get_learned_conditioning([text])
        return torch.cat([contexts[text] for text in texts])

    def pictures(preset: Preset, jobs: Sequence[Request], steps: int) -> list[np.ndarray]:
        pipeline.scheduler = scheduler(preset.sampling.sampler)
        hints = torch.from_numpy(np.stack([job.condition.hint for job in jobs])).to(model.device, model.dtype) / 255
        noise = torch.cat([initial_noise(job) for job in jobs])
        made = pipeline(
            prompt_embeds=encode([preset.prompt_text(job.text) for job in jobs]),
            negative_prompt_embeds=encode([preset.negative_prompt] * len(jobs)),
            image=hints[:, None].repeat(1, 3, 1, 1),
            latents=noise.to(model.device, model.dtype),
            num_inference_steps=steps,
            guidance_scale=preset.sampling.guidance,
            output_type="np",
        ).images
        return list((made * 255).astype(np.uint8))

    return pictures
