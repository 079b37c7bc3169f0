"""Replacing an attribute of torch, and putting it back."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from devguard.support.patching import DoorError, Patches, overwritten


def original() -> str:
    """Return a name."""
    return "original"


@pytest.fixture
def module() -> types.ModuleType:
    made = types.ModuleType("made")
    made.work = original
    return made


@pytest.fixture
def user_module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("user_of_made")
    sys.modules["user_of_made"] = made
    yield made
    del sys.modules["user_of_made"]


def replacement() -> str:
    return "ours"


def test_a_patch_takes_effect_and_restore_puts_the_original_back(module: types.ModuleType) -> None:
    patches = Patches()
    patches.replace(module, "work", lambda: "ours")
    assert module.work() == "ours"
    assert patches.restore() == []
    assert module.work is original
    assert patches.restore() == []


def test_a_patch_keeps_the_names_by_which_pickle_knows_the_function(module: types.ModuleType) -> None:
    patches = Patches()
    patches.replace(module, "work", lambda: "ours")
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        assert getattr(module.work, attribute) == getattr(original, attribute)
    assert module.work.__wrapped__ is original


def test_an_entry_of_a_table_is_restored_and_reported_like_an_attribute() -> None:
    table, patches = {str: original}, Patches()
    patches.replace(table, str, lambda: "ours")
    assert table[str]() == "ours"
    assert table[str].__qualname__ == "original"
    assert patches.restore() == []
    assert table == {str: original}
    patches.replace(table, str, lambda: "ours")
    table[str] = replacement
    assert patches.restore() == ["the entry of str in a table"]
    assert table == {str: replacement}
    with pytest.raises(DoorError, match="cannot watch the entry of int in a table: torch"):
        patches.find(table, int)


def test_a_foreign_patch_on_top_stays_and_is_reported(module: types.ModuleType) -> None:
    patches = Patches()
    patches.replace(module, "work", lambda: "ours")
    module.work = replacement
    assert patches.restore() == ["made.work"]
    assert module.work is replacement


def test_a_deleted_attribute_is_reported_and_not_restored(module: types.ModuleType) -> None:
    patches = Patches()
    patches.replace(module, "work", lambda: "ours")
    del module.work
    assert patches.restore() == ["made.work"]
    assert not hasattr(module, "work")


def test_two_patches_of_one_attribute_come_off_in_reverse(module: types.ModuleType) -> None:
    patches = Patches()
    patches.replace(module, "work", lambda: "first")
    patches.replace(module, "work", lambda: "second")
    assert patches.restore() == []
    assert module.work is original


def test_an_attribute_that_this_torch_lacks_is_a_door_error(module: types.ModuleType) -> None:
    with pytest.raises(
        DoorError, match=rf"cannot watch made\.missing: torch {re.escape(torch.__version__)} has no such"
    ):
        Patches().find(module, "missing")


def test_an_inherited_attribute_is_not_found_on_the_derived_class() -> None:
    class Base:
        def work(self) -> None: ...

    class Derived(Base): ...

    with pytest.raises(DoorError):
        Patches().find(Derived, "work")


def test_an_inherited_attribute_can_be_replaced_on_the_derived_class_alone() -> None:
    class Base:
        def work(self) -> str:
            return "original"

        @staticmethod
        def make(value: str) -> str:
            return value

    class Derived(Base): ...

    patches = Patches()
    patches.replace(Derived, "work", lambda self: "ours", inherited=True)
    patches.replace(Derived, "make", lambda value: f"our {value}", inherited=True)
    assert (Derived().work(), Base().work()) == ("ours", "original")
    assert (Derived.make("x"), Derived().make("x"), Base.make("x")) == ("our x", "our x", "x")
    assert overwritten() == set()
    assert patches.restore() == []
    assert not {"work", "make"} & set(vars(Derived))
    assert (Derived().work(), Derived.make("x")) == ("original", "x")


def test_a_static_method_is_replaced_by_one_and_restored() -> None:
    class Kind:
        @staticmethod
        def make(value: str) -> str:
            return value

    before, patches = vars(Kind)["make"], Patches()
    patches.replace(Kind, "make", lambda value: f"our {value}")
    assert Kind().make("x") == "our x"
    assert patches.restore() == []
    assert vars(Kind)["make"] is before


def test_copies_taken_before_the_patch_are_reported(module: types.ModuleType, user_module: types.ModuleType) -> None:
    patches = Patches()
    user_module.copied = original
    assert "user_of_made.copied" not in patches.early_copies()
    patches.replace(module, "work", replacement)
    assert "user_of_made.copied" in patches.early_copies()
    patches.restore()


def test_overwritten_names_a_patch_that_other_code_replaced(module: types.ModuleType) -> None:
    patches, before = Patches(), overwritten()
    patches.replace(module, "work", replacement)
    assert overwritten() == before
    module.work = original
    assert overwritten() - before == {"made.work"}
    patches.restore()
    assert overwritten() == before


def test_a_class_method_stays_a_class_method() -> None:
    class Owner:
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    class Derived(Owner): ...

    patches, before = Patches(), vars(Owner)["name"]
    find = patches.find(Owner, "name")
    patches.replace(Owner, "name", lambda cls: f"patched {find.__func__(cls)}")  # type: ignore[attr-defined]
    assert (Owner.name(), Derived.name(), Owner().name()) == ("patched Owner", "patched Derived", "patched Owner")
    assert Owner.name.__qualname__ == before.__qualname__
    assert patches.restore() == []
    assert vars(Owner)["name"] is before
