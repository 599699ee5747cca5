"""The losses that ControlNet/train.py minimises, one module a stage.

Each is made of (model, the stage's settings, the data with its texts), says which parameters are trained, and turns a
batch into {"loss": ..., and what else is logged}: pictures, B x 3 x S x S in [-1, 1]; edges, B x 1 x S x S, 0 or 1;
labels, B class numbers; generator: of all random numbers.
"""

import copy
from collections.abc import Iterable

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.ldm.schedule import DISTILLED_STEPS
from ControlNet.ldm.text import END, MAX_LENGTH, tokenize
from ControlNet.ldm.util import extract_into_tensor
from ControlNet.sampling import boundary
from ControlNet.training_data import Views

IGNORED = -100
"""In place of a class number: a position that counts for nothing in cross_entropy."""


class AutoencoderTask(nn.Module):
    """The autoencoder's loss: L1 and L2 of the reconstruction, plus kl_weight times the KL divergence."""

    def __init__(self, model: ControlLDM, settings: DictConfig, data: Views):
        super().__init__()
        self.autoencoder = model.first_stage_model.requires_grad_(True)
        self.kl_weight = settings.kl_weight

    def forward(self, pictures: Tensor, edges: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        posterior = self.autoencoder.encode(pictures)
        reconstruction = self.autoencoder.decode(posterior.sample(generator)).float()
        l1, l2 = F.l1_loss(reconstruction, pictures), F.mse_loss(reconstruction, pictures)
        kl = posterior.kl().mean()
        return {"loss": l1 + l2 + self.kl_weight * kl, "l1": l1, "l2": l2, "kl": kl}


class TextTask(nn.Module):
    """Trains the text encoder to tell the texts apart: a linear probe classifies the text at the end token and padding.

    This replaces CLIP's training with pictures.  Cross-attention mostly sees these positions, which then encode what
    the whole text names.  Pictures are not used, and the probe is discarded afterwards.
    """

    positions: Tensor
    named: Tensor

    def __init__(self, model: ControlLDM, settings: DictConfig, data: Views):
        super().__init__()
        self.encoder = model.cond_stage_model.requires_grad_(True)
        self.texts = data.texts
        nb_named = data.classes + data.negatives
        own = torch.arange(data.classes).repeat_interleave(data.templates)
        named = torch.cat([own, torch.arange(data.classes, nb_named)])[:, None].repeat(1, MAX_LENGTH)
        named[tokenize(self.texts) != END] = IGNORED
        self.register_buffer("named", named, persistent=False)
        self.probe = nn.Linear(self.encoder(self.texts[:1]).shape[-1], nb_named)

    def forward(self, pictures: Tensor, edges: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        logits = self.probe(self.encoder(self.texts)).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), self.named.flatten(), ignore_index=IGNORED)}


