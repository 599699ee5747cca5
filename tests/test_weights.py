"""Weights in every form that people have load to the same model."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ControlNet.cldm.model import ModelError, load_model, load_state_dict, weights_fingerprint
from tests.conftest import long_but
from tests.little_model import CONTROL, little_config, little_model, only, without, write


@pytest.fixture(scope="module")
def official(state, tmp_path_factory):
    """The checkpoint that all the other forms must equal."""
    return write(tmp_path_factory.mktemp("official") / "official.safetensors", state)


def to(dtype, state):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def assert_holds(model, state, tolerance=0.0):
    """Every tensor of the model is the state's, within tolerance of the tensor's largest value."""
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        assert (ours[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


# --- files -------------------------------------------------------------------------------------------------------

FILES = {
    "official": lambda s: s,
    "nested": lambda s: {"state_dict": s, "global_step": 3, "epoch": 0},
    "no position_ids": lambda s: {n: t for n, t in s.items() if "position_ids" not in n},
    "text model's new names": lambda s: {n.replace(".text_model.", "."): t for n, t in s.items()},
    "no tables": lambda s: {n: t for n, t in s.items() if "." in n},
    "averages and losses besides": lambda s: (
        s | {"model_ema.decay": torch.tensor(0.9), "first_stage_model.loss.logvar": torch.zeros(1)}
    ),
    "float64": lambda s: to(torch.float64, s),
}


CASES = [(form, ending) for form in FILES for ending in ("pth", "ckpt", "safetensors")]
QUICK = [(form, ending) for form, ending in CASES if form == "official" or ending == "safetensors"]
QUICK += [("nested", "pth")]


@pytest.mark.parametrize(("form", "ending"), long_but(CASES, *QUICK))
def test_files_of_the_same_weights_make_the_same_model(form, ending, state, official, tmp_path):
    if (form, ending) == ("nested", "safetensors"):
        pytest.skip("safetensors holds tensors alone")
    path = write(tmp_path / f"model.{ending}", FILES[form](state))
    model = load_model(path)
    assert_holds(model, state)
    assert model.dtype == torch.float32
    assert model.fingerprint == weights_fingerprint(path) == weights_fingerprint(official)


def test_a_file_of_a_distributed_training_loads(state, official, tmp_path):
    path = write(tmp_path / "ddp.safetensors", {f"module.{name}": tensor for name, tensor in state.items()})
    assert load_model(path).fingerprint == weights_fingerprint(official)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_loading_leaves_the_weights_in_the_file(ending, tmp_path):
    """On the CPU nothing is copied: a tensor's pages stay unread until it is used."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    path = write(tmp_path / f"big.{ending}", {"control_model.big": torch.ones(32, 2**20)}, config=False)
    before = resident()
    tensors = load_state_dict(path)
    assert resident() - before < path.stat().st_size / 4
    assert tensors["control_model.big"].sum() == 2**25


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_of_lower_precision(dtype, tolerance, ending, state, official, tmp_path):
    model = load_model(write(tmp_path / f"model.{ending}", to(dtype, state)))
    assert model.dtype == torch.float32
    assert_holds(model, state, tolerance)
    assert torch.equal(model.alphas_cumprod, state["alphas_cumprod"])  # a schedule of rounded steps would be another
    if dtype == torch.float16:
        assert model.fingerprint == weights_fingerprint(official)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_lower_precision_keep_tables_and_fingerprint(dtype, state, official):
    model = load_model(official, dtype=dtype)
    decoder = {parameter.dtype for parameter in model.first_stage_model.parameters()}
    assert decoder == {torch.float32 if dtype == torch.float16 else dtype}  # which float16 overflows
    model.first_stage_model = None
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.alphas_cumprod.dtype == torch.float32
    assert torch.equal(model.alphas_cumprod, state["alphas_cumprod"])
    assert model.fingerprint == weights_fingerprint(official)


@pytest.mark.parametrize(("made_by", "ending"), [("safetensors", "ckpt"), ("zip", "safetensors"), ("old torch", "pth")])
def test_a_file_is_read_by_what_it_holds(made_by, ending, state, tmp_path):
    path = tmp_path / f"model.{ending}"
    if made_by == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=made_by == "zip")
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_fingerprint_tells_weights_apart(state, official, tmp_path):
    for name in ("control_model.zero_convs.0.0.bias", "cond_stage_model.transformer.text_model.final_layer_norm.bias"):
        changed = write(tmp_path / "changed.safetensors", state | {name: state[name] + 1})
        assert weights_fingerprint(changed) != weights_fingerprint(official)
    assert re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{8}", weights_fingerprint(official))


