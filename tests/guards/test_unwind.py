"""Scopes that are left out of order or on another thread."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard.guards import unwind
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def misuse() -> Iterator[None]:
    unwind._reported.clear()
    yield
    unwind._reported.clear()


@pytest.mark.usefixtures("misuse")
def test_a_scope_left_out_of_order_is_reported_at_the_users_line(cuda: FakeCuda) -> None:
    first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
    first.__enter__()
    second.__enter__()
    with pytest.warns(RuntimeWarning, match=r"held across an await or a yield.*run\(awaitable\)") as caught:
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        first.__exit__(None, None, None)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    assert cuda.current == 2
    assert devguard.owner() == torch.device("cuda:2")
    second.__exit__(None, None, None)
    assert cuda.current == 0
    assert devguard.owner() is None


@pytest.mark.usefixtures("misuse")
def test_a_report_that_filters_make_an_error_is_printed_and_the_exit_succeeds(
    cuda: FakeCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
    first.__enter__()
    second.__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.__exit__(None, None, None)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{__file__}:")
    assert "held across an await" in err
    second.__exit__(None, None, None)
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
def test_a_scope_without_a_device_may_lie_between_those_left_out_of_order(cuda: FakeCuda) -> None:
    torch.cuda.set_device(3)
    first, between, second = devguard.guard("cuda:1"), devguard.guard("cpu"), devguard.guard("cuda:2")
    for each in (first, between, second):
        each.__enter__()
    with pytest.warns(RuntimeWarning, match="held across"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    between.__exit__(None, None, None)
    assert cuda.current == 3


@pytest.mark.usefixtures("misuse")
def test_the_device_is_restored_when_the_remaining_scopes_took_none(cuda: FakeCuda) -> None:
    first, second = devguard.guard("cuda:1"), devguard.unguarded()
    first.__enter__()
    second.__enter__()
    with pytest.warns(RuntimeWarning, match="held across"):
        first.__exit__(None, None, None)
    assert cuda.current == 0
    second.__exit__(None, None, None)
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
@pytest.mark.parametrize("scoped", [devguard.guard("cuda:1"), devguard.unguarded()], ids=repr)
def test_a_scope_left_on_another_thread_is_reported_there(cuda: FakeCuda, scoped: Any) -> None:
    caught: list[warnings.WarningMessage] = []
    entered = threading.Event()

    def leave() -> None:
        entered.wait()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            scoped.__exit__(None, None, None)
        caught.extend(seen)

    thread = threading.Thread(target=leave)
    thread.start()  # before the scope is entered, so that the thread inherits nothing
    scoped.__enter__()
    entered.set()
    thread.join()
    assert [(one.category, one.filename) for one in caught] == [(RuntimeWarning, __file__)]
    assert "thread that had not entered it" in str(caught[0].message)
    scoped.__exit__(None, None, None)
    assert devguard.owner() is None
    assert cuda.current == 0


@pytest.mark.usefixtures("misuse")
def test_misuse_is_reported_once_per_call_site(cuda: FakeCuda) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            first, second = devguard.guard("cuda:1"), devguard.guard("cuda:2")
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            second.__exit__(None, None, None)
    assert len(caught) == 1
    assert cuda.current == 0
