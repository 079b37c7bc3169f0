"""Two ways of doing one thing, timed in turn, as a ratio.

The machine's speed drifts, so the two are timed round by round, and what comes second finds warmer caches and a fuller
heap, so the order alternates: A B, B A. The figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 20
SAMPLE_NS = 30_000_000  # how long one sample takes, about

Run = Callable[[int], None]  # does the thing that many times


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    what : str
        What is compared with what.
    ratio, low, high : float
        Median, least and greatest ratio of the rounds; or microseconds where `unit` says so.
    budget : float or None
        What DESIGN allows.
    unit : str
        ``"x"`` for a ratio.
    base_us : float
        The median time of the baseline in microseconds.
    """

    what: str
    ratio: float
    low: float
    high: float
    budget: float | None
    unit: str = "x"
    base_us: float = 0.0


def sample(run: Run, times: int) -> float:
    """Return how long one of `times` repetitions takes, in nanoseconds of this thread's processor time.

    Not the wall's: a shared machine would add what others do.
    """
    start = time.thread_time_ns()
    run(times)
    return (time.thread_time_ns() - start) / times


def compare(
    what: str,
    base: Run,
    ours: Run,
    budget: float | None,
    *,
    before_base: Callable[[], None] = lambda: None,
    before_ours: Callable[[], None] = lambda: None,
) -> Row:
    """Time `ours` against `base`; `before_base` and `before_ours` run untimed before each of their samples."""
    before_ours()
    ours(1)
    before_base()
    base(1)
    times = max(1, int(SAMPLE_NS / max(1.0, min(sample(base, 1), sample(base, 1)))))
    times = max(1, int(SAMPLE_NS / max(1.0, sample(base, min(times, 1000)))))
    ratios, bases = [], []
    gc.collect()
    gc.disable()
    try:
        for number in range(ROUNDS):
            pair = [(before_base, base), (before_ours, ours)]
            figures = {}
            for before, run in pair if number % 2 else reversed(pair):
                before()
                figures[run] = sample(run, times)
            ratios.append(figures[ours] / figures[base])
            bases.append(figures[base])
    finally:
        gc.enable()
    middle = statistics.median(ratios)
    return Row(what, middle, min(ratios), max(ratios), budget, base_us=statistics.median(bases) / 1000)
