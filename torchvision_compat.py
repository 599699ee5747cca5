"""Makes ``import torchvision`` work beside a torch build that torchvision's own library does not fit.

A torchvision wheel made for CUDA, installed beside a CPU build of torch, can't load its compiled library, and its
import then dies with "operator torchvision::nms does not exist": the Python half registers a fake implementation of two
operators that the missing library would have declared.  Nothing in this project calls those operators (they are box
suppression for detectors), so declaring their schemas is enough to get models, transforms and everything that imports
torchvision on the way (transformers, pytorch-lightning, torchmetrics).

Where torchvision loads as it should, importing this module changes nothing.  Any room of the house may import it,
before its first import of torchvision, transformers or pytorch-lightning; it imports nothing of the project.
"""

import importlib
import sys

import torch

_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = None  # torch.library drops what it declared when this object is collected


def _declare_missing_operators() -> None:
    global _library
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the half-imported package; the next import starts afresh
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)
    importlib.import_module("torchvision")


_declare_missing_operators()
