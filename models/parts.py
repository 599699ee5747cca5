"""A batch in parts: what one process works off at a time, and what that counts for in the batch's loss."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Some images of a batch.

    images: B x 3 x H x W; targets: B; count: B, or 0 where they only keep a process in step with the others; share: the
    weight of their mean loss; last: whether none comes after it in this process.
    """

    images: Tensor
    targets: Tensor
    count: int
    share: float
    last: bool


def parts(images: Tensor, targets: Tensor, number: int, sizes: tuple[int, int], nb_processes: int) -> Iterator[Part]:
    """A process's images in (up to) so many parts, weighted so that the gradients of all are that of the batch's mean.

    sizes: images of this process that count, and of all processes (`EpochBatchSampler.sizes`).

    Gradients add up over the parts of a process and are averaged over processes.  So the mean loss of n images out of
    the N of all counts n/N times the number of processes: the sum over all parts is the mean over the N images.
    """
    own, of_all = sizes
    if own == 0:
        number = 1
    pieces = list(zip(images.chunk(number), targets.chunk(number), strict=True))
    for place, (some, their_targets) in enumerate(pieces, start=1):
        count = len(some) if own else 0
        yield Part(some, their_targets, count, count * nb_processes / of_all, place == len(pieces))
