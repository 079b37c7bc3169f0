"""The door ``artefacts``: a traced, scripted or exported program that holds ``cuda:0`` as a constant.

What was written as ``device=x.device`` is a constant after tracing and exporting, so the program goes on to make its
tensors on the GPU of the process that exported it. ``torch.export.load`` and ``torch.jit.load`` (with or without
``map_location``, which does not touch constants) are followed by a look at the graphs: a device that is not the
owner's is recorded with the line that loads it, and refused in mode ``error`` before the program can run. It is never
rewritten; export the program anew without an index, or on the owner's index.

Where the tensors of an archive land is the matter of the doors ``load`` and ``jit``. ``torch.export.load`` passes them
by with its weights (newer torch keeps their device in a format of its own): weights that are elsewhere after it are
counted here, when they are there already. A constant ``cuda`` without an index is the current device, and no stray.
Not seen: packages of AOTInductor, which let the caller choose (``device_index=``), pickled ``torch.fx`` graphs,
TensorRT engines, ONNX files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from devguard import scope
from devguard.late import when_imported
from devguard.owners import Owner
from devguard.patching import Patches
from devguard.verdict import judge

__all__ = ["install", "status", "uninstall"]

NAME = "artefacts"

_INDEXED = re.compile(r"cuda:\d+", re.ASCII)

_patches = Patches()
_open = False
_missing: list[str] = []
_unread = 0
_ADVICE = (
    "The program was exported there and holds that device as a constant. Export it on the owner's index, or without "
    "an index ('cuda')."
)


def install() -> None:
    """Look at each program that is loaded; ``torch.export`` is watched as soon as it is imported."""
    global _open, _unread
    import torch.jit._serialization as serialization

    original = _patches.find(serialization, "wrap_cpp_module")  # torch.jit.load ends with it

    def wrap_cpp_module(cpp_module: Any) -> Any:
        module = original(cpp_module)
        owner = scope.owner_in_force()
        if owner is not None and scope.mode_of(NAME) != "off":
            _look(_constants_of_script(cpp_module), owner)
        return module

    _patches.replace(serialization, "wrap_cpp_module", wrap_cpp_module)
    _open = True
    _unread = 0
    _missing.clear()
    when_imported("torch.export", _patch_export)


def uninstall() -> list[str]:
    """Put torch's own functions back."""
    global _open
    _open = False
    return _patches.restore()


def status() -> dict[str, Any]:
    """Return what is watched, and how many programs could not be looked through."""
    row: dict[str, Any] = {
        "watched": [f"{module.__name__}.{name}" for module, name, _, _ in _patches.replaced],
        "early_copies": _patches.early_copies(),
        "unread_programs": _unread,
    }
    if _missing:
        row["problem"] = f"not in this torch: {', '.join(_missing)}"
    return row


def _patch_export(module: ModuleType) -> None:
    """Replace ``torch.export.load``."""
    if not _open or any(patched is module for patched, _, _, _ in _patches.replaced):
        return
    original = vars(module).get("load")
    if original is None:
        _missing.append("torch.export.load")
        return

    def load(*args: Any, **kwargs: Any) -> Any:
        program = original(*args, **kwargs)
        owner = scope.owner_in_force()
        if owner is not None and scope.mode_of(NAME) != "off":
            _look(_constants_of_export(program), owner)
        return program

    _patches.replace(module, "load", load)


def _look(constants: Iterator[tuple[str, int, str]], owner: Owner) -> None:
    """Let the verdict fall on a program's devices: rows of device, bytes there, and where in the program."""
    global _unread
    found: dict[str, list[Any]] = {}
    try:
        for tag, nbytes, where in constants:
            if tag != owner.tag:
                row = found.setdefault(tag, [0, 0, where])
                row[0] += nbytes
                row[1] += 1
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        _unread += 1  # a program of another make; looking must not break the load
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
