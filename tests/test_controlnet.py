"""ControlNet computes the published function: figures measured from the published implementation, and diffusers'."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ControlNet.cldm import lightning
from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.model import MODELS_FOLDER, ModelError, create_model, load_model, load_state_dict
from ControlNet.ldm.schedule import ddim_timesteps
from ControlNet.ldm.text import tokenize
from tests import forks
from tests.little_config import relative_error
from tests.little_model import little_config
from tests.small_controlnet import reference_state_dict, small_config, small_model

REFERENCE = Path(__file__).parent / "reference"
PROMPTS = ["apple pie, best quality, extremely detailed", "golden_retriever, clean, clear, bright, neat"]
NEGATIVES = ["lowres, bad anatomy, worst quality", "blurry, dark, messy, dotted"]
GUESS_SCALES = [0.825 ** (12 - i) for i in range(13)]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def scales(model):
    """The model's control scales, put back to 1 after the test."""
    yield model
    model.control_scales = [1.0] * 13


@pytest.fixture(scope="module")
def figures():
    with np.load(REFERENCE / "controlnet_small.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    arrays["hint"] = arrays["hint"].float().repeat(1, 3, 1, 1)
    return arrays


def conditions(figures, control=True):
    hint = [figures["hint"]] if control else None
    return (
        {"c_concat": hint, "c_crossattn": [figures["context"]]},
        {"c_concat": hint, "c_crossattn": [figures["uncond_context"]]},
    )


def assert_close(ours, theirs, tolerance=1e-4):
    error = relative_error(ours, theirs)
    assert error < tolerance, f"relative error {error:.2e}"


# --- the published figures ---------------------------------------------------------------------------------------


def test_tokens_are_clips(figures):
    assert torch.equal(tokenize(PROMPTS), figures["tokens"])


def test_text_encodings(model, figures):
    assert_close(model.get_learned_conditioning(PROMPTS), figures["context"])
    assert_close(model.get_learned_conditioning(NEGATIVES), figures["uncond_context"])


def test_control_tensors(model, figures):
    control = model.control_model(
        x=figures["x"], hint=figures["hint"], timesteps=figures["t"], context=figures["context"]
    )
    assert len(control) == 13
    for tensor, mean, std in zip(control, figures["control_mean"], figures["control_std"], strict=True):
        assert tensor.mean().item() == pytest.approx(mean.item(), abs=1e-4 * std.item())
        assert tensor.std().item() == pytest.approx(std.item(), rel=1e-4)
    assert_close(control[-1], figures["control_last"])


def test_noise_prediction_with_and_without_control(model, figures):
    cond, _ = conditions(figures)
    assert_close(model.apply_model(figures["x"], figures["t"], cond), figures["eps"])
    cond, _ = conditions(figures, control=False)
    assert_close(model.apply_model(figures["x"], figures["t"], cond), figures["eps_no_control"])


def test_noise_prediction_with_guess_scales(scales, figures):
    scales.control_scales = GUESS_SCALES
    cond, _ = conditions(figures)
    assert_close(scales.apply_model(figures["x"], figures["t"], cond), figures["eps_guess_scales"])


def test_ddim_trajectory(model, figures):
    cond, uncond = conditions(figures)
    sampler = DDIMSampler(model)
    latents, _ = sampler.sample(
        5,
        2,
        (4, 16, 8),
        cond,
        eta=0.0,
        unconditional_guidance_scale=9.0,
        unconditional_conditioning=uncond,
        x_T=figures["x"],
    )
    assert sampler.ddim_timesteps.tolist() == figures["ddim_timesteps"].tolist()
    assert_close(latents, figures["ddim_latents"])


def test_decoded_image(model, figures):
    assert_close(model.decode_first_stage(figures["decode_input"]), figures["decoded"])


# --- the sampler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "count", "last"), [(20, 20, 951), (50, 50, 981), (7, 8, 995), (1000, 1000, 999)])
def test_ddim_timesteps(steps, count, last):
    timesteps = ddim_timesteps(steps)
    assert (len(timesteps), timesteps[0], timesteps[-1]) == (count, 1, last)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be between"):
        ddim_timesteps(steps)


def test_guess_mode_runs_the_branches_apart(scales, figures):
    """No control in the unconditional branch: one step must equal the two predictions put together by hand."""
    scales.control_scales = GUESS_SCALES
    cond, _ = conditions(figures)
    _, uncond = conditions(figures, control=False)
    sampler = DDIMSampler(scales)
    latents, _ = sampler.sample(
        1, 2, (4, 16, 8), cond, unconditional_guidance_scale=4.5, unconditional_conditioning=uncond, x_T=figures["x"]
    )
    t = torch.full((2,), 1)
    on, off = (scales.apply_model(figures["x"], t, c) for c in (cond, uncond))
    eps = off + 4.5 * (on - off)
    a, previous = scales.alphas_cumprod[1], scales.alphas_cumprod[0]
    x0 = (figures["x"] - (1 - a).sqrt() * eps) / a.sqrt()
    assert_close(latents, previous.sqrt() * x0 + (1 - previous).sqrt() * eps, 1e-5)


def test_eta_adds_noise_that_the_generator_decides(model, figures):
    cond, _ = conditions(figures)

    def sample(seed, eta=1.0):
        torch.manual_seed(seed)
        return DDIMSampler(model).sample(2, 2, (4, 16, 8), cond, eta=eta, x_T=figures["x"])[0]

    assert torch.equal(sample(1), sample(1))
    assert not torch.allclose(sample(1), sample(2))
    assert torch.equal(sample(1, eta=0.0), sample(2, eta=0.0))


def test_a_wrongly_shaped_start_is_refused(model, figures):
    cond, _ = conditions(figures)
    with pytest.raises(ValueError, match="x_T has shape"):
        DDIMSampler(model).sample(2, 2, (4, 8, 8), cond, x_T=figures["x"])


# --- independent implementations ---------------------------------------------------------------------------------


def test_tokenizer_agrees_with_transformers(tmp_path):
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    from ControlNet.ldm import text

    ours: Tokenizer = text._tokenizer()
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text(json.dumps(ours.get_vocab()))
    pairs = json.loads(ours.to_str())["model"]["merges"]
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs), encoding="utf-8")
    try:
        theirs = CLIPTokenizer(str(vocabulary), str(merges))
    except (TypeError, ValueError):
        theirs = CLIPTokenizer(vocab=ours.get_vocab(), merges=[tuple(pair) for pair in pairs])
    texts = [
        "",
        "Crème brûlée, it's 2 o'clock!!",
        "A   photo\tof\na 猫 and ß",
        "x" * 500,
        "001.ak47 {label}",
        "🍕 pizza",
    ]
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert tokenize(texts).tolist() == expected


