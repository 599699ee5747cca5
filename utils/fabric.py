"""Lightning Fabric, imported without torchmetrics.

Fabric imports torchmetrics only to see whether it is installed, which takes seconds (transformers, scipy) and serves
two monitors that this project does not use.  Import Fabric from here.
"""

import importlib
import sys
from typing import cast

from torch import Tensor

if "torchmetrics" not in sys.modules:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # "not installed", for the time of this import
    try:
        importlib.import_module("lightning_fabric")
    finally:
        del sys.modules["torchmetrics"]

from lightning_fabric import Fabric


def all_reduce(fabric: Fabric, tensor: Tensor, op: str) -> Tensor:
    """Fabric's, of one tensor.  op: "sum", "mean" or "max"."""
    return cast(Tensor, fabric.all_reduce(tensor, reduce_op=op))
