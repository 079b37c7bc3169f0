"""Draw the demonstration's result: two heat maps, process x GPU, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devguard.demo.report import MIB, contexts, is_stray, mebibytes
from devguard.errors import ConfigError

__all__ = ["check", "draw"]

FORMATS = (".png", ".svg", ".pdf")
STRAY = "#c4161c"


def check(target: str) -> None:
    """Raise `ConfigError` if a plot cannot be written to `target`."""
    path = Path(target)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {target}: the name must end in one of {', '.join(FORMATS)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {target}: there is no directory {path.absolute().parent}. Make it first.")
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
        A file name that `check` has let through.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    ranks = result["ranks"]
    runs = (
        ("Before: unguarded", result["unguarded"]),
        ('After: @devguard.guard(argument="gpu_id")', result["guarded"]),
    )
    names = [process["name"] for process in runs[0][1]["processes"]]
    peak = max(device["peak_bytes"] for _, run in runs for process in run["processes"] for device in process["devices"])
    colours = LinearSegmentedColormap.from_list("held", ["#eef4fb", "#9cc3e6", "#2b6cb0"])
    scale = Normalize(0, max(1.0, peak / MIB))

    size = 0.95 if ranks <= 6 else 0.72  # inches a column
    figure = Figure(figsize=(max(11.0, 2 * ranks * size + 3.2), len(names) * 0.62 + 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (title, run) in zip(panels, runs, strict=True):
        for row, process in enumerate(run["processes"]):
            for device in process["devices"]:
                if not (device["context"] or device["peak_bytes"]):
                    continue
                stray = is_stray(process, device)
                corner = (device["index"] - 0.46, row - 0.43)
                panel.add_patch(
                    Rectangle(
                        corner,
                        0.92,
                        0.86,
                        facecolor=colours(scale(device["peak_bytes"] / MIB)),
                        edgecolor=STRAY if stray else "#7b8a9a",
                        linewidth=2.6 if stray else 0.6,
                    )
                )
                dark = scale(device["peak_bytes"] / MIB) > 0.6
                panel.text(
                    device["index"],
                    row + 0.1,
                    mebibytes(device["peak_bytes"]),
                    ha="center",
                    va="center",
                    color="white" if dark else "#1a202c",
                    fontsize=11,
                    fontweight="bold" if stray else "normal",
                )
                if device["context"]:
                    panel.plot(device["index"], row - 0.26, "o", markersize=4.5, color="white" if dark else "#1a202c")
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
        panel.set_title(title, fontsize=11.5, loc="left")
        strays = f"ranks > 0 on GPU 0: {mebibytes(run['stray_bytes'])} MiB, {contexts(run['stray_contexts'])}"
        panel.set_xlabel(
            strays, fontsize=10.5, color=STRAY if run["stray_contexts"] or run["stray_bytes"] else "#226b3a"
        )
    figure.colorbar(
        ScalarMappable(scale, colours),
        ax=list(panels),
        label="peak memory held (MiB)",
        fraction=0.04,
        pad=0.015,
    )
    figure.suptitle(
        f"Who holds what on which GPU: one image request, {ranks} ranks, {result['backend']} GPUs, torch "
        f"{result['torch']}",
        fontsize=12.5,
    )
    figure.legend(
        handles=[
            Rectangle(
                (0, 0),
                1,
                1,
                facecolor=colours(0.3),
                edgecolor=STRAY,
                linewidth=2.4,
                label="on a GPU that it does not own",
            ),
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                color="#1a202c",
                markersize=4.5,
                label="holds a CUDA context; the number is its memory in MiB",
            ),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10,
    )
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {target}: cannot write it ({error}).") from None