def test_sampling_agrees_with_diffusers_ddim(model, figures):
    """Our steps against diffusers' scheduler, both on our noise prediction."""
    diffusers = pytest.importorskip("diffusers")
    cond, uncond = conditions(figures)
    ours, _ = DDIMSampler(model).sample(
        5, 2, (4, 16, 8), cond, unconditional_guidance_scale=9.0, unconditional_conditioning=uncond, x_T=figures["x"]
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(5)
    x = figures["x"]
    for t in scheduler.timesteps:
        on, off = (model.apply_model(x, torch.full((2,), int(t)), c) for c in (cond, uncond))
        x = scheduler.step(off + 9.0 * (on - off), t, x).prev_sample
    assert_close(ours, x)


# --- the published interface of the model ------------------------------------------------------------------------


def test_one_string_is_one_text(model):
    assert torch.equal(model.get_learned_conditioning(PROMPTS[0]), model.get_learned_conditioning(PROMPTS[:1]))
    assert torch.equal(tokenize(PROMPTS[0]), tokenize([PROMPTS[0]]))
    assert torch.equal(model.get_unconditional_conditioning(2), model.get_learned_conditioning(["", ""]))


def test_the_text_encoder_has_a_tokenizer(model):
    encoder = model.cond_stage_model
    batch = encoder.tokenizer(
        PROMPTS, truncation=True, max_length=encoder.max_length, padding="max_length", return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], tokenize(PROMPTS))
    assert torch.equal(encoder.encode(PROMPTS), encoder(PROMPTS))


def test_what_the_config_says_is_kept(model):
    names = ("first_stage_key", "cond_stage_key", "control_key", "channels", "parameterization", "control_scales")
    assert [getattr(model, name) for name in names] == ["jpg", "txt", "hint", 4, "eps", [1.0] * 13]
    with pytest.raises(ModelError, match="parameterization must be eps"):
        create_model(OmegaConf.merge(small_config(), {"model": {"params": {"parameterization": "v"}}}))


