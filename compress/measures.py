"""What tells good copies from bad ones, on a CPU: edges, class and variety."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from torch import nn

SIDE = 32
"""Pixels a side that the classifier sees."""
BATCH_SIZE = 64
"""Pictures of one of its training updates."""


def edges_found(prompts: Sequence[np.ndarray], copies: Sequence[np.ndarray], reach: int = 2) -> float:
    """Share of the prompts' edge pixels with an edge of their copy at most `reach` pixels away.

    prompts: HxW, above 0 on an edge; copies: pictures (HxWx3 or HxW uint8), brought to their prompt's size.
    nan where the prompts have no edge.
    """
    maps = [cv2.resize(p, e.shape[::-1], interpolation=cv2.INTER_LINEAR) for e, p in zip(prompts, copies, strict=True)]
    counts = [near(prompt, cv2.Canny(picture, 100, 200), reach) for prompt, picture in zip(prompts, maps, strict=True)]
    found, total = np.sum(counts, axis=0)
    return float(found / total) if total else float("nan")


def near(prompt: np.ndarray, edges: np.ndarray, reach: int) -> tuple[int, int]:
    """(edge pixels of the prompt with one of `edges` at most `reach` pixels away, edge pixels of the prompt)."""
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return int(((cv2.dilate(edges, kernel) > 0) & (prompt > 0)).sum()), int((prompt > 0).sum())


def variety(copies: Sequence[np.ndarray]) -> float:
    """Standard deviation over the copies of one image (of one shape), mean over pixels and channels: levels of 255."""
    return float(np.stack(copies).astype(np.float32).std(axis=0).mean())


def network(classes: int) -> nn.Module:
    """A classifier of 3 x SIDE x SIDE pictures."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(128 * (SIDE // 8) ** 2, classes))


def batch(pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """Pictures (HxWx3 or HxW uint8) as the classifier takes them: N x 3 x SIDE x SIDE, -1 to 1."""
    rgb = [np.repeat(p[:, :, None], 3, 2) if p.ndim == 2 else p for p in pictures]
    resized = [cv2.resize(p, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for p in rgb]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(pictures: torch.Tensor, labels: torch.Tensor, classes: int, epochs: int) -> nn.Module:
    """A classifier of real pictures (`batch`), trained with shifts of up to 3 pixels; its seed is fixed."""
    torch.manual_seed(0)
    model = network(classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pictures)).split(BATCH_SIZE):
            if len(chosen) == 1 < len(pictures):  # too few for batch normalisation
                continue
            shift = torch.randint(-3, 4, (2,)).tolist()
            loss = nn.functional.cross_entropy(model(pictures[chosen].roll(shift, (2, 3))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def predicted(model: nn.Module, pictures: Iterable[np.ndarray]) -> np.ndarray:
    """The classifier's class of each picture."""
    return torch.cat([model(part).argmax(1) for part in batch(pictures).split(256)]).numpy()
