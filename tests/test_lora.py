"""LoRA files merged into a model, against diffusers' networks whose layers add scale * up(down(x)) to their output."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.generators import build
from compress.options import parse_settings
from ControlNet.cldm.lora import merge
from ControlNet.cldm.model import Lora, ModelError, load_model, weights_fingerprint
from ControlNet.ldm.text import tokenize
from tests.little_config import relative_error
from tests.little_model import little_config, little_model

RANK = 3
EVERY_KIND = (  # attention, feed-forward, projections, convolutions of every kind, timestep embeddings
    "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "linear_1",
    "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",
)  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    pytest.importorskip("diffusers")
    from tests.diffusers_models import diffusers_networks

    made = diffusers_networks(little_config(), little_model().state_dict())
    return {name: made[name] for name in ("unet", "text_encoder")}


@pytest.fixture
def theirs(networks):
    """Networks to which a test may give hooks."""
    return copy.deepcopy(networks)


def low_rank(networks, seed=0, kinds=EVERY_KIND):
    """(network, layer) -> (layer, down, up), for layers whose names end so; down and up are layers, too."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for network, module in networks.items():
        for name, layer in module.named_modules():
            if not name.endswith(kinds) or not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            if isinstance(layer, nn.Conv2d):
                down = nn.Conv2d(layer.in_channels, RANK, layer.kernel_size, layer.stride, layer.padding, bias=False)
                up = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
            else:
                down = nn.Linear(layer.in_features, RANK, bias=False)
                up = nn.Linear(RANK, layer.out_features, bias=False)
            for part in (down, up):
                part.weight.data = 0.5 * torch.randn(part.weight.shape, generator=draw) / part.weight[0].numel() ** 0.5
            found[network, name] = layer, down, up
    return found


def applied(layers, scale):
    """Let the layers add scale * up(down(x)) to their outputs."""
    for layer, down, up in layers.values():
        layer.register_forward_hook(
            lambda _, inputs, output, down=down, up=up: output + scale * up(down(inputs[0])).detach()
        )


def kohya(layers, alpha):
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}
    tensors = {}
    for (network, name), (_, down, up) in layers.items():
        if network == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"
        stem = f"{prefix[network]}_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down.weight, f"{stem}.lora_up.weight": up.weight}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_names(layers, down_name, up_name):
    tensors = {}
    for (network, name), (_, down, up) in layers.items():
        tensors |= {f"{network}.{name}.{down_name}": down.weight, f"{network}.{name}.{up_name}": up.weight}
    return tensors


def save(tensors, path, metadata=None):
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("naming", "scale", "factor"),
    [
        ("kohya", 0.7, 0.7 * 6.0 / RANK),
        ("peft", 1.0, 1.0),
        pytest.param("lora.down", 1.3, 1.3, marks=pytest.mark.long),
        ("head", 0.5, 0.5 * 9.0 / RANK),
    ],
)
def test_a_merged_lora_computes_what_its_layers_do(naming, scale, factor, checkpoint, theirs, tmp_path):
    layers, metadata = low_rank(theirs), None
    assert {name.partition(".")[0] for network, name in layers if network == "unet"} >= {
        "conv_in", "conv_out", "time_embedding", "down_blocks", "mid_block", "up_blocks"
    }  # fmt: skip
    if naming == "kohya":
        tensors = kohya(layers, alpha=6.0)
    elif naming == "lora.down":
        tensors = diffusers_names(layers, "lora.down.weight", "lora.up.weight")
    else:
        tensors = diffusers_names(layers, "lora_A.weight", "lora_B.weight")
    if naming == "head":
        alphas = {"unet.lora_alpha": 9, "text_encoder.lora_alpha": 9, "unet.r": RANK}
        metadata = {"lora_adapter_metadata": json.dumps(alphas)}
    file = save(tensors, tmp_path / "lora.safetensors", metadata)
    ours = load_model(checkpoint, loras=[Lora(file, scale)])
    plain = load_model(checkpoint)
    applied(layers, factor)

    with torch.no_grad():
        context = ours.get_learned_conditioning(["apple pie"] * 2)
        expected = theirs["text_encoder"](input_ids=tokenize(["apple pie"] * 2)).last_hidden_state
        assert relative_error(context, expected) < 1e-5
        assert relative_error(plain.get_learned_conditioning(["apple pie"] * 2), expected) > 0.01
        x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([801, 1])
        cond = {"c_concat": None, "c_crossattn": [context]}
        expected = theirs["unet"](x, t, encoder_hidden_states=context).sample
        assert relative_error(ours.apply_model(x, t, cond), expected) < 1e-5
        assert relative_error(plain.apply_model(x, t, cond), expected) > 0.01