def test_encoding_gives_a_distribution_over_unscaled_latents(model):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = model.encode_first_stage(images)
    mean, logvar = posterior.parameters.chunk(2, dim=1)
    assert torch.equal(posterior.mode(), mean)
    torch.manual_seed(5)
    expected = 0.18215 * (mean + (logvar / 2).exp() * torch.randn(mean.shape))
    torch.manual_seed(5)
    assert_close(model.get_first_stage_encoding(posterior), expected, 1e-6)
    assert torch.equal(model.get_first_stage_encoding(mean), 0.18215 * mean)


def test_low_vram_shift_without_a_gpu_changes_nothing(model, figures):
    cond, _ = conditions(figures)
    model.low_vram_shift(is_diffusing=True)
    assert_close(model.apply_model(figures["x"], figures["t"], cond), figures["eps"])
    model.low_vram_shift(is_diffusing=False)


# --- names, shapes, loading --------------------------------------------------------------------------------------


def test_the_full_size_model_has_the_official_names_and_shapes():
    with torch.device("meta"):  # no memory behind the tensors
        model = create_model(MODELS_FOLDER / "cldm_v15.yaml")
    official = json.loads((REFERENCE / "control_sd15_canny.keys.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == official
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (
            ("unet", model.model),
            ("control", model.control_model),
            ("autoencoder", model.first_stage_model),
            ("text", model.cond_stage_model),
        )
    }
    assert counts == {"unet": 859520964, "control": 361279120, "autoencoder": 83653863, "text": 123060480}


def test_loading_draws_no_random_numbers(tmp_path, checkpoint):
    path = write_config(tmp_path / "small.pth")
    torch.save(checkpoint, path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_model(path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def fresh():
    """Built after a model of the same size was freed, whose memory it may have got."""
    other = create_model(small_config())
    other.load_state_dict(reference_state_dict(other))
    del other
    return lightning.create_model(small_config())


def test_a_fresh_control_network_changes_nothing(fresh):
    """ControlNet section 3.1: zero convolutions, so training starts from the plain UNet."""
    x, hint, context = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 64, 64), torch.randn(1, 77, 64)
    control = fresh.control_model(x=x, hint=hint, timesteps=torch.tensor([10]), context=context)
    assert all(not tensor.any() for tensor in control)


def test_a_fresh_model_has_the_published_initial_values(fresh):
    """Zero where they are: zero convolutions, and the last layer of a block's residual branch.  Random elsewhere."""
    names = dict(fresh.named_parameters())
    zero = {name for name, parameter in names.items() if parameter.ndim > 1 and not parameter.any()}
    assert zero == {
        name
        for name in names
        if (name.endswith(("out_layers.3.weight", "proj_out.weight")) and not name.startswith("first_stage_model"))
        or (name.startswith(("control_model.zero_convs", "control_model.middle_block_out")) and name.endswith("weight"))
        or name in ("control_model.input_hint_block.14.weight", "model.diffusion_model.out.2.weight")
    }
    for name, parameter in names.items():
        assert parameter.isfinite().all(), name
        if name.startswith("control_model.input_hint_block") and parameter.any() and name.endswith("weight"):
            bound = parameter[0].numel() ** -0.5  # torch's default for a convolution: uniform in +-1/sqrt(fan in)
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_the_hint_can_be_learned(fresh):
    """A ControlNet trained from initial values feels its hint, though it starts at zero."""
    generator = torch.Generator().manual_seed(0)
    hints = (torch.rand(2, 3, 64, 64, generator=generator) < 0.1).float()
    batch = {"x_start": torch.randn(2, 4, 8, 8, generator=generator), "noise": torch.randn(2, 4, 8, 8)}
    context = torch.randn(2, 77, 64, generator=generator)
    fresh.learning_rate = 1e-3
    for parameter in fresh.model.diffusion_model.out.parameters():  # starts at zero, too, and would pass nothing back
        parameter.data.normal_(0, 0.1, generator=generator)
    fresh.sd_locked = True
    optimizer = fresh.configure_optimizers()
    for _ in range(4):
        cond = {"c_concat": [hints], "c_crossattn": [context]}
        loss, _ = fresh.p_losses(cond=cond, t=torch.tensor([500, 100]), **batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        eps, other = (
            fresh.apply_model(batch["noise"], torch.tensor([500, 100]), {"c_concat": [h], "c_crossattn": [context]})
            for h in (hints, hints.flip(-1))
        )
    assert (eps - other).abs().max() > 1e-7


@pytest.fixture(scope="module")
def checkpoint(model):
    return dict(model.state_dict())


def write_config(path):
    OmegaConf.save(small_config(), path.with_suffix(".yaml"))
    return path


def test_the_public_way_of_loading(tmp_path, checkpoint, figures):
    path = tmp_path / "small.pth"
    torch.save(checkpoint, path)
    model = create_model(small_config()).cpu()
    model.load_state_dict(load_state_dict(path, location="cpu"))
    cond, _ = conditions(figures)
    assert_close(model.apply_model(figures["x"], figures["t"], cond), figures["eps"])


def test_bfloat16_networks_keep_the_tables_exact(tmp_path, checkpoint, figures):
    path = write_config(tmp_path / "small.pth")
    torch.save(checkpoint, path)
    model = load_model(path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.alphas_cumprod, checkpoint["alphas_cumprod"])
    cond, uncond = conditions(figures)
    cond, uncond = ({k: [x.bfloat16() for x in v] for k, v in c.items()} for c in (cond, uncond))
    latents, _ = DDIMSampler(model).sample(2, 2, (4, 16, 8), cond, x_T=figures["x"])
    assert latents.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "os.system"}, "unknown target 'os.system'"),
        ({"params": {"linear_begin": 1}}, "cldm.cldm.ControlLDM: .* unexpected keyword argument 'linear_begin'"),
    ],
)
def test_configs_can_name_only_what_is_known(change, message):
    config = OmegaConf.merge(small_config(), {"model": change})
    with pytest.raises(ModelError, match=message):
        create_model(config)


