"""What exemplars of a form cost, in units and in bytes."""

from pathlib import Path
from typing import Any

from compress.forms import Form
from utils.data.images import image_bits
from utils.data.paths import DatasetPaths
from utils.errors import UserError


class Cost:
    """What exemplars of one form cost and keep, for the trainer's memory.

    form: None for real exemplars, which are kept as they are.
    """

    def __init__(self, form: Form | None, paths: DatasetPaths):
        self.form = form
        self.paths = paths

    def settings(self) -> dict[str, Any]:
        """The form's; none for real exemplars."""
        return self.form.settings() if self.form else {}

    def units(self, image: Path) -> float | None:
        """Cost of a train image's exemplar in units of one real image, whether it has been made or not.

        None for a form that has no such count.  Raises UserError for an image that can't be read.
        """
        if self.form is None:
            return 1.0
        try:
            width, height, bits_per_pixel = image_bits(image)
            raw_bits = self.form.raw_bits(height, width, self.paths.find_kept(image))
        except OSError as error:
            raise UserError(f"cannot read image {error}. Replace the file or take it away.") from error
        return None if raw_bits is None else raw_bits / (width * height * bits_per_pixel)

    def kept(self, image: Path) -> bytes | None:
        """What is kept of a train image, as it goes into the memory's file; None while it has not been made."""
        if self.form is None:
            return image.read_bytes()
        path = self.paths.find_kept(image)
        if path is None:
            return None
        try:
            width, height, bits_per_pixel = image_bits(image)
            return self.form.payload(path.read_bytes(), (height, width), bits_per_pixel != 24)
        except OSError as error:
            raise UserError(f"{path}: {error}. Delete it; --repair of compress/run.py makes it again.") from error

    def kept_bytes(self, image: Path) -> int | None:
        """Its number of bytes."""
        if self.form is None:
            return image.stat().st_size
        kept = self.kept(image)
        return None if kept is None else len(kept)

    def expected_bytes(self, image: Path) -> int:
        """The same, of what has not been made yet too: it is encoded in memory, unless its length is fixed."""
        on_disk = self.kept_bytes(image)
        if on_disk is not None:
            return on_disk
        assert self.form is not None
        try:
            return len(self.form.stand_in(image))
        except OSError as error:
            raise UserError(f"cannot read image {error}. Replace the file or take it away.") from error
