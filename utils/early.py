"""What the file system tells of a run before torch is imported, which takes seconds."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from utils.config.read import read_json
from utils.config.schema import Config
from utils.data.labels import check_phase_sizes, class_labels, indices_of
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.results.output import Output


def check_files(config: Config, paths: DatasetPaths) -> None:
    """Raises UserError for classes that do not fit the phases, and for folders that can't be, or are not, the run's.

    Nothing is made.  The same is checked again where it is used, with what is known by then.
    """
    labels = class_labels(paths, config.class_sort, config.memory_only)
    check_phase_sizes(paths.dataset, len(labels), config.init_cls, config.increment)
    if config.class_order is not None:
        indices_of(config.class_order, labels)
    assert config.output_dir is not None  # filled in when the config was read
    check_writable("output_dir", Path(config.output_dir))
    if config.phase0_cache:
        check_writable("phase0_cache", Path(config.phase0_cache))
    file = Path(config.output_dir) / "config.json"
    if file.is_file():
        with suppress(UserError):  # a damaged file is `Output`'s to name
            # What is left to the plan of exemplars, the record has as the plan's numbers.
            planned = ["augmentations_per_image"]
            if config.real_per_class is None:
                planned.append("real_per_class")
            if isinstance(config.syn_per_class, str):
                planned.append("syn_per_class")
            before = read_json(file)
            config = replace(config, **{key: before[key] for key in planned if key in before})
        Output(config, file.parent)


def check_writable(key: str, folder: Path) -> None:
    """Raises UserError where a folder can't be made or written to."""
    existing = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not existing.is_dir():
        raise UserError(f"{key}: {folder} can't be written to: {existing} is not a folder.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{key}: {folder} can't be written to.")
