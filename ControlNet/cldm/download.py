"""Download the official weights, only where asked to.

hf_hub_download resumes and retries, too, but checks the size alone and only warns of a full disk.  Here the SHA-256 is
checked, too little space is refused, and a file that a browser left incomplete is fetched anew.
"""

import hashlib
import http.client
import os
import shutil
import time
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ControlNet.cldm.files import ModelError, expected_size
from ControlNet.cldm.weights import BUNDLED, MODELS_FOLDER

REPOSITORY, FILE = "lllyasviel/ControlNet", "models/control_sd15_canny.pth"
ATTEMPTS = 5  # in a row that bring nothing
CHUNK = 2**20


def download_sd15(folder: Path = MODELS_FOLDER, endpoint: str | None = None, pause: float = 5.0) -> Path:
    """The official control_sd15_canny.pth (5.7 GB) in `folder`, fetched from the Hugging Face hub unless it is there.

    A download that broke off goes on where it stopped, here and in a later call; the file gets its name when its
    size and its SHA-256 are the hub's.  One process at a time.
    endpoint: the hub's address, None for HF_ENDPOINT or the usual one; pause: seconds before a new attempt.
    Raises ModelError: no connection, no space, or other contents than the hub promised.
    """
    path = folder / BUNDLED["sd15"][1]
    if path.is_file() and (expected_size(path) or 1) <= path.stat().st_size:
        return path
    part = path.with_name(path.name + ".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        url, size, sha256 = _look_up(endpoint)
        have = part.stat().st_size if part.exists() else 0
        free = shutil.disk_usage(folder).free
        if size - have > free:
            raise ModelError(f"{folder} has {free / 1e9:.1f} GB free, and the download needs {(size - have) / 1e9:.1f}")
        _fetch(url, part, size, pause)
        with part.open("rb") as file:
            damaged = hashlib.file_digest(file, "sha256").hexdigest() != sha256
        if damaged:
            part.unlink()
            raise ModelError(f"what came from {url.split('?')[0]} is not the official file: start the download again")
        os.replace(part, path)
    except OSError as error:
        raise ModelError(f"can't save {path}: {error.strerror or error}") from error
    return path


def _look_up(endpoint: str | None) -> tuple[str, int, str]:
    """(address, bytes, SHA-256) of the file, from the hub.  Raises ModelError."""
    # here, because no other run of the program has to do with the hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPOSITORY, FILE, endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url)
    except Exception as error:  # whatever its HTTP library of the day raises
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"can't reach {url} ({why[0]}). On a machine without network, copy the file to {MODELS_FOLDER}"
        ) from error
    if found.size is None or found.etag is None:
        raise ModelError(f"{url} gives neither size nor checksum: is it a Hugging Face hub?")
    return found.location, found.size, found.etag


def _fetch(url: str, part: Path, size: int, pause: float) -> None:
    """Bring `part` to `size` bytes, going on at what it has.  Raises ModelError when nothing more comes."""
    failures = 0
    have = part.stat().st_size if part.exists() else 0
    with tqdm(total=size, initial=min(have, size), unit="B", unit_scale=True, desc=part.stem) as bar:
        while have < size:
            before, why = have, "the connection was closed"
            try:
                _continue(url, part, have, bar)
            except (http.client.HTTPException, ConnectionError, TimeoutError, urllib.request.URLError) as error:
                why = str(error) or type(error).__name__
            have = part.stat().st_size if part.exists() else 0
            failures = 0 if have > before else failures + 1
            if failures == ATTEMPTS:
                raise ModelError(f"the download stopped at {have:,} of {size:,} bytes ({why}): start it again to go on")
            if have < size:
                time.sleep(pause)
    if have > size:
        part.unlink()
        raise ModelError(f"{part} was longer than the file to download: start again")


def _continue(url: str, part: Path, have: int, bar: tqdm) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        if have and answer.status != http.client.PARTIAL_CONTENT:  # a server that can't go on in the middle
            have = 0
            bar.reset()
        with part.open("r+b" if part.exists() else "wb") as file:
            file.truncate(have)
            file.seek(have)
            while block := answer.read(CHUNK):
                file.write(block)
                bar.update(len(block))
