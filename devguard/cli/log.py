"""``devguard log``: show the strays that the processes of a run recorded with ``DEVGUARD_LOG``, and fail CI on them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from devguard.errors import ConfigError
from devguard.support.terminal import complain, show, show_json, width

if TYPE_CHECKING:
    from devguard.logs.gate import Gate
    from devguard.logs.reader import Merged
    from devguard.logs.selection import Selection
    from devguard.logs.summary import Summary

__all__ = ["configure", "run"]

FORMATS = ("text", "md", "json", "sarif")
FAILED = 3  # the exit status where the gate fails


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``devguard log``."""
    from devguard.logs import selection as log_selection
    from devguard.reporting import actions

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = actions.explain(width() - 2)
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the folder given to DEVGUARD_LOG or devguard run --log"
    )
    parser.add_argument(
        "--processes",
        action="store_true",
        help="list all processes, with owner, contexts and end; by default, those that were killed or crashed",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--door", metavar="DOOR,...", action="append", help="only records of these doors")
    shown.add_argument(
        "--rank", metavar="RANK,...", action="append", help="only records of these ranks; none: of processes without"
    )
    shown.add_argument(
        "--sort", choices=list(log_selection.SORTS), default="bytes", help="the order of call sites (default: bytes)"
    )
    shown.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="md: for a comment on a pull request; sarif: for code scanning",
    )
    shown.add_argument("--json", dest="format", action="store_const", const="json", help="short for --format json")
    shown.add_argument(
        "--root",
        metavar="DIR",
        default=os.curdir,
        help="the folder of the sources where the program ran: paths in it become relative (default: this folder)",
    )
    gates = parser.add_argument_group(f"gates for CI, with exit status {FAILED} where there is a stray that fails")
    gates.add_argument(
        "--fail-on",
        metavar="ACTION,...",
        action="append",
        help=f"the actions that fail: {', '.join(actions.FAIL_ON)} (default with --baseline: strays)",
    )
    gates.add_argument("--baseline", metavar="FILE", help="known strays, which pass; vanished ones are named")
    gates.add_argument("--write-baseline", metavar="FILE", help="write the strays of this log as known ones")


def run(arguments: argparse.Namespace) -> int:
    """Show the merged records of ``arguments.folder``.

    Returns
    -------
    int
        0; 1 if a file holds lines that cannot be read; 3 if the gate fails.
    """
    from devguard.doors import table
    from devguard.logs import reader as log_reader
    from devguard.logs.selection import Selection, split_names
    from devguard.logs.summary import Summary
    from devguard.reporting import actions

    selection = Selection(
        doors=split_names("--door", arguments.door) if arguments.door else (),
        ranks=split_names("--rank", arguments.rank) if arguments.rank else (),
        sort=arguments.sort,
    )
    fail_on = split_names("--fail-on", arguments.fail_on, actions.FAIL_ON) if arguments.fail_on else ()
    _check_baseline_options(arguments)
    processes, merged, damaged = log_reader.read(arguments.folder, selection.has_process)
    selection.check(processes, merged, table.NAMES)
    sites = selection.pick(merged)
    found = Summary(list(filter(selection.has_process, processes)), sites, damaged, arguments.root)
    if arguments.write_baseline is not None:
        _write_baseline(arguments, sites, fail_on)
    elif fail_on or arguments.baseline is not None:
        found.gate = _judge(arguments, sites, fail_on, selection)
    _show(found, arguments)
    if found.gate is not None and found.gate.failing:
        return FAILED
    return 1 if damaged else 0


def _check_baseline_options(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    if arguments.write_baseline is None:
        return
    if arguments.baseline is not None:
        raise ConfigError("--baseline and --write-baseline exclude each other. Judge by a baseline, or write one.")
    if arguments.door or arguments.rank:
        raise ConfigError("--write-baseline writes all strays of a log. Leave out --door and --rank.")


def _judge(arguments: argparse.Namespace, sites: list[Merged], fail_on: tuple[str, ...], selection: Selection) -> Gate:
    from devguard.logs import baseline_file, gate

    file = arguments.baseline
    known = None if file is None else baseline_file.read(Path(file))
    return gate.judge(sites, fail_on, known, file, root=arguments.root, selection=selection)


def _write_baseline(arguments: argparse.Namespace, sites: list[Merged], fail_on: tuple[str, ...]) -> None:
    """Write the strays that would fail as a baseline, and say so on standard error."""
    from devguard.logs import baseline_file
    from devguard.logs.baseline import Baseline
    from devguard.reporting import actions

    file = Path(arguments.write_baseline)
    before = baseline_file.read_reasons(file)
    named = actions.expand(fail_on)
    after = Baseline.of([site for site in sites if actions.matches(site.action, named)], arguments.root, before)
    baseline_file.write(file, after)
    added, removed = after.entries.keys() - before.entries.keys(), before.entries.keys() - after.entries.keys()
    complain(f"{file}: {len(after.entries)} known (added {len(added)}, removed {len(removed)})")


def _show(found: Summary, arguments: argparse.Namespace) -> None:
    if arguments.format == "json":
        show_json(found.as_dict())
    elif arguments.format == "sarif":
        from devguard.logs import sarif

        show_json(sarif.as_sarif(found))
    elif arguments.format == "md":
        from devguard.logs.markdown import format_markdown

        for line in format_markdown(found):
            show(line)
    else:
        from devguard.logs.text import format_text

        for line in format_text(found, list_processes=arguments.processes):
            show(line)
