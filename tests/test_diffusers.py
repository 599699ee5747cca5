"""The same weights in diffusers' and transformers' networks: the same numbers, within 1e-4 of the largest.

Renamed by diffusers' own converters, so that a mistake in our names can't cancel out.  The full size (gigabytes,
minutes) is switched on with ESCORT_SLOW=1.
"""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.model import MODELS_FOLDER, create_empty_model
from ControlNet.ldm.text import tokenize
from tests.little_config import relative_error
from tests.small_controlnet import reference_state_dict, small_config

pytest.importorskip("diffusers")

FULL = pytest.param("full", marks=pytest.mark.slow(reason="needs 7 GB and minutes"))
TEXTS = ["apple pie, best quality, extremely detailed", ""]
NEGATIVES = ["longbody, lowres, bad anatomy", "longbody, lowres, bad anatomy"]


@pytest.fixture(scope="module", params=["small", FULL])
def both(request):
    """Our model and diffusers' networks, on the same tensors; inputs for them."""
    from tests.diffusers_models import diffusers_networks

    config = small_config() if request.param == "small" else OmegaConf.load(MODELS_FOLDER / "cldm_v15.yaml")
    model = create_empty_model(config)
    model.load_state_dict(reference_state_dict(model), assign=True)
    model.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        size=request.param,
        model=model,
        **diffusers_networks(config, model.state_dict()),
        x=torch.randn(2, 4, 16, 16, generator=draw),
        t=torch.tensor([801, 1]),
        hint=(torch.rand(2, 1, 128, 128, generator=draw) < 0.1).float().repeat(1, 3, 1, 1),
        context=model.get_learned_conditioning(TEXTS),
        uncond_context=model.get_learned_conditioning(NEGATIVES),
    )


def condition(both, context, control=True):
    return {"c_concat": [both.hint] if control else None, "c_crossattn": [context]}


def their_noise(both, scales=None):
    """diffusers' prediction with control, each control tensor times its scale."""
    down, middle = both.controlnet(
        both.x, both.t, encoder_hidden_states=both.context, controlnet_cond=both.hint, return_dict=False
    )
    scales = scales or [1.0] * (len(down) + 1)
    return both.unet(
        both.x,
        both.t,
        encoder_hidden_states=both.context,
        down_block_additional_residuals=[tensor * scale for tensor, scale in zip(down, scales[:-1], strict=True)],
        mid_block_additional_residual=middle * scales[-1],
    ).sample


def assert_same(both, what, ours, theirs, tolerance=1e-4):
    error = relative_error(ours, theirs)
    print(f"{both.size} size, {what}: relative difference {error:.1e}")
    assert ours.shape == theirs.shape
    assert error < tolerance, f"{what}: relative difference {error:.1e}"


def test_text_encodings(both):
    for texts in (TEXTS, NEGATIVES):
        theirs = both.text_encoder(input_ids=tokenize(texts)).last_hidden_state
        assert_same(both, "text encoding", both.model.get_learned_conditioning(texts), theirs)


def test_control_tensors(both):
    ours = both.model.control_model(x=both.x, hint=both.hint, timesteps=both.t, context=both.context)
    down, middle = both.controlnet(
        both.x, both.t, encoder_hidden_states=both.context, controlnet_cond=both.hint, return_dict=False
    )
    for i, (our, their) in enumerate(zip(ours, [*down, middle], strict=True)):
        assert_same(both, f"control tensor {i}", our, their)


def test_noise_prediction_with_control(both):
    ours = both.model.apply_model(both.x, both.t, condition(both, both.context))
    assert_same(both, "noise with control", ours, their_noise(both))


def test_noise_prediction_without_control(both):
    ours = both.model.apply_model(both.x, both.t, condition(both, both.context, control=False))
    theirs = both.unet(both.x, both.t, encoder_hidden_states=both.context).sample
    assert_same(both, "noise without control", ours, theirs)
    assert (theirs - their_noise(both)).abs().max() > 0.01 * theirs.abs().max()  # or control would go untested


def test_noise_prediction_with_guess_scales(both):
    scales = [0.825 ** (12 - i) for i in range(13)]
    both.model.control_scales = scales
    try:
        ours = both.model.apply_model(both.x, both.t, condition(both, both.context))
    finally:
        both.model.control_scales = [1.0] * 13
    assert_same(both, "noise with guess scales", ours, their_noise(both, scales))


def test_autoencoder(both):
    latents = both.x * 0.8
    theirs = both.vae.decode(latents / 0.18215).sample
    assert_same(both, "decoded picture", both.model.decode_first_stage(latents), theirs)
    pictures = both.hint * 2 - 1
    ours, theirs = both.model.first_stage_model.encode(pictures), both.vae.encode(pictures).latent_dist
    assert_same(both, "encoded means", ours.mode(), theirs.mode())
    assert_same(both, "encoded log variances", ours.logvar, theirs.logvar)


def test_the_whole_way_from_noise_to_picture(both):
    """Five DDIM steps with guidance 9 in diffusers' own pipeline, and the autoencoder after them."""
    from diffusers import StableDiffusionControlNetPipeline

    from tests.diffusers_schedulers import scheduler

    ours, _ = DDIMSampler(both.model).sample(
        5,
        2,
        (4, 16, 16),
        condition(both, both.context),
        unconditional_guidance_scale=9.0,
        unconditional_conditioning=condition(both, both.uncond_context),
        x_T=both.x,
    )
    pipeline = StableDiffusionControlNetPipeline(
        vae=both.vae,
        text_encoder=both.text_encoder,
        tokenizer=None,
        unet=both.unet,
        controlnet=both.controlnet,
        scheduler=scheduler("ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=both.context,
        negative_prompt_embeds=both.uncond_context,
        image=both.hint,
        latents=both.x,
        num_inference_steps=5,
        guidance_scale=9.0,
        output_type="latent",
    ).images
    assert_same(both, "latents after 5 steps", ours, theirs)
    theirs = both.vae.decode(theirs / 0.18215).sample
    assert_same(both, "picture after 5 steps", both.model.decode_first_stage(ours), theirs)
