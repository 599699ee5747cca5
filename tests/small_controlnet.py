"""The small model that the reference figures were measured on: cldm_v15.yaml, narrower."""

import torch
from omegaconf import DictConfig, OmegaConf

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.model import MODELS_FOLDER, create_model
from tests.reference.reference_weights import reference_tensor


def small_config() -> DictConfig:
    config = OmegaConf.load(MODELS_FOLDER / "cldm_v15.yaml")
    params = config.model.params
    for name in ("control_stage_config", "unet_config"):
        params[name].params.model_channels = 32
        params[name].params.context_dim = 64
    params.first_stage_config.params.ddconfig.ch = 32
    params.cond_stage_config.params = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return config


def reference_state_dict(model: ControlLDM) -> dict[str, torch.Tensor]:
    """The reference weights by official names; the schedule's tables and position_ids stay the model's own."""
    return {
        name: tensor
        if "." not in name or name.endswith("position_ids")
        else torch.from_numpy(reference_tensor(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }


def small_model() -> ControlLDM:
    model = create_model(small_config())
    model.load_state_dict(reference_state_dict(model))
    return model.eval().requires_grad_(False)
