"""Read pictures: the one that ships with the package, or the user's own files.

``picture.jpg`` is our own work (drawn by arithmetic, 1024 x 768 pixels) and is covered by the licence of this
package. Nothing here imports torch, so that a bad file is reported before anything expensive starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from devguard.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DEFAULT", "read"]

DEFAULT = Path(__file__).with_name("picture.jpg")


def read(path: str | Path) -> Image.Image:
    """Read and decode one picture.

    Parameters
    ----------
    path : str or Path
        A file in any format that Pillow reads.

    Returns
    -------
    PIL.Image.Image
        The decoded picture, mode RGB, 8 bits a channel.

    Raises
    ------
    ConfigError
        If the file is missing, is no picture, is broken, or is larger than Pillow's safety limit.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise ConfigError(
            "reading a picture needs Pillow, which is not installed. Install it with: pip install "
            "'torch-devguard[demo]'."
        ) from None
    advice = "Give a readable picture (PNG, JPEG, WebP, ...), or leave --image out to use the built-in one."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                decoded: Image.Image = picture.convert("RGB")
                return decoded
    except FileNotFoundError:
        raise ConfigError(f"--image {path}: there is no such file. {advice}") from None
    except UnidentifiedImageError:
        raise ConfigError(f"--image {path}: this is not a picture in a format that Pillow knows. {advice}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConfigError(f"--image {path}: the picture is too large ({error}). {advice}") from None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's word for a broken PNG
        raise ConfigError(f"--image {path}: the picture cannot be decoded ({error}). {advice}") from None


def read_all(paths: Sequence[str | Path]) -> list[Image.Image]:
    """Read several pictures; the built-in one if `paths` is empty."""
    return [read(path) for path in paths or (DEFAULT,)]
