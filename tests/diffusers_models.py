"""diffusers' and transformers' networks with the weights of one of our models, renamed by diffusers' own converters."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel


def diffusers_networks(config: DictConfig, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """{"unet", "controlnet", "vae", "text_encoder"}: the networks of a ControlLDM's config and state_dict.

    They share the state's tensors: no memory on top of it.
    """
    params = config.model.params
    encoder = _encoder(params.unet_config.params)
    attends = encoder["down_block_types"]
    up = tuple("CrossAttnUpBlock2D" if "CrossAttn" in kind else "UpBlock2D" for kind in reversed(attends))
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**encoder, up_block_types=up, out_channels=4),
            "controlnet": ControlNetModel(**encoder, conditioning_embedding_out_channels=(16, 32, 96, 256)),
            "vae": _autoencoder(params.first_stage_config.params.ddconfig),
        }
    for name, convert in (
        ("unet", single_file_utils.convert_ldm_unet_checkpoint),
        ("controlnet", single_file_utils.convert_controlnet_checkpoint),
        ("vae", single_file_utils.convert_ldm_vae_checkpoint),
    ):
        networks[name].load_state_dict(convert(dict(state), dict(networks[name].config)), assign=True)
    networks["text_encoder"] = _text_encoder(params.cond_stage_config.get("params") or {}, state)
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def _encoder(params: DictConfig) -> dict:
    levels = len(params.channel_mult)
    attends = [2**level in params.attention_resolutions for level in range(levels)]
    return {
        "in_channels": 4,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "block_out_channels": tuple(params.model_channels * mult for mult in params.channel_mult),
        "layers_per_block": params.num_res_blocks,
        "cross_attention_dim": params.context_dim,
        "attention_head_dim": params.num_heads,  # diffusers' name for the number of heads, a mistake that stayed
    }


def _autoencoder(ddconfig: DictConfig) -> AutoencoderKL:
    levels = len(ddconfig.ch_mult)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(ddconfig.ch * mult for mult in ddconfig.ch_mult),
        layers_per_block=ddconfig.num_res_blocks,
        latent_channels=4,
        scaling_factor=0.18215,
    )


def _text_encoder(sizes: Mapping, state: Mapping[str, Tensor]) -> CLIPTextModel:
    defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    encoder = CLIPTextModel(CLIPTextConfig(**{**defaults, **sizes}, hidden_act="quick_gelu", eos_token_id=49407))
    prefix = "cond_stage_model.transformer.text_model."
    own = "text_model." if hasattr(encoder, "text_model") else ""  # releases of transformers differ
    tensors = {own + name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    encoder.load_state_dict(tensors, assign=True)
    return encoder