def test_reference_weights_cover_every_network(model):
    """Guards the tests above: weights that were left out would compare equal for the wrong reason."""
    state = reference_state_dict(model)
    assert all(tensor.std() > 0 for name, tensor in state.items() if name.endswith(".weight"))


# --- other machines ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 1e-1)])
def test_a_gpu_predicts_what_the_cpu_does(dtype, tolerance, model, figures, tmp_path, checkpoint):
    path = write_config(tmp_path / "small.pth")
    torch.save(checkpoint, path)
    on_gpu = load_model(path, device="cuda", dtype=dtype)
    cond, _ = conditions(figures)
    cond = {name: [x.to("cuda", dtype) for x in tensors] for name, tensors in cond.items()}
    eps = on_gpu.apply_model(figures["x"].to("cuda", dtype), figures["t"].cuda(), cond)
    assert_close(eps.float().cpu(), figures["eps"], tolerance)


TRAINING = """
import torch
from torch.utils.data import DataLoader
{imports}
from cldm.cldm import ControlLDM
from ldm.models.diffusion.ddpm import LatentDiffusion
import ControlNet.cldm.model as plain

assert isinstance(model, ControlLDM) and isinstance(model, LatentDiffusion) and isinstance(model, pl.LightningModule)
assert not isinstance(plain.create_model("little.yaml"), pl.LightningModule)
before = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
picture = torch.rand(64, 64, 3)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = pl.Trainer(accelerator="cpu", max_steps=2, **quiet)
trainer.fit(model, DataLoader([{{"jpg": picture * 2 - 1, "txt": "digit", "hint": picture}}] * 4, batch_size=2))
changed = {{name.split(".")[0] for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}}
assert changed == {{"control_model"}}, changed
"""
MODEL_FIRST = """
from cldm.model import create_model
model = create_model("little.yaml")
import pytorch_lightning as pl
"""
LIGHTNING_FIRST = """
import pytorch_lightning as pl
from cldm.model import create_model
model = create_model("little.yaml")
"""


@pytest.mark.parametrize("imports", [MODEL_FIRST, LIGHTNING_FIRST])
def test_a_trainer_takes_the_published_model_in_either_order_of_imports(imports, tmp_path):
    OmegaConf.save(little_config(), tmp_path / "little.yaml")
    script = TRAINING.format(imports=imports)
    ended = forks.run(["-c", script], cwd=tmp_path, env={"PYTHONPATH": str(MODELS_FOLDER.parent)})
    assert ended.returncode == 0, ended.stderr


def test_commands_do_not_import_lightning():
    commands = (
        "import sys, main, compress.run, compress.generators.build, compress.training.on_demand, ControlNet.train"
    )
    ended = forks.run(["-c", f"{commands}\nassert 'pytorch_lightning' not in sys.modules"])
    assert ended.returncode == 0, ended.stderr
