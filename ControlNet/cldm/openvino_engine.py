"""OpenVINO in place of torch for the networks of sampling, on a CPU: the denoising step and the decoder.

A network is converted once for its weights, whatever the batch and the size of the pictures, and kept on disk.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.ldm.unet import CrossAttention, DeepFeatures

FORMAT = 1
"""Of the converted networks: to be raised where the same weights would be converted to another function."""
SAMPLED_VALUES = 256
"""Of each tensor, in the digest of a network's weights."""

LARGE = 100_000_000
"""Of a network of more parameters, whose compiled weights take gigabytes, one compiled form is kept at a time."""
MOST_SHAPES = 8
"""For which a smaller network is kept compiled."""

log = logging.getLogger(__name__)


def is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def _core():
    """OpenVINO's runtime, one for the whole process, which is never let go.

    On a CPU with AMX its CPU plugin sets an alternate stack for signals, and frees that memory when it is unloaded
    although the thread may still be told to use it (seen in 2026.4): the next signal, such as that of a
    DataLoader's worker that has ended, would kill the process.
    """
    import openvino

    return openvino.Core()


def computes_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def cache_folder() -> Path:
    """Of converted networks: $ESCORT_CACHE_DIR/openvino, ~/.cache/escort/openvino by default."""
    home = os.environ.get("ESCORT_CACHE_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "escort")
    return Path(home).expanduser() / "openvino"


def use_openvino(model: ControlLDM, precision: str = "fp32") -> None:
    """Let OpenVINO compute the model's apply_model and decode_first_stage.

    model: in float32, on the CPU; precision: "fp32" (torch's results up to rounding), or "bf16" where `computes_bf16`.
    """
    steps: dict[tuple[bool, bool], _Network] = {}  # (controlled, reusing deep features) -> network

    def apply_model(x_noisy: Tensor, t: Tensor, cond: dict) -> Tensor:
        deep = cond.get("deep")
        reused = deep is not None and deep.blocks is not None
        inputs = {"x": x_noisy, "t": t, "context": torch.cat(cond["c_crossattn"], dim=1)}
        is_controlled = cond["c_concat"] is not None
        if is_controlled:
            hint_features = cond.get("hint_features")
            if hint_features is None:
                hint_features = model.control_model.encode_hint(torch.cat(cond["c_concat"], dim=1))
            inputs |= {"hint_features": hint_features, "scales": torch.tensor(model.control_scales)}
        if reused:
            inputs["features"] = deep.features  # type: ignore[union-attr]  # there, where they are reused
        if (is_controlled, reused) not in steps:
            steps[is_controlled, reused] = _Network(_Step(model), precision)
        eps, *features = steps[is_controlled, reused](inputs)
        if features and deep is not None:
            (deep.features,) = features
        return eps

    autoencoder = model.first_stage_model
    decoder = _Network(nn.Sequential(autoencoder.post_quant_conv, autoencoder.decoder), precision)

    def decode_first_stage(z: Tensor, *_, **__) -> Tensor:
        return decoder({"input": z / model.scale_factor})[0]

    model.apply_model = apply_model  # type: ignore[method-assign]
    model.decode_first_stage = decode_first_stage  # type: ignore[method-assign]


class _Step(nn.Module):
    """ControlLDM.apply_model, with tensors alone.  Its second output are the deep features, unless they are given."""

    def __init__(self, model: ControlLDM):
        super().__init__()
        self.unet, self.control = model.model.diffusion_model, model.control_model
        self.only_mid_control = model.only_mid_control

    def forward(self, x, t, context, hint_features=None, scales=None, features=None):
        deep = DeepFeatures(reuse=features is not None, features=features)
        control = None
        if hint_features is not None:
            control = self.control(
                x=x, hint=None, timesteps=t, context=context, hint_features=hint_features, blocks=deep.blocks
            )
            control = [tensor * scales[i] for i, tensor in enumerate(control)]
        eps = self.unet(
            x=x, timesteps=t, context=context, control=control, only_mid_control=self.only_mid_control, deep=deep
        )
        return (eps, deep.features) if features is None else (eps,)


class _Network:
    """A module as OpenVINO computes it, converted at its first call.

    It is compiled for each shape of the inputs, which takes seconds, and saves a small network half of its time, a
    large one a sixth.  A large one is compiled for the first shape, and once for all shapes when another one comes.
    """

    def __init__(self, module: nn.Module, precision: str):
        self.module, self.precision = module.eval(), precision
        self.is_large = sum(parameter.numel() for parameter in module.parameters()) > LARGE
        self._graph: Any = None
        self._any_shapes: dict[str, Any] = {}  # the graph's own, by inputs
        self._requests: dict[tuple | None, Any] = {}  # by shapes, None for all; the last used one at the end

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The module's outputs, float32.  inputs: by the names of its arguments."""
        shapes: tuple | None = tuple(tuple(tensor.shape) for tensor in inputs.values())
        if self.is_large and self._requests and shapes not in self._requests:
            shapes = None
            if None not in self._requests:
                self._requests.clear()  # before the next one is compiled, which takes as much memory
        request = self._requests[shapes] = self._requests.pop(shapes, None) or self._compiled(inputs, shapes)
        if len(self._requests) > MOST_SHAPES:
            del self._requests[next(iter(self._requests))]
        outputs = request.infer({name: tensor.contiguous().numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(output) for output in outputs.values()]

    def _compiled(self, inputs: Mapping[str, Tensor], shapes: tuple | None):
        """A request to the network that is compiled for these shapes, None for all."""
        if self._graph is None:
            self._graph = self._converted(inputs)
            self._any_shapes = {input.any_name: input.partial_shape for input in self._graph.inputs}
        self._graph.reshape(self._any_shapes if shapes is None else dict(zip(inputs, shapes, strict=True)))
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # several processes on a machine would be bound to the same cores
        }
        return _core().compile_model(self._graph, "CPU", options).create_infer_request()

    def _converted(self, inputs: Mapping[str, Tensor]):
        """OpenVINO's graph, from the cache or, where it is not there yet, converted and put into it."""
        import openvino

        name = f"{type(self.module).__name__.strip('_').lower()}-{self._digest(inputs, openvino.__version__)}"
        file = cache_folder() / name / "network.xml"
        if file.is_file():
            try:
                return _core().read_model(file)
            except RuntimeError:
                log.warning("%s can't be read, the network is converted again", file)
                shutil.rmtree(file.parent, ignore_errors=True)
        log.info("converting a network for OpenVINO, once for these weights")
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's: the graph does not depend on sizes
            example = {name: tensor.clone() for name, tensor in inputs.items()}
            graph = openvino.convert_model(self.module, example_input=example)
        try:
            _write(graph, file)
        except (OSError, RuntimeError) as error:
            reason, folder = (str(error).strip().splitlines() or ["?"])[-1], file.parent
            log.warning(
                "the converted network can't be kept in %s and is converted again next time: %s", folder, reason
            )
        return graph

    def _digest(self, inputs: Mapping[str, Tensor], version: str) -> str:
        """Of all that the converted network depends on: the weights by a sample of each tensor's values."""
        heads = [module.heads for module in self.module.modules() if isinstance(module, CrossAttention)]
        only_mid = getattr(self.module, "only_mid_control", None)
        parts = (FORMAT, version, sorted(inputs), str(self.module), heads, only_mid)
        digest = hashlib.sha256(repr(parts).encode())
        for name, tensor in self.module.state_dict().items():
            values = tensor.detach().flatten()
            picked = values[:: max(1, len(values) // SAMPLED_VALUES)].float().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + picked.numpy().tobytes())
        return digest.hexdigest()[:16]


def _write(graph, file: Path) -> None:
    """Write a graph into a folder that is there as a whole or not at all."""
    import openvino

    folder = file.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as made:
        openvino.save_model(graph, Path(made, file.name), compress_to_fp16=False)
        os.chmod(made, 0o755)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
