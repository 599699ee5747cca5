"""Are the copies there that a training needs?"""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from utils.data.classes import typical_size
from utils.data.datasets import dataset_defaults
from utils.data.paths import DatasetPaths
from utils.errors import UserError


def check_copies(paths: DatasetPaths, images: Iterable[Path], augmentations_per_image: int) -> None:
    """Raises UserError where one of the copies 0 ... K-1 of `images` is not on disk, with the command that makes them.

    Lists the folder of each class once, and looks at no file itself.
    """
    on_disk: dict[str, frozenset[str]] = {}
    wanted, missing, first = 0, 0, None
    for image in images:
        label = image.parent.name
        if label not in on_disk:
            folder = paths.copies_folder(label)
            on_disk[label] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        wanted += augmentations_per_image
        gaps = [
            k for k, name in enumerate(paths.copy_names(image, augmentations_per_image)) if name not in on_disk[label]
        ]
        missing += len(gaps)
        if gaps and first is None:
            first = (image, gaps[0])
    if first is None:
        return
    image, k = first
    resolution = dataset_defaults(paths.dataset, typical_size([image])).resolution
    raise UserError(
        f"{missing} of {wanted} copies are missing, the first is {paths.copy(image, k)}. Make them with:\n"
        f"python compress/run.py --data-dir {shlex.quote(str(paths.data_dir))} --dataset {shlex.quote(paths.dataset)} "
        f"--resolution {resolution} --seeds {augmentations_per_image}"
        + (f" --keep-apart {paths.variant}" if paths.variant else "")
    )
