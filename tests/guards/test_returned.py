"""A decorated plain function that returns code which runs later: that code runs inside the scope."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import functools
import gc
import inspect
import types
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import wrapt

import devguard
from devguard.guards import returned
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


class TestCodeThatSomeoneElseHolds:
    """The object around it may be dropped at any time; what it is around belongs to the one who made it."""

    def test_a_dropped_wrapper_leaves_a_generator_alone(self) -> None:
        held = (where() for _ in range(3))
        source = devguard.guard("cpu")(lambda: held)
        assert [next(source()) for _ in range(3)] == ["cpu"] * 3
        assert next(source(), "end") == "end"

    @pytest.mark.parametrize("decorator", [plain_wrapper, functools.lru_cache, by_wrapt])
    def test_a_cached_generator_goes_on_where_it_was(self, decorator: Any) -> None:
        held = iter_of(3)
        source = devguard.guard("cpu")(decorator(lambda: held))
        assert [next(source()), next(source())] == [0, 1]
        assert [next(held), next(source(), "end")] == [2, "end"]

    def test_a_loop_that_breaks_leaves_the_rest(self) -> None:
        held = iter_of(4)
        source = devguard.guard("cpu")(lambda: held)
        got = []
        for _ in range(4):
            for item in source():
                got.append(item)
                break
        assert got == [0, 1, 2, 3]

    def test_a_wrapper_in_a_cycle_leaves_a_generator_alone(self) -> None:
        held = iter_of(3)
        source = devguard.guard("cpu")(lambda: held)
        cycle: list[Any] = [source()]
        cycle.append(cycle)
        assert next(cycle[0]) == 0
        del cycle
        gc.collect()
        assert list(held) == [1, 2]

    def test_it_keeps_the_scopes_and_the_device_that_it_holds(self, cuda: FakeCuda) -> None:
        def steps() -> Iterator[Any]:
            with devguard.guard(3):
                yield where(), cuda.current
                yield where(), cuda.current
            yield where(), cuda.current

        held = steps()
        source = devguard.guard(2)(lambda: held)
        assert [next(source()) for _ in range(3)] == [("cuda:3", 3), ("cuda:3", 3), ("cuda:2", 2)]
        assert (next(source(), "end"), where(), cuda.current) == ("end", "None", 0)

    @pytest.mark.parametrize("started", [False, True])
    def test_close_reaches_it_all_the_same(self, started: bool) -> None:
        got: list[str] = []
        held = noting(got)
        next(held)
        wrapper: Any = devguard.guard("cpu")(lambda: held)()
        if started:
            next(wrapper)
        wrapper.close()
        assert (got, next(held, "end")) == (["cpu"], "end")

    @pytest.mark.parametrize("started", ["by its maker", "by the wrapper", "by both"])
    def test_the_last_reference_finalises_it_inside_the_scope(self, started: str) -> None:
        got: list[str] = []

        def make() -> Any:
            made = noting(got)
            if started != "by the wrapper":
                next(made)
            return made

        wrapper: Any = devguard.guard("cpu")(make)()
        if started != "by its maker":
            next(wrapper)
        del wrapper
        assert got == ["cpu"]

    def test_a_dropped_wrapper_leaves_a_coroutine_alone(self) -> None:
        async def main() -> list[str]:
            held = coroutine()
            wrapper = devguard.guard("cpu")(lambda: held)()
            wrapper.send(None)
            del wrapper
            with pytest.raises(StopIteration) as ended:
                held.send(None)
            return list(ended.value.value)

        assert asyncio.run(main()) == ["cpu", "None"]

    def test_a_wrapper_that_was_never_awaited_leaves_a_coroutine_alone(self) -> None:
        held = coroutine()
        wrapper: Any = devguard.guard("cpu")(lambda: held)()
        with pytest.warns(RuntimeWarning, match="never awaited"):
            del wrapper
        assert run(held) == ["None", "None"]

    def test_a_dropped_coroutine_is_closed_inside_the_scope(self) -> None:
        got: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(0)
            finally:
                got.append(where())

        wrapper: Any = devguard.guard("cpu")(plain_wrapper(work))()
        wrapper.send(None)
        del wrapper
        assert got == ["cpu"]

    def test_a_dropped_wrapper_leaves_an_asynchronous_generator_alone(self) -> None:
        async def main() -> list[str]:
            held = async_generator()
            source = devguard.guard("cpu")(lambda: held)
            got = [await anext(source())]
            gc.collect()
            await asyncio.sleep(0.01)  # the loop closes the wrapper in a task
            got.append(await anext(source()))
            await asyncio.sleep(0.01)
            assert await anext(held, "end") == "end"
            return got

        assert asyncio.run(main()) == ["cpu", "cpu"]

    @pytest.mark.parametrize("held_elsewhere", [False, True])
    @pytest.mark.parametrize("dropped", [False, True])
    def test_an_asynchronous_generator_is_closed_inside_the_scope(self, held_elsewhere: bool, dropped: bool) -> None:
        got: list[str] = []

        async def items() -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0)
                got.append(where())

        async def main() -> None:
            made: list[Any] = [items()]
            take = made.copy if held_elsewhere else lambda: [made.pop()]
            wrapper = devguard.guard("cpu")(lambda: take()[0])()
            await anext(wrapper)
            if not dropped:
                await wrapper.aclose()
            del wrapper
            await asyncio.sleep(0.01)
            assert got == ([] if held_elsewhere and dropped else ["cpu"])
            if made:
                await made[0].aclose()

        asyncio.run(main())

    def test_a_context_manager_that_is_handed_out_again_and_again(self) -> None:
        held = manager()
        source = devguard.guard("cpu")(lambda: held)
        for _ in range(3):
            assert source()(where)() == "None"
        del source
        assert seen == ["cpu"] * 6
        with held as value:
            assert value == "None"


def iter_of(count: int) -> Iterator[int]:
    yield from range(count)


def noting(got: list[str]) -> Iterator[int]:
    try:
        yield 1
        yield 2
    finally:
        got.append(where())


class Request(collections.abc.Coroutine[Any, Any, Any]):
    """As aiohttp's: a coroutine that is an asynchronous context manager, too."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def send(self, value: Any) -> Any:
        return self.inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self.inner.throw(*error)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()

    async def __aenter__(self) -> Any:
        return await self.inner

    async def __aexit__(self, *error: object) -> None: ...


