"""The entry point ``devguard`` of the group ``torch.backends``, which torch calls at the end of ``import torch``.

If none of devguard's variables asks for a guard or a transport, it imports nothing, and does nothing but make a
relative ``DEVGUARD_LOG`` absolute, for guards in code. It never raises: ``import torch`` would then fail. A guard that
cannot be in force is reported on standard error, whatever the filters of warnings.
"""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["activate"]


def activate() -> None:
    """Apply ``DEVGUARD`` and devguard's other variables; if that fails, report it and leave devguard off."""
    names = ("DEVGUARD", "DEVGUARD_DOORS", "DEVGUARD_LOG", "DEVGUARD_TRANSPORT")
    mode, doors, log, transport = (os.environ.get(name, "").strip() for name in names)
    if log and not os.path.isabs(log):
        with contextlib.suppress(Exception):  # this devguard is broken, which is reported below
            from devguard.support import log_folder

            log_folder.locate()  # before the program changes its working directory
    if not mode:
        if doors:
            problem = "without DEVGUARD it has no effect. Set DEVGUARD=repair or another mode, or unset DEVGUARD_DOORS."
            _report(f"DEVGUARD_DOORS={doors!r}", problem)
        if transport:
            _arm_transport(transport)
        return
    try:
        from devguard import integrations
        from devguard.activation.activate import activate
        from devguard.activation.install import uninstall

        if activate():
            try:
                integrations.arm()
            except Exception:
                uninstall()
                raise
    except Exception as error:  # noqa: BLE001 - an error here would make `import torch` fail
        _report(f"DEVGUARD={os.environ.get('DEVGUARD')!r}", f"{type(error).__name__}: {error}{_advise(error)}")


def _arm_transport(transport: str) -> None:
    """Apply ``DEVGUARD_TRANSPORT``, which needs no guard."""
    try:
        from devguard import integrations

        integrations.arm_transport()
    except Exception as error:  # noqa: BLE001 - an error here would make `import torch` fail
        _report(f"DEVGUARD_TRANSPORT={transport!r}", f"{type(error).__name__}: {error}{_advise(error)}")


def _advise(error: Exception) -> str:
    """Return what to do about a package that devguard needs; empty for other errors, which say it themselves."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "wrapt":
        return ". Install it in this environment: pip install 'wrapt>=2'."
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "devguard":
        return ". This devguard is incomplete, or two versions are mixed: install torch-devguard again."
    return ""


def _report(asked: str, problem: str) -> None:
    text = f"devguard is off in this process, although {asked}: {problem}"
    try:
        from devguard.ownership.process import process

        process.fail(problem)
    except Exception as error:  # noqa: BLE001 - this devguard is broken: say at least that
        text = f"{text} ({type(error).__name__}: {error})"
    try:
        from devguard.support.strictness import report_off
    except Exception:  # noqa: BLE001 - as above
        with contextlib.suppress(Exception):  # there is none, or it is closed
            sys.stderr.write(f"{text}\n")
        return
    report_off(text)
