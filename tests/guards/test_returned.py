"""A decorated plain function that returns code which runs later: that code runs inside the scope."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import functools
import inspect
import types
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import wrapt

import devguard
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def where() -> str:
    return str(devguard.owner())


async def coroutine(value: int = 1) -> list[str]:
    got = [where()]
    await asyncio.sleep(0)
    return [*got, where()]


def generator(value: int = 1) -> Iterator[str]:
    yield where()
    yield where()


async def async_generator(value: int = 1) -> AsyncIterator[str]:
    yield where()
    await asyncio.sleep(0)
    yield where()


@types.coroutine
def old_coroutine(value: int = 1) -> Any:
    got = [where()]
    yield from asyncio.sleep(0).__await__()
    return [*got, where()]


def plain_wrapper(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def retrying(function: Any) -> Any:
    class Retrying:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            for attempt in range(2):
                if attempt:
                    return function(*args, **kwargs)
            return None

    return functools.wraps(function)(Retrying())


@wrapt.decorator
def by_wrapt(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


class Holder:
    def __init__(self, function: Any) -> None:
        self.function = function

    def method(self, *args: Any) -> Any:
        return self.function(*args)


DECORATORS: list[Callable[[Any], Any]] = [
    plain_wrapper,
    retrying,
    by_wrapt,
    functools.lru_cache,
    lambda function: functools.partial(plain_wrapper(function), 1),
    lambda function: Holder(function).method,
    lambda function: lambda *args: function(*args),
]


def run(result: Any) -> list[str]:
    """Run what a function returned, from outside every scope, and return the owners that it has seen."""
    if inspect.isasyncgen(result):

        async def collect() -> list[str]:
            return [item async for item in result]

        return asyncio.run(collect())
    if inspect.isawaitable(result):

        async def wait() -> Any:
            return await result

        return list(asyncio.run(wait()))
    return list(result)


@pytest.mark.parametrize("decorator", DECORATORS)
@pytest.mark.parametrize("function", [coroutine, generator, async_generator, old_coroutine])
def test_code_that_a_decorator_returns_runs_inside_the_scope(decorator: Any, function: Any) -> None:
    decorated = devguard.guard("cpu")(decorator(function))
    result = decorated()
    assert devguard.owner() is None
    assert run(result) == ["cpu", "cpu"]
    assert devguard.owner() is None


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (coroutine, collections.abc.Coroutine),
        (generator, collections.abc.Generator),
        (async_generator, collections.abc.AsyncGenerator),
        (old_coroutine, collections.abc.Generator),
    ],
)
def test_the_result_keeps_its_kind_and_its_name(function: Any, kind: Any) -> None:
    result, original = devguard.guard("cpu")(plain_wrapper(function))(), function()
    kinds = (inspect.iscoroutine, inspect.isgenerator, inspect.isasyncgen, inspect.isawaitable)
    assert isinstance(result, kind)
    assert [of(result) for of in kinds] == [of(original) for of in kinds]
    assert result.__qualname__ == original.__qualname__
    for each in (result, original):
        if hasattr(each, "close"):
            each.close()


def test_send_throw_and_close_reach_a_generator() -> None:
    got: list[Any] = []

    def echo() -> Iterator[Any]:
        try:
            while True:
                try:
                    got.append((yield where()))
                except KeyError:
                    got.append(where())
        finally:
            got.append(("closed", where()))

    stepped: Any = devguard.guard("cpu")(plain_wrapper(echo))()
    assert (next(stepped), stepped.send(2), stepped.throw(KeyError)) == ("cpu", "cpu", "cpu")
    stepped.close()
    assert got == [2, "cpu", ("closed", "cpu")]


def test_a_generator_takes_the_device_only_while_it_runs(cuda: FakeCuda) -> None:
    stepped = devguard.guard(2)(plain_wrapper(lambda: (cuda.current for _ in range(2))))()
    assert (next(stepped), cuda.current, next(stepped), cuda.current) == (2, 0, 2, 0)


@contextlib.contextmanager
def manager(value: int = 1) -> Iterator[str]:
    seen.append(where())
    try:
        yield where()
    except KeyError:
        seen.append("caught")
    finally:
        seen.append(where())


@contextlib.asynccontextmanager
async def async_manager(value: int = 1) -> AsyncIterator[str]:
    seen.append(where())
    try:
        yield where()
    finally:
        await asyncio.sleep(0)
        seen.append(where())


seen: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


@pytest.mark.parametrize(
    "decorator", [lambda function: function, plain_wrapper, by_wrapt, lambda f: functools.partial(f, 1)]
)
class TestContextManagers:
    def test_the_generator_runs_inside_the_scope_and_the_block_outside(self, decorator: Any) -> None:
        made = devguard.guard("cpu")(decorator(manager))()
        assert isinstance(made, contextlib.AbstractContextManager)
        with made as value:
            assert (value, devguard.owner()) == ("cpu", None)
        assert seen == ["cpu", "cpu"]

    def test_exceptions_pass_through_the_generator(self, decorator: Any) -> None:
        decorated = devguard.guard("cpu")(decorator(manager))
        with decorated():
            raise KeyError
        for error in (ZeroDivisionError(), StopIteration(), RuntimeError()):
            with pytest.raises(type(error)) as raised, decorated():
                raise error
            assert raised.value is error
        assert seen == ["cpu", "caught", "cpu"] + ["cpu"] * 6

    def test_it_can_be_used_as_a_decorator_again_and_again(self, decorator: Any) -> None:
        @devguard.guard("cpu")(decorator(manager))()
        def work() -> str:
            return where()

        assert (work(), work()) == ("None", "None")
        assert seen == ["cpu"] * 4

    def test_asynchronous_context_managers(self, decorator: Any) -> None:
        made = devguard.guard("cpu")(decorator(async_manager))()
        assert isinstance(made, contextlib.AbstractAsyncContextManager)

        async def main() -> tuple[str, str]:
            async with made as value:
                return value, where()

        assert asyncio.run(main()) == ("cpu", "None")
        assert seen == ["cpu", "cpu"]


class Methods:
    @devguard.guard("cpu")
    @plain_wrapper
    async def method(self) -> list[str]:
        return [where()]

    @devguard.guard("cpu")
    @staticmethod
    @plain_wrapper
    async def static() -> list[str]:
        return [where()]

    @devguard.guard("cpu")
    @classmethod
    @plain_wrapper
    async def of_class(cls) -> list[str]:
        return [where()]

    async def work(self, first: int, gpu_id: Any) -> list[Any]:
        return [where(), first, gpu_id]

    partial = devguard.guard(argument="gpu_id")(functools.partialmethod(work, 7))


def test_methods_of_every_kind() -> None:
    made = Methods()
    assert [run(each()) for each in (made.method, made.static, made.of_class, Methods.of_class)] == [["cpu"]] * 4
    assert run(made.partial("cpu")) == ["cpu", 7, "cpu"]


def test_the_device_of_an_argument_holds_for_the_returned_code(cuda: FakeCuda) -> None:
    async def work(gpu_id: int) -> int:
        await asyncio.sleep(0)
        return cuda.current

    decorated = devguard.guard(argument="gpu_id")(plain_wrapper(work))

    async def main() -> list[int]:
        return await asyncio.gather(*(decorated(index) for index in (1, 2, 3)))

    assert asyncio.run(main()) == [1, 2, 3]


def test_a_guard_without_a_device_finds_it_at_the_call() -> None:
    devices = iter(["cpu"])
    decorated = devguard.guard(resolve=lambda: next(devices, "cpu"))(plain_wrapper(coroutine))
    assert run(decorated()) == ["cpu", "cpu"]


@pytest.mark.parametrize("scope", [devguard.unguarded(), devguard.remap("cpu")])
def test_other_scopes(scope: Any) -> None:
    with devguard.guard("cpu"):
        result = scope(plain_wrapper(generator))()
    with devguard.guard("cpu"):
        assert list(result) == [where() if isinstance(scope, devguard.remap) else "None"] * 2


class TestTasks:
    def test_a_task_is_reported_once_with_what_to_write(self) -> None:
        @devguard.guard("cpu")
        def start() -> Any:
            return asyncio.ensure_future(coroutine())

        async def main() -> list[str]:
            with pytest.warns(RuntimeWarning, match=r"start is decorated .*create_task\(devguard.guard\('cpu'\).run"):
                first = await start()
            assert await start() == first
            return list(first)

        assert asyncio.run(main()) == ["None", "None"]

    def test_a_future_is_no_code_and_is_not_reported(self) -> None:
        @devguard.guard("cpu")
        def start() -> Any:
            return asyncio.get_running_loop().create_future()

        async def main() -> Any:
            future = start()
            future.set_result(3)
            return await future

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert asyncio.run(main()) == 3


@pytest.mark.parametrize("result", [None, 1, "text", [1], {}, object(), iter([1]), (i for i in ()).__iter__, coroutine])
def test_other_results_are_returned_as_they_are(result: Any) -> None:
    assert devguard.guard("cpu")(lambda: result)() is result


def test_other_context_decorators_are_returned_as_they_are() -> None:
    class Manager(contextlib.ContextDecorator):
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    made = Manager()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devguard.guard("cpu")(lambda: made)() is made
