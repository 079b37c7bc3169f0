"""DecoratingScope: the kind, the name and the signature of a function stay, and its device is bound by name."""

from __future__ import annotations

import abc
import asyncio
import functools
import inspect
import pickle
import re
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch

import devguard
from devguard import ConfigError, DeviceResolutionError
from tests.helpers.fakecuda import FakeCuda

pytestmark = pytest.mark.usefixtures("clean")


def where() -> str:
    return str(devguard.owner())


# --- the kind of function ---


def plain(value: int, *, other: int = 2) -> str:
    """A plain function."""
    return where()


async def coroutine(value: int) -> str:
    """A coroutine function."""
    return where()


def generator(value: int) -> Iterator[str]:
    """A generator function."""
    yield where()


async def async_generator(value: int) -> AsyncIterator[str]:
    """An asynchronous generator function."""
    yield where()


@types.coroutine
def old_coroutine(value: int) -> Any:
    """A coroutine function of the old kind."""
    yield
    return where()


KINDS = [plain, coroutine, generator, async_generator, old_coroutine]
SCOPES = [devguard.guard("cpu"), devguard.remap("cpu"), devguard.unguarded()]


def kind_of(function: Any) -> tuple[bool, ...]:
    flags = function.__code__.co_flags
    return (
        inspect.isfunction(function),
        inspect.iscoroutinefunction(function),
        inspect.isgeneratorfunction(function),
        inspect.isasyncgenfunction(function),
        bool(flags & inspect.CO_ITERABLE_COROUTINE),
    )


@pytest.mark.parametrize("scoped", SCOPES, ids=repr)
@pytest.mark.parametrize("function", KINDS, ids=lambda function: function.__name__)
def test_the_decorated_function_is_a_native_function_of_the_same_kind(scoped: Any, function: Any) -> None:
    decorated = scoped(function)
    assert type(decorated) is types.FunctionType
    assert kind_of(decorated) == kind_of(function)
    assert kind_of(scoped(decorated)) == kind_of(function)


@pytest.mark.parametrize("function", KINDS, ids=lambda function: function.__name__)
def test_names_documentation_signature_and_the_original_stay(function: Any) -> None:
    function.mark = "kept"
    decorated = devguard.guard("cpu")(function)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "mark"):
        assert getattr(decorated, attribute) == getattr(function, attribute)
    assert inspect.signature(decorated) == inspect.signature(function)
    assert decorated.__wrapped__ is function


def test_each_kind_runs_inside_the_scope() -> None:
    scoped = devguard.guard("cpu")
    assert scoped(plain)(1) == "cpu"
    assert asyncio.run(scoped(coroutine)(1)) == "cpu"
    assert list(scoped(generator)(1)) == ["cpu"]

    async def awaits() -> Any:
        return await scoped(old_coroutine)(1)

    async def collect() -> list[str]:
        return [item async for item in scoped(async_generator)(1)]

    assert asyncio.run(awaits()) == "cpu"
    assert asyncio.run(collect()) == ["cpu"]
    assert devguard.owner() is None


def test_an_awaitable_generator_can_be_awaited_only_if_the_original_could() -> None:
    async def awaits(function: Any) -> Any:
        return await function(1)

    with pytest.raises(TypeError, match="await"):
        awaits(devguard.guard("cpu")(generator)).send(None)


class Worker:
    @devguard.guard(argument="gpu_id")
    def method(self, value: int, gpu_id: int) -> tuple[Any, ...]:
        return self, value, where()

    @staticmethod
    @devguard.guard(argument="gpu_id")
    def static_inside(value: int, gpu_id: int = 5) -> tuple[Any, ...]:
        return value, where()

    @devguard.guard(argument="gpu_id")
    @staticmethod
    def static_outside(value: int, gpu_id: int = 5) -> tuple[Any, ...]:
        return value, where()

    @classmethod
    @devguard.guard(argument="gpu_id")
    def class_inside(cls, value: int, gpu_id: int = 5) -> tuple[Any, ...]:
        return cls, value, where()

    @devguard.guard(argument="gpu_id")
    @classmethod
    def class_outside(cls, value: int, gpu_id: int = 5) -> tuple[Any, ...]:
        return cls, value, where()

    @property
    @devguard.guard("cuda:6")
    def prop(self) -> str:
        return where()

    @devguard.guard("cuda:6")
    async def async_method(self) -> str:
        return where()

    def undecorated(self, gpu_id: int) -> str:
        return where()

    def __call__(self, gpu_id: int) -> str:
        return where()


