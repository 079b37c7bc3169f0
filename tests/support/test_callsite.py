"""Call sites: the line of user code that caused a stray, and the transport through which the data came."""

from __future__ import annotations

import _thread
import concurrent.futures
import contextvars
import functools
import gc
import inspect
import io
import json
import linecache
import multiprocessing
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle
import dill
import joblib
import pytest
import torch
import zmq

import devguard
from devguard.support import callsite
from devguard.support.callsite import Site
from tests.helpers import tagging

pytestmark = pytest.mark.usefixtures("clean")

PAYLOAD = tagging.dumps(torch.arange(4.0))
FILE = tagging.save(torch.arange(4.0))


def here() -> int:
    return inspect.currentframe().f_back.f_lineno  # type: ignore[union-attr]


def the_stray() -> devguard.Stray:
    (stray,) = devguard.strays()
    return stray


def pickle_loads(tmp_path: Any) -> int:
    return (pickle.loads(PAYLOAD), here())[1]


def pickle_load(tmp_path: Any) -> int:
    return (pickle.load(io.BytesIO(PAYLOAD)), here())[1]


def pickle_unpickler(tmp_path: Any) -> int:
    return (pickle.Unpickler(io.BytesIO(PAYLOAD)).load(), here())[1]


def pickle_in_python(tmp_path: Any) -> int:
    return (pickle._loads(PAYLOAD), here())[1]


def torch_load_buffer(tmp_path: Any) -> int:
    return (torch.load(io.BytesIO(FILE)), here())[1]


def torch_load_file(tmp_path: Any) -> int:
    (tmp_path / "f.pt").write_bytes(FILE)
    return (torch.load(tmp_path / "f.pt", weights_only=False), here())[1]


def cloudpickle_loads(tmp_path: Any) -> int:
    with tagging.tagged("cuda:3"):
        data = cloudpickle.dumps(torch.arange(4.0))
    return (cloudpickle.loads(data), here())[1]


def dill_loads(tmp_path: Any) -> int:
    with tagging.tagged("cuda:3"):
        data = dill.dumps(torch.arange(4.0))
    return (dill.loads(data), here())[1]


def joblib_load(tmp_path: Any) -> int:
    with tagging.tagged("cuda:3"):
        joblib.dump(torch.arange(4.0), tmp_path / "f.joblib")
    return (joblib.load(tmp_path / "f.joblib"), here())[1]


def zmq_recv_pyobj(tmp_path: Any) -> int:
    with zmq.Context() as context, context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as receiver:
        sender.bind("inproc://tensors")
        receiver.connect("inproc://tensors")
        with tagging.tagged("cuda:3"):
            sender.send_pyobj(torch.arange(4.0))
        return (receiver.recv_pyobj(), here())[1]


def multiprocessing_pipe(tmp_path: Any) -> int:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        sender.send(tagging.Envelope(PAYLOAD))
        return (receiver.recv(), here())[1]


def multiprocessing_queue(tmp_path: Any) -> int:
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(tagging.Envelope(PAYLOAD))
    line = (queue.get(), here())[1]
    queue.close()
    return line


WAYS: list[tuple[Callable[[Any], int], str | None]] = [
    (pickle_loads, None),
    (pickle_load, None),
    (pickle_unpickler, None),
    (pickle_in_python, None),
    (torch_load_buffer, None),
    (torch_load_file, None),
    (cloudpickle_loads, None),  # cloudpickle.loads is pickle.loads
    (dill_loads, "dill"),
    (joblib_load, "joblib"),
    (zmq_recv_pyobj, "zmq"),
    (multiprocessing_pipe, "multiprocessing"),
    (multiprocessing_queue, "multiprocessing"),
]


@pytest.mark.parametrize(("way", "via"), WAYS, ids=lambda value: getattr(value, "__name__", None) or "")
def test_the_call_site_is_the_line_of_this_file(way: Callable[[Any], int], via: str | None, tmp_path: Any) -> None:
    with devguard.guard("cpu"):
        line = way(tmp_path)
    stray = the_stray()
    assert stray.site == Site(__file__, line, way.__qualname__)
    assert stray.via == via
    assert stray.action == "repaired"
    assert "here())[1]" in stray.site.source


@pytest.mark.parametrize(("way", "via"), WAYS, ids=lambda value: getattr(value, "__name__", None) or "")
def test_each_way_fails_while_the_door_is_closed(way: Any, via: str | None, tmp_path: Any) -> None:
    with pytest.raises(RuntimeError, match=tagging.REFUSAL):
        way(tmp_path)
    assert devguard.strays() == ()