OTHER_CONFIGS = {
    "linear_start": 0.001,
    "scale_factor": 0.13025,
    "only_mid_control": True,
    "unet_config.params.num_heads": 4,
    "control_stage_config.params.num_heads": 4,
    "cond_stage_config.params.num_attention_heads": 4,
}


@pytest.mark.parametrize("where", long_but(OTHER_CONFIGS, "linear_start", "control_stage_config.params.num_heads"))
def test_a_fingerprint_tells_configs_apart_whose_pictures_differ(where, state, official, tmp_path):
    """Equal tensors under another config make other pictures, though no shape differs."""
    path = write(tmp_path / "other.safetensors", state)
    config = little_config()
    OmegaConf.update(config, f"model.params.{where}", OTHER_CONFIGS[where])
    OmegaConf.save(config, path.with_suffix(".yaml"))
    other, same = weights_fingerprint(path), weights_fingerprint(official)
    assert other != same
    assert other.partition(".")[0] == same.partition(".")[0]
    assert load_model(path).fingerprint == other


def test_a_fingerprint_knows_defaults_and_ignores_what_changes_no_picture(state, official, tmp_path):
    path = write(tmp_path / "other.safetensors", state)
    config = little_config()
    del config.model.params.scale_factor  # 0.18215 by default, too
    config.model.params.monitor = "val/loss"
    OmegaConf.save(config, path.with_suffix(".yaml"))
    assert weights_fingerprint(path) == weights_fingerprint(official)


def test_a_model_that_was_not_loaded_has_no_fingerprint():
    assert little_model().fingerprint == ""


# --- a control network and its base ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["official", "float16 safetensors", "no prefix"])
def test_a_control_network_joins_its_base(form, state, official, tmp_path):
    control = only(state, CONTROL)
    if form == "no prefix":
        control = {name.removeprefix(CONTROL): tensor for name, tensor in control.items()}
    half = form == "float16 safetensors"
    path = write(tmp_path / "control.safetensors", to(torch.float16, control) if half else control)
    average = {"model_ema.decay": torch.tensor(0.9), "cond_stage_model.logit_scale": torch.tensor(4.6)}
    base = write(tmp_path / "base.ckpt", {"state_dict": without(state, CONTROL) | average}, config=False)
    model = load_model(path, base=base)
    assert_holds(model, state, 2**-11 if half else 0.0)
    assert model.fingerprint == weights_fingerprint(path, base) == weights_fingerprint(official)


def test_a_base_replaces_all_but_the_control_of_a_whole_checkpoint(state, official, tmp_path):
    base = write(tmp_path / "base.safetensors", {name: tensor + 1 for name, tensor in state.items() if "." in name})
    model = load_model(official, base=base)
    for name, tensor in only(model.state_dict(), CONTROL).items():
        assert torch.equal(tensor, state[name])
    for name, tensor in only(model.state_dict(), "model.", "first_stage_model.").items():
        assert torch.equal(tensor, state[name] + 1)


def test_a_config_beside_the_base_counts_where_it_describes_control(state, tmp_path):
    control = write(tmp_path / "control.safetensors", only(state, CONTROL), config=False)
    base = write(tmp_path / "base.safetensors", without(state, CONTROL))
    assert_holds(load_model(control, base=base), state)
    base.with_suffix(".yaml").write_text("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}")
    with pytest.raises(ModelError, match=r"its config is .*cldm_v15.yaml"):
        load_model(control, base=base)


# --- diffusers' layout -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(state):
    pytest.importorskip("diffusers")
    from tests.diffusers_models import diffusers_networks

    return diffusers_networks(little_config(), state)


def save_folder(networks, folder, names=("unet", "vae", "text_encoder", "controlnet"), config=True, **how):
    """A pipeline's folder, written by diffusers."""
    for name in names:
        own = {key: how[key] for key in how if key != "safe_serialization" or name != "text_encoder"}
        networks[name].save_pretrained(folder / name, **own)
    if config:
        OmegaConf.save(little_config(), folder / "model.yaml")
    return folder


