"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest

from devguard.support.sizes import parse_size

VALID = {"4096": 4096, "1K": 1 << 10, "1.5 GiB": 3 << 29, " 2mb ": 2 << 20, "1TB": 1 << 40, "0": 0}


@pytest.mark.parametrize("text", VALID)
def test_a_size_is_in_powers_of_1024(text: str) -> None:
    assert parse_size(text) == VALID[text]


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "1 PB", "1G1", "9" * 400, "1.", "nan"])
def test_other_texts_are_no_size(text: str) -> None:
    assert parse_size(text) is None
