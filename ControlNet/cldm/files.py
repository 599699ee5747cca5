"""Load a weights file without running code from it, or raise an error that says what is wrong with it."""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


class ModelError(ValueError):
    """A config or weights that can't be used.  The message is written for the user."""


def load_state_dict(path: str | os.PathLike, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name: safetensors or any torch.save format, whatever the file's ending.

    Code in the file is not run (weights_only).  On the CPU the tensors are views of the memory-mapped file and take no
    memory until they are used.  Tensors may be nested under "state_dict".
    Raises ModelError where the file is missing, broken or not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path} is a folder: name the file in it")
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: put it there, or name another file")
    if torch.device(location).type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"location={str(location)!r}: this machine has no CUDA device; use location='cpu'")
    try:
        kind = _kind(path)
        if kind == "safetensors":
            return load_file(path, device=str(location))
        if kind == "zip" and path.suffix != ".safetensors":  # torch.load goes by that ending
            content = torch.load(path, map_location=location, weights_only=True, mmap=True)
        else:  # torch maps files of its zip format only; older ones are read whole
            with path.open("rb") as file:
                content = torch.load(file, map_location=location, weights_only=True)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a flipped bit makes the readers raise anything
        raise ModelError(f"{path} {_why_unreadable(path, error)}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no tensors by name")
    return dict(content)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for other files, and for broken ones, which loading names."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def digest(path: str | os.PathLike, what: str) -> str:
    """16 hex digits of a file's content.  Raises ModelError, which calls it `what`, where there is no such file."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ModelError(f"no {what} at {path}: {error.strerror}") from error


_TAKE_ANOTHER = "and not a checkpoint of PyTorch: take its .safetensors or .ckpt"
_OTHER_FILES = {
    rb"\Z": "empty, a broken download? Fetch it again",
    rb"version https://git-lfs": "a Git LFS pointer, not the weights: `git lfs pull` in its folder fetches them",
    rb"\s*<(?i:!doctype|html|\?xml)": "a web page saved under this name: download the file that the page links to",
    rb"GGUF": f"a GGUF file (quantised weights for llama.cpp and the like), {_TAKE_ANOTHER}",
    rb"\x89HDF": f"an HDF5 file (Keras), {_TAKE_ANOTHER}",
    rb"TFL3": f"a TensorFlow Lite model, {_TAKE_ANOTHER}",
}
"""Patterns of a file's first bytes -> what it is: other formats, and what failed downloads leave."""


def _kind(path: Path) -> str:
    """ "zip" (torch.save's), "safetensors" or "pickle" (torch.save's before 2020), by the first bytes of the file.

    Raises ModelError for other content.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\3\4"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    for pattern, what in _OTHER_FILES.items():
        if re.match(pattern, head):
            raise ModelError(f"{path} is {what}")
    if path.suffix.lower() == ".onnx" and head[:1] == b"\x08":  # protobuf's first field, the format's version
        raise ModelError(f"{path} is an ONNX model, {_TAKE_ANOTHER}")
    if head.isascii() and head.decode().replace("\n", " ").isprintable():
        raise ModelError(f"{path} is not a checkpoint but a text that begins with {head[:40].decode()!r}")
    return "pickle"


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"may not be read: {error.strerror}"
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to disable weights_only
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            return (
                "is no plain checkpoint: another kind of file, a broken download, or it holds code, which is never run"
            )
        held = f"beside tensors it holds code ({code[1]}), which is never run"
        return f"is no plain checkpoint: {held}. Take the .safetensors of these weights instead"
    size, why = path.stat().st_size, re.split(r"\. |\n", str(error))[0] or type(error).__name__
    if broke_off(path) or "incomplete metadata" in why or "MetadataIncomplete" in why:  # safetensors' words
        return f"is a download that broke off after {size:,} bytes. Fetch it again"
    return f"is not a whole checkpoint, a broken download? It has {size:,} bytes ({why})"


def broke_off(path: Path) -> bool:
    """Whether a file begins as torch.save's zip and lacks the table at its end."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4" and not zipfile.is_zipfile(path)