class Derived(Worker):
    def method(self, value: int, gpu_id: int) -> tuple[Any, ...]:
        return ("derived", *super().method(value, gpu_id))


def test_methods_take_the_device_by_name_after_other_arguments(cuda: FakeCuda) -> None:
    worker = Worker()
    assert worker.method(1, 2) == (worker, 1, "cuda:2")
    assert worker.method(gpu_id=3, value=1) == (worker, 1, "cuda:3")
    assert Worker.method(worker, 1, 4) == (worker, 1, "cuda:4")
    derived = Derived()
    assert derived.method(1, 2) == ("derived", derived, 1, "cuda:2")
    assert worker.prop == "cuda:6"
    assert asyncio.run(worker.async_method()) == "cuda:6"


@pytest.mark.parametrize("name", ["static_inside", "static_outside"])
def test_static_methods_in_either_order(cuda: FakeCuda, name: str) -> None:
    for owner in (Worker, Worker()):
        assert getattr(owner, name)(1) == (1, "cuda:5")
        assert getattr(owner, name)(1, 2) == (1, "cuda:2")
    assert isinstance(vars(Worker)[name], staticmethod)


@pytest.mark.parametrize("name", ["class_inside", "class_outside"])
def test_class_methods_in_either_order(cuda: FakeCuda, name: str) -> None:
    for owner in (Worker, Worker()):
        assert getattr(owner, name)(1) == (Worker, 1, "cuda:5")
        assert getattr(owner, name)(1, gpu_id=2) == (Worker, 1, "cuda:2")
    assert getattr(Derived, name)(1)[0] is Derived
    assert isinstance(vars(Worker)[name], classmethod)


def test_bound_methods_callable_objects_and_partials_can_be_decorated(cuda: FakeCuda) -> None:
    scoped = devguard.guard(argument="gpu_id")
    worker = Worker()
    assert scoped(worker.undecorated)(2) == "cuda:2"
    assert scoped(worker)(3) == "cuda:3"

    def work(value: int, gpu_id: int, last: int = 0) -> tuple[int, str, int]:
        return value, where(), last

    assert scoped(functools.partial(work, 1))(2) == (1, "cuda:2", 0)
    assert scoped(functools.partial(work, gpu_id=3))(1) == (1, "cuda:3", 0)
    assert scoped(functools.partial(work, gpu_id=3))(1, gpu_id=4) == (1, "cuda:4", 0)
    with pytest.raises(ConfigError, match="gpu_id"):  # the partial already passes it
        scoped(functools.partial(work, 1, 5))
    assert functools.partial(scoped(work), 1)(6) == (1, "cuda:6", 0)


def test_a_partial_of_a_coroutine_function_is_guarded_while_it_runs() -> None:
    decorated = devguard.guard("cpu")(functools.partial(coroutine, 1))
    assert inspect.iscoroutinefunction(decorated)
    assert asyncio.run(decorated()) == "cpu"


def test_a_callable_object_with_an_asynchronous_call_is_guarded_while_it_runs() -> None:
    class Handler:
        async def __call__(self) -> str:
            await asyncio.sleep(0)
            return where()

    assert asyncio.run(devguard.guard("cpu")(Handler())()) == "cpu"


def test_a_bound_method_keeps_its_kind() -> None:
    decorated = devguard.guard("cuda:6")(Worker().async_method)
    assert inspect.iscoroutinefunction(decorated)


def test_an_abstract_method_stays_abstract() -> None:
    class Base(abc.ABC):
        @devguard.guard("cpu")
        @abc.abstractmethod
        def work(self) -> None: ...

    assert Base.__abstractmethods__ == {"work"}


def test_decorators_stack_and_the_innermost_owner_holds(cuda: FakeCuda) -> None:
    @devguard.guard("cuda:1")
    @devguard.guard("cuda:2")
    def work() -> tuple[str, int]:
        return where(), cuda.current

    assert work() == ("cuda:2", 2)
    assert cuda.current == 0


