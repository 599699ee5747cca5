"""The memory's file of earlier versions: a ZIP, stored without compression.

memory.json                     which exemplars there are, in which form; the forms' settings; the classes' texts
real/<class>/<image>            real exemplars, byte for byte
<form>/<class>/<image><ending>  what is kept of the others
"""

import io
import re
import zipfile
from typing import Any

from utils.data.items import REAL
from utils.memory.packed import ClassRecord, DamagedError, Exemplar, Memory, check, read_json
from utils.memory.share import Row

MAGIC = b"PK"
INDEX = "memory.json"


def unzipped(content: bytes) -> Memory:
    """Raises DamagedError."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DamagedError(f"it is no ZIP ({error})") from None
    entries = {entry.filename: entry for entry in archive.infolist()}

    def read(name: str) -> bytes:
        if name not in entries:
            raise DamagedError(f"{name!r} is missing")
        if entries[name].compress_type != zipfile.ZIP_STORED or entries[name].flag_bits & 1:
            raise DamagedError(f"{name!r} is compressed or encrypted, which this program never writes")
        try:
            return archive.read(name)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise DamagedError(f"{name!r} can't be read ({error})") from None

    index = read_json(read(INDEX))
    try:
        texts = index["texts"]
        classes = [
            ClassRecord(
                of_class["target"],
                of_class["label"],
                str(texts.get(of_class["label"], of_class["label"])),
                [_exemplar(read, of_class["label"], about) for about in of_class["exemplars"]],
            )
            for of_class in index["classes"]
        ]
        memory = Memory(index["dataset"], dict(index["forms"]), classes)
        check(memory)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{INDEX!r} is no memory's index ({type(error).__name__}: {error})") from None
    return memory


def _exemplar(read, label: str, about: dict[str, Any]) -> Exemplar:
    form, image, ending = about["form"], about["image"], about["kept"]
    width, height = (int(side) for side in about["size"])
    kept = None
    if ending is not None:
        name = f"{form}/{label}/{image}{ending}"
        kept = read(name.encode("utf-8", "backslashreplace").decode())
    if form != REAL and ending and not re.fullmatch(r"\.\w+", ending):
        raise DamagedError(f"an exemplar's ending is {ending!r}")
    row = Row(None if kept is None else len(kept), (width, height), int(about["bits_per_pixel"]))
    return Exemplar(form, row, kept, str(image), ending or "")
