"""Samplers against diffusers' schedulers, and the deterministic ones against a solution that is known."""

import itertools

import numpy as np
import pytest
import torch

from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.ldm.schedule import Schedule
from ControlNet.sampling import SAMPLERS, Guided, make_schedule
from tests.conftest import long_but
from tests.diffusers_schedulers import SCHEDULERS, scheduler
from tests.little_config import relative_error
from tests.little_model import little_model, sampled

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def model():
    return little_model()


@pytest.fixture(scope="module")
def full_model():
    """Stable Diffusion 1.5's sizes, with random weights."""
    from ControlNet.cldm.model import MODELS_FOLDER, create_empty_model
    from tests.small_controlnet import reference_state_dict

    model = create_empty_model(MODELS_FOLDER / "cldm_v15.yaml")
    model.load_state_dict(reference_state_dict(model), assign=True)
    return model.eval().requires_grad_(False)


def prompts(model, text="apple pie, best quality", seed=0):
    """Two pictures' initial noise, conditioning and unconditional conditioning."""
    generator = torch.Generator().manual_seed(seed)
    hint = (torch.rand((2, 3, 64, 64), generator=generator) > 0.95).float()
    cond, uncond = (
        {"c_concat": [hint], "c_crossattn": [model.get_learned_conditioning([t] * 2)]} for t in (text, "low quality")
    )
    return torch.randn((2, *SHAPE), generator=generator), cond, uncond


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(name, model, steps, guidance=9.0, **options):
    x, cond, uncond = prompts(model)
    uncond = None if guidance is None else uncond
    return sampled(model, name, steps, (2, *SHAPE), cond, uncond, guidance, **{"x": x, **options})


def published(model, steps, guidance=9.0, **options):
    """By the published class, with the same inputs."""
    x, cond, uncond = prompts(model)
    options = {"x_T": x, "unconditional_conditioning": uncond, "unconditional_guidance_scale": guidance, **options}
    return DDIMSampler(model).sample(steps, 2, SHAPE, cond, **{"verbose": False, **options})


def by_scheduler(model, name, steps, inputs, guidance, generator):
    """Latents by diffusers' scheduler, from our model's noise predictions."""
    pytest.importorskip("diffusers")
    theirs, options = scheduler(name), SCHEDULERS[name][2]
    if name == "ancestral":
        theirs.set_timesteps(timesteps=np.linspace(850, 50, steps).round().astype(int).tolist())
    else:
        theirs.set_timesteps(steps)
    if name in ("lcm", "tcd", "ancestral"):
        options = {**options, "generator": generator}
    x, cond, uncond = inputs
    with torch.no_grad():
        for t in theirs.timesteps:
            on, off = (model.apply_model(x, torch.full((len(x),), int(t)), c) for c in (cond, uncond))
            x = theirs.step(off + guidance * (on - off), t, x, **options).prev_sample
    return x


EACH_SAMPLER = [(name, steps) for name in SAMPLERS for steps in (1, 4, 8)]


@pytest.mark.parametrize(("name", "steps"), long_but(EACH_SAMPLER, ("ddim", 1), *((name, 4) for name in SAMPLERS)))
def test_samplers_agree_with_diffusers(name, steps, model):
    eta = SCHEDULERS[name][2].get("eta", 0.0)
    ours = sample(name, model, steps, eta=eta, generator=generators(5, 6))
    theirs = by_scheduler(model, name, steps, prompts(model), 9.0, generators(5, 6))
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("steps", long_but((5, 7, 15), 7))
def test_dpm_solver_agrees_with_diffusers_at_odd_steps(steps, model):
    ours = sample("dpm++2m", model, steps)
    theirs = by_scheduler(model, "dpm++2m", steps, prompts(model), 9.0, None)
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.slow(reason="needs 7 GB and minutes")
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_agree_with_diffusers_at_full_size(name, full_model):
    x, cond, uncond = prompts(full_model)
    eta = SCHEDULERS[name][2].get("eta", 0.0)
    ours = sampled(full_model, name, 2, (2, *SHAPE), cond, uncond, x=x, eta=eta, generator=generators(5, 6))
    theirs = by_scheduler(full_model, name, 2, (x, cond, uncond), 9.0, generators(5, 6))
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize(("name", "eta"), [("lcm", 0.0), ("tcd", 0.3), ("ddim", 1.0), ("ancestral", 0.0)])
def test_an_item_with_a_generator_of_its_own_does_not_depend_on_its_batch(name, eta, model):
    together = sample(name, model, 4, eta=eta, x=None, generator=generators(5, 6))
    other = sample(name, model, 4, eta=eta, x=None, generator=generators(5, 7))
    assert torch.equal(together[0], other[0])
    assert not torch.allclose(together[1], other[1])
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        sample(name, model, 4, eta=eta, generator=generators(5, 6, 7), x=None)


