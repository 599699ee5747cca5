"""ACIL: Zhuang et al., "ACIL: Analytic Class-Incremental Learning with Absolute Memorization and Privacy Protection",
NeurIPS 2022.

The backbone learns in phase 0, with a linear head that is then thrown away, and is fixed afterwards.  Its features go
through a fixed random layer with ReLU, and the head over those is the ridge regression of one-hot targets on all images
seen so far.  No exemplars: two matrices of sums are all that is kept of them.

The paper's and PyCIL's recursion updates an inverse; here the sums themselves are kept and the equations are solved
anew, which is the same in exact arithmetic.  A checkpoint holds them: buffer_size^2 numbers of 8 bytes, 512 MiB for
8192.  Settings and schedule are PyCIL's for CIFAR-100.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convs.blocks import FeatureExtractor
from models.networks import GrowingNet, NewBackbone, Outputs
from models.training.method import Method
from models.training.stages import Defaults, Stage
from utils.config.schema import Config, setting
from utils.config.types import Count, Positive


@dataclass
class Settings:
    buffer_size: Count = setting(8192, "features after the random layer", source="PyCIL")
    gamma: Positive = setting(0.1, "weight of the ridge penalty", source="PyCIL")
    IL_batch_size: Count = setting(4096, "images that are added to the sums at a time", source="PyCIL")
    inplace_repeat: Count = setting(1, "how often each image counts", source="PyCIL")


class AnalyticNet(GrowingNet):
    """A backbone, a fixed random layer without bias, and streams: an activation and a linear head of float64 each.

    activations: of the streams; scales: what their logits are multiplied by before they are added up.
    In training mode the logits are those of `head`, which knows the classes of phase 0 alone.
    """

    head: nn.Linear
    projection: Tensor

    def __init__(
        self,
        backbone: FeatureExtractor,
        size: int,
        activations: Sequence[Callable[[Tensor], Tensor]],
        scales: Sequence[float] = (1.0,),
    ):
        super().__init__()
        self.backbone, self.activations, self.scales = backbone, activations, scales
        self.register_buffer("projection", torch.empty(size, backbone.feature_dim, dtype=torch.float64))
        nn.init.uniform_(self.projection, -(backbone.feature_dim**-0.5), backbone.feature_dim**-0.5)
        for stream in range(len(activations)):
            self.register_buffer(f"weight{stream}", torch.zeros(size, 0, dtype=torch.float64))

    def grow(self, nb_new: int) -> None:
        if not self.nb_classes:
            self.head = nn.Linear(self.backbone.feature_dim, nb_new, bias=False)
        self.nb_classes += nb_new
        for stream in range(len(self.activations)):
            setattr(self, f"weight{stream}", F.pad(getattr(self, f"weight{stream}"), (0, nb_new)))

    def first_phase_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.backbone, self.head

    def hidden(self, features: Tensor, stream: int) -> Tensor:
        """What a stream's head reads: B x D -> B x size, float64."""
        return self.activations[stream](features.to(self.projection) @ self.projection.T)

    def logits(self, features: Tensor, stream: int) -> Tensor:
        """One stream's, B x D -> B x classes, float64."""
        return self.hidden(features, stream) @ getattr(self, f"weight{stream}")

    def forward(self, x: Tensor) -> Outputs:
        features = self.backbone(x)
        if self.training:
            return Outputs(self.head(features), features)
        logits = [scale * self.logits(features, stream) for stream, scale in enumerate(self.scales)]
        return Outputs(sum(logits[1:], logits[0]), features)


class ACIL(Method, name="acil"):
    network: AnalyticNet
    defaults = Defaults(epochs=1, init_epoch=160, init_milestones=(120, 140))
    uses_memory = False
    plain_phase_0 = False

    @classmethod
    def build_network(cls, new_backbone: NewBackbone, config: Config) -> AnalyticNet:
        return AnalyticNet(new_backbone(), config.settings.buffer_size, [torch.relu])

    def stages(self) -> Iterable[Stage]:
        return super().stages() if self.phase == 0 else []

    def loss(self, outputs: Outputs, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)

    @torch.no_grad()
    def after_training(self) -> None:
        """Add the new classes' images to the sums, a batch at a time in the order of classes."""
        features = self.new_features("ridge regression")
        targets = self.data.phase_targets(self.phase)
        labels = torch.tensor([t for t, rows in zip(targets, features, strict=True) for _ in rows])
        repeat, size = self.settings.inplace_repeat, self.settings.IL_batch_size
        rows = torch.cat(features).repeat_interleave(repeat, dim=0).split(size)
        for some, their_labels in zip(rows, labels.repeat_interleave(repeat).split(size), strict=True):
            one_hot = F.one_hot(their_labels, self.nb_seen).double()
            self.add(self.fabric.to_device(some), self.fabric.to_device(one_hot))
        for stream in range(len(self.network.activations)):
            self.solve(stream)

    def add(self, features: Tensor, one_hot: Tensor) -> None:
        """Count some images in.  features: B x D; one_hot: B x nb_seen."""
        self.add_to_sums(0, self.network.hidden(features, 0), one_hot, self.settings.gamma)

    def add_to_sums(self, stream: int, hidden: Tensor, wanted: Tensor, gamma: float) -> None:
        """A stream's sums: gamma I + X^T X and X^T Y, with X the hidden features and Y what its head should say."""
        autocorrelation = self.state.get(f"autocorrelation{stream}")
        if autocorrelation is None:
            autocorrelation = gamma * torch.eye(hidden.shape[1], dtype=hidden.dtype)
        products = self.state.get(f"products{stream}", hidden.new_zeros(hidden.shape[1], 0))
        products = F.pad(products.to(hidden.device), (0, wanted.shape[1] - products.shape[1]))
        self.state[f"autocorrelation{stream}"] = autocorrelation.to(hidden.device) + hidden.T @ hidden
        self.state[f"products{stream}"] = products + hidden.T @ wanted

    def solve(self, stream: int) -> None:
        """Give a stream's head the weights (gamma I + X^T X)^-1 X^T Y."""
        factor = torch.linalg.cholesky(self.state[f"autocorrelation{stream}"])
        weight = torch.cholesky_solve(self.state[f"products{stream}"], factor)
        getattr(self.network, f"weight{stream}").copy_(weight)
