"""The key copies_kept: of an exemplar's candidates, the K copies that a classifier chooses."""

import torch

from models.networks import GrowingNet
from models.run import Run


def choose_copies(run: Run, network: GrowingNet, description: str = "") -> None:
    """Choose the copies of exemplars that have none chosen yet; they keep them in all later phases.

    network: the classifier of the phase.  copies_kept "agree": the copies of largest probability of their class;
    "boundary": those whose logit differs least from the largest one of another class, on either side.  Of equal copies
    the first are taken.
    """
    config, memory, paths = run.config, run.memory, run.data.paths
    exemplars = [item for item in memory.items() if item.regenerated or config.augmentation_prob > 0]
    exemplars = [item for item in exemplars if not item.copies]
    if not exemplars:
        return
    candidates = range(config.copy_candidates)
    pictures = [paths.copy(item.image, k) for item in exemplars for k in candidates]
    logits = run.predict(network, pictures, description).logits.view(len(exemplars), len(candidates), -1)
    targets = torch.tensor([item.target for item in exemplars])[:, None, None].expand(-1, len(candidates), 1)
    if config.copies_kept == "agree":
        scores = logits.log_softmax(dim=2).gather(2, targets)
    else:
        others = logits.scatter(2, targets, -torch.inf).amax(dim=2, keepdim=True)
        scores = -(logits.gather(2, targets) - others).abs()
    best = scores[:, :, 0].argsort(dim=1, descending=True, stable=True)[:, : config.augmentations_per_image]
    for item, numbers in zip(exemplars, best.sort(dim=1).values.tolist(), strict=True):
        memory.chosen_copies[item.image] = tuple(numbers)