def test_reused_features_cost_less_and_change_little():
    """Every step computed is the plain result; between, only the shallow blocks run, of UNet and control network."""
    model = little_model()
    plain = sample("ddim", model, 10)
    calls = {"middle": 0, "shallow": 0, "control": 0}
    for name, block in (
        ("middle", model.model.diffusion_model.middle_block),
        ("shallow", model.model.diffusion_model.output_blocks[-1]),
        ("control", model.control_model.middle_block),
    ):
        block.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    every = sample("ddim", model, 10, reuse_every=1)
    assert torch.equal(every, plain)
    assert calls == {"middle": 10, "shallow": 10, "control": 10}
    calls.update(dict.fromkeys(calls, 0))
    second = sample("ddim", model, 10, reuse_every=2)
    assert calls == {"middle": 5, "shallow": 10, "control": 5}
    fifth = sample("ddim", model, 10, reuse_every=5)
    errors = [((latents - plain).norm() / plain.norm()).item() for latents in (second, fifth)]
    assert 1e-4 < errors[0] < errors[1]
    assert errors[0] < 0.5


def test_a_step_that_reuses_its_own_features_is_the_plain_one(model):
    """At an unchanged input nothing is lost: what is reused is what would be computed."""
    x, cond, uncond = prompts(model)
    t = torch.full((2,), 500)
    predict = Guided(model, cond, uncond, reusing=True)
    with torch.no_grad():
        first = predict(x, t, 9.0)
        assert torch.allclose(predict(x, t, 9.0, reuse=True), first, atol=1e-5)
        changed = predict(x + 0.1, t, 9.0, reuse=True)
        assert not torch.allclose(changed, predict(x + 0.1, t, 9.0), atol=1e-5)


def test_guidance_1_skips_the_unconditional_branch(model, monkeypatch):
    batches = []
    predict = model.apply_model
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond: batches.append(len(x)) or predict(x, t, cond))
    unguided = sample("ddim", model, 4, guidance=1.0)
    assert batches == [2] * 4
    sample("ddim", model, 4, guidance=1.5)
    assert batches[4:] == [4] * 4
    plain = sample("ddim", model, 4, guidance=None)
    assert torch.equal(unguided, plain)


def test_the_timesteps_are_evenly_spaced_from_the_last():
    schedule = make_schedule("dpm++2m", little_model(), 20)
    assert schedule.timesteps == [round(999 * (20 - i) / 20) for i in range(20)]
    assert len(schedule.alphas) == 21
    assert np.square(schedule.alphas) + np.square(schedule.sigmas) == pytest.approx(np.ones(21))
    assert (schedule.alphas[-1], schedule.sigmas[-1]) == (1, 0)
    assert (np.diff(schedule.lambdas) > 0).all()


class FineSchedule:
    """What a sampler asks of a model, with timesteps so fine that rounding to them is not seen."""

    num_timesteps = 100_001
    alphas_cumprod = (-torch.linspace(0.001, 6.0, num_timesteps, dtype=torch.float64)).exp()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm++2m", 2), ("unipc", 3)])
def test_the_order_of_convergence(name, order):
    """Half the step size: a half of DDIM's error, a quarter of DPM-Solver++ 2M's, an eighth of UniPC's, whose
    corrector adds an order.

    Of data that are Gaussian, with mean 0 and variance v, the way is known: eps(x, t) = sigma_t x / s_t^2, where
    s_t^2 = alpha_t^2 v + sigma_t^2 is the variance at t; and x_t / s_t never changes.
    """

    def spread(alpha, sigma):
        return (alpha**2 * 0.5 + sigma**2) ** 0.5

    def error(steps):
        whole, half = make_schedule(name, FineSchedule, steps), steps // 2  # the end lies elsewhere for each number
        alphas, sigmas = whole.alphas[: half + 1], whole.sigmas[: half + 1]
        schedule = Schedule(whole.timesteps[:half], alphas, sigmas, whole.alphas_cumprod)

        def denoise(x, i):
            return sigmas[i] * x / spread(alphas[i], sigmas[i]) ** 2

        x = SAMPLERS[name].sample(denoise, torch.ones((), dtype=torch.float64), schedule, None, 0.0)
        return abs(float(x - spread(alphas[-1], sigmas[-1]) / spread(alphas[0], sigmas[0])))

    errors = [error(steps) for steps in (50, 100, 200)]
    for coarse, fine in itertools.pairwise(errors):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_all_samplers_have_the_same_interface(model):
    for name in SAMPLERS:
        latents = sample(name, model, 5, generator=generators(1, 2))
        assert latents.shape == (2, *SHAPE)
        assert latents.dtype == torch.float32
        assert torch.equal(sample(name, model, 5, generator=generators(1, 2)), latents)


