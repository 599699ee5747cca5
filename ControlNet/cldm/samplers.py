"""The samplers by name."""

from ControlNet.cldm.codebook import AncestralSampler
from ControlNet.cldm.ddim import DDIMSampler, TrailingDDIMSampler
from ControlNet.cldm.dpm_solver import (
    DPMSolverSampler,
    KarrasDPMSolverSampler,
    KarrasUniPCSampler,
    UniPCSampler,
)
from ControlNet.cldm.few_steps import LCMSampler, TCDSampler

SAMPLERS = {
    "ddim": DDIMSampler,
    "ddim-trailing": TrailingDDIMSampler,
    "ancestral": AncestralSampler,
    "dpm++2m": DPMSolverSampler,
    "dpm++2m-karras": KarrasDPMSolverSampler,
    "unipc": UniPCSampler,
    "unipc-karras": KarrasUniPCSampler,
    "lcm": LCMSampler,
    "tcd": TCDSampler,
}
