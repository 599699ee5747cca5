"""Lightning Fabric, imported without torchmetrics.

Fabric imports torchmetrics only to see whether it is installed, which takes seconds (transformers, scipy) and serves
two monitors that this project does not use.  Import Fabric from here.
"""

import importlib
import sys

if "torchmetrics" not in sys.modules:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # "not installed", for the time of this import
    try:
        importlib.import_module("lightning_fabric")
    finally:
        del sys.modules["torchmetrics"]

from lightning_fabric import Fabric

__all__ = ["Fabric"]
