"""Packed weights, compiled steps, and parts that visit a device: the same numbers, and nothing left behind."""

import copy
import gc
import shutil
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ControlNet.cldm import inference
from ControlNet.cldm.inference import PackedConv2d, PackedLinear, make_ready, pack_weights, release, visiting
from tests.little_config import relative_error
from tests.little_model import little_model, sampled


def inputs(model, batch=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, 4, size // 8, size // 8), generator=generator)
    hint = (torch.rand((batch, 3, size, size), generator=generator) > 0.9).float()
    context = torch.randn((batch, 77, 32), generator=generator)
    return x, torch.full((batch,), 500), {"c_concat": [hint], "c_crossattn": [context]}


def packed_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedConv2d | PackedLinear)]


def computes_bf16():
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()


# --- packed weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1),
        nn.Conv2d(48, 16, 1),
        nn.Flatten(2),
        nn.Linear(16, 24),
        nn.Linear(24, 5, bias=False),
    )


def test_packed_layers_compute_the_same_at_every_size(layers):
    """Weights are packed for the first input's size, and must be right for all others."""
    pack_weights(layers)
    plain = copy.deepcopy(layers)
    for module in plain:
        module.__class__ = {PackedConv2d: nn.Conv2d, PackedLinear: nn.Linear}.get(type(module), type(module))
    assert len(packed_layers(layers)) == 5
    assert not packed_layers(plain)
    with torch.inference_mode():
        for batch, height in ((2, 8), (1, 8), (7, 8)):
            x = torch.randn(batch, 4, height, 8)
            assert relative_error(layers(x), plain(x)) < 1e-5
        for height, width in ((6, 40), (64, 64), (2, 2)):
            x = torch.randn(2, 4, height, width)
            assert relative_error(layers[:4](x), plain[:4](x)) < 1e-5
            assert torch.equal(layers[:4](x), layers[:4](x))


@pytest.mark.skipif(not computes_bf16(), reason="oneDNN does not compute in bfloat16 on this CPU")
def test_packed_layers_are_as_near_in_bf16_as_plain_ones(layers):
    x = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        exact = layers(x)
        layers.bfloat16()
        plain = layers(x.bfloat16())
        pack_weights(layers)
        ours = layers(x.bfloat16())
    assert all(vars(layers[i]).get("_packed_weight") is not None for i in (0, 2, 3, 5, 6))
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours.float(), exact) < 1.5 * relative_error(plain.float(), exact) < 0.05


def test_a_precision_that_is_not_packed_is_computed_plainly(layers, monkeypatch):
    monkeypatch.setattr(inference, "_computes", lambda dtype: dtype == torch.float32)
    pack_weights(layers.bfloat16())
    with torch.inference_mode():
        assert layers(torch.randn(1, 4, 8, 8).bfloat16()).dtype == torch.bfloat16
    assert not any("_packed_weight" in vars(layer) for layer in layers)


def test_packing_changes_no_name_and_no_parameter(layers):
    before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in layers.state_dict().items()}
    pack_weights(layers)
    with torch.no_grad():
        layers(torch.randn(1, 4, 8, 8))
    assert {name: (tensor.data_ptr(), tensor.shape) for name, tensor in layers.state_dict().items()} == before


def test_a_changed_weight_is_packed_again(layers):
    pack_weights(layers)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        before = layers(x)
        layers[0].weight.mul_(2)
        layers[0].bias.mul_(2)
        layers.load_state_dict({**layers.state_dict(), "6.weight": layers[6].weight * 3})
        changed = layers(x)
    plain = layers(x)  # with gradients: the plain path
    assert relative_error(changed, plain) < 1e-5
    assert relative_error(before, plain) > 0.1
    layers.double()
    with torch.no_grad():
        assert layers(x.double()).dtype == torch.float64


def test_packed_layers_still_train_and_copy(layers):
    pack_weights(layers)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = layers(x)
        twin = copy.deepcopy(layers)
        assert torch.equal(twin(x), expected)
    layers(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layers.parameters())


def test_a_model_made_ready_predicts_the_same():
    plain, ready = little_model(), little_model()
    make_ready(ready)
    names = packed_layers(ready)
    assert {name.partition(".")[0] for name in names} == {"model", "control_model", "first_stage_model"}
    with torch.inference_mode():
        arguments = inputs(plain)
        assert relative_error(ready.apply_model(*arguments), plain.apply_model(*arguments)) < 1e-5
        latents = arguments[0]
        assert relative_error(ready.decode_first_stage(latents), plain.decode_first_stage(latents)) < 1e-5