def test_a_recursive_function_enters_again(cuda: FakeCuda) -> None:
    @devguard.guard(argument="gpu_id")
    def work(gpu_id: int) -> list[int]:
        deeper = work(gpu_id - 1) if gpu_id else []
        return [*deeper, cuda.current]

    assert work(3) == [0, 1, 2, 3]
    assert cuda.current == 0


def test_arguments_results_and_exceptions_pass_through() -> None:
    @devguard.guard("cpu")
    def work(*args: Any, **kwargs: Any) -> Any:
        if "fail" in kwargs:
            raise LookupError(*args)
        return args, kwargs

    assert work(1, self=2, scope=3, function=4, args=5, kwargs=6) == (
        (1,),
        {"self": 2, "scope": 3, "function": 4, "args": 5, "kwargs": 6},
    )
    with pytest.raises(LookupError, match="7"):
        work(7, fail=True)
    assert devguard.owner() is None


def test_a_decorated_function_pickles_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(Worker.method)) is Worker.method
    assert pickle.loads(pickle.dumps(Worker.class_outside)) == Worker.class_outside


# --- argument=: by position, keyword and default ---


def positional(a: int, gpu_id: int, b: int = 0) -> str:
    return where()


def defaulted(a: int = 0, gpu_id: Any = 3) -> str:
    return where()


def keyword_only(*args: int, gpu_id: int = 4) -> str:
    return where()


def required_keyword(*, gpu_id: int) -> str:
    return where()


def positional_only(gpu_id: int, /, b: int = 0) -> str:
    return where()


def catch_all(**options: Any) -> str:
    return where()


def before_star(gpu_id: int, *rest: int) -> str:
    return where()


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (positional, (0, 2), {}, "cuda:2"),
        (positional, (0,), {"gpu_id": 2}, "cuda:2"),
        (positional, (), {"b": 7, "gpu_id": 2, "a": 0}, "cuda:2"),
        (positional, (0, "cuda:5", 7), {}, "cuda:5"),
        (positional, (0, torch.device("cpu")), {}, "cpu"),
        (defaulted, (), {}, "cuda:3"),
        (defaulted, (7,), {}, "cuda:3"),
        (defaulted, (7, 0), {}, "cuda:0"),
        (keyword_only, (), {}, "cuda:4"),
        (keyword_only, (7, 6, 5), {}, "cuda:4"),
        (keyword_only, (7, 6, 5), {"gpu_id": 1}, "cuda:1"),
        (required_keyword, (), {"gpu_id": 2}, "cuda:2"),
        (positional_only, (2,), {"b": 1}, "cuda:2"),
        (catch_all, (), {"gpu_id": 2}, "cuda:2"),
        (before_star, (2, 7, 6), {}, "cuda:2"),
    ],
)
def test_the_device_is_bound_by_name(
    cuda: FakeCuda, function: Callable[..., str], args: tuple[Any, ...], kwargs: dict[str, Any], expected: str
) -> None:
    assert devguard.guard(argument="gpu_id")(function)(*args, **kwargs) == expected


def test_a_positional_only_parameter_is_not_taken_from_keywords_of_the_same_name(cuda: FakeCuda) -> None:
    @devguard.guard(argument="gpu_id")
    def work(gpu_id: int, /, **options: Any) -> str:
        return where()

    assert work(1, gpu_id=2) == "cuda:1"