@pytest.mark.long
def test_two_loras_add_up_and_scale_0_changes_nothing(checkpoint, theirs, tmp_path):
    one, other = (
        save(kohya(low_rank(theirs, seed, ("to_q",)), 1.0), tmp_path / f"{seed}.safetensors") for seed in (1, 2)
    )
    name = next(each for each in little_model().state_dict() if each.startswith("model.") and "attn1.to_q" in each)

    def weight(*loras):
        return load_model(checkpoint, loras=loras).state_dict()[name]

    changes = [weight(Lora(file, 0.5)) - weight() for file in (one, other)]
    assert torch.allclose(weight(Lora(one, 0.5), Lora(other, 0.5)), weight() + sum(changes), atol=1e-6)
    assert torch.equal(weight(Lora(one, 0.0)), weight())
    assert all(change.abs().max() > 0.01 for change in changes)


@pytest.mark.long
def test_names_of_first_releases_and_a_middle_kernel(checkpoint, theirs, tmp_path):
    layers = low_rank(theirs, kinds=("attn1.to_q", "attn1.to_out.0", "q_proj"))
    old = {}
    for (network, name), (_, down, up) in layers.items():
        head, _, last = name.removesuffix(".0").rpartition(".")
        stem = f"unet.{head}.processor.{last}_lora"
        if network == "text_encoder":
            stem = f"text_encoder.{head}.to_q_lora"
        old |= {f"{stem}.down.weight": down.weight, f"{stem}.up.weight": up.weight}
    first = load_model(checkpoint, loras=[Lora(save(old, tmp_path / "old.safetensors"))]).state_dict()
    new = save(diffusers_names(layers, "lora_A.weight", "lora_B.weight"), tmp_path / "new.safetensors")
    for name, tensor in load_model(checkpoint, loras=[Lora(new)]).state_dict().items():
        assert torch.equal(tensor, first[name])

    down, mid, up = torch.randn(2, 4, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(32, 2, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    locon = {f"lora_unet_conv_in.{name}": tensor for name, tensor in tensors.items()}
    merged = load_model(checkpoint, loras=[Lora(save(locon, tmp_path / "locon.safetensors"))])
    x = torch.randn(1, 4, 8, 8)
    conv, conv2d = merged.model.diffusion_model.input_blocks[0][0], nn.functional.conv2d
    expected = load_model(checkpoint).model.diffusion_model.input_blocks[0][0](x)
    expected = expected + conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    assert relative_error(conv(x), expected) < 1e-5


DOWN, UP = torch.zeros(2, 32), torch.zeros(32, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_single_blocks_0.lora_down.weight": DOWN}, "fits nothing of this model"),
        ({"lora_unet_conv_in.lora_down.weight": DOWN, "lora_unet_conv_in.lora_up.weight": UP}, "does not fit"),
        ({"lora_unet_conv_in.lora_down.weight": DOWN}, "does not fit"),
        ({"lora_unet_conv_in.lokr_w1": DOWN}, "is a LoKr, and only plain LoRA"),
        ({"conv.weight": DOWN}, "is no LoRA: it holds conv.weight"),
    ],
)
def test_what_fits_nothing_is_refused_in_one_line(tensors, message, checkpoint, tmp_path, capsys):
    file = save(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=message) as error:
        load_model(checkpoint, loras=[Lora(file)])
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="no LoRA at"):
        weights_fingerprint(checkpoint, loras=[Lora(tmp_path / "missing.safetensors")])


