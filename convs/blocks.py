"""What the named backbones do to torchvision's residual blocks: no last ReLU, attention, or branches that fold away."""

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck


class LinearBasicBlock(BasicBlock):
    """A BasicBlock without its last ReLU, so that features have both signs and cosines all their range.

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


LINEAR = {BasicBlock: LinearBasicBlock, Bottleneck: LinearBottleneck}


class AttendedBatchNorm(nn.BatchNorm2d):
    """A residual branch's last batch norm, and CBAM's attention over what it puts out, B x C x H x W.

    Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018: F' = M_c(F) F, then F'' = M_s(F') F' (eq. 1),
    with M_c and M_s of eq. 2 and 3.  As a batch norm it keeps the names of torchvision's weights.
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


def attend(block: BasicBlock | Bottleneck) -> None:
    """Put CBAM at the end of a block's residual branch (figure 3 of the paper)."""
    last = "bn3" if isinstance(block, Bottleneck) else "bn2"
    setattr(block, last, AttendedBatchNorm(getattr(block, last).num_features))


class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, each with its batch norm, summed; `folded` into one 3x3 after training.

    Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3.2, without the identity branch,
    which a residual block has already.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        size = conv.in_channels, conv.out_channels
        self.dense = nn.Conv2d(*size, 3, conv.stride, padding=1, bias=False)
        self.dense_bn = nn.BatchNorm2d(conv.out_channels)
        self.point = nn.Conv2d(*size, 1, conv.stride, bias=False)
        self.point_bn = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_bn(self.dense(x)) + self.point_bn(self.point(x))

    def folded(self) -> nn.Conv2d:
        """One 3x3 convolution that computes what the branches do in eval mode (section 3.3)."""
        dense = fuse_conv_bn_eval(copy.deepcopy(self.dense).eval(), copy.deepcopy(self.dense_bn).eval())
        point = fuse_conv_bn_eval(copy.deepcopy(self.point).eval(), copy.deepcopy(self.point_bn).eval())
        with torch.no_grad():
            dense.weight[:, :, 1:2, 1:2] += point.weight
            dense.bias += point.bias
        return dense


def branch(block: BasicBlock) -> None:
    """Give both 3x3 convolutions of a block their 1x1 branch; the batch norms move into the branches."""
    block.conv1, block.bn1 = RepConv(block.conv1), nn.Identity()
    block.conv2, block.bn2 = RepConv(block.conv2), nn.Identity()


def folded(network: nn.Module) -> nn.Module:
    """A copy of a network, for inference: every `RepConv` is one convolution."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, RepConv):
                setattr(module, name, child.folded())
    return network
