"""``devguard watch``: which process is on which GPU, live, or once for CI."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from devguard.errors import ConfigError
from devguard.modes import check_mode
from devguard.support import private_folders
from devguard.support.log_folder import TEMPORARY, VARIABLE
from devguard.support.notices import flush
from devguard.support.terminal import complain, show
from devguard.watch.cells import VERDICTS
from devguard.watch.gpus import INTERVAL_S, LEAST_INTERVAL_S

if TYPE_CHECKING:
    from devguard.cli.watch_program import Program
    from devguard.watch.matrix import Matrix
    from devguard.watch.metrics.server import Server
    from devguard.watch.view import View

__all__ = ["configure", "run"]

LONGEST_INTERVAL_S = 3600.0
ENDING = (signal.SIGTERM, signal.SIGHUP)  # what ends the watcher as Ctrl-C does: in order
STRAYED = 3  # the exit status where a cell says STRAY
FIRST_SAMPLES_S = 1.5  # how long `--once` waits for what the processes report


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard watch``."""
    parser.usage = (
        "devguard watch [options] [DIR]\n       devguard watch [options] --pid PID\n"
        "       devguard watch [options] [DIR] -- COMMAND [ARGUMENT ...]"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verdicts = "\n".join(f"  {verdict:8} {meaning}" for verdict, meaning in VERDICTS.items())
    parser.epilog = (
        f"cells:\n{verdicts}\n\n"
        "Without DIR, --pid or COMMAND, only the driver's view is shown: all processes, without owners. With --once,\n"
        f"the exit status is {STRAYED} if a cell says STRAY. The live screen ends with q; its last line\n"
        "names the other keys."
    )
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, help="the folder given to DEVGUARD_LOG or devguard run --log"
    )
    parser.add_argument(
        "--pid",
        type=int,
        action="append",
        default=[],
        help="show only this process; may be repeated. DIR is found in its environment",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=INTERVAL_S,
        metavar="SECONDS",
        help=f"seconds between two looks, from {LEAST_INTERVAL_S} (default: 1)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one table; with COMMAND, its worst moment at its end"
    )
    parser.add_argument(
        "--mode",
        help="with COMMAND: off, observe, warn, repair or error (default: DEVGUARD, or repair); observe only watches",
    )
    parser.add_argument("--json", action="store_true", help="with --once, print JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="with --once, also save the table as a picture")
    parser.add_argument(
        "--serve",
        metavar="[ADDRESS:]PORT",
        help="answer Prometheus at this port, on the loopback interface unless an address is named",
    )
    parser.add_argument(
        "--label-pid", action="store_true", help="with --serve, give the series of processes the label pid"
    )
    parser.set_defaults(program=[])


def run(arguments: argparse.Namespace) -> int:
    """Watch until the user or the program ends it."""
    _check(arguments)
    folder, command = arguments.folder, arguments.program
    if folder is None and arguments.pid:
        folder = _find_folder(arguments.pid[0])
    if not command:
        with _signals_end_in_order():
            return _watch(arguments, folder, None)
    from devguard.cli.watch_program import start

    with _signals_end_in_order(), _folder_for(folder) as place:
        is_live = _is_live(arguments)
        with start(command, place, is_captured=is_live, mode=arguments.mode) as started:
            return _watch(arguments, place, started)


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.interval >= LEAST_INTERVAL_S:
        raise ConfigError(
            f"--interval {arguments.interval:g} is too short. Each look holds a lock of the driver for milliseconds, "
            f"which slows the programs on the GPUs; use {LEAST_INTERVAL_S} or more."
        )
    if arguments.interval > LONGEST_INTERVAL_S:
        raise ConfigError(f"--interval {arguments.interval:g} is too long. Use {LONGEST_INTERVAL_S:g} or less.")
    for name in ("json", "svg"):
        if getattr(arguments, name) and not arguments.once:
            raise ConfigError(f"--{name} is only valid with --once. Add --once, or leave out --{name}.")
    if arguments.serve is not None and arguments.once:
        raise ConfigError("--serve is not valid with --once, which ends at once. Leave out one of them.")
    if arguments.label_pid and arguments.serve is None:
        raise ConfigError("--label-pid is only valid with --serve. Add --serve, or leave out --label-pid.")
    if arguments.mode is not None:
        if not arguments.program:
            raise ConfigError("--mode is only valid with a program. Add -- COMMAND, or leave out --mode.")
        check_mode(arguments.mode)
    if arguments.pid and arguments.program:
        raise ConfigError("--pid is not valid with a program, all processes of which are shown. Leave out one of them.")
    _check_for_rich(arguments)


def _check_for_rich(arguments: argparse.Namespace) -> None:
    from devguard.cli.watch_output import require_rich

    if arguments.svg is not None:
        require_rich("--svg", "leave out --svg")
    if _is_live(arguments):
        require_rich("the live screen", "print one table with --once")


def _is_live(arguments: argparse.Namespace) -> bool:
    if arguments.once or sys.stdout is None or not sys.stdout.isatty():
        return False
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")  # on these rich shows no screen


def _find_folder(pid: int) -> Path | None:
    """Return the log folder of a process, by its environment; None if it has none, or cannot be seen."""
    try:
        variables = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except OSError as error:
        raise ConfigError(f"--pid {pid}: {error.strerror}. Name a process of yours that runs.") from None
    values = [each.partition(b"=")[2] for each in variables if each.startswith(os.fsencode(f"{VARIABLE}="))]
    named = os.fsdecode(values[0]).strip() if values else ""
    if not named or os.path.isabs(named):
        return Path(named) if named else None
    with suppress(OSError):
        folder = Path(os.readlink(f"/proc/{pid}/cwd"), named)
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"--pid {pid}: its {VARIABLE} is {named!r}, and its working directory has no such folder. Name the folder "
        "as DIR."
    )