def test_copies_remember_their_loras_by_content_and_scale(checkpoint, theirs, tmp_path):
    file = save(kohya(low_rank(theirs, kinds=("to_q",)), 1.0), tmp_path / "a:b.safetensors")
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(file.read_bytes())

    def made_by(options):
        _, machine, words, _ = parse_settings(f"--model {checkpoint} {options}", "high")
        assert parse_settings(" ".join(words), "high")[1] == machine
        return build.model_fingerprint(machine)

    plain = made_by("")
    assert plain == weights_fingerprint(checkpoint)
    assert (
        made_by(f"--lora {file}")
        == made_by(f"--lora {twin}:1")
        == load_model(checkpoint, loras=[Lora(file)]).fingerprint
    )
    assert made_by(f"--lora {file}").startswith(f"{plain}+")
    assert len({made_by(f"--lora {file}:{scale}") for scale in ("0.5", "1", "-1")}) == 3
    assert made_by(f"--lora {file}:0.5 --lora {twin}:0.25").count("+") == 2


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_equal_to_the_weights_that_diffusers_fuses(naming, checkpoint, theirs, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    from diffusers import StableDiffusionPipeline

    layers = low_rank(theirs, kinds=EVERY_KIND[:12] + EVERY_KIND[-6:])
    tensors = kohya(layers, 6.0) if naming == "kohya" else diffusers_names(layers, "lora_A.weight", "lora_B.weight")
    file = save(tensors, tmp_path / "lora.safetensors")
    rest = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**theirs, **rest, requires_safety_checker=False)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(lora_scale=0.7)
    ours = load_model(checkpoint, loras=[Lora(file, 0.7)])
    with torch.no_grad():
        context = ours.get_learned_conditioning(["apple pie"] * 2)
        expected = theirs["text_encoder"](input_ids=tokenize(["apple pie"] * 2)).last_hidden_state
        assert relative_error(context, expected) < 1e-4
        x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([801, 1])
        expected = theirs["unet"](x, t, encoder_hidden_states=context).sample
        assert relative_error(ours.apply_model(x, t, {"c_concat": None, "c_crossattn": [context]}), expected) < 1e-4


def peft_adapter(layers, folder, **config):
    """adapter_model.safetensors and adapter_config.json, as peft's `save_pretrained` writes them of a UNet's layers."""
    tensors = {}
    for (network, name), (_, down, up) in layers.items():
        assert network == "unet"
        stem = f"base_model.model.{name}"
        tensors |= {f"{stem}.lora_A.weight": down.weight, f"{stem}.lora_B.weight": up.weight}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return save(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"lora_alpha": 2}, 2 / RANK),
        ({}, 8 / RANK),  # peft's default
        ({"lora_alpha": 2, "use_rslora": True}, 2 / RANK**0.5),
        ({"lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 6}}, 6 / RANK),
        ({"lora_alpha": 2, "alpha_pattern": {"attn2.to_q": 6}}, 2 / RANK),
    ],
)
def test_pefts_own_files_are_as_strong_as_their_config_says(config, strength, theirs, tmp_path):
    """peft adds lora_alpha / r * B @ A, or with rank-stabilised LoRA lora_alpha / sqrt(r) * B @ A."""
    layers = {key: layer for key, layer in low_rank(theirs).items() if key[1].endswith("attn1.to_q")}
    state = little_model().state_dict()
    merged = merge(state, Lora(peft_adapter(layers, tmp_path, **config)))
    changed = [name for name in state if not torch.equal(state[name], merged[name])]
    assert len(changed) == len(layers) > 0
    changes = [strength * up.weight @ down.weight for _, down, up in layers.values()]
    for name in changed:
        difference = merged[name] - state[name]
        assert any(torch.allclose(difference, each, atol=1e-6) for each in changes), name


def test_an_adapter_config_is_part_of_what_copies_remember(checkpoint, theirs, tmp_path):
    layers = {key: layer for key, layer in low_rank(theirs).items() if key[1].endswith("attn1.to_q")}

    def made_by(alpha):
        file = peft_adapter(layers, tmp_path, lora_alpha=alpha)
        return weights_fingerprint(checkpoint, loras=[Lora(file)])

    assert made_by(2) != made_by(4)


def test_a_broken_adapter_config_is_refused(theirs, tmp_path):
    layers = {key: layer for key, layer in low_rank(theirs).items() if key[1].endswith("attn1.to_q")}
    file = peft_adapter(layers, tmp_path, lora_alpha="much")
    with pytest.raises(ModelError, match=r"can't read .*adapter_config\.json, which says how strong"):
        merge(little_model().state_dict(), Lora(file))
