"""The device is read from what the callable that is really called gets."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import wrapt

import devguard
from devguard.errors import ConfigError
from devguard.guards.parameter import find_parameter
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")

scoped = devguard.guard(argument="gpu_id")


def work(first: Any, gpu_id: Any = 5) -> tuple[Any, str]:
    return gpu_id, str(devguard.owner())


def passes_on(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def logs(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*a: Any, **k: Any) -> Any:
        logging.debug("called with %d arguments: %s", len(a), a)
        result = None
        for _ in range(2):
            result = function(*a, **k)
        return result

    return wrapper


def prepends(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function("context", *args, **kwargs)

    return wrapper


def drops(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args[1:], **kwargs)

    return wrapper


def reorders(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*reversed(args), **kwargs)

    return wrapper


def supplies(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, gpu_id=3, **kwargs)

    return wrapper


def changes(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs["gpu_id"] = 3
        return function(*args, **kwargs)

    return wrapper


def hands_over(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(gpu_id=3)
        return function(*args, **kwargs)

    return wrapper


def rebinds(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = args[::-1]
        return function(*args, **kwargs)

    return wrapper


def takes_none(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args, 3)

    return wrapper


@wrapt.decorator
def by_wrapt(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped("context", *args, **kwargs)


class Callable_:
    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function("context", *args, **kwargs)


def binds(function: Any) -> Any:
    bound = functools.partial(function, "config")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return wrapper


def binds_inside(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, "config")(*args, **kwargs)

    return wrapper


def binds_by_attribute(function: Any) -> Any:
    holder = mock.Mock(call=functools.partial(function, "config"))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return holder.call(*args, **kwargs)

    return wrapper


def binds_again(function: Any) -> Any:
    original = function
    function = functools.partial(function, "config")

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def binds_at_the_call(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal function
        function = functools.partial(function, "config")
        return function(*args, **kwargs)

    return wrapper


def shadows(function: Any) -> Any:
    bound = functools.partial(function, "config")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        def call(function: Any) -> Any:
            return function(*args, **kwargs)

        return call(bound) or function(*args, **kwargs)

    return wrapper


def has_an_alias(function: Any) -> Any:
    bound = functools.partial(function, "config")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        same = args
        return bound(*same) if same else function(*args, **kwargs)

    return wrapper


def names_an_alias(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        print(same := args)
        return function("config", *same) if same else function(*args, **kwargs)

    return wrapper


def hands_out(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = function
        return call("config", args[0]) if args else function(*args, **kwargs)

    return wrapper


def calls_it_otherwise_too(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function("config", args[0]) if args else function(*args, **kwargs)

    return wrapper


def passes_to_a_helper(function: Any) -> Any:
    def helper(args: Any) -> Any:
        return function("config", *args)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return helper(args) if args else function(*args, **kwargs)

    return wrapper


def loops(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for args in (("config", 2),):  # noqa: B007
            logging.debug("called")
        return function(*args, **kwargs)

    return wrapper


def copies_names(function: Any) -> Any:
    def other(*args: Any, **kwargs: Any) -> Any:
        return work("config", *args, **kwargs)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return other(*args, **kwargs)

    return wrapper


def passes_on_global(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return work(*args, **kwargs)

    return wrapper


def names_it(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 5:
            raise ValueError(f"{function.__name__} got {len(args)} arguments")
        print(function.__qualname__, args, repr(args))
        logging.debug(f"called with {args}")

        def again() -> Any:
            return function(*args, **kwargs)

        return again()

    return wrapper


MAY_CHANGE: list[Callable[[Any], Any]] = [
    prepends, drops, reorders, supplies, changes, hands_over, rebinds, takes_none, by_wrapt, Callable_,
    binds, binds_inside, binds_by_attribute, binds_again, binds_at_the_call, shadows, has_an_alias, names_an_alias,
    hands_out, calls_it_otherwise_too, passes_to_a_helper, loops, copies_names,
]  # fmt: skip


@pytest.mark.parametrize("decorator", MAY_CHANGE)
@pytest.mark.parametrize("inner", [lambda f: f, passes_on])
@pytest.mark.parametrize("outer", [lambda f: f, passes_on, functools.lru_cache])
def test_a_wrapper_that_may_change_the_arguments_is_refused(decorator: Any, inner: Any, outer: Any) -> None:
    with pytest.raises(ConfigError, match=r"Put @guard\(argument='gpu_id'\) below that decorator"):
        scoped(outer(decorator(inner(work))))


@pytest.mark.parametrize("decorator", MAY_CHANGE[:2])
def test_below_such_a_wrapper_the_guard_reads_what_the_function_gets(decorator: Any, cuda: FakeCuda) -> None:
    gpu_id, owner = decorator(scoped(work))(1, 2) if decorator is drops else decorator(scoped(work))(2)
    assert owner == f"cuda:{gpu_id}"


@pytest.mark.parametrize(
    "decorator",
    [
        passes_on,
        logs,
        names_it,
        functools.lru_cache,
        lambda f: passes_on(logs(passes_on(f))),
        mock.patch("os.sep", ";"),
        mock.patch.object(logging, "raiseExceptions", False),
        mock.patch.dict("os.environ", {}),
        devguard.guard("cpu"),
    ],
)
def test_a_wrapper_that_passes_its_arguments_on_is_seen_through(decorator: Any, cuda: FakeCuda) -> None:
    seen: list[Any] = []

    def own(first: Any, gpu_id: Any = 5) -> None:
        seen.append(("own", gpu_id))

    scope = devguard.guard(argument="gpu_id")
    parameter = find_parameter(decorator(own), "gpu_id")
    assert (parameter.position, parameter.keyword, parameter.default) == (1, True, 5)
    decorated = scope(decorator(own))
    decorated(1, 2), decorated(1, gpu_id=4), decorated(1)
    assert list(dict.fromkeys(seen)) == [("own", 2), ("own", 4), ("own", 5)]
    assert [index for _, index in cuda.calls if index][:1] == [2]


def test_the_wrapped_function_may_be_a_global_name(cuda: FakeCuda) -> None:
    assert scoped(passes_on_global(work))(1, 2) == (2, "cuda:2")
    with pytest.raises(ConfigError, match="below that decorator"):
        scoped(passes_on_global(lambda first, gpu_id: None))


def test_the_mocks_that_patch_appends_change_no_position(cuda: FakeCuda) -> None:
    @scoped
    @mock.patch("os.sep")
    @mock.patch("os.linesep")
    def run(first: Any, gpu_id: Any, *mocks: Any) -> Any:
        return len(mocks), str(devguard.owner())

    assert run(1, 2) == (2, "cuda:2")


def adds(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(gpu_id: int, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_a_parameter_of_the_wrappers_own_counts(cuda: FakeCuda) -> None:
    @scoped
    @adds
    def run(first: Any, gpu_id: Any = 5) -> Any:
        return first, gpu_id, str(devguard.owner())

    assert run(2, "first") == ("first", 5, "cuda:2")


def test_the_wrappers_own_position_counts_where_it_reorders(cuda: FakeCuda) -> None:
    def reordering(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(gpu_id: Any, first: Any) -> Any:
            return function(first, gpu_id)

        return wrapper

    assert scoped(reordering(work))(2, "first") == (2, "cuda:2")


class Methods:
    @scoped
    @passes_on
    def method(self, first: Any, gpu_id: Any) -> Any:
        return str(devguard.owner())

    @scoped
    @classmethod
    @passes_on
    def of_class(cls, first: Any, gpu_id: Any) -> Any:
        return str(devguard.owner())

    @scoped
    @staticmethod
    @passes_on
    def static(first: Any, gpu_id: Any) -> Any:
        return str(devguard.owner())

    @passes_on
    def bound(self, first: Any, gpu_id: Any) -> Any:
        return str(devguard.owner())


def test_wrapped_methods_of_every_kind(cuda: FakeCuda) -> None:
    made = Methods()
    ways = [made.method, made.of_class, Methods.of_class, made.static, Methods.static, scoped(made.bound)]
    assert [way(1, 2) for way in ways] == ["cuda:2"] * len(ways)
    assert [way(1, gpu_id=3) for way in ways] == ["cuda:3"] * len(ways)


def test_a_wrapper_without_source_is_refused() -> None:
    namespace: dict[str, Any] = {}
    exec("def wrapper(*args, **kwargs): return work(*args, **kwargs)", {"work": work}, namespace)
    with pytest.raises(ConfigError, match="below that decorator"):
        find_parameter(functools.wraps(work)(namespace["wrapper"]), "gpu_id")


def test_a_partial_object_of_a_wrapper(cuda: FakeCuda) -> None:
    assert scoped(functools.partial(passes_on(work), "first"))(2) == (2, "cuda:2")
    assert scoped(functools.partial(passes_on(work), gpu_id=3))("first") == (3, "cuda:3")
    with pytest.raises(ConfigError, match="passes 'gpu_id' itself already"):
        scoped(functools.partial(passes_on(work), "first", 2))
    with pytest.raises(ConfigError, match="below that decorator"):
        scoped(functools.partial(prepends(work), 2))
