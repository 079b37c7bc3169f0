"""Turn pictures into model input on the CPU, as the image processor of Qwen2-VL and Qwen2.5-VL does.

The rules come from ``models/qwen2_vl/image_processing_qwen2_vl.py`` of ``transformers``: smart resize, CLIP
normalisation, and the order of the patches, which lets the vision tower merge neighbours with a plain reshape. They
are reimplemented here, so that the demonstration needs neither transformers nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["make_batch", "normalise", "patchify", "smart_resize"]

PATCH = 14  # pixels a side
TEMPORAL = 2  # frames in a patch; a still picture is repeated
MERGE = 2  # the model merges 2 x 2 patches into one token
CHANNELS = 3
FEATURES = CHANNELS * TEMPORAL * PATCH * PATCH  # 1176 numbers in a patch
FACTOR = PATCH * MERGE
MIN_PIXELS = 56 * 56
MAX_PIXELS = 14 * 14 * 4 * 1280
MAX_ASPECT = 200

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int,
    width: int,
    factor: int = FACTOR,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Return the size to which a picture is scaled for the model.

    Both sides become multiples of `factor`, the area lies between `min_pixels` and `max_pixels`, and the aspect
    ratio changes as little as possible.

    Parameters
    ----------
    height, width : int
        The picture's size, in pixels.
    factor : int
        Both sides become multiples of this number of pixels.
    min_pixels, max_pixels : int
        Bounds of the area, in pixels.

    Returns
    -------
    tuple of int
        Height and width, in pixels.

    Raises
    ------
    ValueError
        If one side is more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(
            f"a picture of {width} x {height} pixels is too thin: one side may be at most {MAX_ASPECT} times the "
            "other. Crop it first."
        )
    rows = round(height / factor) * factor
    columns = round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def patchify(frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames into patches, with the patches that the model merges next to each other.

    Parameters
    ----------
    frames : Tensor, any dtype, shape [frames, 3, height, width]
        Height and width are multiples of 28. If the number of frames is odd, the last one is repeated.

    Returns
    -------
    patches : Tensor, same dtype, shape [grid_t * grid_h * grid_w, 1176]
        One patch a row: channel, then frame, then the 14 x 14 pixels. Rows are ordered by pairs of frames, then by
        blocks of 2 x 2 patches from left to right and top to bottom, then likewise inside a block.
    grid : tuple of int
        Patches in time, down and across: (grid_t, grid_h, grid_w).
    """
    count, channels, height, width = frames.shape
    if channels != CHANNELS or height % FACTOR or width % FACTOR or not count:
        raise ValueError(
            f"frames must be [frames, {CHANNELS}, height, width] with both sides multiples of {FACTOR}; "
            f"got {list(frames.shape)}."
        )
    missing = -count % TEMPORAL
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    grid_t, grid_h, grid_w = frames.shape[0] // TEMPORAL, height // PATCH, width // PATCH
    blocks = frames.reshape(grid_t, TEMPORAL, CHANNELS, grid_h // MERGE, MERGE, PATCH, grid_w // MERGE, MERGE, PATCH)
    #                      t  row block, column block, row, column, channel, frame, y, x
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(grid_t * grid_h * grid_w, FEATURES).contiguous(), (grid_t, grid_h, grid_w)


def normalise(picture: Image.Image) -> torch.Tensor:
    """Resize and normalise one picture.

    Returns
    -------
    Tensor, float32, shape [3, height, width]
        Both sides are multiples of 28. Each channel is (value - mean) / std, with CLIP's mean and std.
    """
    from PIL import Image

    height, width = smart_resize(picture.height, picture.width)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    scaled = raw.reshape(height, width, CHANNELS).permute(2, 0, 1).to(torch.float32) / 255
    mean = torch.tensor(MEAN).reshape(CHANNELS, 1, 1)
    std = torch.tensor(STD).reshape(CHANNELS, 1, 1)
    return (scaled - mean) / std


def make_batch(pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn pictures into one batch of model input on the CPU.

    Returns
    -------
    pixel_values : Tensor, float32, shape [patches, 1176]
        The patches of all pictures, one picture after the other.
    image_grid_thw : Tensor, int64, shape [images, 3]
        Patches in time, down and across, for each picture.
    """
    parts = [patchify(normalise(picture).unsqueeze(0)) for picture in pictures]
    return torch.cat([patches for patches, _ in parts]), torch.tensor([grid for _, grid in parts], dtype=torch.int64)