def test_the_published_class_samples_the_same(model):
    steps = []
    latents, way = published(model, 5, callback=steps.append, log_every_t=2)
    assert steps == [0, 1, 2, 3, 4]
    assert len(way["x_inter"]) == len(way["pred_x0"]) == 4  # the noise, and after steps 0, 2 and 4
    assert torch.equal(way["x_inter"][-1], latents)
    assert torch.equal(sample("ddim", model, 5), latents)


# --- the published sampler's arguments ---------------------------------------------------------------------------
# Expected values come from DDIM's equation 12, written out below, with noise drawn where the published sampler draws.


def reference(model, steps, *, seed, eta=0.0, scale=1.0, scales=None, temperature=1.0, mask=None, x0=None, factor=1.0):
    _, cond, uncond = prompts(model)
    torch.manual_seed(seed)
    x = torch.randn(2, *SHAPE)
    timesteps = list(range(1, 1000, 1000 // steps))
    cumprod = model.alphas_cumprod.double()
    for i, t in enumerate(reversed(timesteps)):
        a, previous = cumprod[t], cumprod[0 if t == 1 else t - 1000 // steps]
        sigma = eta * ((1 - previous) / (1 - a) * (1 - a / previous)).sqrt()
        if mask is not None:
            kept = cumprod[t].sqrt() * x0 + (1 - cumprod[t]).sqrt() * torch.randn(2, *SHAPE)
            x = kept.float() * mask + (1 - mask) * x
        on, off = (model.apply_model(x, torch.full((2,), t), c) for c in (cond, uncond))
        eps = factor * (off + (scales[i] if scales else scale) * (on - off))
        predicted = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = previous.sqrt() * predicted + (1 - previous - sigma**2).sqrt() * eps
        x = (x + sigma * temperature * torch.randn(2, *SHAPE)).float()
    return x, torch.rand(1)


class Halve:
    def modify_score(self, model, eps, x, t, conditioning, factor):
        return factor * eps


MASK = (torch.arange(8) < 4).float().expand(2, 1, 8, 8)
KEPT = torch.linspace(-1, 1, 2 * 4 * 64).reshape(2, *SHAPE)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"unconditional_guidance_scale": 3.0}, {"scale": 3.0}),
        ({"eta": 1.0, "temperature": 0.7}, {"eta": 1.0, "temperature": 0.7}),
        ({"mask": MASK, "x0": KEPT}, {"mask": MASK, "x0": KEPT}),
        ({"ucg_schedule": [1.0, 2.0, 3.0, 0.5, 4.0]}, {"scales": [1.0, 2.0, 3.0, 0.5, 4.0]}),
        ({"score_corrector": Halve(), "corrector_kwargs": {"factor": 0.5}}, {"factor": 0.5}),
    ],
)
def test_the_published_arguments(model, ours, theirs):
    _, cond, uncond = prompts(model)
    torch.manual_seed(3)
    latents, _ = DDIMSampler(model).sample(
        5, 2, SHAPE, cond, verbose=False, unconditional_conditioning=uncond, **ours
    )  # fmt: skip
    draw = torch.rand(1)
    expected, next_draw = reference(model, 5, seed=3, **theirs)
    assert relative_error(latents, expected) < 1e-5
    assert torch.equal(draw, next_draw)  # a script that goes on drawing gets the published numbers


def test_callbacks_get_every_step(model):
    seen = []
    published(model, 3, img_callback=lambda x0, i: seen.append((i, x0.shape)), noise_dropout=0.5)
    assert seen == [(i, (2, *SHAPE)) for i in range(4)]  # 1000 // 3 = 333: four timesteps, as published


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"quantize_x0": True}, "codebook"),
        ({"dynamic_threshold": 0.9}, "dynamic_threshold is not supported"),
        ({"normals_sequence": [1]}, "normals_sequence is not supported"),
        ({"ucg_schedule": [1.0]}, "1 scales for 5 steps"),
        ({"mask": MASK}, "mask needs x0"),
    ],
)
def test_arguments_that_can_not_be_used_are_refused(model, option, message):
    with pytest.raises(ValueError, match=message):
        published(model, 5, **option)
    with pytest.raises(ValueError, match="conditioning must be"):
        DDIMSampler(model).sample(5, 2, SHAPE, torch.zeros(2, 77, 32))


