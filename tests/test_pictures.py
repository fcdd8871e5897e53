"""judging/pictures.py: how a picture file is read, whose it is, and who drew it."""
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from judging.pictures import (
    check_own,
    file_names,
    picture_paths,
    pictures_by_case,
    read_manifest,
    read_picture,
    replace_own,
)
from plumbing.options import UserError
from prompts import Prompt


def ramp(low=0, high=255):
    """Greys (16, 16) from low to high."""
    return np.linspace(low, high, 256).round().astype(np.int64).reshape(16, 16)


def png16(path, values):
    """A grey PNG (H, W) of 16 bits, written by hand."""
    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


# ---- reading -------------------------------------------------------------------------------------

def test_16_bits_are_scaled_and_not_clipped(tmp_path):
    png16(tmp_path / "a.png", ramp(0, 65535))
    picture = read_picture(str(tmp_path / "a.png"), "--images")
    assert picture.dtype == np.uint8 and picture.shape == (16, 16, 3)
    assert np.abs(picture[..., 0] - ramp()).max() <= 1
    wide = Image.fromarray(ramp(0, 65535).astype(np.uint16)).convert("I")
    wide.save(tmp_path / "b.tiff")                      # another form, whatever its name says
    (tmp_path / "b.tiff").rename(tmp_path / "b.png")
    assert np.array_equal(read_picture(str(tmp_path / "b.png"), "--images"), picture)


@pytest.mark.parametrize("values, reason", [
    (ramp().astype(np.float32), "no whole numbers"),
    ((ramp() * 1000).astype(np.int32), "not of 16 bits"),
    ((ramp() - 9).astype(np.int32), "not of 16 bits")])
def test_numbers_of_no_known_range_are_refused(tmp_path, values, reason):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"--images: .*a.png is no readable picture .*{reason}"):
        read_picture(str(tmp_path / "a.png"), "--images")


def test_transparent_parts_are_white(tmp_path):
    red = np.zeros((8, 8, 4), np.uint8)
    red[:4] = 200, 0, 0, 255                            # the lower half shows nothing of its black
    grey = np.zeros((8, 8, 2), np.uint8)
    grey[:4] = 90, 255
    for values, upper in ((red, (200, 0, 0)), (grey, (90, 90, 90))):
        Image.fromarray(values).save(tmp_path / "a.png")
        picture = read_picture(str(tmp_path / "a.png"), "--images")
        assert (picture[:4] == upper).all() and (picture[4:] == 255).all()
    half = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    Image.fromarray(half).save(tmp_path / "h.png")
    assert (read_picture(str(tmp_path / "h.png"), "--images") == 127).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    assert (read_picture(str(tmp_path / "p.png"), "--images") == (10, 200, 30)).all()
    palette.save(tmp_path / "p.png", transparency=1)
    assert (read_picture(str(tmp_path / "p.png"), "--images") == 255).all()


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, :8] = 255                                 # white at the left
    exif = Image.Exif()
    exif[0x0112] = 6                                    # to be turned right
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    picture = read_picture(str(tmp_path / "a.png"), "--images")
    assert picture.shape == (16, 8, 3)
    assert (picture[0] == 255).all() and not picture[-1].any()      # white at the top


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_forms_of_the_same_picture_are_the_same(tmp_path, mode):
    values = np.repeat(np.where(ramp() > 127, 255, 0).astype(np.uint8)[..., None], 3, 2)
    ending = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    Image.fromarray(values).convert(mode).save(tmp_path / f"a.{ending}")
    picture = read_picture(str(tmp_path / f"a.{ending}"), "--images")
    assert np.abs(picture.astype(int) - values).max() <= (60 if ending == "jpg" else 0)


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (read_picture(str(tmp_path / name), "--images") == (255, 0, 0)).all()


def torn(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-3000])


def bomb(path):
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())                 # a header that promises too much
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [
    torn, bomb, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"torn"),
    lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    lambda path: path.mkdir()])
def test_what_cannot_be_read_is_one_sentence(tmp_path, spoil):
    spoil(tmp_path / "a.png")
    with pytest.raises(UserError, match="--images: .*a.png is no readable picture") as error:
        read_picture(str(tmp_path / "a.png"), "--images")
    assert "\n" not in str(error.value)


# ---- which belongs to which case -----------------------------------------------------------------

def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return str(folder)


