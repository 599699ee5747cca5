"""The methods, by the name that a config's `model_name` gives them."""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning: lets a CUDA wheel load beside a CPU torch)
from models.base import Learner
from models.der import DER
from models.icarl import ICaRL
from models.memo import MEMO
from models.wa import WA

METHODS: dict[str, type[Learner]] = {"icarl": ICaRL, "wa": WA, "der": DER, "memo": MEMO}