def test_a_decorator_of_devguard_is_not_the_call_site() -> None:
    @devguard.guard("cpu")
    def work() -> int:
        return (pickle.loads(PAYLOAD), here())[1]

    line = work()
    assert the_stray().site == Site(__file__, line, work.__qualname__)


def test_the_call_site_of_a_nested_pickle_is_the_line_that_unpickles_it() -> None:
    with devguard.guard("cpu"):
        torch.load(io.BytesIO(tagging.save(tagging.Nested(PAYLOAD))), weights_only=False)
    assert the_stray().site is not None
    assert the_stray().site.function == "Nested.__setstate__"
    assert the_stray().site.file == tagging.__file__


def test_work_of_a_pool_without_user_code_has_the_line_that_submits_it() -> None:
    with devguard.guard("cpu"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        guarded = devguard.guard("cpu").bind(pickle.loads)
        line = here() + 1
        assert pool.submit(guarded, PAYLOAD).result().tolist() == [0, 1, 2, 3]
    stray = the_stray()
    assert stray.site is not None
    assert (stray.site.file, stray.site.line) == (__file__, line)
    assert stray.via == "concurrent"
    assert stray.thread.startswith("ThreadPoolExecutor")
    assert stray.stack


def test_a_stack_of_library_code_only_has_no_call_site() -> None:
    done = threading.Event()
    loading = functools.partial(devguard.guard("cpu").bind(pickle.loads))
    weakref.finalize(loading, done.set)
    _thread.start_new_thread(loading, (PAYLOAD,))
    del loading
    done.wait()
    stray = the_stray()
    assert stray.site is None
    assert stray.stack
    assert "no line of user code" in str(stray)


def test_code_without_a_file_counts_as_user_code() -> None:
    namespace = {"pickle": pickle, "payload": PAYLOAD}
    with devguard.guard("cpu"):
        exec(compile("\n\npickle.loads(payload)", "<ipython-input-1>", "exec"), namespace)
    assert the_stray().site == Site("<ipython-input-1>", 3, "<module>")
    assert the_stray().site.source == ""


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        (os.path.abspath(torch.serialization.__file__), "f", callsite._INTERNAL),
        (os.path.abspath(devguard.__file__), "f", callsite._INTERNAL),
        (os.path.abspath(threading.__file__), "f", callsite._INTERNAL),
        (pickle.__file__, "f", callsite._INTERNAL),
        ("<frozen runpy>", "f", callsite._INTERNAL),
        (multiprocessing.connection.__file__, "f", "multiprocessing"),
        (concurrent.futures.thread.__file__, "f", "concurrent"),
        (zmq.__file__, "f", "zmq"),
        (cloudpickle.cloudpickle.__file__, "f", "cloudpickle"),
        (dill.__file__, "f", "dill"),
        (joblib.__file__, "f", "joblib"),
        (os.path.join(os.sep, "v", "site-packages", "loky", "process_executor.py"), "f", "loky"),
        (os.path.join(os.sep, "v", "dist-packages", "wrapt", "wrappers.py"), "f", callsite._INTERNAL),
        (os.path.join(os.sep, "v", "site-packages", "ddtrace", "contrib", "futures.py"), "f", callsite._INTERNAL),
        (os.path.join(os.sep, "v", "site-packages", "opentelemetry", "trace.py"), "f", callsite._INTERNAL),
        (os.path.join(os.sep, "v", "site-packages", "sentry_sdk", "threading.py"), "f", callsite._INTERNAL),
        (os.path.join(os.sep, "v", "site-packages", "sglang", "srt", "utils.py"), "f", callsite._USER),
        (os.path.join(os.sep, "v", "site-packages", "torchvision", "ops.py"), "f", callsite._USER),
        (os.path.join(os.sep, "v", "site-packages", "dill.py"), "f", "dill"),
        (os.path.join(os.sep, "home", "me", "torch", "train.py"), "f", callsite._USER),
        (__file__, "f", callsite._USER),
        ("<string>", "f", callsite._USER),
        ("relative.py", "f", callsite._USER),
    ],
)
def test_code_is_classified_as_internal_transport_or_user(
    file: str, name: str, kind: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callsite, "_kinds", {})
    code = compile("0", file, "eval").replace(co_name=name)
    assert callsite._classify(code) == kind
    assert callsite.is_user(code) == (kind == callsite._USER)


