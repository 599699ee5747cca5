"""A linear autoencoder of patches: the larger latents of small models that are trained on a CPU.

The published autoencoder takes most of a small model's training time, and with 4 channels its pictures stay blurred.
The principal components of patches need no training, and 12 of them keep a picture of CIFAR-10 at
32 dB (tests/bench/bench_patch_autoencoder.py).
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ControlNet.ldm.autoencoder import DiagonalGaussianDistribution

LEAST_LOG_VARIANCE = -30.0
"""Of the latents, which are a function of the picture; `DiagonalGaussianDistribution` clamps to it."""


class PatchAutoencoder(nn.Module):
    """encode: B x 3 x H x W in [-1, 1] -> a distribution of variance ~0 over B x embed_dim x H/8 x W/8.

    Latents are the first embed_dim principal components of 8 x 8 patches, in their natural scale: coarse components
    have a larger variance than fine ones, so a diffusion model settles them first.  `fit` sets the components.
    """

    PATCH = 8

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.encoder = nn.Conv2d(3, embed_dim, self.PATCH, stride=self.PATCH)
        self.decoder = nn.ConvTranspose2d(embed_dim, 3, self.PATCH, stride=self.PATCH)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        mean = self.encoder(x)
        return DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, LEAST_LOG_VARIANCE)], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    @torch.no_grad()
    def fit(self, pictures: Tensor) -> None:
        """Set the components to those of B x 3 x H x W pictures in [-1, 1]."""
        patches = rearrange(pictures, "b c (h p) (w q) -> (b h w) (c p q)", p=self.PATCH, q=self.PATCH).double()
        mean = patches.mean(0)
        components = torch.linalg.eigh(torch.cov((patches - mean).T)).eigenvectors.flip(1)[:, : self.embed_dim].T
        assert self.encoder.bias is not None
        assert self.decoder.bias is not None
        self.encoder.weight.copy_(components.view_as(self.encoder.weight))
        self.encoder.bias.copy_(-components @ mean)
        self.decoder.weight.copy_(components.view_as(self.decoder.weight))
        # The mean as a picture that is equal in each patch would need a bias per pixel: only its colour is kept.
        self.decoder.bias.copy_(mean.view(3, -1).mean(1))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the latents by a factor; reconstructions stay the same."""
        assert self.encoder.bias is not None
        self.encoder.weight *= factor
        self.encoder.bias *= factor
        self.decoder.weight /= factor
