"""The door ``artefacts``: a traced, scripted or exported program that holds ``cuda:0`` as a constant.

Tracing turns ``device=x.device`` into this constant, so the program creates its tensors on the GPU of its exporter.
- ``torch.export.load``, owner on a GPU: mode ``repair`` reads a program that names one other GPU as if it named the
  owner, so nothing lands there first (torch's ``move_to_device_pass`` moves afterwards). A program that names several
  GPUs is recorded and left. Mode ``error`` refuses at the first other GPU, before anything is allocated on it.
- ``torch.export.load``, owner ``cpu``: mode ``error`` refuses in the same way; no mode rewrites the program.
- ``torch.jit.load``: the program is loaded first, then its constants are judged: they allocate nothing before they run.

The doors ``load`` and ``jit`` decide where the tensors of an archive land. A constant ``cuda`` without an index is no
stray. Not seen: AOTInductor's packages, pickled ``torch.fx`` graphs, TensorRT engines, ONNX files. See docs/doors.md.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from devguard.modes import DoorMode
from devguard.ownership import in_force
from devguard.ownership.owner import Owner
from devguard.reporting.advice import advise
from devguard.reporting.allowlist import is_allowed
from devguard.reporting.journal import journal
from devguard.reporting.verdict import judge
from devguard.support.import_hooks import when_imported
from devguard.support.patching import Patches

__all__ = ["install", "status", "uninstall"]

NAME = "artefacts"

_INDEXED = re.compile(r"cuda:\d+", re.ASCII)

# The modules in which torch reads the devices of an exported program. The second copies the function of the first.
READER = "deserialize_device"
READERS = ("torch._export.serde.serialize", "torch.export.pt2_archive._package")

_ADVICE = advise(NAME)

_patches = Patches()


class _State:
    """What the door has patched and counted.

    Attributes
    ----------
    is_open : bool
        Whether the door is open. Import hooks outlive it.
    missing : list of str
        The functions that this torch lacks.
    unread : int
        How many programs could not be searched.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.missing: list[str] = []
        self.unread = 0


_state = _State()


class _Stop(Exception):
    """Ends the reading of a program that is refused, or that names several GPUs."""


class _Reading:
    """One reading of a program by ``torch.export.load``, in which each GPU that the program names is seen.

    Attributes
    ----------
    found : dict
        How often the program names each GPU that is not the owner's and not allowed.
    stopped : bool
        Whether the reading was ended by `_Stop`.
    """

    def __init__(self, owner: Owner, *, refuse: bool) -> None:
        self.owner = owner
        self.refuse = refuse
        self.found: dict[str, int] = {}
        self.stopped = False
        self._others = False  # whether the program names the owner, or a GPU that is allowed

    def place(self, device: Any) -> Any:
        """Return the device to use in place of one that the program names."""
        tag = str(device)
        if tag == self.owner.tag or is_allowed(tag):
            self._others = True
        else:
            self.found[tag] = self.found.get(tag, 0) + 1
        if self.found and (self.refuse or self._others or len(self.found) > 1):
            self.stopped = True
            raise _Stop
        # From the tag, because an owner that only the environment named may not have been entered yet.
        return device if tag not in self.found else sys.modules["torch"].device(self.owner.tag)


class _Thread(threading.local):
    reading: _Reading | None = None


_thread = _Thread()


def install() -> None:
    """Watch ``torch.jit.load`` now, and ``torch.export`` as soon as it is imported."""
    import torch.jit._serialization as serialization

    original = _patches.find(serialization, "wrap_cpp_module")  # the last call of torch.jit.load

    def wrap_cpp_module(cpp_module: Any) -> Any:
        module = original(cpp_module)
        owner = in_force.owner_at_door()
        if owner is not None and in_force.mode_of(NAME) != "off":
            _judge_constants(_constants_of_script(cpp_module), owner)
        return module

    _patches.replace(serialization, "wrap_cpp_module", wrap_cpp_module)
    _state.is_open = True
    _state.unread = 0
    _state.missing.clear()
    when_imported("torch.export", _patch_export)
    for name in READERS:
        when_imported(name, _patch_reader)


