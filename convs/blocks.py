"""Changes to torchvision's residual blocks: no last ReLU, attention, or 1x1 adapters that fold away."""

import torch
from torch import Tensor, nn

import torchvision_compat  # noqa: F401  (before torchvision: lets a CUDA wheel load beside a CPU build of torch)

from torchvision.models.resnet import BasicBlock, Bottleneck  # isort: skip


class FeatureExtractor(nn.Sequential):
    """A backbone: B x 3 x S x S, normalised -> features B x `feature_dim`."""

    feature_dim: int


class LinearBasicBlock(BasicBlock):
    """A BasicBlock without its last ReLU, so that features are signed and cosines use their whole range.

    Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return residual + (x if self.downsample is None else self.downsample(x))


class LinearBottleneck(Bottleneck):
    """A Bottleneck without its last ReLU; see `LinearBasicBlock`."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(residual)) + (x if self.downsample is None else self.downsample(x))


class AttendedBatchNorm(nn.BatchNorm2d):
    """The last batch norm of a residual branch, followed by CBAM's attention: B x C x H x W -> the same shape.

    Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018: F' = M_c(F) F, then F'' = M_s(F') F' (eq. 1),
    with M_c and M_s of eq. 2 and 3.  A subclass of the batch norm, to keep the names of torchvision's weights.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(channels)
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        average, greatest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        x = x * torch.sigmoid(self.mlp(average) + self.mlp(greatest))
        along_channels = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.spatial(along_channels))


class RepConv(nn.Conv2d):
    """A 3x3 convolution with a parallel 1x1 convolution (the adapter), both with bias, summed.

    Zhu et al., "Self-Sustaining Representation Expansion for Non-Exemplar Class-Incremental Learning", CVPR 2022,
    section 3.2.
    """

    bias: nn.Parameter

    def __init__(self, conv: nn.Conv2d):
        stride = conv.stride[0]
        super().__init__(conv.in_channels, conv.out_channels, 3, stride, padding=1)
        self.adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)

    @torch.no_grad()
    def fold(self) -> None:
        """Add the adapter to the 3x3 kernel's centre and set it to zero; the function stays the same."""
        assert self.adapter.bias is not None
        self.weight[:, :, 1:2, 1:2] += self.adapter.weight
        self.bias.add_(self.adapter.bias)
        self.adapter.weight.zero_()
        self.adapter.bias.zero_()


def fold_adapters(network: nn.Module) -> None:
    """Fold every `RepConv` of a network, as after each phase (in place)."""
    for module in network.modules():
        if isinstance(module, RepConv):
            module.fold()


def add_attention(block: Bottleneck) -> None:
    """Put CBAM at the end of a block's residual branch (figure 3 of the paper)."""
    block.bn3 = AttendedBatchNorm(block.bn3.num_features)


def add_adapters(block: BasicBlock) -> None:
    """Give both 3x3 convolutions of a block a 1x1 adapter, and its shortcut a bias in place of the batch norm."""
    block.conv1, block.conv2 = RepConv(block.conv1), RepConv(block.conv2)
    if block.downsample is not None:
        conv = block.downsample[0]
        block.downsample = nn.Sequential(nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride))


BLOCKS = {"basic": (BasicBlock, LinearBasicBlock), "bottleneck": (Bottleneck, LinearBottleneck)}
"""The block of a name, and the one without the last ReLU."""

EXTRAS = {"attention": add_attention, "adapters": add_adapters, None: lambda block: None}
"""What is done to each block."""
