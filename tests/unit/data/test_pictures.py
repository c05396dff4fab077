"""A render depends only on seed, key and index; it has one of the backgrounds, and its empty patches are marked."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_dist.data.pictures import BACKGROUNDS, RASTER, augmented, rasterise
from moe_dist.errors import DataError


def disc() -> np.ndarray:
    """Returns a picture of a red disc left of the centre. All pixels around the disc are transparent."""
    y, x = np.mgrid[:RASTER, :RASTER]
    raster = np.zeros((RASTER, RASTER, 4), np.uint8)
    raster[(x - 20) ** 2 + (y - 32) ** 2 < 14**2] = (255, 0, 0, 255)
    return raster


def test_renders_vary_and_mark_what_is_empty() -> None:
    backgrounds, places = set(), set()
    for index in range(60):
        render = augmented(disc(), seed=1, key="disc", index=index)
        patches = render.pixels.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(8, 8, 16, 3)
        background = tuple(patches[render.empty][0, 0].tolist())
        assert background in BACKGROUNDS
        assert (patches[render.empty] == background).all()
        assert (patches[~render.empty] != background).any(axis=(1, 2)).all()
        backgrounds.add(background)
        places.add(render.empty.tobytes())
    assert backgrounds == set(BACKGROUNDS)
    assert len(places) > 20


def test_a_render_follows_from_seed_key_and_index() -> None:
    first = augmented(disc(), seed=1, key="disc", index=3)
    np.testing.assert_array_equal(first.pixels, augmented(disc(), seed=1, key="disc", index=3).pixels)
    for changed in ({"seed": 2}, {"key": "other"}, {"index": 4}):
        other = augmented(disc(), **({"seed": 1, "key": "disc", "index": 3} | changed))
        assert (first.pixels != other.pixels).any()


def test_rasterise_fits_any_shape_into_a_square(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (0, 0, 255)).save(tmp_path / "wide.png")
    raster = rasterise(tmp_path / "wide.png")
    assert raster.shape == (RASTER, RASTER, 4)
    assert (raster[16:48] == (0, 0, 255, 255)).all()
    assert (raster[:16, :, 3] == 0).all()
    assert (raster[48:, :, 3] == 0).all()


def test_rasterise_turns_a_photo_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    Image.new("RGB", (200, 100)).save(tmp_path / "turned.jpg", exif=exif)
    raster = rasterise(tmp_path / "turned.jpg")
    assert (raster[:, :16, 3] == 0).all()
    assert (raster[:, 16:48, 3] == 255).all()


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("1", (10_000, 5_001)).save(tmp_path / "vast.png")
    with pytest.raises(DataError, match=r"vast\.png' has more than 50,000,000 pixels; scale it down"):
        rasterise(tmp_path / "vast.png")


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A progressive JPEG may repeat a scan of 100 bytes, and a decoder passes over the whole picture for each of them."""
    Image.new("L", (1000, 1000), 128).save(tmp_path / "scans.jpg", progressive=True)
    assert rasterise(tmp_path / "scans.jpg").any()
    content = (tmp_path / "scans.jpg").read_bytes()
    (tmp_path / "scans.jpg").write_bytes(content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 1000 + b"\xff\xd9")
    with pytest.raises(DataError, match=r"scans\.jpg' has 1,00\d scans, each over the whole picture; save it again"):
        rasterise(tmp_path / "scans.jpg")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(evil) print\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(("name", "content"), [("a.png", b"no picture"), ("a.svg", b"no picture"), ("a.png", EPS)])
def test_a_damaged_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    gs = tmp_path / "gs"  # Pillow would start this program to read EPS files
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for svg in {False, name.endswith(".svg")}:
        with pytest.raises(DataError, match=name):
            rasterise(tmp_path / name, svg=svg)
    assert not (tmp_path / "ran").exists()


def test_an_svg_of_a_user_is_not_drawn(tmp_path: Path) -> None:
    """resvg would read any file that an SVG names. With a large numOctaves it would never end."""
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    with pytest.raises(DataError, match="not a PNG or JPEG"):
        rasterise(tmp_path / "a.svg")
