"""diffusers' schedulers by our samplers' names, with the settings that its users give them for Stable Diffusion 1.5."""

DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
UNIPC = {"solver_type": "bh2", "final_sigmas_type": "zero"}
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", DDIM, {}),
    "ddim-trailing": ("DDIMScheduler", {**DDIM, "timestep_spacing": "trailing"}, {}),
    "ancestral": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}, {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", DPM, {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {**DPM, "use_karras_sigmas": True}, {}),
    "unipc": ("UniPCMultistepScheduler", UNIPC, {}),
    "unipc-karras": ("UniPCMultistepScheduler", {**UNIPC, "use_karras_sigmas": True}, {}),
    "lcm": ("LCMScheduler", {"set_alpha_to_one": False}, {}),
    "tcd": ("TCDScheduler", {"set_alpha_to_one": False}, {"eta": 0.3}),
}
"""Our name -> (diffusers' class, its settings, options of its step())."""


def scheduler(name: str):
    """diffusers' scheduler for one of our samplers' names."""
    import diffusers

    kind, settings, _ = SCHEDULERS[name]
    return getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)