def test_a_script_with_a_loop_of_its_own_samples_the_same(model):
    x, cond, uncond = prompts(model)
    guided = {"unconditional_guidance_scale": 4.0, "unconditional_conditioning": uncond}
    expected, _ = published(model, 4, guidance=4.0)
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=4, ddim_eta=0.0, verbose=False)
    assert torch.equal(sampler.decode(x, cond, 4, **guided), expected)
    for index in reversed(range(4)):
        t = torch.full((2,), sampler.ddim_timesteps[index])
        x, predicted = sampler.p_sample_ddim(x, cond, t, index, **guided)
    assert torch.equal(x, expected)
    assert predicted.shape == x.shape


def test_from_a_start_ddim_is_the_published_image_to_image(model):
    """stochastic_encode, then decode with the last steps of the schedule."""
    (_, cond, uncond), steps = prompts(model), 8
    noise, start = torch.randn((2, 2, *SHAPE), generator=torch.Generator().manual_seed(1))
    options = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uncond}
    ours = sampled(model, "ddim", steps, (2, *SHAPE), cond, uncond, 3.0, x=noise, start=start, strength=0.5)
    sampler = DDIMSampler(model)
    sampler.make_schedule(steps, verbose=False)
    noisy = sampler.stochastic_encode(start, torch.tensor([steps // 2 - 1] * 2), noise=noise)
    torch.testing.assert_close(ours, sampler.decode(noisy, cond, steps // 2, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_goes_on_from_a_start(name, model, monkeypatch):
    """Where the noise that was added is predicted, the start comes back; and only the last steps are computed."""
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    start, calls = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), []

    def added_noise(x, t, cond):
        calls.append(int(t))
        alpha = model.alphas_cumprod[t].double()
        return ((x - alpha.sqrt() * start) / (1 - alpha).sqrt()).float()

    monkeypatch.setattr(model, "apply_model", added_noise)
    cond = {"c_concat": None, "c_crossattn": [torch.zeros(1, 77, 64)]}
    for strength, expected in ((0.5, 4), (1.0, 8), (0.01, 1)):
        calls.clear()
        options = {"x": noise, "start": start, "strength": strength, "generator": generators(0)}
        latents = sampled(model, name, 8, (1, 4, 8, 8), cond, **options)
        assert len(calls) == expected
        torch.testing.assert_close(latents, start, rtol=0, atol=0.1)


def test_inversion_leads_back(model):
    _, cond, _ = prompts(model)
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=200, verbose=False)
    noisy, out = sampler.encode(KEPT, cond, 40, return_intermediates=2)
    assert out["intermediate_steps"] == [0, 20, 38, 39]
    assert torch.equal(out["x_encoded"], noisy)
    back = sampler.decode(noisy, cond, 40)
    assert (back - KEPT).norm() < 0.1 * (noisy - KEPT).norm()


def test_latents_are_noised_as_the_schedule_says(model):
    sampler = DDIMSampler(model)
    sampler.make_schedule(5)
    noise = torch.randn(2, *SHAPE)
    index = torch.tensor([4, 0])
    a = model.alphas_cumprod[torch.tensor([801, 1])][:, None, None, None]
    expected = a.sqrt() * KEPT + (1 - a).sqrt() * noise
    assert torch.allclose(sampler.stochastic_encode(KEPT, index, noise=noise), expected, atol=1e-6)
    original = sampler.stochastic_encode(KEPT, torch.tensor([801, 1]), use_original_steps=True, noise=noise)
    assert torch.allclose(original, expected, atol=1e-6)


def test_what_the_solver_cannot_do_is_refused(model):
    for name, eta in (("dpm++2m", 0.5), ("lcm", 0.5), ("tcd", 2.0)):
        with pytest.raises(ValueError, match=rf"eta {eta} is not for the sampler"):
            sample(name, model, 4, eta=eta)
    with pytest.raises(ValueError, match="steps must be between 1 and 50"):
        sample("lcm", model, 51)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps must be between 1 and 1000"):
            sample("dpm++2m", model, steps)
    assert len(make_schedule("dpm++2m", model, 1000).timesteps) == 999  # timestep 0 is as good as the clean picture
