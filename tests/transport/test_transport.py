"""The face of the package."""

from __future__ import annotations

import pytest

from devguard import errors, transport


def test_the_face_has_what_is_documented() -> None:
    assert transport.__all__ == sorted(transport.__all__, key=str.casefold)
    for name in transport.__all__:
        assert getattr(transport, name).__doc__


@pytest.mark.parametrize("name", ["BudgetFull", "HandleReleased", "PeerGone"])
def test_its_errors_are_devguards(name: str) -> None:
    assert getattr(transport, name) is getattr(errors, name)
    assert issubclass(getattr(errors, name), errors.DevGuardError)
