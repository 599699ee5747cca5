"""freeze_backbone and backbone_lrate, for every method through three phases."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.conftest import long_but
from tests.little_trainer import SHORT, keys_of, new_trainer
from tests.methods import METHODS
from tests.shapes import make_shapes

RATE = 1.25e-3  # of the backbone; no method has it of its own
QUICK = ("ewc", "tagfex")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data"), train=4, test=1, copies=0)


@pytest.fixture
def trainer(paths, tmp_path):
    def call(method, **values):
        keys = {**SHORT, **keys_of(method), **values, "batch_size": 4}
        return new_trainer(paths, tmp_path / "run", method, exemplars=2, **keys)

    return call


def layers_of_backbones(network: nn.Module) -> list[nn.Module]:
    """Convolutions and batch norms: no head has any."""
    return [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]


@pytest.mark.parametrize("method", long_but(METHODS, *QUICK))
def test_a_frozen_backbone_keeps_its_features(trainer, method):
    """Of every extractor, after every phase; batch norm's statistics are a part of that."""
    run = trainer(method, freeze_backbone=True)
    images = torch.randn(3, 3, 32, 32)

    def features():
        with torch.no_grad():
            return run.method.evaluated.eval()(images).features

    start_phase, first = run.start_phase, {}

    def start(phase):
        start_phase(phase)
        if phase == 0:
            first["features"], network = features(), run.method.network
            first["head"] = [p.clone() for p in network.parameters() if p.requires_grad]
            first["agnostic"] = [t.clone() for t in getattr(network, "agnostic", nn.Module()).state_dict().values()]

    run.start_phase, seen = start, []

    def compare(records):
        width = first["features"].shape[1]
        for of_extractor in features().split(width, dim=1):
            torch.testing.assert_close(of_extractor, first["features"], rtol=1e-4, atol=1e-4)
        agnostic = getattr(run.method.network, "agnostic", nn.Module()).state_dict().values()
        assert all(torch.equal(now, then) for now, then in zip(agnostic, first["agnostic"], strict=True))
        seen.append(len(records))

    run.fit(after_phase=compare)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("method", long_but(METHODS, *QUICK))
def test_the_backbone_has_a_rate_of_its_own(trainer, method):
    """In every optimisation step: the layers of backbones have it, and nothing else has."""
    run, of_backbones = trainer(method, backbone_lrate=RATE), []

    def look(optimizer, *_):
        backbone = {id(p) for layer in layers_of_backbones(run.method.network) for p in layer.parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert (group["initial_lr"] == RATE) == (id(parameter) in backbone)
                of_backbones.append(id(parameter) in backbone)

    hook = register_optimizer_step_pre_hook(look)
    try:
        run.fit()
    finally:
        hook.remove()
    assert any(of_backbones)
    assert not all(of_backbones)
