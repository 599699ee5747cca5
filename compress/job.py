"""What a run of compress/run.py, or of copies on demand, is asked to do.  Made once, from the options."""

from dataclasses import dataclass

from compress.forms import Form
from utils.data.paths import DatasetPaths


@dataclass(frozen=True)
class Data:
    """Which copies of which images.

    classes: labels, None for all; limit: images of each class, the first ones, None for all; copy_numbers: of each
    image; shard: (i, n), 1 <= i <= n, takes every n-th image.
    """

    paths: DatasetPaths
    copy_numbers: tuple[int, ...]
    classes: tuple[str, ...] | None = None
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Machine:
    """Which model, and how it runs; the options of compress/run.py of the same names.

    loras: files and scales; precision, engine: "auto" or a name.
    """

    model: str = "sd15"
    base: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    decoder: str | None = None
    precision: str = "auto"
    batch_size: int | None = None
    low_memory: bool = False
    engine: str = "auto"


@dataclass(frozen=True)
class Job:
    """data: what to make; form: the settings, which are recorded; machine: what makes it.

    options: of compress/run.py, that give these settings and this model, for records and messages;
    existing: what happens to files of other settings: "refuse", "replace" them, or "overwrite" all files.
    """

    data: Data
    form: Form
    machine: Machine
    options: tuple[str, ...] = ()
    existing: str = "refuse"
