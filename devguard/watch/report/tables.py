"""The tables of the page: strays by line, contexts, arenas, processes, and the memory of each GPU by process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from devguard.logs import process_end
from devguard.support.terminal import format_size, list_some
from devguard.watch.report.arenas import ArenaUse, quantile
from devguard.watch.report.layers import Stack
from devguard.watch.report.markup import Html, element, join, moment, number, size, table, text
from devguard.watch.report.moments import CLASSES
from devguard.watch.report.run import VARIABLES, Run
from devguard.watch.report.sites import CallSite
from devguard.watch.report.summary import count_of

__all__ = ["list_arenas", "list_contexts", "list_layers", "list_processes", "list_sites"]

MOST_LISTED, MOST_NAMES = 8, 4  # short texts, and long ones, in one cell
NO_LINE = "no line of user code"


def list_sites(run: Run, most: int) -> Html:
    """Return the lines that strayed, each with what to write there; last what is no stray."""
    strays = [site for site in run.sites if site.is_stray]
    others = [site for site in run.sites if not site.is_stray]
    parts = [_sites("Strays by line: those that were left alone first, then most bytes first", strays, most)]
    if not strays:
        parts = [element("p", "No strays.")]
    if others:
        listed = _sites("Not counted as strays", others, most)
        summary = f"{len(others)} more, which do not count as strays: placed and kept"
        parts.append(element("details", element("summary", summary), listed))
    return join(parts)


def _sites(caption: str, sites: Sequence[CallSite], most: int) -> Html:
    heads = ["line", "bytes", "count", "door", "before → after", "action", "processes", "process mode", "first"]
    rows = []
    for site in sites[:most]:
        quote = []
        if site.quote.text:
            changed = " (the file has changed since)" if site.quote.changed else ""
            quote = [element("code", site.quote.text, class_="quote"), changed]
        via = [element("small", f"via {site.via}. ")] if site.via else []
        note = [element("small", site.note)] if site.note else []
        advice = element("small", element("strong", "Write there: "), site.advice)
        where = element("code", site.place if site.file else NO_LINE)
        line = element("th", where, *quote, *via, *note, advice, scope="row", class_="site")
        names = list_some(site.processes, MOST_NAMES)
        ranks = f"; rank {_fold(site.ranks)}" if site.ranks else ""
        owners = f"; owner {list_some(site.owners, MOST_LISTED)}" if site.owners else ""
        action = element("b", site.action, class_="pill stray" if site.is_left_alone else None)
        rows.append(
            [
                line,
                size(site.bytes),
                number(site.count),
                site.door,
                list_some(site.devices, MOST_NAMES),
                action,
                f"{names}{ranks}{owners}",
                list_some(site.modes, MOST_LISTED) or "-",
                moment(site.first),
            ]
        )
    return join([table(caption, heads, rows, class_="sites"), _left_out(len(sites) - most, "line", "lines")])


def list_contexts(run: Run, most: int) -> Html:
    """Return the contexts on GPUs of others, when each was first seen, and the number of the rest."""
    shown = [context for context in run.contexts if context.verdict != "own"]
    own = len(run.contexts) - len(shown)
    rest = f"Not listed: {count_of(own, 'context')} of processes on GPUs that they own."
    if not shown:
        return element("p", f"No context on another GPU than the process's own. {rest}")
    names = {column.uuid: column.label for column in run.history.columns}
    rows = [
        [
            moment(context.time),
            run.title(context.place),
            f"{context.device} (GPU {names.get(context.uuid, '?')})",
            element("b", context.verdict, class_=f"pill {CLASSES[context.verdict]}"),
            element("code", context.line) if context.line else "not known: devguard run --trace-contexts tells",
        ]
        for context in shown[:most]
    ]
    heads = ["first seen", "process", "device", "verdict", "first line that put something there"]
    listed = table("Contexts on GPUs that are not the process's own", heads, rows)
    return join([listed, _left_out(len(shown) - most, "context", "contexts"), element("p", rest)])


def list_arenas(run: Run, most: int) -> Html:
    """Return what the arenas of devguard.transport held."""
    heads = ["process", "budget", "most in use", "at the end", "leases at the end", "waits", "put to last ack", "more"]
    rows = [[f"{run.name(arena.place)} {arena.last.get('kind', '')}", *_arena(arena)] for arena in run.arenas[:most]]
    kinds = sorted({track.journal.process.transport or "" for track in run.tracks} - {""})
    named = list_some(kinds, MOST_LISTED)
    carried = [element("p", f"Tensors of the framework were carried by: {named}.")] if kinds else []
    listed = table("Arenas of devguard.transport, as last sampled", heads, rows)
    return join([*carried, listed, _left_out(len(run.arenas) - most, "arena", "arenas")])


def _arena(arena: ArenaUse) -> Iterator[object]:
    for name in ("budget", "peak", "in_use"):
        value = arena.most.get(name) if name == "peak" else arena.number(name)
        yield size(value)
    leases, waits = arena.number("leases"), arena.number("waits")
    yield text("not known") if leases is None else number(leases)
    seconds = arena.last.get("wait_seconds")
    waited = f" ({seconds:.3g} s)" if isinstance(seconds, int | float) else ""
    yield f"{arena.most.get('waiting', 0):,} at once" if waits is None else join([number(waits), waited])
    half, nearly_all = quantile(arena, 0.5), quantile(arena, 0.99)
    yield "not known" if half is None or nearly_all is None else f"p50 {_bound(half)}, p99 {_bound(nearly_all)}"
    yield "; ".join(_rest(arena)) or "-"


def _rest(arena: ArenaUse) -> Iterator[str]:
    """Yield what else is known of an arena, whatever its release of devguard sampled."""
    shown = {"kind", "address", "budget", "peak", "in_use", "leases", "waits", "wait_seconds", "release_seconds"}
    for name, value in arena.last.items():
        if name in shown or value in (None, 0, ""):
            continue
        known = arena.number(name)
        if known is not None:
            yield f"{name} {format_size(known) if name.endswith('bytes') or name == 'allocated' else f'{known:,}'}"
        elif isinstance(value, dict):
            yield f"{name}: {', '.join(f'{key} {each}' for key, each in value.items())}"
        else:
            yield f"{name} {value}"


def _bound(seconds: float) -> str:
    return "over the last bound" if math.isinf(seconds) else f"≤ {seconds * 1000:g} ms"


def list_processes(run: Run, most: int) -> Html:
    """Return the processes, with the versions and variables that their logs name."""
    known = run.environments
    same = {
        name: known[0][name]
        for name in VARIABLES
        if known and name in known[0] and all(each.get(name) == known[0][name] for each in known)
    }
    hosts = {track.journal.process.host for track in run.tracks}
    simulated = any(track.journal.process.simulation for track in run.tracks)
    facts = [f"{name} {value}" for name, value in same.items()]
    facts += ["on simulated GPUs"] if simulated else []
    facts += [f"on {next(iter(hosts))}"] if len(hosts) == 1 else []
    heads = ["process", "pid", "rank", "owner", "end", "devices that it saw", "more", "command"]
    rows = []
    for place in run.order()[:most]:
        process = run.tracks[place].journal.process
        own = {name: value for name, value in known[place].items() if name not in same and name in VARIABLES}
        more = [f"{name}={value}" for name, value in own.items()]
        more += [f"on {process.host}"] if len(hosts) > 1 else []
        more += [f"owner from {process.source}"] if process.source else []
        rows.append(
            [
                run.name(place),
                process.pid,
                process.rank or "-",
                run.owner(place) or "not known",
                process_end.describe(process),
                f"{len(process.gpus)}" if process.gpus else "-",
                "; ".join(more) or "-",
                element("td", element("code", process.command), class_="command"),
            ]
        )
    listed = table("Processes that wrote a log", heads, rows)
    return join([element("p", "; ".join(facts)), listed, _left_out(len(run.tracks) - most, "process", "processes")])


def list_layers(run: Run, stacks: Sequence[Stack]) -> Html:
    """Return the most that each process held on each GPU: the key to the drawing, and its numbers."""
    heads = ["GPU", "most at once", "at", "layers of the drawing from below, and the most of each"]
    rows = []
    for one in stacks:
        peak = run.history.peaks.get(one.column.uuid)
        keys = []
        for layer in one.layers:
            names = [run.title(place) for place in layer.places]
            name = names[0] if len(names) == 1 else f"{len(names)} processes: {list_some(names, 3)}"
            swatch = element("i", class_=f"swatch {layer.kind} shade-{layer.shade}", aria_hidden="true")
            kind = {"unknown": "owner not known", "stray": "STRAY"}.get(layer.kind, layer.kind)
            keys.append(element("li", swatch, element("b", kind), f" {name} ", size(layer.most)))
        layers = element("ul", *keys, class_="layers") if keys else "-"
        gpu = element("th", f"GPU {one.column.label}", scope="row", class_="short")
        rows.append([gpu, size(peak.bytes if peak else 0), moment(peak.time) if peak else "-", layers])
    return table("Memory of each GPU", heads, rows)


def _left_out(count: int, what: str, many: str) -> Html:
    if count <= 0:
        return Html("")
    return element("p", f"Not shown, so that the page stays small: {count_of(count, f'more {what}', f'more {many}')}.")


def _fold(ranks: Sequence[str]) -> str:
    """Return ranks in order, those in a row as one: ``0-3, 7``."""
    numbers = sorted({int(rank) for rank in ranks if rank.isdecimal() and len(rank) < 10})
    rows: list[list[int]] = []
    for rank in numbers:
        if rows and rows[-1][-1] == rank - 1:
            rows[-1].append(rank)
        else:
            rows.append([rank])
    folded = [f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows]
    return list_some([*folded, *(rank for rank in ranks if not (rank.isdecimal() and len(rank) < 10))], MOST_LISTED)
