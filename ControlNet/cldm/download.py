"""Download the official weights, only where asked to."""

import hashlib
import os
import shutil
from pathlib import Path

from ControlNet.cldm.files import ModelError, broke_off
from ControlNet.cldm.weights import BUNDLED, MODELS_FOLDER

REPOSITORY, FILE = "lllyasviel/ControlNet", "models/control_sd15_canny.pth"


def download_sd15(folder: Path = MODELS_FOLDER, endpoint: str | None = None) -> Path:
    """The official control_sd15_canny.pth (5.7 GB) in `folder`, fetched from the Hugging Face hub unless it is there.

    A connection that breaks is taken up again, and a later call begins anew; the file gets its name when its SHA-256
    is the hub's.  endpoint: the hub's address, None for HF_ENDPOINT or the usual one.
    Raises ModelError: no connection, no space, or other contents than the hub promised.
    """
    # here, because no other run of the program has to do with the hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    path = folder / BUNDLED["sd15"][1]
    if path.is_file() and not broke_off(path):
        return path
    url, unfinished = hf_hub_url(REPOSITORY, FILE, endpoint=endpoint), folder / "download"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = get_hf_file_metadata(url).etag
        fetched = Path(hf_hub_download(REPOSITORY, FILE, local_dir=unfinished, endpoint=endpoint))
        with fetched.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ModelError(f"what came from {url} is not the official file: start the download again")
        os.replace(fetched, path)
    except ModelError:
        raise
    except Exception as error:  # whatever the hub's HTTP library of the day raises
        if isinstance(error, OSError) and error.errno is not None:
            raise ModelError(f"can't save {path}: {error.strerror}") from error
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"can't fetch {url} ({why[0]}): start it again, or, on a machine without network, copy the file to {folder}"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path
