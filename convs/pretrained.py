"""torchvision's ImageNet weights, read from torch's download cache; nothing is downloaded."""

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import re
from pathlib import Path

import torch
from torch import nn

from torchvision.models import get_model_weights  # isort: skip


def load_pretrained(backbone: nn.Module, name: str) -> None:
    """Fill a backbone with the weights of torchvision's network `name`; CBAM's attention keeps its initial ones.

    Raises FileNotFoundError where the file is not there, ValueError where it holds something else.
    """
    file = _file(name)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        missing, surplus = backbone.load_state_dict(weights, strict=False)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file} does not hold the weights of {name} ({reason}); delete it") from None
    missing = [key for key in missing if not re.search(r"\.(mlp|spatial)\.", key)]
    surplus = [key for key in surplus if not key.startswith("fc.")]
    if missing or surplus:
        raise ValueError(f"{file} does not hold the weights of {name} ({(missing + surplus)[0]} differs); delete it")


def _file(name: str) -> Path:
    """The file of a network's weights in torch's cache: torchvision's own names first, then any of the same stem."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    urls = [weights.url for weights in get_model_weights(name)]
    candidates = [folder / url.rpartition("/")[2] for url in urls] + sorted(folder.glob(f"{name}-*.pth"))
    for file in candidates:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no weights of torchvision's {name} in {folder}; save {urls[0]} there, or set pretrained to false"
    )
