"""What the tests of transport share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devguard.transport import Arena


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena("cpu", budget="4MiB") as made:
        yield made
