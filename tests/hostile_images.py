"""Files that a train folder may hold: pictures of every kind that people have, and what only calls itself one.

`write_pictures` writes what is to be processed, with the picture that each file shows; `write_broken` what is to be
listed, with a word of the reason; `write_bombs` what would take gigabytes to decode.
"""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

WIDTH, HEIGHT = 48, 32


def quarters(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Red, green / blue, black: H x W x 3 uint8, different however it is turned or flipped."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 230, 20, 30
    picture[: height // 2, width // 2 :] = 10, 200, 40
    picture[height // 2 :, : width // 2] = 20, 30, 220
    return picture


PICTURE = quarters()
GREY = np.asarray(Image.fromarray(PICTURE).convert("L"))
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)
HALF_CLEAR = np.where(np.arange(WIDTH)[None, :, None] < WIDTH // 2, PICTURE, 255).astype(np.uint8)
"""The picture over white, where its right half is clear."""

# What has to be done to an upright picture to get the pixels that a file of this orientation stores.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(picture: np.ndarray = PICTURE, mode: str = "RGB", **options) -> bytes:
    return encoded(Image.fromarray(picture).convert(mode), "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(picture: np.ndarray = PICTURE, mode: str = "RGB", **options) -> bytes:
    return encoded(Image.fromarray(picture).convert(mode), "PNG", **options)


def with_orientation(orientation: int) -> dict:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return {"exif": exif}


def turned(orientation: int) -> np.ndarray:
    return np.ascontiguousarray(STORED[orientation](PICTURE))


def half_clear() -> Image.Image:
    image = Image.fromarray(PICTURE).convert("RGBA")
    image.paste((255, 0, 255, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))  # a hidden colour, which nobody is to see
    return image


def half_clear_palette(kind: str) -> bytes:
    """Colour 1 is clear."""
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([230, 20, 30, 255, 0, 255])
    image.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    return encoded(image, kind, transparency=1)


RED_AND_CLEAR = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
RED_AND_CLEAR[:, : WIDTH // 2] = 230, 20, 30


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def without_adobe_marker(content: bytes) -> bytes:
    start = content.index(b"\xff\xee")
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


def cmyk() -> Image.Image:
    return Image.fromarray(PICTURE).convert("CMYK")


def ycck() -> bytes:
    """As Photoshop writes CMYK: the colours as YCbCr, told by a 2 at the end of Adobe's marker, and black.

    libjpeg gives 255 - (R, G, B) of the stored (Y, Cb, Cr) as Adobe's inverted ink, which is (R, G, B) of the picture;
    and Pillow stores the inverse of what it takes for ink.
    """
    colours = np.asarray(Image.fromarray(255 - PICTURE).convert("YCbCr"))
    stored = np.dstack([colours, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    content = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=95, subsampling=0))
    marker = content.index(b"\xff\xee")
    content[marker + 1 + int.from_bytes(content[marker + 2 : marker + 4], "big")] = 2
    return bytes(content)


def with_much_metadata() -> bytes:
    """A thumbnail, a profile in several parts, and two megabytes of comments."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    thumbnail = b"\xff\xe1" + struct.pack(">H", 30_002) + b"Exif\0\0" + jpeg(quarters(16, 12))[:20_000]
    content = jpeg(exif=exif, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() * 40)
    comments = (b"\xff\xfe\xff\xff" + b"x" * 65_533) * 32
    return content[:2] + comments + thumbnail.ljust(30_004, b"\0") + content[2:]


def sixteen_bits(picture: np.ndarray, ending: str) -> bytes:
    """Levels of 0 ... 65535 whose upper bytes are the picture; `picture` is HxW or HxWx3 RGB."""
    levels = picture.astype(np.uint16) * 256 + 128
    return cv2.imencode(ending, levels if levels.ndim == 2 else levels[..., ::-1])[1].tobytes()


def frames(kind: str) -> bytes:
    """The picture, then its negative, then nothing."""
    others = [Image.fromarray(255 - PICTURE), Image.new("RGB", (WIDTH, HEIGHT))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encoded(Image.fromarray(PICTURE), kind, save_all=True, append_images=others, **lossless)


def pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """File name -> its content, and what it shows."""
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), half_clear().getchannel("A")])
    red = Image.new("RGB", (WIDTH, HEIGHT), (230, 20, 30))
    red.paste((1, 2, 3), (WIDTH // 2, 0, WIDTH, HEIGHT))
    black_and_white = np.where(PICTURE[..., :1] > 128, 255, 0).astype(np.uint8).repeat(3, axis=2)
    whole = {
        "plain.jpg": jpeg(),
        "progressive.jpg": jpeg(progressive=True),
        "upper case.JPEG": jpeg(),
        "UPPER.PNG": png(),
        "cmyk of adobe.jpg": encoded(cmyk(), "JPEG", quality=95, subsampling=0),
        "cmyk without its marker.jpg": without_adobe_marker(encoded(cmyk(), "JPEG", quality=95, subsampling=0)),
        "ycck.jpg": ycck(),
        "cmyk.tif": encoded(cmyk(), "TIFF"),
        "metadata.jpg": with_much_metadata(),
        "garbage behind.jpg": jpeg() + b"<html>" * 1000,
        "broken exif.jpg": jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "orientation 77.jpg": jpeg(**with_orientation(77)),
        "sixteen bits.png": sixteen_bits(PICTURE, ".png"),
        "sixteen bits.tif": sixteen_bits(PICTURE, ".tif"),
        "palette.png": encoded(Image.fromarray(PICTURE).quantize(4), "PNG"),
        "a png.jpg": png(),
        "a webp.png": encoded(Image.fromarray(PICTURE), "WEBP", lossless=True),
        "a jpeg.tga": jpeg(),
        "pages.tif": frames("TIFF"),
        "animated.gif": frames("GIF"),
        "animated.webp": frames("WEBP"),
        "animated.png": frames("PNG"),
        "picture.bmp": encoded(Image.fromarray(PICTURE), "BMP"),
        "picture.ppm": encoded(Image.fromarray(PICTURE), "PPM"),
        "picture.tga": encoded(Image.fromarray(PICTURE), "TGA"),
        "picture.jp2": encoded(Image.fromarray(PICTURE), "JPEG2000"),
        "picture.ico": encoded(Image.fromarray(PICTURE), "ICO", sizes=[(WIDTH, HEIGHT)]),
        "space  and ü 寿司.jpg": jpeg(),
        "new\nline.jpg": jpeg(),
        "-dash.jpg": jpeg(),
        "%s {label} $HOME `x` 'q' \"q\".jpg": jpeg(),
        os.fsdecode(b"not utf-8 \xff\xfe.jpg"): jpeg(),
        "n" * 230 + ".jpg": jpeg(),
        "text chunk.png": png(pnginfo=_with_text("x" * 900_000)),
        **{f"turned {n}.jpg": jpeg(turned(n), **with_orientation(n)) for n in STORED},
        **{f"turned {n}.png": png(turned(n), **with_orientation(n)) for n in STORED},
        "turned 6.tif": encoded(Image.fromarray(turned(6)), "TIFF", **with_orientation(6)),
        "turned 6.webp": encoded(Image.fromarray(turned(6)), "WEBP", lossless=True, **with_orientation(6)),
        "turned by exif behind the pixels.png": png()[:-12] + chunk(b"eXIf", _exif_bytes(6)) + png()[-12:],
    }
    odd = {
        "grey.jpg": (jpeg(mode="L"), GREY_RGB),
        "sixteen bits grey.png": (sixteen_bits(GREY, ".png"), GREY_RGB),
        "sixteen bits grey.tif": (sixteen_bits(GREY, ".tif"), GREY_RGB),
        "sixteen bits grey.pgm": (sixteen_bits(GREY, ".pgm"), GREY_RGB),
        "one bit.png": (png(black_and_white, mode="1"), black_and_white),
        "alpha.png": (encoded(half_clear(), "PNG"), HALF_CLEAR),
        "alpha.webp": (encoded(half_clear(), "WEBP", lossless=True, exact=True), HALF_CLEAR),
        "grey and alpha.png": (encoded(grey_alpha, "PNG"), np.where(HALF_CLEAR == 255, 255, GREY_RGB)),
        "clear colour.png": (encoded(red, "PNG", transparency=(1, 2, 3)), RED_AND_CLEAR),
        "clear palette.png": (half_clear_palette("PNG"), RED_AND_CLEAR),
        "clear palette.gif": (half_clear_palette("GIF"), RED_AND_CLEAR),
        **{
            f"{width}x{height}.png": (png(quarters(width, height)), quarters(width, height))
            for width, height in ((1, 1), (2, 2), (1, 3000), (3000, 1))
        },
    }
    return {name: (content, PICTURE) for name, content in whole.items()} | odd


def _with_text(text: str) -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", text, zip=True)
    return info


def _exif_bytes(orientation: int) -> bytes:
    return with_orientation(orientation)["exif"].tobytes().removeprefix(b"Exif\0\0")


def write_pictures(folder: Path) -> dict[Path, np.ndarray]:
    """Write them all.  Returns what each file shows, H x W x 3 uint8; lossy files show it within a few levels."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {}
    for name, (content, picture) in pictures().items():
        (folder / name).write_bytes(content)
        shown[folder / name] = picture
    (folder / "link.jpg").symlink_to("plain.jpg")
    return shown | {folder / "link.jpg": PICTURE}


def write_broken(folder: Path) -> dict[Path, str]:
    """Write what can't be processed.  Returns a word of the reason for each."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    bad_header, bad_pixels = bytearray(noise), bytearray(noise)
    bad_header[30] ^= 1  # in the checksum of the header
    bad_pixels[len(noise) // 2] ^= 1
    contents = {
        "empty.jpg": (b"", "empty"),
        "zeros.jpg": (bytes(10_000), "not a picture"),
        os.fsdecode(b"broken \xff.jpg"): (b"", "empty"),
        "text.jpg": (b"these are not the pixels you are looking for", "not a picture"),
        "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "not a picture"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not a pict"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not a picture"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200), "not a picture"),
        "bad header.png": (bytes(bad_header), "."),
        "bad pixels.png": (bytes(bad_pixels), "."),
        "truncated.png": (noise[: len(noise) // 2], "truncated"),
        "truncated.gif": (encoded(Image.fromarray(PICTURE), "GIF")[:-100], "."),
        "truncated.webp": (frames("WEBP")[:60], "."),
        "float.tif": (encoded(Image.fromarray(GREY / np.float32(255)), "TIFF"), "32 bits"),
        "long integers.tif": (encoded(Image.fromarray(GREY.astype(np.int32) << 20), "TIFF"), "32 bits"),
        "x" * 251 + ".jpg": (jpeg(), "too long"),
        **{
            f"truncated at {share} %.jpg": (photo[: len(photo) * share // 100], ".")
            for share in (1, 5, 10, 25, 50, 75, 90, 99)
        },
    }
    reasons = {}
    for name, (content, reason) in contents.items():
        (folder / name).write_bytes(content)
        reasons[folder / name] = reason

    def add(name: str, make: Callable[[Path], object], reason: str) -> None:
        make(folder / name)
        reasons[folder / name] = reason

    add("folder.jpg", Path.mkdir, "folder")
    add("dangling.jpg", lambda path: path.symlink_to("nothing.jpg"), "No such file")
    add("loop.jpg", lambda path: path.symlink_to("loop.jpg"), "symbolic links")
    add("endless.jpg", lambda path: path.symlink_to("/dev/zero"), "device")
    add("pipe.jpg", os.mkfifo, "pipe")
    add("socket.jpg", _bind, "pipe")
    return reasons


def _bind(path: Path) -> None:
    """A socket's file; the path of a socket may be no longer than some 100 bytes, so it is made from within."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def write_bombs(folder: Path) -> list[Path]:
    """Small files that decode, or claim to decode, to hundreds of megabytes and more."""
    folder.mkdir(parents=True, exist_ok=True)
    side = 20_000
    header = struct.pack(">II5B", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    signature = b"\x89PNG\r\n\x1a\n"
    large = bytearray(jpeg())
    size_at = large.index(b"\xff\xc0") + 5
    large[size_at : size_at + 4] = struct.pack(">HH", side, side)
    mebibyte = zlib.compress(bytes(2**20), 9)
    long_text = zlib.compress(bytes(200 * 2**20), 9)
    inner = signature + chunk(b"IHDR", struct.pack(">II5B", 12_000, 12_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner
    contents = {
        "valid.png": signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""),
        "header.png": signature + chunk(b"IHDR", header) + chunk(b"IDAT", mebibyte),
        "header.jpg": bytes(large),
        "header.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, side, side, 1, 24, *[0] * 6) + bytes(99),
        "header.gif": b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b"," + bytes(4)
        + struct.pack("<HHBB", side, side, 0, 8) + bytes(99),
        "header.ppm": b"P6 20000 20000 255\n" + bytes(99),
        "header.tga": bytes([0, 0, 2, *[0] * 9]) + struct.pack("<HHBB", side, side, 24, 0) + bytes(99),
        "header.webp": b"RIFF" + struct.pack("<I", 26) + b"WEBPVP8L" + struct.pack("<I", 14) + b"/"
        + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(9),
        "header.tif": _tiff_header(side),
        "inside.ico": icon,
        "text.png": png()[:33] + chunk(b"zTXt", b"Comment\0\0" + long_text) + png()[33:],
        "international text.png": png()[:33] + chunk(b"iTXt", b"Comment\0\1\0\0\0" + long_text) + png()[33:],
        "profile.png": png()[:33] + chunk(b"iCCP", b"profile\0\0" + long_text) + png()[33:],
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def _tiff_header(side: int) -> bytes:
    """One strip of `side` x `side` grey pixels that the file doesn't hold."""
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bytes(99)
