"""Values of a wrong type are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from devguard.logs import values

CASES: dict[str, tuple[Callable[[Any], Any], list[Any], list[Any]]] = {
    "number": (values.as_number, [0, (1 << 64) - 1], [-1, 1 << 64, True, 1.5, "1", None]),
    "text": (values.as_text, ["", "x"], [None, 1, [], b"x"]),
    "text or none": (values.as_text_or_none, [None, "x"], [1, []]),
    "texts": (values.as_texts, [[], ["x"]], ["x", [1], {}, None]),
    "text by text": (values.as_text_by_text, [{}, {"x": "y"}], [[], {"x": 1}, {1: "x"}, None]),
    "time": (values.as_time, [0, 1.5, 1 << 39], [-1.0, 1 << 41, True, "1", None, float("nan"), float("inf")]),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_value_of_its_type_is_returned_and_any_other_is_refused(kind: str) -> None:
    read, good, bad = CASES[kind]
    assert [read(value) for value in good] == good
    for value in bad:
        with pytest.raises(TypeError):
            read(value)