def test_the_autoencoders_attention_takes_a_fused_kernel(monkeypatch):
    """Kernels that keep no N x N scores refuse tensors whose last stride is not 1; choice 0 is the one that does."""
    choices = []

    def note(q, k, v, of=F.scaled_dot_product_attention):
        choices.append(torch._fused_sdp_choice(q, k, v))
        return of(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    model = little_model()
    with torch.inference_mode():
        model.decode_first_stage(torch.zeros(1, 4, 8, 8))
        model.encode_first_stage(torch.zeros(1, 3, 64, 64))
    assert choices
    assert 0 not in choices


def test_low_memory_packs_nothing():
    model = little_model()
    make_ready(model, low_memory=True)
    assert not packed_layers(model)


# --- torch.compile -----------------------------------------------------------------------------------------------


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == inference.__name__]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing compiled by an earlier run, and nothing left of this one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow(reason="compiles for a minute")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_steps_predict_the_same(own_cache, caplog):
    plain, compiled = little_model(), little_model()
    make_ready(compiled, engine="compile")
    with torch.inference_mode():
        arguments = inputs(plain)
        assert relative_error(compiled.apply_model(*arguments), plain.apply_model(*arguments)) < 1e-4
        latents = arguments[0]
        assert relative_error(compiled.decode_first_stage(latents), plain.decode_first_stage(latents)) < 1e-4
    assert not said(caplog)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


class Model(nn.Module):
    """As much of a ControlLDM as is compiled: torch takes its time with a whole one."""

    device = torch.device("cpu")

    def apply_model(self, x):
        return x.sin() + 1

    decode_first_stage = apply_model


@pytest.mark.parametrize("words", ["CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_lack_of_memory_is_no_fault_of_the_compiler(words, monkeypatch):
    """The batch is halved, and the compiled steps stay."""

    def compiled(*_):
        raise RuntimeError(f"CUDA error: {words}")

    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled)
    model = Model()
    make_ready(model, engine="compile")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            model.apply_model(torch.zeros(1))


def test_a_model_made_ready_is_freed_with_its_last_owner(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = Model()
    make_ready(model, engine="compile")
    model.apply_model(torch.zeros(1))
    freed = weakref.ref(model)
    gc.disable()
    try:
        release(model)
        del model
        assert freed() is None
    finally:
        gc.enable()


def assert_goes_on_without(caplog, reason):
    model = Model()
    make_ready(model, engine="compile")
    for x in torch.randn(2, 5):
        assert torch.equal(model.apply_model(x), x.sin() + 1)
    (message,) = said(caplog)  # once
    assert message.startswith("torch.compile does not work here, going on without it: ")
    assert reason in message
    assert "\n" not in message


def test_what_cannot_be_compiled_goes_on_in_words(own_cache, monkeypatch, caplog):
    def compiler(graph, inputs):
        raise RuntimeError("no compiler here")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=compiler))
    assert_goes_on_without(caplog, "no compiler here")


@pytest.mark.long
def test_a_machine_without_a_compiler_goes_on_in_words(own_cache, monkeypatch, caplog):
    import torch._inductor.config as settings

    monkeypatch.setattr(settings, "force_disable_caches", True)
    monkeypatch.setattr(settings.cpp, "cxx", ("/nonexistent/compiler",))
    assert_goes_on_without(caplog, "No working C++ compiler found")


# --- visits ------------------------------------------------------------------------------------------------------


def test_a_visit_ends_at_home(monkeypatch):
    model = little_model()
    tensors = list(model.model.parameters())
    homes = [tensor.data_ptr() for tensor in tensors]
    monkeypatch.setattr(inference, "moved", lambda tensor, device: tensor.clone())
    with visiting(torch.device("cpu"), model.model):
        assert not {tensor.data_ptr() for tensor in tensors} & set(homes)
    assert [tensor.data_ptr() for tensor in tensors] == homes
    with pytest.raises(ZeroDivisionError), visiting(torch.device("cpu"), model.model):
        raise ZeroDivisionError
    assert [tensor.data_ptr() for tensor in tensors] == homes


def test_a_visit_that_does_not_fit_ends_at_home(monkeypatch):
    network = little_model().model
    homes = [tensor.data_ptr() for tensor in network.parameters()]
    room = iter(range(3))

    def moved(tensor, device):
        if next(room, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.clone()

    monkeypatch.setattr(inference, "moved", moved)
    with pytest.raises(torch.OutOfMemoryError), visiting(torch.device("cpu"), network):
        pytest.fail("it did not fit")
    assert [tensor.data_ptr() for tensor in network.parameters()] == homes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", [{}, {"reuse_every": 2}, {"sampler": "unipc"}])
def test_cuda_graphs_sample_the_same(own_cache, caplog, how):
    """A sampler keeps the results of earlier steps, which the next replay of a graph must not overwrite."""
    how = dict(how)
    plain, compiled = little_model().cuda(), little_model().cuda()
    make_ready(compiled, engine="compile")
    sampler = how.pop("sampler", "ddim")
    for batch, size in ((2, 64), (1, 128), (2, 64)):
        _, _, cond = inputs(plain, batch, size)
        cond = {name: [tensor.cuda() for tensor in tensors] for name, tensors in cond.items()}
        uncond = {**cond, "c_crossattn": [torch.zeros_like(tensor) for tensor in cond["c_crossattn"]]}
        latents = []
        for model in (plain, compiled):
            with torch.inference_mode():
                shape, generator = (batch, 4, size // 8, size // 8), torch.Generator().manual_seed(0)
                made = sampled(model, sampler, 6, shape, cond, uncond, 3.0, generator=generator, **how)
                latents.append((made, model.decode_first_stage(made)))
        for ours, theirs in zip(*latents, strict=True):
            assert relative_error(ours, theirs) < 1e-2  # TF32 and other kernels
    assert not said(caplog)