def test_none_continues_the_search_for_an_owner(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    @devguard.guard(argument="gpu_id")
    def work(gpu_id: int | None = None) -> str:
        return where()

    with devguard.guard(5):
        assert work() == work(None) == work(gpu_id=None) == "cuda:5"
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert work() == "cuda:3"
    with pytest.raises(TypeError, match="gpu_id"):
        required_keyword()  # type: ignore[call-arg]


def test_a_missing_argument_is_the_functions_own_type_error(cuda: FakeCuda) -> None:
    with devguard.guard(1), pytest.raises(TypeError, match="gpu_id"):
        devguard.guard(argument="gpu_id")(positional)(0)


def test_a_missing_argument_is_the_functions_own_type_error_even_without_any_owner() -> None:
    with pytest.raises(TypeError, match="gpu_id"):
        devguard.guard(argument="gpu_id")(positional)(0)


@pytest.mark.parametrize("value", ["gpu", -1, True, 1.5, "cuda"])
def test_a_bad_value_is_an_error_that_names_the_argument_and_the_function_does_not_run(value: Any) -> None:
    ran = []

    @devguard.guard(argument="gpu_id")
    def work(gpu_id: Any) -> None:
        ran.append(gpu_id)

    with pytest.raises(DeviceResolutionError, match="the argument gpu_id"):
        work(value)
    assert ran == []


def test_an_index_out_of_range_names_cuda_visible_devices(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceResolutionError, match="CUDA_VISIBLE_DEVICES"):
        devguard.guard(argument="gpu_id")(positional)(0, 8)


@pytest.mark.parametrize("function", [plain, coroutine, generator, async_generator], ids=lambda f: f.__name__)
def test_a_parameter_that_does_not_exist_is_a_configuration_error_when_decorating(function: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{function.__name__} has no parameter 'gpu_id'.*value"):
        devguard.guard(argument="gpu_id")(function)


def test_a_parameter_that_does_not_exist_in_a_method_names_the_method() -> None:
    with pytest.raises(ConfigError, match=r"Worker\.method has no parameter 'device'"):
        devguard.guard(argument="device")(Worker.method)


def test_star_args_do_not_make_a_parameter() -> None:
    with pytest.raises(ConfigError):
        devguard.guard(argument="args")(lambda *args: None)


def test_each_kind_takes_its_device_from_its_argument(cuda: FakeCuda) -> None:
    scoped = devguard.guard(argument="value")
    assert scoped(plain)(1) == "cuda:1"
    assert asyncio.run(scoped(coroutine)(2)) == "cuda:2"
    assert list(scoped(generator)(3)) == ["cuda:3"]

    async def collect() -> list[str]:
        return [item async for item in scoped(async_generator)(value=4)]

    assert asyncio.run(collect()) == ["cuda:4"]
    assert cuda.current == 0


def test_the_device_is_read_from_the_argument_at_each_call(cuda: FakeCuda) -> None:
    decorated = devguard.guard(argument="value")(generator)
    first, second = decorated(1), decorated(2)
    assert (next(second), next(first)) == ("cuda:2", "cuda:1")


def pick() -> str:
    return "cuda:2"


def name(value: object) -> str:
    """Return a test id without addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def test_decorating_a_class_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="Model"):

        @devguard.guard("cpu")
        class Model: ...


@pytest.mark.parametrize("thing", [1, "work", None, property(pick)], ids=name)
def test_decorating_what_cannot_be_called_is_a_type_error(thing: Any) -> None:
    with pytest.raises(TypeError, match="decorates functions"):
        devguard.guard("cpu")(thing)


@pytest.mark.parametrize("decorator", [functools.lru_cache, functools.lru_cache(maxsize=2), functools.cache])
@pytest.mark.parametrize("twice", [False, True])
def test_the_cache_of_a_decorated_function_stays_within_reach(decorator: Any, twice: bool) -> None:
    scoped = devguard.guard("cpu")
    decorated = scoped(decorator(lambda value: where()))
    if twice:
        decorated = scoped(decorated)
    assert [decorated(1), decorated(1), decorated(2)] == ["cpu"] * 3
    assert decorated.cache_info()[:2] == (1, 2)
    assert decorated.cache_parameters()["typed"] is False
    decorated.cache_clear()
    assert decorated.cache_info()[:2] == (0, 0)


def test_the_methods_of_a_decorated_callable_object_stay_within_reach() -> None:
    class Counted:
        """A function that counts its calls, as decorators of other libraries make it."""

        count = 0

        def __call__(self) -> str:
            self.count += 1
            return where()

        def reset(self) -> int:
            last, self.count = self.count, 0
            return last

        @property
        def failing(self) -> Any:
            raise RuntimeError("not read")

    decorated = devguard.guard("cpu")(Counted())
    assert [decorated(), decorated()] == ["cpu", "cpu"]
    assert (decorated.reset(), decorated.reset()) == (2, 0)
