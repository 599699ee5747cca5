"""Lets torchvision be imported where its compiled library does not fit torch, as a CUDA wheel beside a CPU build.

Without that library, torchvision's import fails with "operator torchvision::nms does not exist": it registers fake
implementations of two operators that the library declares.  Nothing here calls these (they are for detectors), so
declaring their schemas is enough.  Import this module before torchvision, transformers and Lightning.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")  # its schemas live as long as this object
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
