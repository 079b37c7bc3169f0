"""Payloads that prove themselves: each word says to which lease it belongs, and where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np

ODD, GOLDEN = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
TAIL = 512  # bytes of the view beside the array


def make(key: int, nbytes: int) -> dict[str, Any]:
    """Return the payload of a lease: an array of about `nbytes`, and a view of a few bytes."""
    return {"key": key, "words": _words(key, nbytes), "tail": memoryview(_tail(key))}


def check(value: dict[str, Any], key: int, nbytes: int) -> str:
    """Return what is wrong with a payload that has been read; empty if it is as it was made."""
    if value["key"] != key:
        return f"lease {key} holds lease {value['key']}"
    expected = _words(key, nbytes)
    if value["words"].shape != expected.shape:
        return f"lease {key} has the shape {value['words'].shape}, not {expected.shape}"
    different = np.flatnonzero(value["words"] != expected)
    if len(different):
        return f"lease {key}: {len(different)} of {len(expected)} words differ, the first one at {different[0]}"
    if bytes(value["tail"]) != bytes(_tail(key)):
        return f"lease {key}: the view differs"
    return ""


def scribble(value: dict[str, Any]) -> None:
    """Overwrite a payload; only its own copy or private map may change."""
    value["words"][:] = 0
    value["tail"][:] = bytes(len(value["tail"]))


def _words(key: int, nbytes: int) -> Any:
    words = np.arange(max(1, nbytes // 8), dtype=np.uint64)
    words *= np.uint64(ODD)
    words += np.uint64(key * GOLDEN % 2**64)
    return words


def _tail(key: int) -> bytearray:
    return bytearray(key.to_bytes(8, "little") * (TAIL // 8))
