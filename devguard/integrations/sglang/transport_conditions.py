"""Where SGLang's tensors can travel through an arena, how many ranks read one, and what ``devguard doctor`` says.

Not through an arena: on several nodes, with a separate encoder (EPD), the Rust server, elastic expert parallelism or
``--skip-tokenizer-init``, and in releases without the ``ShmPointerMMData`` of 0.5.23.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from devguard import modes
from devguard.activation import environment
from devguard.errors import ConfigError
from devguard.integrations.sglang import shm_pointer, versions

__all__ = ["count_readers", "examine", "find_exception", "find_problem"]

TRUE = ("1", "true", "yes", "y", "on")  # as SGLang reads its variables


def examine(version: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return what ``devguard doctor`` says of the transport, and what is wrong with it; imports no SGLang.

    Parameters
    ----------
    version : str or None
        The installed release.
    environ : mapping
        The environment.
    """
    if environ.get("DEVGUARD_TRANSPORT", "").strip().lower() != "host":
        return "", ""
    if modes.is_killed(environ):
        return "", "DEVGUARD_TRANSPORT=host has no effect with DEVGUARD=off."
    if version is None:
        return "", "DEVGUARD_TRANSPORT=host has no effect here: SGLang is not installed."
    problem = _problem_of_server(environ) or _problem_of_release(version, _reads_as_known())
    if problem:
        return "", f"DEVGUARD_TRANSPORT=host is not in force: {problem}"
    with contextlib.suppress(ConfigError):  # it is reported with the settings
        budget = environment.read(environ).budget
        return f"host, for multimodal tensors; budget {budget:,} bytes in each tokenizer's process (experimental)", ""
    return "", ""


def _reads_as_known() -> str:
    """Return what the class of the installed release lacks, by its source."""
    found = importlib.util.find_spec("sglang")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    relative = Path(*shm_pointer.MODULE.split(".")[1:]).with_suffix(".py")
    try:
        text = "" if folder is None else (folder / relative).read_text()
    except OSError:
        text = ""
    if f"class {shm_pointer.NAME}" not in text:
        return f"it has no {shm_pointer.NAME}"
    return "" if "def close_and_unlink" in text else f"its {shm_pointer.NAME} has no close_and_unlink"


def _problem_of_release(version: str | None, lacking: str) -> str:
    if not lacking:
        return ""
    return f"SGLang {version} is too old: {lacking}. Use {versions.NEWEST}, or unset DEVGUARD_TRANSPORT."


def _problem_of_server(environ: Mapping[str, str]) -> str:
    if environ.get("SGLANG_RUST_SERVER", "").strip().lower() in TRUE:
        return "SGLANG_RUST_SERVER makes its segments in Rust. Unset one of the two variables."
    return ""


def find_problem(module: ModuleType) -> str:
    """Return why the transport is off with this release and this server; empty if it is not.

    Parameters
    ----------
    module : module
        SGLang's module with the class.
    """
    lacking = shm_pointer.find_problem(module)
    return _problem_of_server(os.environ) or _problem_of_release(versions.installed(), lacking)


def find_exception(context: ModuleType) -> str:
    """Return why this server cannot use the transport; empty if it can."""
    parallel, disaggregation = context.get_parallel(), context.get_disagg()
    if parallel.nnodes > 1:
        return f"the server runs on {parallel.nnodes} nodes, and memory is shared on one."
    if disaggregation.language_only or disaggregation.encoder_only:
        return "a separate encoder (EPD) makes the tensors."
    if context.get_serving().skip_tokenizer_init:
        return "with --skip-tokenizer-init SGLang sends tensors inside its messages."
    if getattr(parallel, "max_ep_size", None) is not None:
        return "with elastic expert parallelism the number of readers changes."
    return ""


def count_readers(parallel: Any) -> int:
    """Return how many ranks materialize a tensor: those to which SGLang's first rank broadcasts a request.

    One replica of data parallelism reads, and of its pipeline the first stage. Without attention data parallelism the
    broadcast goes to all tensor-parallel ranks, with it to one of its groups.
    """
    if parallel.attn_dp_enabled:
        return int(parallel.attn_tp_size * parallel.attn_cp_size)
    return int(parallel.tp_size)
