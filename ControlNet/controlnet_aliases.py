"""Makes the published module names (`cldm.model`, `ldm.util`, ...) further names of this package's own modules.

Published scripts put the ControlNet folder itself on sys.path and import `cldm`, `ldm` and `annotator` from there.
Loaded that way, every class would exist a second time beside `ControlNet.cldm...`, and isinstance would fail between
the two.  So these packages' `__init__`, when it runs under the short name, calls `enter`, which installs a finder: it
imports submodules as `ControlNet.<name>...` from this same folder, and puts them into sys.modules under the short name.
The parent folder need not be on sys.path.
"""

import contextlib
import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("cldm", "ldm", "annotator")
MOVED = {
    "cldm.ddim_hacked": "ControlNet.cldm.ddim",
    "cldm.logger": "ControlNet.cldm.lightning",
    "cldm.model": "ControlNet.cldm.lightning",
    "ldm.models.autoencoder": "ControlNet.ldm.autoencoder",
    "ldm.models.diffusion.ddim": "ControlNet.cldm.ddim",
    "ldm.models.diffusion.ddpm": "ControlNet.cldm.cldm",
    "ldm.modules.attention": "ControlNet.ldm.unet",
    "ldm.modules.diffusionmodules.model": "ControlNet.ldm.autoencoder",
    "ldm.modules.diffusionmodules.openaimodel": "ControlNet.ldm.unet",
    "ldm.modules.diffusionmodules.util": "ControlNet.ldm.util",
    "ldm.modules.distributions.distributions": "ControlNet.ldm.autoencoder",
    "ldm.modules.encoders.modules": "ControlNet.ldm.text",
}
"""Published modules whose file has another name here.  All others differ by the prefix `ControlNet.` alone."""

_EMPTY = {name.rsplit(".", n)[0] for name in MOVED for n in range(1, name.count("."))}  # ldm.models, ldm.modules, ...


class _Finder(MetaPathFinder, Loader):
    """Resolves submodules of PACKAGES to modules of ControlNet."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in PACKAGES or "." not in fullname:
            return None
        if fullname in _EMPTY:
            return ModuleSpec(fullname, self, is_package=True)
        return ModuleSpec(fullname, self) if find_spec(self._own(fullname)) else None

    @staticmethod
    def _own(fullname: str) -> str:
        return MOVED.get(fullname, f"ControlNet.{fullname}")

    def exec_module(self, module):
        if module.__name__ not in _EMPTY:  # the import system returns what stands in sys.modules afterwards
            sys.modules[module.__name__] = importlib.import_module(self._own(module.__name__))


def enter(name: str) -> None:
    """Make the submodules of the package `name`, one of PACKAGES, those of ControlNet."""
    sys.path.insert(0, str(FOLDER.parent))
    try:
        import ControlNet

        if name != "annotator":
            with contextlib.suppress(ModuleNotFoundError):  # absent where this folder was copied alone
                import torchvision_compat  # noqa: F401  before the script imports pytorch_lightning
    finally:
        sys.path.remove(str(FOLDER.parent))
    if FOLDER not in [Path(path).resolve() for path in ControlNet.__path__]:
        raise ImportError(f"another ControlNet is imported already, not the one in {FOLDER}")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
