"""Reading one file of weights, and saying what it is where it is none.  Nothing in a file is ever run."""

import os
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class ModelError(ValueError):
    """A config or weights that can't be used.  The message is for the person who named them."""


def load_state_dict(path: str | os.PathLike, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name: safetensors, or anything torch.save wrote, by any ending.

    Nothing in the file is run (weights_only), and on the CPU its tensors are views of the memory-mapped file: they
    take no memory until they are used.  Tensors nested under "state_dict" are found.
    Raises ModelError where the file is missing, broken or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: put it there, or name another file")
    try:
        kind = _kind(path)
        if kind == "safetensors":
            return load_file(path, device=str(location))
        # torch maps files of its zip format only; older ones are read whole
        content = torch.load(path, map_location=location, weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:  # torch's own words advise to switch the protection off
        raise ModelError(f"{path} {_why_not_plain(error)}") from error
    except PermissionError as error:
        raise ModelError(f"{path} may not be read: {error.strerror}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} is not a whole checkpoint, {_what_is_missing(path)}: {why}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no tensors by name")
    return dict(content)


def _kind(path: Path) -> str:
    """ "zip" (torch.save's), "safetensors" or "pickle" (torch.save's before 2020), by the first bytes of the file.

    Raises ModelError for the things that downloads leave under a checkpoint's name instead.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if not head:
        raise ModelError(f"{path} is empty, a broken download? Fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the weights: `git lfs pull` in its folder fetches them")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        raise ModelError(f"{path} is a web page saved under this name: download the file that the page links to")
    if head.isascii() and head.decode().replace("\n", " ").isprintable():
        raise ModelError(f"{path} is not a checkpoint but a text that begins with {head[:40].decode()!r}")
    return "pickle"


def _why_not_plain(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return (
            f"is no plain checkpoint: beside tensors it holds code ({found[1]}), which is never run. "
            "Take the .safetensors of these weights instead"
        )
    return "is no plain checkpoint: another kind of file, a broken download, or one that holds code, which is never run"


def _what_is_missing(path: Path) -> str:
    """How much of a file that broke off is there, as far as its first bytes tell."""
    found = path.stat().st_size
    expected = _expected_size(path)
    if expected is None or found >= expected:
        return f"a broken download? It has {found:,} bytes"
    return f"a download that broke off: {found:,} of {expected:,} bytes"


def _expected_size(path: Path) -> int | None:
    """Bytes that the file should have (of a zip, its tensors alone); None where its head does not tell."""
    with path.open("rb") as file:
        head = file.read(30)
        try:
            if head.startswith(b"PK"):
                name, extra = struct.unpack("<26x2H", head)
                file.seek(30 + name + extra)
                table = _TensorTable(file)
                table.load()
                return sum(table.storages.values())
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            ends = re.findall(rb'"data_offsets":\s*\[\d+,\s*(\d+)\]', file.read(length))
            return 8 + length + max(map(int, ends)) if file.tell() == 8 + length else None
        except Exception:  # the file is broken: any step of this may fail, and then there is nothing to tell
            return None


class _TensorTable(pickle.Unpickler):
    """Reads torch.save's table of contents for the sizes in it.  Every class and function it names is a blank."""

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, int] = {}  # key -> bytes

    def find_class(self, module, name):
        return type(name, (dict,), {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None})

    def persistent_load(self, pid):
        _, kind, key, _, count = pid
        width = {"Double": 8, "Long": 8, "Half": 2, "BFloat16": 2, "Byte": 1, "Bool": 1}
        self.storages[key] = count * width.get(kind.__name__.removesuffix("Storage"), 4)
