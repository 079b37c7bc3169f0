"""``devguard demo``: stray tensors on GPU 0, before and after the guard, in real processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator

from devguard.support.terminal import complain, show, show_json

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard demo``."""
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="number of rank processes, one GPU each: 2 to 16 (default: 4, or fewer if there are 2 or 3 real GPUs)",
    )
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="pictures to send (default: the built-in one)",
    )
    parser.add_argument(
        "--transport",
        choices=("pickle", "host"),
        default="pickle",
        help="how the guarded pass sends the request: pickle, as SGLang does, or host: devguard.transport puts it into "
        "host memory, once, and the messages carry a handle, which each rank opens on its own GPU. With host the "
        "result also shows, for both passes, the copies down to the host and up to the GPUs (counted by the simulated "
        "GPUs), the contexts, and the peaks of GPU 0, of the host's memory and of /dev/shm (default: pickle)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output, and nothing else"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the result: process x GPU, before and after")
    parser.add_argument(
        "--torch",
        metavar="VERSION",
        help="torch for simulated GPUs (default: the version in this environment)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "simulated", "real"),
        default="auto",
        help="which GPUs to use; auto uses real ones if torch sees enough, else simulated ones (default: auto)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration.

    Returns
    -------
    int
        0 if the guarded pass was clean and its values equal; 1 if not, or if the demonstration failed.

    Raises
    ------
    ConfigError
        If an argument is not valid. `devguard.cli.main` then returns 2.
    """
    from devguard.demo import DemoError, pictures
    from devguard.errors import ConfigError, SimulationError

    try:
        from rich.console import Console

        from devguard import simgpu
        from devguard.demo import launch, plot, report
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("devguard"):
            raise
        raise ConfigError(
            f"the demonstration needs {error.name}, which is not installed. Install it with: "
            "pip install 'torch-devguard[demo]'."
        ) from None
    pictures.read_all(arguments.image)  # A bad file must be reported before anything expensive starts.
    if arguments.plot is not None:
        plot.check(arguments.plot)
    stage = launch.choose(arguments.backend, arguments.ranks, arguments.torch)
    complain(f"devguard demo: {stage.ranks} ranks on {stage.backend} GPUs ({stage.reason})")
    try:
        if stage.backend == "simulated":
            # Build what is missing now: the build shows its own progress bar.
            with tempfile.TemporaryDirectory() as folder:
                simgpu.environment(stage.ranks, torch=arguments.torch, state=os.path.join(folder, "state"))
        with _progress() as on_stage:
            result = launch.run_both(
                stage, arguments.image, arguments.torch, simgpu.environment, on_stage, arguments.transport
            )
    except (DemoError, SimulationError) as error:
        complain(f"devguard demo: {error}")
        return 1
    if arguments.plot is not None:
        plot.draw(result, arguments.plot)
    if arguments.json:
        show_json(result)
    else:
        report.show(result, Console())
        if arguments.plot is not None:
            show(f"Chart: {arguments.plot}")
    return 0 if report.is_clean(result) else 1


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current stage: as a progress bar on a terminal, as plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def show(text: str) -> None:
            complain(f"devguard demo: {text}")

        yield show
        return
    from devguard.demo.scenario import STAGES

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=2 * len(STAGES))
        finished = 0

        def advance(text: str) -> None:
            nonlocal finished
            progress.update(bar, description=text, completed=finished)
            finished += 1

        yield advance