class Awaitable:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __await__(self) -> Any:
        return self.inner.__await__()


@pytest.mark.parametrize("kind", [Request, Awaitable])
def test_another_awaitable_is_returned_unchanged_and_reported_with_what_to_write(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returned, "_reported", set())
    made: list[Any] = []

    @devguard.guard("cpu")
    def get() -> Any:
        made.append(kind(coroutine()))
        return made[-1]

    async def main() -> list[Any]:
        with pytest.warns(RuntimeWarning, match=rf"get is decorated .*{kind.__name__}.*guard\('cpu'\)\.run\(") as given:
            first = get()
        assert given[0].filename == __file__
        assert first is made[0]
        if kind is Request:
            async with get() as entered:
                assert entered == ["None", "None"]
        return [await first, await devguard.guard("cpu").run(get())]

    assert asyncio.run(main()) == [["None", "None"], ["cpu", "cpu"]]


def later(kind: str, got: list[Any]) -> Any:
    async def code() -> list[str]:
        got.append(where())
        return got

    def items() -> Iterator[None]:
        got.append(where())
        yield

    if kind == "coroutine":
        return code()
    return contextlib.contextmanager(items)() if kind == "manager" else items()


@pytest.mark.parametrize("scope", [devguard.guard, devguard.remap])
@pytest.mark.parametrize("kind", ["coroutine", "generator", "manager"])
def test_resolve_is_called_once_per_call_and_holds_for_the_code(cuda: FakeCuda, scope: Any, kind: str) -> None:
    devices = iter([1, 2])  # a third call would raise
    got: list[Any] = []

    @scope(resolve=lambda: next(devices))
    def work() -> Any:
        got.append(where())
        return later(kind, got)

    for _ in range(2):
        result = work()
        if kind == "manager":
            with result:
                pass
        else:
            run(result)
    assert got == ["cuda:1", "cuda:1", "cuda:2", "cuda:2"]


def test_the_environment_is_read_once_per_call(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")

    @devguard.guard()
    def work() -> Any:
        monkeypatch.setenv("LOCAL_RANK", "2")
        return (where() for _ in range(2))

    assert list(work()) == ["cuda:1", "cuda:1"]


class Raising(type):
    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Answering(type):
    def __getattr__(cls, name: str) -> Any:
        return name


class Unhashable(type):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("not comparable")


class Strict(type):
    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(f"no {name}")


@pytest.mark.parametrize("meta", [Raising, Answering, Unhashable, Strict])
def test_a_result_of_an_unusual_class_is_returned_as_it_is(meta: Any) -> None:
    made = type.__call__(meta("Model", (), {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devguard.guard("cpu")(lambda: made)() is made


def test_an_awaitable_whose_attributes_raise_is_returned_as_it_is() -> None:
    class Lazy:
        def __await__(self) -> Any: ...

        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(f"not loaded: {name}")

    made = Lazy()
    with pytest.warns(RuntimeWarning, match="Lazy"):
        assert devguard.guard("cpu")(lambda: made)() is made


def test_a_context_manager_that_cannot_be_copied_is_returned_and_reported() -> None:
    class Manager(contextlib._GeneratorContextManager):  # type: ignore[type-arg]
        def __copy__(self) -> Any:
            raise RuntimeError("not twice")

    made: Any = Manager(generator, (), {})
    with pytest.warns(RuntimeWarning, match=r"runs outside devguard.guard\('cpu'\): RuntimeError: not twice"):
        assert devguard.guard("cpu")(lambda: made)() is made
