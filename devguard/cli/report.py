"""``devguard report``: one page on what a run did on its GPUs, from its journals alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devguard.errors import ConfigError
from devguard.support.terminal import printable, show, show_json

if TYPE_CHECKING:
    from devguard.watch.report.run import Run

__all__ = ["configure", "run"]

DEFAULT_OUTPUT = "report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard report``."""
    parser.epilog = (
        "The report works during a run, after it and after a crash. Memory over time needs samples: run the program "
        "with devguard run --log DIR --record, or let devguard watch DIR run beside it. The exit status is 1 if a file "
        "of the folder holds lines that cannot be read, and else 0, whether or not anything strayed."
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the folder given to DEVGUARD_LOG or devguard run --log"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help=f"the file to write (default: {DEFAULT_OUTPUT}; Markdown goes to standard output)",
    )
    parser.add_argument("--before", metavar="DIR", type=Path, help="another run, to be shown side by side")
    parser.add_argument(
        "--format", choices=["html", "md"], default="html", help="md is short enough for a comment on a pull request"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the verdict and the numbers as JSON on standard output; then a page is only written with -o",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report on ``arguments.folder``.

    Returns
    -------
    int
        0, whether or not anything strayed; 1 if a file holds lines that cannot be read.
    """
    from devguard.watch.report import run as runs

    after = runs.read(arguments.folder)
    before = None if arguments.before is None else runs.read(arguments.before)
    pair = [("", after)] if before is None else [("Before", before), ("After", after)]
    output: Path | None = arguments.output
    if output is None and arguments.format == "html" and not arguments.json:
        output = Path(DEFAULT_OUTPUT)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {output.absolute().parent}. Create it first.")
    written = None
    if output is not None or not arguments.json:
        written = _render(pair, arguments.format)
    if output is not None and written is not None:
        output.write_text(written, encoding="utf-8")
    if arguments.json:
        show_json(_as_dict(after) if before is None else {**_as_dict(after), "before": _as_dict(before)})
    elif output is None:
        show(written or "")
    else:
        _show_verdicts(pair)
        show(f"Written to {printable(output)}.")
    damaged = [place for _, each in pair for place in each.damaged]
    if not arguments.json and output is not None:
        for place in damaged:
            show(f"cannot be read: {printable(place)}")
    return 1 if damaged else 0


def _render(pair: list[tuple[str, Run]], form: str) -> str:
    if form == "md":
        from devguard.watch.report import markdown

        return markdown.render(pair)
    from devguard.watch.report import page

    return page.render(pair)


def _show_verdicts(pair: list[tuple[str, Run]]) -> None:
    from devguard.watch.report.summary import summarize

    for title, each in pair:
        show(printable(f"{title}: {summarize(each).verdict}" if title else summarize(each).verdict))


def _as_dict(each: Run) -> dict[str, Any]:
    """Return the verdict and the numbers of a run as plain data."""
    from devguard.watch.report.summary import as_dict

    return as_dict(each)