def test_cases_and_turns_are_found_by_name(tmp_path):
    folder = touch(tmp_path / "x", "3_0.png", "3_1.JPG", "0012.webp", "grid.png", "notes.txt")
    found = pictures_by_case(folder)
    assert {case: [path.rsplit("/")[-1] for path in paths] for case, paths in found.items()} == {
        3: ["3_0.png", "3_1.JPG"], 12: ["0012.webp"]}
    assert len(pictures_by_case(touch(tmp_path / "y", "3_1.png", "3_2.png"))[3]) == 2   # from 1


@pytest.mark.parametrize("names, sentence", [
    (["17.png", "17.jpg"], "17.jpg and 17.png are of one case and turn"),
    (["17.png", "0017.png"], "are of one case and turn"),
    (["17_1.png", "17_01.png"], "are of one case and turn"),
    (["17.png", "17_1.png"], "has 17.png, 17_1.png of case 17; one without a turn"),
    (["17_0.png", "17_2.png"], "turns from 0 on with none missing"),
    (["16_0.png", "17_1.png"], "turns from 0 on with none missing"),
    (["17_2.png", "17_3.png"], "turns from 1 on with none missing"),
    (["+17.png"], "is named neither CASE nor CASE_TURN"),
    ([" 17.png"], "is named neither CASE nor CASE_TURN"),
    (["-17.png"], "is named neither CASE nor CASE_TURN"),
    (["17 (1).png"], "is named neither CASE nor CASE_TURN"),
    (["17_a.png"], "is named neither CASE nor CASE_TURN"),
    (["17_0_1.png"], "is named neither CASE nor CASE_TURN"),
    (["²3.png"], "holds no picture named by case number"),
    (["a.png"], "holds no picture named by case number"),
    (["17.gif"], "holds no picture named by case number")])
def test_a_name_that_is_not_clear_is_refused(tmp_path, names, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        pictures_by_case(touch(tmp_path / "x", *names))


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name, what in (("file", "is a file"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=f"--reference: .*{name} {what}; a folder of pictures"):
            picture_paths(str(tmp_path / name), "--reference")


# ---- who drew them -------------------------------------------------------------------------------

def test_of_a_folder_of_samples_only_the_last_commands_pictures_count(tmp_path):
    folder = touch(tmp_path / "x")
    replace_own(folder, {"00003.png": {"prompt": "a"}})
    touch(tmp_path / "x", "00003.png", "00004.png")     # the second by another program
    assert list(pictures_by_case(folder)) == [3]
    with pytest.raises(UserError, match="--output-dir: .*/x holds 00004.png, which sample.py's"):
        check_own(folder)
    (tmp_path / "x" / "00004.png").unlink()
    check_own(folder)
    replace_own(folder, {"00005.png": {"prompt": "b"}})
    assert not (tmp_path / "x" / "00003.png").exists()
    assert read_manifest(folder) == {"00005.png": {"prompt": "b"}}


@pytest.mark.parametrize("manifest", [
    "", "[]", "{}", '{"pictures": []}', '{"pictures": {"0.png": 3}}',
    '{"pictures": {"../0.png": {}}}', '{"pictures": {"grid.png": {}}}'])
def test_a_manifest_that_is_not_ours_is_refused_and_nothing_is_taken_out(tmp_path, manifest):
    folder = touch(tmp_path / "x", "grid.png")
    touch(tmp_path, "0.png")
    (tmp_path / "x" / "samples.json").write_text(manifest)
    for program in (pictures_by_case, check_own, lambda folder: replace_own(folder, {})):
        with pytest.raises(UserError, match="samples.json"):
            program(folder)
    assert (tmp_path / "0.png").exists() and (tmp_path / "x" / "grid.png").exists()


def test_pictures_of_one_case_get_names_of_their_own():
    one, two = Prompt("a", case=7), Prompt("b", case=12)
    assert file_names([one, two]) == ["00007.png", "00012.png"]
    assert file_names([one, two, one, two]) == ["00007_0.png", "00012_0.png",
                                                "00007_1.png", "00012_1.png"]
    assert file_names([one, one, two]) == ["00007_0.png", "00007_1.png", "00012_0.png"]


def test_what_is_named_is_found_again_by_its_case_and_turn(tmp_path):
    prompts = [Prompt("a", case=7), Prompt("b", case=12), Prompt("a", case=7)]
    folder = touch(tmp_path / "x", *file_names(prompts))
    replace_own(folder, json.loads(json.dumps({name: {} for name in file_names(prompts)})))
    touch(tmp_path / "x", *file_names(prompts))
    assert {case: len(paths) for case, paths in pictures_by_case(folder).items()} == {7: 2, 12: 1}