BASE = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_a_pipelines_folder(how, networks, state, official, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline", **how)
    model = load_model(folder)
    assert_holds(model, state)
    assert model.fingerprint == weights_fingerprint(folder) == weights_fingerprint(official)


@pytest.mark.parametrize("how", [{}, {"variant": "fp16"}])
def test_a_folder_in_shards(how, networks, state, official, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline", max_shard_size="300KB", **how)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert load_model(folder).fingerprint == weights_fingerprint(official)
    (folder / "unet" / next((folder / "unet").glob("*-00001-of-*")).name).unlink()
    with pytest.raises(ModelError, match=r"no checkpoint at .*00001-of"):
        load_model(folder)


def test_a_pickled_text_encoder_of_a_folder(networks, state, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    safe = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_state_dict(safe)
    position = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(tensors | position, folder / "text_encoder" / "pytorch_model.bin")
    safe.unlink()
    assert_holds(load_model(folder), state)


@pytest.mark.parametrize(("control", "base"), [("folder", "folder"), ("file", "folder"), ("folder", "file")])
def test_control_and_base_in_any_mixture(control, base, networks, state, official, tmp_path):
    if control == "folder":
        networks["controlnet"].save_pretrained(tmp_path / "control")
        control_path = tmp_path / "control"
        OmegaConf.save(little_config(), control_path / "model.yaml")
    else:
        control_path = write(tmp_path / "control.safetensors", only(state, CONTROL))
    if base == "folder":
        base_path = save_folder(networks, tmp_path / "base", BASE, config=False)
    else:
        base_path = write(tmp_path / "base.safetensors", without(state, CONTROL), config=False)
    model = load_model(control_path, base=base_path)
    assert_holds(model, state)
    assert model.fingerprint == weights_fingerprint(official)


def test_the_file_of_a_control_networks_folder(networks, state, tmp_path):
    networks["controlnet"].save_pretrained(tmp_path / "control")
    base = write(tmp_path / "base.safetensors", without(state, CONTROL))
    file = next((tmp_path / "control").glob("*.safetensors"))
    assert_holds(load_model(file, base=base), state)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


SHAPES = [(shape, names) for shape in ("linear", "convolution") for names in ("old", "new")]


@pytest.mark.parametrize(("shape", "names"), long_but(SHAPES, ("linear", "new"), ("convolution", "old")))
def test_attention_of_older_and_newer_autoencoders(names, shape, networks, state, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    path = next((folder / "vae").glob("*.safetensors"))
    tensors = {}
    for name, tensor in load_state_dict(path).items():
        attends = ".attentions." in name
        if attends and tensor.ndim == 2 and shape == "convolution":
            tensor = tensor[:, :, None, None]
        if attends and names == "old":
            for new, old in OLD_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor.clone()
    assert any(".query." in name for name in tensors) == (names == "old")
    save_file(tensors, path)
    assert_holds(load_model(folder), state)


def test_a_transformers_linear_projections(networks, state, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    path = next((folder / "unet").glob("*.safetensors"))
    linear = {
        name: tensor[:, :, 0, 0].clone() if name.endswith(("proj_in.weight", "proj_out.weight")) else tensor.clone()
        for name, tensor in load_state_dict(path).items()
    }
    save_file(linear, path)
    assert_holds(load_model(folder), state)


def test_folders_that_are_not_diffusers_are_refused(networks, state, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ModelError, match=r"photos is no folder of diffusers' layout.* but nothing"):
        load_model(tmp_path / "photos")
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ModelError, match=r"but a\.jpg"):
        load_model(tmp_path / "photos")
    with pytest.raises(ModelError, match="base model without control"):
        load_model(save_folder(networks, tmp_path / "base", BASE))
    with pytest.raises(ModelError, match="one network, and no ControlNet"):
        load_model(tmp_path / "base" / "unet")
    (tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae is no folder of diffusers' layout"):
        load_model(tmp_path / "base")


def test_other_predictions_than_noise_are_refused(networks, tmp_path):
    folder = save_folder(networks, tmp_path / "pipeline")
    (folder / "scheduler").mkdir()
    settings = {"prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    load_model(folder)
    settings["prediction_type"] = "v_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="v_prediction"):
        load_model(folder)
