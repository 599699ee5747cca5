"""Makes the published module names (`cldm.model`, `ldm.util`, ...) further names of this package's own modules.

Published scripts put the ControlNet folder itself on sys.path and import `cldm`, `ldm` and `annotator` from there.
Loaded that way, every class would exist a second time beside `ControlNet.cldm...`, and isinstance would fail between
the two.  So these packages' `__init__`, when it runs under the short name, calls `enter`, which installs a finder: it
imports submodules as `ControlNet.<name>...` from this same folder, and puts them into sys.modules under the short name.
The parent folder need not be on sys.path.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("cldm", "ldm", "annotator")
MOVED = {
    "cldm.ddim_hacked": "ControlNet.cldm.ddim",
    "cldm.logger": "ControlNet.cldm.lightning",
    "cldm.model": "ControlNet.cldm.lightning",
    "ldm.models.autoencoder": "ControlNet.ldm.autoencoder",
    "ldm.models.diffusion.ddim": "ControlNet.cldm.ddim",
    "ldm.models.diffusion.ddpm": "ControlNet.ldm.diffusion",
    "ldm.modules.attention": "ControlNet.ldm.attention",
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
    if "ControlNet" not in sys.modules:
        _load("ControlNet", FOLDER / "__init__.py", [str(FOLDER)])
    if FOLDER not in [Path(path).resolve() for path in sys.modules["ControlNet"].__path__]:
        raise ImportError(f"another ControlNet is imported already, not the one in {FOLDER}")
    compat = FOLDER.parent / "torchvision_compat.py"
    if name != "annotator" and compat.is_file() and compat.stem not in sys.modules:
        _load(compat.stem, compat)  # before the script imports pytorch_lightning
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _load(name: str, file: Path, search: list[str] | None = None) -> None:
    spec = spec_from_file_location(name, file, submodule_search_locations=search)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
