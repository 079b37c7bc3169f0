"""The installed SGLang for ``devguard doctor``: its known bugs, and how its multimodal tensors travel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from devguard.support import terminal

__all__ = ["examine", "examine_transport", "show"]


def examine(version: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the installed SGLang with its known bugs (None if there is none), and notes about it."""
    if version is None:
        return None, []
    from devguard.integrations import sglang
    from devguard.integrations.sglang import versions

    try:
        versions.check(version)
    except sglang.UnsupportedVersionError as error:
        return {"version": version, "known": False, "bugs": []}, [str(error)]
    bugs = [dataclasses.asdict(bug) for bug in sglang.known_bugs(version)]
    return {"version": version, "known": True, "bugs": bugs}, []


def examine_transport(version: str | None, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """Return how SGLang's multimodal tensors travel (None: as SGLang sends them), and what is wrong with that."""
    if not environ.get("DEVGUARD_TRANSPORT", "").strip():
        return None, ""
    from devguard.integrations.sglang import transport_conditions

    found, problem = transport_conditions.examine(version, environ)
    return found or None, problem


def show(found: dict[str, Any] | None, transport: str | None) -> None:
    """Print what `examine` and `examine_transport` returned."""
    if found is not None:
        terminal.show(f"SGLang {found['version']}")
    if transport:
        terminal.show(f"  transport: {transport}")
    for bug in found["bugs"] if found else ():
        terminal.show(f"  wrong GPU: {bug['what']} ({bug['reference']})\n    devguard, {bug['remedy']}")