@contextmanager
def _signals_end_in_order() -> Iterator[None]:
    """Leave the block at SIGTERM, and when the terminal is closed, before the signal ends this process.

    So the program ends as well, the terminal is as before, and nothing stays in the temporary folder.
    """
    received = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handler
        before = {each: signal.signal(each, end) for each in ENDING if signal.getsignal(each) is signal.SIG_DFL}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if received:
            flush()
            os.kill(os.getpid(), received[0])


@contextmanager
def _folder_for(given: Path | None) -> Iterator[Path]:
    """Make the log folder for a program, for this user alone: the one that was given, or a temporary one."""
    if given is not None:
        private_folders.make(given)
        yield given
        return
    # A process that outlives the program may still write there.
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as place:
        yield Path(place)


def _watch(arguments: argparse.Namespace, folder: Path | None, started: Program | None) -> int:
    from devguard.cli import watch_output
    from devguard.logs.reader import require_logs
    from devguard.watch.view import View

    view = View(folder, arguments.pid)
    if arguments.once:
        if arguments.folder is not None and started is None:
            require_logs(arguments.folder)
        matrix = _look_once(view) if started is None else _worst(view, started, arguments.interval)
        watch_output.show_matrix(matrix, as_json=arguments.json)
        if arguments.svg is not None:
            watch_output.save_picture(matrix, arguments.svg)
        if matrix.has("STRAY"):
            return STRAYED
        return 0 if started is None else started.wait()
    title = " ".join(arguments.program) or str(folder or "all processes")
    with _served(view, arguments) as server:
        if not _is_live(arguments):
            if server is not None:
                return _report_problems(server, started, arguments.interval)
            return _print_changes(view, started, arguments.interval)
        from devguard.watch.screen.live import Screen

        output = None if started is None else started.output
        screen = Screen(f"devguard watch  {title}", arguments.interval, output)
        screen.run(view.look, lambda: started is None or started.is_running())
        return 0 if started is None else _finish(started)


@contextmanager
def _served(view: View, arguments: argparse.Namespace) -> Iterator[Server | None]:
    """Serve the metrics of a view inside the block, if that was asked for."""
    if arguments.serve is None:
        yield None
        return
    from devguard.watch.metrics.server import serve

    view.look()  # A folder that does not exist is an error now, not at the first scrape.
    with closing(serve(view, arguments.serve, label_pid=arguments.label_pid)) as server:
        complain(f"devguard watch: metrics at {server.url}")
        yield server


def _report_problems(server: Server, started: Program | None, interval: float) -> int:
    """Say what the scrapes cannot read, whenever that has changed."""
    problem: str | None = None
    while started is None or started.is_running():
        if server.problem != problem:
            problem = server.problem
            complain(f"devguard watch: {f'cannot be read: {problem}' if problem else 'everything can be read again'}")
        _pause(started, interval)
    return started.wait()


def _finish(started: Program) -> int:
    """Wait for the program after the screen was closed."""
    if started.is_running():
        complain(f"devguard watch: the program goes on (pid {started.pid}); Ctrl-C ends it")
    status = started.wait()
    started.copy_output()
    return status


def _look_once(view: View) -> Matrix:
    """Return the matrix as soon as each process has reported its memory, or after a short time."""
    begun = time.time()
    matrix = view.look()
    while view.awaits_samples(begun) and time.time() < begun + FIRST_SAMPLES_S:
        time.sleep(0.05)
        matrix = view.look()
    return matrix


def _worst(view: View, started: Program, interval: float) -> Matrix:
    """Return the matrix of the moment with the most strays until the program ends."""
    worst = view.look()
    while started.is_running():
        started.pause(interval)
        matrix = view.look()
        if _badness(matrix) >= _badness(worst):
            worst = matrix
    end = view.look(ended_since=started.begun)  # A process may have lived between two looks.
    return end if _badness(end)[0] > _badness(worst)[0] or not any(row.guarded for row in worst.rows) else worst


def _badness(matrix: Matrix) -> tuple[int, int, int]:
    """Return the strays, then the cells with owners: a process that is about to end has closed its log already."""
    cells = [cell for row in matrix.rows for cell in row.cells.values()]
    known = sum(len(row.cells) for row in matrix.rows if row.guarded)
    return sum(cell.verdict == "STRAY" for cell in cells), known, len(cells)


def _print_changes(view: View, started: Program | None, interval: float) -> int:
    """Print the table whenever it has changed, as text."""
    from devguard.cli.watch_output import as_text

    last = ""
    while started is None or started.is_running():
        text = as_text(view.look())
        if text != last:
            show(f"{time.strftime('%H:%M:%S')}\n{text}\n")
            sys.stdout.flush()
            last = text
        _pause(started, interval)
    return started.wait()


def _pause(started: Program | None, seconds: float) -> None:
    if started is None:
        time.sleep(seconds)
    else:
        started.pause(seconds)
