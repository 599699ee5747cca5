"""Backbones by a library's name: `torchvision/NAME` and, where timm is installed, `timm/NAME`.

The network, the size of its features and its input (side, resize, mean, std) are the library's.  Nothing is downloaded:
weights are read from a file, or from where the library keeps what it has downloaded.
"""

import torchvision_compat  # noqa: F401  (before torchvision and timm)

# isort: split
import difflib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision import models

from convs.blocks import FeatureExtractor
from convs.pretrained import cached_file, read_weights


class Input(NamedTuple):
    """side: of the square pictures that a network takes; resize: of a picture's shorter side before its centre is
    cropped; mean, std: of each channel; mode: of resizing, "bilinear" or "bicubic"."""

    side: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str


class LibraryBackbone(FeatureExtractor):
    """A library's network without its classifier."""

    def __init__(self, network: nn.Module, feature_dim: int):
        super().__init__()
        self.network = network
        self.feature_dim = feature_dim


def library_backbone(
    convnet_type: str, image_size: int | None = None, pretrained: bool | str = False, weights: bool = True
) -> LibraryBackbone:
    """A network by name, with fresh weights from torch's random state or with pretrained ones.

    image_size: the side of its pictures, None for the library's; pretrained: a file of weights, or true for those that
    the library has downloaded earlier; weights: false leaves them out.
    Raises ValueError for an unknown name or weights that do not fit, FileNotFoundError where they are not there.
    """
    library, _, name = convnet_type.partition("/")
    build = {"torchvision": _torchvision, "timm": _timm}[library]
    backbone = build(name, image_size)
    if pretrained and weights:
        file = Path(pretrained) if isinstance(pretrained, str) else _downloaded(library, name)
        _load(backbone.network, convnet_type, file)
    probe = torch.zeros(1, 3, *[library_input(convnet_type, image_size).side] * 2)
    with torch.no_grad():
        shape = tuple(backbone.eval()(probe).shape)
    backbone.train()
    if shape != (1, backbone.feature_dim):
        raise ValueError(f"{convnet_type} gives features of shape {shape}, not 1 x {backbone.feature_dim}")
    return backbone


def library_input(convnet_type: str, image_size: int | None = None) -> Input:
    """What a network takes, by the library's own description of its weights.  Raises ValueError for an unknown name."""
    library, _, name = convnet_type.partition("/")
    own = (_torchvision_input if library == "torchvision" else _timm_input)(name)
    if image_size is None:
        return own
    return own._replace(side=image_size, resize=math.floor(image_size * own.resize / own.side))


# torchvision


def _torchvision(name: str, image_size: int | None) -> LibraryBackbone:
    _check_known(name, models.list_models(module=models), "torchvision")
    options = {"image_size": image_size} if image_size and name.startswith("vit_") else {}
    network = models.get_model(name, weights=None, **options)
    linear = [layer for layer, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or getattr(network, "aux_logits", False):
        raise ValueError(f"torchvision/{name} does not end in one linear classifier, so that it gives no features")
    parent, _, child = linear[-1].rpartition(".")
    feature_dim = network.get_submodule(linear[-1]).in_features
    setattr(network.get_submodule(parent), child, nn.Identity())
    return LibraryBackbone(network, feature_dim)


def _torchvision_input(name: str) -> Input:
    _check_known(name, models.list_models(module=models), "torchvision")
    transform = models.get_model_weights(name).DEFAULT.transforms()
    numbers = tuple(transform.mean), tuple(transform.std)
    return Input(transform.crop_size[0], transform.resize_size[0], *numbers, _mode(transform.interpolation.value))


# timm


def _import_timm():
    try:
        import timm
    except ImportError:
        raise ValueError("timm/... needs the package timm: pip install timm") from None
    return timm


def _timm(name: str, image_size: int | None) -> LibraryBackbone:
    timm = _import_timm()
    _check_known(name.partition(".")[0], timm.list_models(), "timm")
    try:
        network = timm.create_model(name, num_classes=0, img_size=image_size) if image_size else None
    except TypeError:  # a convolutional network: any size will do
        network = None
    network = network or timm.create_model(name, num_classes=0)
    return LibraryBackbone(network, getattr(network, "head_hidden_size", network.num_features))


def _timm_input(name: str) -> Input:
    timm = _import_timm()
    _check_known(name.partition(".")[0], timm.list_models(), "timm")
    pretrained = timm.get_pretrained_cfg(name)
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else {})
    side = config["input_size"][-1]
    resize = math.floor(side / config["crop_pct"])
    return Input(side, resize, tuple(config["mean"]), tuple(config["std"]), _mode(config["interpolation"]))


def _mode(name: str) -> str:
    return "bicubic" if name == "bicubic" else "bilinear"


def _check_known(name: str, known: list[str], library: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}" if near else ""  # the caller ends the sentence
        raise ValueError(f"{library} {sys.modules[library].__version__} has no network {name!r}{hint}")


# Weights


def _downloaded(library: str, name: str) -> Path:
    """The file of weights that the library has downloaded earlier."""
    if library == "torchvision":
        return cached_file(name)
    import huggingface_hub

    pretrained = _import_timm().get_pretrained_cfg(name)
    repository = pretrained.hf_hub_id if pretrained else None
    for file in ("model.safetensors", "pytorch_model.bin"):
        path = repository and huggingface_hub.try_to_load_from_cache(repository, pretrained.hf_hub_filename or file)
        if isinstance(path, str):
            return Path(path)
    get = f"get them with `hf download {repository}`, or " if repository else ""
    raise FileNotFoundError(f"no weights of timm/{name} in Hugging Face's cache; {get}name a file")


def _load(network: nn.Module, name: str, file: Path) -> None:
    """Fill a network; a classifier in the file is left out."""
    weights: Mapping[str, Any] = read_weights(file, name)
    convert = (
        getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if name.startswith("timm/")
        else None
    )
    try:
        if convert is not None:  # other authors' names, and positions for another size of pictures
            weights = convert(dict(weights), network)
        missing, surplus = network.load_state_dict(weights, strict=False)
    except Exception as error:  # another network's weights raise whatever their shapes lead to
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file} does not hold the weights of {name} ({reason})") from None
    heads = ("head", "fc", "classifier", "last_linear")
    surplus = [key for key in surplus if not key.startswith(heads)]
    if missing or surplus:
        raise ValueError(f"{file} does not hold the weights of {name} ({[*missing, *surplus][0]} differs)")
