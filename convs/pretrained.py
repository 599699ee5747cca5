"""Pretrained weights: from a file, or from torch's download cache; nothing is downloaded."""

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchvision.models import get_model_weights  # isort: skip


def load_pretrained(backbone: nn.Module, name: str, file: Path | None = None) -> None:
    """Fill a backbone with the weights of torchvision's network `name`; CBAM's attention keeps its initial ones.

    file: where they are, None for torch's cache.
    Raises FileNotFoundError where the file is not there, ValueError where it holds something else.
    """
    advice = "delete it" if file is None else "name another file"
    file = file or cached_file(name)
    try:
        missing, surplus = backbone.load_state_dict(read_weights(file, name), strict=False)
    except RuntimeError as error:  # shapes that differ
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file} does not hold the weights of {name} ({reason}); {advice}") from None
    missing = [key for key in missing if not re.search(r"\.(mlp|spatial)\.", key)]
    surplus = [key for key in surplus if not key.startswith("fc.")]
    if missing or surplus:
        raise ValueError(f"{file} does not hold the weights of {name} ({(missing + surplus)[0]} differs); {advice}")


def read_weights(file: Path, name: str) -> Mapping[str, Any]:
    """The tensors of a file of network `name`, read without unpickling code: safetensors, or torch's own format.

    Raises FileNotFoundError where there is no such file, ValueError where it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to run the code in the file
        why = "another kind of file, or one that holds code, which is never run"
        raise ValueError(f"{file} does not hold the weights of {name} ({why})") from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file} does not hold the weights of {name} ({reason})") from None
    for key in ("state_dict", "model"):  # training scripts put them among other things
        weights = weights.get(key, weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict):
        raise ValueError(f"{file} does not hold the weights of {name} (but a {type(weights).__name__})")
    return weights


def cached_file(name: str) -> Path:
    """The file of a network's weights in torch's cache: torchvision's own names first, then any of the same stem."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    urls = [weights.url for weights in get_model_weights(name)]
    candidates = [folder / url.rpartition("/")[2] for url in urls] + sorted(folder.glob(f"{name}-*.pth"))
    for file in candidates:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no weights of torchvision's {name} in {folder}; save {urls[0]} there, name a file, or set pretrained to false"
    )
