"""Draw the result of the demonstration: two heat maps, process x GPU, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from devguard.demo.report import MIB, format_contexts, format_mebibytes, is_stray, title_after, total
from devguard.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = ["check", "draw"]

FORMATS = (".png", ".svg", ".pdf")
STRAY, CLEAN, INK = "#c4161c", "#226b3a", "#1a202c"
DOT = 4.5  # points


def check(target: str) -> None:
    """Raise `ConfigError` if a plot cannot be written to `target`."""
    path = Path(target)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {target}: the name must end in one of {', '.join(FORMATS)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {target}: there is no directory {path.absolute().parent}. Create it first.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed. Install it with: pip install 'torch-devguard[demo]'."
        ) from None


def draw(result: dict[str, Any], target: str) -> None:
    """Write the chart.

    Parameters
    ----------
    result : dict
        From `devguard.demo.launch.run_both`.
    target : str
        A file name that passed `check`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks, before, after = result["ranks"], result["unguarded"], result["guarded"]
    column = 0.95 if ranks <= 6 else 0.72  # inches
    width, height = max(11.0, 2 * ranks * column + 3.2), len(before["processes"]) * 0.62 + 2.6
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    shades = _make_shades(before, after)
    _draw_panel(left, "Before: unguarded", before, ranks, shades)
    _draw_panel(right, title_after(result), after, ranks, shades)
    figure.colorbar(shades, ax=[left, right], label="peak memory held (MiB)", fraction=0.04, pad=0.015)
    figure.suptitle(
        f"What each process holds on each GPU: one image request, {ranks} ranks, {result['backend']} GPUs, torch "
        f"{result['torch']}",
        fontsize=12.5,
    )
    _add_legend(figure, shades)
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {target}: cannot write it ({error}).") from None


def _make_shades(*runs: dict[str, Any]) -> ScalarMappable:
    """Return the colour scale of both panels, from MiB to a shade of blue."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    peak = max(device["peak_bytes"] for run in runs for process in run["processes"] for device in process["devices"])
    blues = LinearSegmentedColormap.from_list("held", ["#eef4fb", "#9cc3e6", "#2b6cb0"])
    return ScalarMappable(Normalize(0, max(1.0, peak / MIB)), blues)


def _draw_panel(panel: Axes, title: str, run: dict[str, Any], ranks: int, shades: ScalarMappable) -> None:
    """Draw one pass: a row for each process, a column for each GPU, and the total of the strays below."""
    for row, process in enumerate(run["processes"]):
        for device in process["devices"]:
            if device["context"] or device["peak_bytes"]:
                _draw_cell(panel, row, device, shades, stray=is_stray(process, device))
    _draw_grid(panel, [process["name"] for process in run["processes"]], ranks)
    panel.set_title(title, fontsize=11.5, loc="left")
    strays = f"ranks > 0 on GPU 0: {format_mebibytes(run['stray_bytes'])} MiB, {format_contexts(run['stray_contexts'])}"
    if run.get("costs"):
        strays += f"\n{_describe_costs(run['costs'])}"
    panel.set_xlabel(strays, fontsize=10.5, color=STRAY if run["stray_contexts"] or run["stray_bytes"] else CLEAN)


def _describe_costs(costs: dict[str, Any]) -> str:
    """Return what sending cost, in two lines."""
    gpu_0, host, shm = (format_mebibytes(costs[name]) for name in ("gpu_0_peak", "host_peak", "shm_peak"))
    text = f"peaks: GPU 0 {gpu_0} MiB, host {host} MiB, /dev/shm {shm} MiB"
    if costs["copies"]:
        down, up = (format_mebibytes(total(costs, direction)) for direction in ("down", "up"))
        text += f"\ncopies: {down} MiB to the host, {up} MiB to the GPUs"
    return text


def _draw_cell(panel: Axes, row: int, device: dict[str, Any], shades: ScalarMappable, *, stray: bool) -> None:
    """Draw one process on one GPU: its memory as a shade and a number, a context as a dot."""
    from matplotlib.patches import Rectangle

    column = device["index"]
    level: Any = shades.norm(device["peak_bytes"] / MIB)
    ink = "white" if level > 0.6 else INK
    cell = Rectangle(
        (column - 0.46, row - 0.43),
        0.92,
        0.86,
        facecolor=shades.cmap(level),
        edgecolor=STRAY if stray else "#7b8a9a",
        linewidth=2.6 if stray else 0.6,
    )
    panel.add_patch(cell)
    panel.text(
        column,
        row + 0.1,
        format_mebibytes(device["peak_bytes"]),
        ha="center",
        va="center",
        color=ink,
        fontsize=11,
        fontweight="bold" if stray else "normal",
    )
    if device["context"]:
        panel.plot(column, row - 0.26, "o", markersize=DOT, color=ink)


def _draw_grid(panel: Axes, names: list[str], ranks: int) -> None:
    """Label the rows and columns, and draw thin lines between them."""
    panel.set_xlim(-0.5, ranks - 0.5)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xticks(range(ranks), [f"GPU {index}" for index in range(ranks)])
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(length=0)
    panel.set_xticks([index + 0.5 for index in range(ranks - 1)], minor=True)
    panel.set_yticks([row + 0.5 for row in range(len(names) - 1)], minor=True)
    panel.grid(which="minor", color="#dfe5ec", linewidth=0.8)
    panel.tick_params(which="minor", length=0)
    for spine in panel.spines.values():
        spine.set_color("#b8c2cc")


def _add_legend(figure: Figure, shades: ScalarMappable) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    stray = Rectangle((0, 0), 1, 1, facecolor=shades.cmap(0.3), edgecolor=STRAY, linewidth=2.4)
    stray.set_label("on a GPU that it does not own")
    context = Line2D([], [], marker="o", linestyle="", color=INK, markersize=DOT)
    context.set_label("holds a CUDA context; the number is its memory in MiB")
    figure.legend(handles=[stray, context], loc="outside lower center", ncols=2, frameon=False, fontsize=10)