class _NoiseTask(nn.Module):
    """What the tasks that add noise to latents draw, from the generator, for a batch of pictures."""

    def __init__(self, model: ControlLDM, settings: DictConfig, data: Views):
        super().__init__()
        self.model, self.settings = model, settings
        self.texts, self.templates, self.negatives = data.texts, data.templates, data.negatives

    def draw_texts(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each of B class numbers a text of its class and a negative one, as numbers in `texts`."""
        positive, negative = (torch.rand(len(labels), generator=generator) for _ in range(2))
        text = labels.cpu() * self.templates + (positive * self.templates).long()
        return text, len(self.texts) - self.negatives + (negative * self.negatives).long()

    def draw_control(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """B x 1 x 1 x 1: 1 for an item whose UNet gets the control, 0 for the share hint_dropout of them."""
        controlled = torch.rand(len(pictures), generator=generator) >= self.settings.hint_dropout
        return controlled.float()[:, None, None, None].to(pictures.device)

    @torch.no_grad()
    def add_noise(self, pictures: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(the pictures' latents with the noise of timesteps t, that noise)."""
        posterior = self.model.encode_first_stage(pictures)
        latents = self.model.get_first_stage_encoding(posterior, generator).float()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return self.model.q_sample(latents, t, noise), noise


class DiffusionTask(_NoiseTask):
    """The noise-prediction loss (DDPM, equation 14), conditioned on text and edge map.

    A share of the texts is replaced by a negative text, to train the unconditional branch of guidance, and a share of
    the control tensors is set to zero, to train the UNet without control (hint_dropout; 1 trains the UNet only).
    """

    def __init__(self, model: ControlLDM, settings: DictConfig, data: Views):
        super().__init__(model, settings, data)
        model.first_stage_model.requires_grad_(False)
        model.cond_stage_model.requires_grad_(model.cond_stage_trainable)

    def forward(self, pictures: Tensor, edges: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        model, batch, device = self.model, len(pictures), pictures.device
        text, negative = self.draw_texts(labels, generator)
        text = torch.where(torch.rand(batch, generator=generator) < self.settings.text_dropout, negative, text)
        controlled = self.draw_control(pictures, generator)
        # A power below 1 lets noisy timesteps come more often.
        noisiness = torch.rand(batch, generator=generator) ** self.settings.get("timestep_power", 1.0)
        t = (noisiness * model.num_timesteps).long().clamp(max=model.num_timesteps - 1).to(device)
        noisy, noise = self.add_noise(pictures, t, generator)
        context = model.get_learned_conditioning(self.texts)[text.to(device)]
        if self.settings.hint_dropout >= 1:
            eps = model.model.diffusion_model(x=noisy, timesteps=t, context=context, control=None).float()
        else:
            networks = model.model.diffusion_model, model.control_model
            eps = predicted_noise(networks, noisy, t, context, edges, controlled)
        return {"loss": F.mse_loss(eps, noise)}


class ConsistencyTask(_NoiseTask):
    """Distils the model into one for a few LCM steps without guidance (Luo et al. 2023, algorithm 1).

    The teacher, the model as it was, makes one guided DDIM step from timestep t, one of the 50, to t - settings.skip.
    The clean latents that the trained networks predict at t are to be those that a moving average of the same networks
    (target_decay; 0: the networks as they are) predicts behind that step.  settings.guidance: the teacher's scale,
    which the distilled model then has by itself.  (LCM draws it and tells the network; these networks have no input
    for it, like LCM-LoRA's.)  LCM skips 20 timesteps; more of them take fewer training steps to reach the noisiest.
    """

    HUBER = 1e-3
    """c of the pseudo-Huber loss, sqrt(difference^2 + c^2) - c."""

    def __init__(self, model: ControlLDM, settings: DictConfig, data: Views):
        super().__init__(model.requires_grad_(False), settings, data)
        self.networks = nn.ModuleList([model.model.diffusion_model, model.control_model])
        self.teacher, self.target = (copy.deepcopy(self.networks).eval() for _ in range(2))
        self.networks.requires_grad_(True)

    def forward(self, pictures: Tensor, edges: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        model, device = self.model, pictures.device
        self._move_target()
        text, negative = self.draw_texts(labels, generator)
        controlled = self.draw_control(pictures, generator)
        spacing = model.num_timesteps // DISTILLED_STEPS
        chosen = (torch.rand(len(pictures), generator=generator) * DISTILLED_STEPS).long()
        t = ((chosen + 1) * spacing - 1).to(device)
        with torch.no_grad():
            noisy, _ = self.add_noise(pictures, t, generator)
            contexts = model.get_learned_conditioning(self.texts)
            context, unconditional = contexts[text.to(device)], contexts[negative.to(device)]
            eps = predicted_noise(self.teacher, noisy, t, context, edges, controlled)
            eps_unconditional = predicted_noise(self.teacher, noisy, t, unconditional, edges, controlled)
            eps = eps_unconditional + self.settings.guidance * (eps - eps_unconditional)
            before = (t - self.settings.skip).clamp(min=0)
            less_noisy = model.q_sample(self._x0(noisy, t, eps), before, eps)  # DDIM's step
            target = self._clean(self.target, less_noisy, before, context, edges, controlled)
        difference = self._clean(self.networks, noisy, t, context, edges, controlled) - target
        return {"loss": ((difference**2 + self.HUBER**2).sqrt() - self.HUBER).mean()}

    def _x0(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        signal = extract_into_tensor(self.model.sqrt_alphas_cumprod, t, x.shape)
        return (x - extract_into_tensor(self.model.sqrt_one_minus_alphas_cumprod, t, x.shape) * eps) / signal

    def _clean(self, networks: nn.ModuleList, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """The consistency function: the clean latents at the end of the trajectory through x."""
        skip, out = boundary(t[:, None, None, None].float())
        return skip * x + out * self._x0(x, t, predicted_noise(networks, x, t, *conditions))

    @torch.no_grad()
    def _move_target(self) -> None:
        """Before a step, which is after the last one: the target moves towards the networks."""
        if self.training:
            for kept, new in zip(self.target.parameters(), self.networks.parameters(), strict=True):
                kept.lerp_(new, 1 - self.settings.target_decay)


def predicted_noise(
    networks: Iterable[nn.Module], x: Tensor, t: Tensor, context: Tensor, edges: Tensor, controlled: Tensor
) -> Tensor:
    """networks: UNet and control network; controlled: B x 1 x 1 x 1, 1 where an item has control and 0 where not."""
    unet, control_model = networks
    control = control_model(x=x, hint=edges.expand(-1, 3, -1, -1), timesteps=t, context=context)
    return unet(x=x, timesteps=t, context=context, control=[c * controlled for c in control]).float()
