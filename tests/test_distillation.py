"""Distilling a model to a few LCM steps: the loss, from diffusers' schedulers, and what is trained by it."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ControlNet.objectives import ConsistencyTask
from tests.diffusers_schedulers import scheduler
from tests.little_model import little_model

pytest.importorskip("diffusers", reason="is what the loss is compared with")

TEXTS = SimpleNamespace(texts=["digit one", "digit two", "blurry"], classes=2, templates=1, negatives=1)
SETTINGS = {"guidance": 3.0, "skip": 20, "hint_dropout": 0.0, "target_decay": 0.9}


def batch(count: int, size: int = 32):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand((count, 3, size, size), generator=generator) * 2 - 1
    edges = (torch.rand((count, 1, size, size), generator=generator) > 0.8).float()
    return pictures, edges, torch.arange(count) % 2


class Calls:
    """What a UNet was called with, and what it said: (x, timesteps, context, prediction)."""

    def __init__(self, networks):
        self.made = []
        networks[0].register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs, output):
        self.made.append((kwargs["x"], kwargs["timesteps"], kwargs["context"], output.detach()))


@pytest.mark.parametrize("skip", [20, 100])
def test_the_loss_is_that_of_diffusers_schedulers(skip):
    model = little_model()
    task = ConsistencyTask(model, OmegaConf.create({**SETTINGS, "skip": skip}), TEXTS)
    with torch.no_grad():
        for parameter in task.networks.parameters():  # no longer the teacher's
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    task.eval()  # the target stays
    teacher, target, trained = (Calls(networks) for networks in (task.teacher, task.target, task.networks))
    pictures, edges, labels = batch(60)
    loss = task(pictures, edges, labels, torch.Generator().manual_seed(3))["loss"]

    contexts = model.get_learned_conditioning(TEXTS.texts)
    (noisy, t, context, eps), (_, _, unconditional, eps_unconditional) = teacher.made
    assert torch.equal(context, contexts[labels])
    assert torch.equal(unconditional, contexts[torch.full_like(labels, 2)])
    (less_noisy, before, _, eps_before), (x, times, _, eps_trained) = target.made[0], trained.made[0]
    assert torch.equal(x, noisy)
    assert torch.equal(times, t)
    assert set(t.tolist()) <= set(range(19, 1000, 20))
    assert 19 in t  # whose step ends at timestep 0
    ddim, lcm = scheduler("ddim"), scheduler("lcm")
    ddim.set_timesteps(1000 // skip)
    guided = eps_unconditional + SETTINGS["guidance"] * (eps - eps_unconditional)
    expected_loss = 0.0
    for i, timestep in enumerate(t.tolist()):
        step = ddim.step(guided[i], timestep, noisy[i]).prev_sample
        torch.testing.assert_close(less_noisy[i], step, rtol=1e-4, atol=1e-5)
        assert before[i] == max(timestep - skip, 0)
        ends = []
        for time, point, noise in ((timestep, noisy[i], eps_trained[i]), (int(before[i]), step, eps_before[i])):
            keep, out = lcm.get_scalings_for_boundary_condition_discrete(time)
            a = lcm.alphas_cumprod[time]
            ends.append(keep * point + out * (point - (1 - a).sqrt() * noise) / a.sqrt())
        expected_loss += ((ends[0] - ends[1]).square() + 1e-6).sqrt().sub(1e-3).mean() / len(t)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-6)


def test_the_target_follows_the_networks_and_the_teacher_stays():
    task = ConsistencyTask(little_model(), OmegaConf.create(SETTINGS), TEXTS).train()
    weights = {name: next(getattr(task, name).parameters()) for name in ("networks", "target", "teacher")}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        weights["networks"].add_(1)
    loss = task(*batch(2), torch.Generator().manual_seed(0))["loss"]
    loss.backward()
    torch.testing.assert_close(weights["target"], before["target"] + 0.1)
    assert torch.equal(weights["teacher"], before["teacher"])
    trained = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(name.startswith(("networks.", "model.")) for name in trained)
    assert not any("first_stage" in name or "cond_stage" in name for name in trained)
