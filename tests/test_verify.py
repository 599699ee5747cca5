"""Looking for what is wrong with edge maps and copies, and making that again: --verify and --repair."""

import json
import re
import shutil
import socket

import pytest
from PIL import Image

from compress.coding.edge_maps import decode
from tests.conftest import long_but
from tests.folders import save_picture
from tests.little_run import Killed, copies, kill_at, tree, without_weights

pytestmark = pytest.mark.usefixtures("one_thread")  # for results that do not change with the machine


def break_things(paths) -> dict[str, str]:
    """Every kind of damage: path -> what --verify should say of it."""
    first, second = paths.images("sushi")
    other = paths.images("apple pie")[0]
    broken = {}

    def damage(path, words, content=None):
        path.unlink() if content is None else path.write_bytes(content)
        broken[str(path)] = words

    whole = paths.copy(first, 0).read_bytes()
    damage(paths.copy(first, 0), "unreadable (the file is truncated)", whole[: len(whole) // 2])
    damage(paths.copy(first, 1), "unreadable", whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    damage(paths.copy(second, 0), "missing")
    damage(paths.copy(second, 1), "of the wrong size (20 x 10 instead of 48 x 40 pixels)")
    save_picture(paths.copy(second, 1), size=(20, 10))
    damage(paths.copy(other, 0), "made otherwise")
    with Image.open(paths.copy(other, 1)) as image:
        image.save(paths.copy(other, 0), comment=b"ESCORT 000000000000")
    damage(paths.copy(other, 1), "unreadable (the file is truncated)", b"")
    damage(paths.find_kept(first), "unreadable", b"RIFF")
    damage(paths.find_kept(second), "missing")
    return broken


def test_verify_and_repair_each_kind_of_damage(paths, compress, made):
    whole = tree(paths.root)
    code, out, err = compress("--verify")
    assert (code, "nothing is wrong" in out) == (0, True)
    assert "checked: 4 edge maps and 8 copies of 4 images" in out
    assert "4/4" in err
    broken = break_things(paths)
    leftover = paths.copies_folder("sushi") / f".{socket.gethostname()}.{2**22 + 1}-x.tmp"
    leftover.touch()
    damaged = tree(paths.root)
    code, out, _ = compress("--verify")
    assert code == 1
    assert tree(paths.root) == damaged
    for path, words in broken.items():
        assert re.search(rf"^  {re.escape(path)}: {re.escape(words)}", out, re.MULTILINE), path
    assert str(leftover) in out
    assert len(out[out.index("wrong:") :].splitlines()) == 1 + len(broken) + 1
    assert compress("--repair", "--dry-run")[0] == 0
    assert tree(paths.root) == damaged
    code, out, _ = compress("--repair")
    assert code == 0
    assert "edge maps: 2 made, 2 skipped, 0 failed" in out
    assert "copies: 6 made, 2 skipped, 0 failed" in out
    assert tree(paths.root) == whole
    assert compress("--verify")[0] == 0


@pytest.mark.parametrize("moment", long_but((1, 2, None), 1))
def test_an_edge_map_of_another_image_is_found_and_its_copies_made_again(paths, compress, monkeypatch, moment, made):
    """Also where the repair itself is killed, once the edge map is right again."""
    whole = tree(paths.root)
    first, second = paths.images("sushi")
    shutil.copy(paths.find_kept(first), paths.find_kept(second))
    paths.copy(second, 0).unlink()
    assert compress()[0] == 0  # makes the copy from the wrong edge map
    assert tree(paths.root) != whole
    code, out, _ = compress("--verify")
    assert code == 1
    assert f"{paths.find_kept(second)}: made otherwise (its edges are not those of the image)" in out
    if moment is not None:
        with monkeypatch.context() as patch:
            kill_at(moment, patch)
            with pytest.raises(Killed):
                compress("--repair")
    code, out, _ = compress("--repair")
    assert f"copies: {2 - (moment or 1) + 1} made" in out
    assert tree(paths.root) == whole


def test_an_edge_map_of_the_wrong_size(paths, compress):
    compress(resolution="low")
    image = paths.images("sushi")[0]
    paths.find_kept(image).unlink()
    save_picture(paths.kept(image).with_suffix(".webp"), size=(48, 40), mode="L")
    code, out, _ = compress("--verify", resolution="low")
    assert code == 1
    assert "1 edge map of the wrong size" in out
    assert "48 x 40 instead of 64 x 64 pixels" in out


def test_verifying_with_other_settings_says_how_they_differ(paths, compress, monkeypatch, made):
    without_weights(monkeypatch)  # none are needed
    code, out, _ = compress("--verify", steps="2")
    assert code == 1
    assert "8 copies made otherwise" in out
    assert "steps 1 -> 2" in out


def test_a_bmp_of_the_published_scripts_is_held_to_its_size_alone(paths, compress):
    image = paths.images("sushi")[0]
    bmp = paths.kept(image).with_suffix(".bmp")
    save_picture(bmp, size=(48, 40), mode="L")
    compress()
    assert compress("--verify")[0] == 0
    save_picture(bmp, size=(40, 40), mode="L")
    assert compress("--verify")[0] == 1
    assert "edge maps: 1 made, 3 skipped" in compress("--repair")[1]
    assert not bmp.exists()  # or it would come back if the new one went away
    assert compress("--verify")[0] == 0


def save_as(kept, size, ending):
    """Write a kept edge map as earlier versions did, without a record of a coder."""
    Image.fromarray(decode(kept.read_bytes(), *size) > 0).save(kept.with_suffix(ending), lossless=True)
    kept.unlink()
    (record,) = kept.parents[1].glob("settings*.json")
    record.write_text(json.dumps({**(content := json.loads(record.read_text())), "settings": {
        name: value for name, value in content["settings"].items() if name != "edge_coder"}}))  # fmt: skip


@pytest.mark.parametrize("option", ["", pytest.param("--repair", marks=pytest.mark.long)])
def test_edge_maps_of_earlier_versions_are_coded_anew_and_their_copies_stay(paths, compress, option, made):
    option = option.split()
    whole = tree(paths.root)
    images = [image for label in ("sushi", "apple pie") for image in paths.images(label)]
    for image, ending in zip(images, (".webp", ".png", ".webp", ".png"), strict=True):
        with Image.open(image) as picture:
            save_as(paths.kept(image), picture.size[::-1], ending)
    assert compress("--verify")[0] == 0
    code, out, _ = compress(*option)
    assert code == 0
    assert "edge maps: 0 made, 4 skipped (4 of them recoded), 0 failed" in out
    assert "copies: 0 made, 8 skipped, 0 failed" in out
    after = tree(paths.root)
    files = {name for name in whole if "settings" not in str(name)}
    assert {name for name in after if "settings" not in str(name)} == files
    assert all(after[name] == whole[name] for name in files)
    code, out, _ = compress(*option)
    assert "4 skipped, 0 failed" in out
    assert compress("--verify")[0] == 0


def test_an_earlier_version_s_edge_map_of_another_image_is_not_coded_anew(paths, compress, made):
    first = paths.images("sushi")[0]
    save_as(paths.kept(first), (40, 48), ".webp")
    edge_map = paths.kept(first).with_suffix(".webp")
    with Image.open(edge_map) as picture:
        turned = picture.rotate(180)
    turned.save(edge_map, lossless=True)
    before = edge_map.read_bytes()
    assert compress()[0] == 0
    assert edge_map.read_bytes() == before
    assert compress("--verify")[0] == 1


def test_edge_maps_of_another_coder_are_not_mixed_with_this_one_s(paths, compress, made):
    (record,) = paths.folder("kept").glob("settings*.json")
    record.write_text(re.sub(r'"edge_coder": "\w+"', '"edge_coder": "000000000000"', record.read_text()))
    code, _, err = compress()
    assert code == 2
    assert "edge coder '000000000000' -> " in err


def test_orphans_are_reported_and_never_deleted(paths, compress, made):
    orphans = [
        paths.copies_folder("sushi") / "gone_seed00.jpg",
        paths.copies_folder("sushi") / "notes.txt",
        paths.kept(paths.images("sushi")[0]).parent / "gone.png",
    ]
    for orphan in orphans:
        orphan.write_text("x")
    shutil.rmtree(paths.folder("train") / "apple pie")
    for option in ("--verify", "--repair"):
        code, out, _ = compress(option)
        assert code == 0
        assert all(f"\n  {orphan}\n" in out for orphan in orphans)
        assert str(paths.folder("copies") / "apple pie") in out
    assert all(orphan.exists() for orphan in orphans)


def test_a_bad_image_is_told_and_cannot_be_repaired(paths, compress, made):
    image = paths.images("sushi")[0]
    image.write_bytes(image.read_bytes()[:-300])
    for option in ("--verify", "--repair"):
        code, out, _ = compress(option)
        assert code == 1
        assert f"{image}: unreadable" in out
    assert len(copies(paths)) == 8