def test_equal_code_in_two_files_is_distinguished() -> None:
    """Python compares code objects without their file name."""
    text = "def work(load, payload):\n    return load(payload)"
    functions = []
    for file in (pickle.__file__, "first.py", "second.py"):
        namespace: dict[str, Any] = {}
        exec(compile(text, file, "exec"), namespace)
        functions.append(namespace["work"])
    library, first, second = functions
    assert library.__code__ == first.__code__
    assert not callsite.is_user(library.__code__)
    assert callsite.is_user(first.__code__)
    with devguard.guard("cpu"):
        first(pickle.loads, PAYLOAD)
        second(pickle.loads, PAYLOAD)
    assert [(stray.site and stray.site.file, stray.count) for stray in devguard.strays()] == [
        ("first.py", 1),
        ("second.py", 1),
    ]


def test_torch_in_an_unusual_folder_is_still_internal(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = type(sys)("torch")
    stand_in.__file__ = os.path.join(os.sep, "opt", "overlay", "torch", "__init__.py")
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    code = compile("0", os.path.join(os.sep, "opt", "overlay", "torch", "storage.py"), "eval")
    assert callsite._classify(code) == callsite._INTERNAL


def test_a_stack_is_short_and_formatted_when_read() -> None:
    def deep(depth: int) -> Any:
        return deep(depth - 1) if depth else pickle.loads(PAYLOAD)

    with devguard.guard("cpu"):
        deep(40)
    stack = the_stray().stack
    assert 0 < len(stack) <= callsite.STACK_DEPTH
    assert all(isinstance(site, Site) for site in stack)
    assert stack[-1].function == deep.__qualname__
    assert not any("devguard" + os.sep in site.file for site in stack)


def test_the_text_of_a_site_can_be_opened_in_an_editor() -> None:
    line = here()
    site = Site(__file__, line, "f")
    assert str(site) == f"{__file__}:{line} in f"
    assert site.source == linecache.getline(__file__, line).strip() == "line = here()"


def test_the_cache_of_code_kinds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callsite, "MAX_KINDS", 10)
    monkeypatch.setattr(callsite, "_kinds", {})
    for number in range(100):
        assert callsite.is_user(compile(str(number), f"made_{number}.py", "eval"))
        assert len(callsite._kinds) <= 10


def test_work_with_and_without_a_frame_of_user_code_is_distinguished() -> None:
    class Work:
        def __call__(self) -> None: ...

        def method(self) -> None: ...

    def work() -> None: ...

    context = contextvars.copy_context()
    of_user = [work, Work(), Work().method, functools.partial(work), functools.partial(context.run, work)]
    of_others = [torch.load, pickle.loads, [].append, functools.partial(pickle.loads, b""), json.loads, None]
    assert [callsite.has_user_code(each) for each in of_user] == [True] * len(of_user)
    assert [callsite.has_user_code(each) for each in of_others] == [False] * len(of_others)


def generated(number: int) -> Any:
    names: dict[str, Any] = {"callsite": callsite, "sys": sys}
    exec(compile(f"def f(): return callsite.find(sys._getframe()), {number}", f"<generated {number}>", "exec"), names)
    return names["f"]


def test_code_that_is_no_longer_used_is_freed_and_forgotten() -> None:
    before, kinds = set(callsite.INTERNAL), len(callsite._kinds)
    references = []
    for number in range(50):
        function = generated(number)
        (code, _, _), _ = function()
        assert code is function.__code__
        references.append(weakref.ref(code))
        del function, code
    internal = compile("0", threading.__file__, "exec")
    assert not callsite.is_user(internal)
    assert id(internal) in callsite.INTERNAL
    del internal
    gc.collect()
    assert [reference() for reference in references] == [None] * 50
    assert len(callsite._kinds) <= kinds
    assert before >= callsite.INTERNAL


def test_an_identity_that_is_used_again_is_classified_again() -> None:
    for number in range(200):
        user = compile(f"{number}", "program.py", "exec")
        assert callsite.is_user(user)
        del user
        internal = compile(f"{number}", threading.__file__, "exec")  # often at the same address
        assert not callsite.is_user(internal)
        del internal


def test_seen_lines_are_told_apart_by_the_identity_of_their_code_and_forgotten_with_it() -> None:
    seen = callsite.SeenLines()
    code, equal = (compile("0", name, "exec") for name in ("a.py", "b.py"))
    assert code == equal
    assert [seen.add(code, 1), seen.add(code, 1), seen.add(code, 2), seen.add(equal, 1)] == [True, False, True, True]
    del code
    gc.collect()
    assert len(seen._lines) == 1
    seen.clear()
    assert seen.add(equal, 1)
