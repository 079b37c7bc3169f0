"""Reading pictures: the built-in one, and files that cannot be read."""

from __future__ import annotations

import pytest
from PIL import Image

from devguard.demo import pictures
from devguard.errors import ConfigError


def test_the_built_in_picture_is_small_and_readable():
    assert pictures.DEFAULT.stat().st_size < 60_000
    picture = pictures.read(pictures.DEFAULT)
    assert (picture.mode, picture.size) == ("RGB", (1024, 768))
    assert [found.size for found in pictures.read_all([])] == [(1024, 768)]


def test_a_palette_picture_is_decoded_to_rgb(tmp_path):
    Image.new("P", (20, 10)).save(tmp_path / "palette.png")
    assert pictures.read(tmp_path / "palette.png").mode == "RGB"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.png: there is no such file.*Give a readable picture"):
        pictures.read(tmp_path / "nowhere.png")


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("once upon a time")
    with pytest.raises(ConfigError, match="not a picture"):
        pictures.read(tmp_path / "text.png")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be decoded"):
        pictures.read(tmp_path)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_truncated_picture_is_refused(tmp_path, kind):
    complete = tmp_path / f"complete.{kind}"
    pictures.read(pictures.DEFAULT).save(complete)
    broken = tmp_path / f"broken.{kind}"
    broken.write_bytes(complete.read_bytes()[: complete.stat().st_size // 2])
    with pytest.raises(ConfigError, match=rf"broken\.{kind}: the picture cannot be decoded"):
        pictures.read(broken)


@pytest.mark.parametrize("limit", [70, 30])  # Pillow warns above the limit, and raises above twice the limit.
def test_a_picture_above_the_limit_of_pillow_is_refused(tmp_path, monkeypatch, limit):
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ConfigError, match="too large"):
        pictures.read(tmp_path / "large.png")