def uninstall() -> list[str]:
    """Put torch's functions back."""
    _state.is_open = False
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what is watched, and how many programs could not be searched."""
    row: dict[str, Any] = {
        "watched": [f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced],
        "early_copies": _patches.early_copies(),
        "unread_programs": _state.unread,
    }
    if _state.missing:
        row["problem"] = f"not in this torch: {', '.join(_state.missing)}"
    return row


def _patch_export(module: ModuleType) -> None:
    """Replace ``torch.export.load``."""
    if not _state.is_open or _patches.has(module):
        return
    original = vars(module).get("load")
    if original is None:
        _state.missing.append("torch.export.load")
        return

    def load(*args: Any, **kwargs: Any) -> Any:
        owner = in_force.owner_at_door()
        if owner is None or (mode := in_force.mode_of(NAME)) == "off":
            return original(*args, **kwargs)
        watches = mode == "error" or (mode == "repair" and owner.index >= 0)
        program = _read_for(owner, mode, original, args, kwargs) if watches else None
        if program is None:
            program = original(*args, **kwargs)
        _judge_constants(_constants_of_export(program), owner)
        return program

    _patches.replace(module, "load", load)


def _read_for(
    owner: Owner, mode: DoorMode, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return a program, read with the owner in place of the one GPU that it names; None if it names several."""
    file: Any = args[0] if args else kwargs.get("f")
    position = file.tell() if hasattr(file, "tell") else None
    reading, outer = _Reading(owner, refuse=mode == "error"), _thread.reading
    _thread.reading = reading
    mark = journal.mark()
    try:
        program = original(*args, **kwargs)
    except Exception:
        # If the door `load` refuses the weights, torch 2.8 takes the error for a file of an older format.
        if mode == "error":
            reading.found |= {stray.source: 1 for stray in journal.since(mark) if stray.action == "refused"}
        # torch wraps an error during the reading of a graph in another error, so the type does not show the cause.
        if not reading.stopped and not (mode == "error" and reading.found):
            raise
        program = None
    finally:
        _thread.reading = outer
    if reading.found and mode == "error":
        judge(NAME, ",".join(sorted(reading.found)), owner, 0, _ADVICE)
    if program is None:
        if position is not None:
            file.seek(position)
    elif reading.found:
        ((tag, count),) = reading.found.items()
        tensors = (*program.state_dict.values(), *program.constants.values())
        nbytes = sum(value.nbytes for value in tensors if getattr(value, "is_cuda", False))
        judge(NAME, tag, owner, nbytes, _ADVICE, target=owner.tag, note=f"named {count} x in the program")
    return program


def _patch_reader(module: ModuleType) -> None:
    """Replace the function by which a module of torch reads a device.

    Without this function, programs are only judged after they were loaded.
    """
    original = vars(module).get(READER)
    if not _state.is_open or _patches.has(module):
        return
    if original is None:
        _state.missing.append(f"{module.__name__}.{READER}")
        return
    for _, name, replaced, ours in _patches.replaced:
        if name == READER and original is ours:  # copied while the door was open
            _patches.replaced.append((module, name, replaced, ours))
            return

    def deserialize_device(*args: Any, **kwargs: Any) -> Any:
        device = original(*args, **kwargs)
        reading = _thread.reading
        return device if reading is None or device.type != "cuda" or device.index is None else reading.place(device)

    _patches.replace(module, READER, deserialize_device)


def _judge_constants(constants: Iterator[tuple[str, int, str]], owner: Owner) -> None:
    """Judge the devices of a program, given as rows of device, bytes there, and place in the program."""
    found: dict[str, list[Any]] = {}
    try:
        for tag, nbytes, where in constants:
            if tag != owner.tag:
                row = found.setdefault(tag, [0, 0, where])
                row[0] += nbytes
                row[1] += 1
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        _state.unread += 1  # a program of unknown structure must not break the load
    if found:
        note = "; ".join(f"{tag} {count} x, first in {where}" for tag, (_, count, where) in sorted(found.items()))
        nbytes = sum(row[0] for row in found.values())
        judge(NAME, ",".join(sorted(found)), owner, nbytes, f"{_ADVICE} Found: {note}.", note=note)


def _constants_of_export(program: Any) -> Iterator[tuple[str, int, str]]:
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for tag in _devices((node.args, node.kwargs)):
                yield tag, 0, f"node {node.name}"
    for name, value in (*program.state_dict.items(), *program.constants.items()):
        if getattr(value, "is_cuda", False):
            yield f"cuda:{value.get_device()}", value.nbytes, f"tensor {name}"


def _devices(value: Any) -> Iterator[str]:
    """Yield each CUDA device with an index in the arguments of a node."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _devices(item)
    elif isinstance(value, dict):
        yield from _devices(list(value.values()))
    elif (isinstance(value, str) or type(value).__name__ == "device") and _INDEXED.fullmatch(str(value)):
        yield str(value)


def _constants_of_script(cpp_module: Any) -> Iterator[tuple[str, int, str]]:
    for name in cpp_module._method_names():
        graph = cpp_module._get_method(name).inlined_graph
        for node in graph.findAllNodes("prim::Constant"):
            if node.output().type().kind() in ("DeviceObjType", "StringType") and node.hasAttribute("value"):
                value = node.s("value")
                if _INDEXED.fullmatch(value):
                    yield value, 0, f"method {name}"
