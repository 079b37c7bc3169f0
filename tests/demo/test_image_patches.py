"""The image processor: values computed by hand, and the properties of patches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from devguard.demo.image_patches import FEATURES, MAX_PIXELS, MIN_PIXELS, make_batch, normalise, patchify, smart_resize


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((768, 1024), (756, 1036)),  # 27.43 and 36.57 blocks of 28, rounded
        ((28, 28), (56, 56)),  # 784 pixels, doubled to reach 3136
        ((3000, 4000), (840, 1148)),  # shrunk by 3.458, rounded down
        ((56, 56), (56, 56)),
        ((42, 70), (56, 56)),  # 1.5 and 2.5 blocks: halves are rounded to the even number
    ],
)
def test_smart_resize_returns_the_sizes_computed_by_hand(size, expected):
    assert smart_resize(*size) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_smart_resize_returns_whole_blocks_within_the_bounds(height, width):
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="too thin"):
            smart_resize(height, width)
        return
    rows, columns = smart_resize(height, width)
    assert rows % 28 == 0
    assert columns % 28 == 0
    assert MIN_PIXELS <= rows * columns <= MAX_PIXELS


def test_each_row_holds_the_patch_of_its_position():
    height, width = 56, 84
    frames = torch.arange(3 * height * width, dtype=torch.int64).reshape(1, 3, height, width)
    patches, grid = patchify(frames)
    assert grid == (1, 4, 6)
    row = 0
    for block_row in range(2):
        for block_column in range(3):
            for down in range(2):
                for across in range(2):
                    y, x = (2 * block_row + down) * 14, (2 * block_column + across) * 14
                    square = frames[0, :, y : y + 14, x : x + 14]
                    twice = torch.stack([square, square], dim=1)  # channel, frame, y, x
                    assert torch.equal(patches[row], twice.reshape(-1))
                    row += 1
    assert row == patches.shape[0]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_frames_can_be_rebuilt_from_patches(down, across, count):
    frames = torch.arange(count * 3 * down * across * 28 * 28).reshape(count, 3, down * 28, across * 28)
    patches, (grid_t, grid_h, grid_w) = patchify(frames)
    assert patches.shape == (grid_t * grid_h * grid_w, FEATURES)
    assert (grid_t, grid_h, grid_w) == ((count + 1) // 2, 2 * down, 2 * across)
    parts = patches.reshape(grid_t, down, across, 2, 2, 3, 2, 14, 14).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    rebuilt = parts.reshape(2 * grid_t, 3, down * 28, across * 28)
    assert torch.equal(rebuilt[:count], frames)
    if count % 2:
        assert torch.equal(rebuilt[count], frames[-1])


@pytest.mark.parametrize("shape", [(1, 3, 30, 28), (1, 3, 28, 14), (1, 4, 28, 28), (0, 3, 28, 28)])
def test_frames_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify(torch.zeros(shape))


def test_pixels_are_normalised_as_clip_does():
    white = normalise(Image.new("RGB", (56, 56), "white"))
    black = normalise(Image.new("RGB", (56, 56), "black"))
    for found, by_hand in ((white, (1.9303361, 2.0748837, 2.1458969)), (black, (-1.7922626, -1.7520971, -1.4802198))):
        assert found.dtype == torch.float32
        assert found.shape == (3, 56, 56)
        for channel, value in zip(found, by_hand, strict=True):
            torch.testing.assert_close(channel, torch.full((56, 56), value), rtol=0, atol=1e-6)


def test_a_grey_or_transparent_picture_is_converted_to_rgb():
    assert normalise(Image.new("L", (56, 56))).shape == (3, 56, 56)
    assert normalise(Image.new("RGBA", (56, 56))).shape == (3, 56, 56)


def test_a_batch_holds_the_pictures_one_after_the_other():
    first, second = Image.new("RGB", (56, 56), "white"), Image.new("RGB", (112, 84), "black")
    pixel_values, grid = make_batch([first, second])
    assert pixel_values.shape == (16 + 48, 1176)
    assert pixel_values.dtype == torch.float32
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[1, 4, 4], [1, 6, 8]]
    assert pixel_values[:16].min() > 0 > pixel_values[16:].max()
    assert int(grid.prod(dim=1).sum()) == pixel_values.shape[0]
