"""The methods, by the name that a config's `model_name` gives them."""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning: lets a CUDA wheel load beside a CPU torch)
from models.base import Learner
from models.bic import BiC
from models.coil import Coil
from models.der import DER
from models.ewc import EWC
from models.finetune import Finetune
from models.foster import FOSTER
from models.gem import GEM
from models.icarl import ICaRL
from models.joint import Joint
from models.lwf import LwF
from models.memo import MEMO
from models.podnet import PODNet
from models.replay import Replay
from models.simplecil import SimpleCIL
from models.wa import WA

METHODS: dict[str, type[Learner]] = {
    "finetune": Finetune,
    "replay": Replay,
    "joint": Joint,
    "lwf": LwF,
    "ewc": EWC,
    "gem": GEM,
    "icarl": ICaRL,
    "bic": BiC,
    "wa": WA,
    "podnet": PODNet,
    "der": DER,
    "memo": MEMO,
    "foster": FOSTER,
    "coil": Coil,
    "simplecil": SimpleCIL,
}
