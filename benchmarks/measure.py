"""Two ways of doing one thing, timed in turn, as a ratio with its interval.

The machine's speed drifts, so the two are timed close together and in both orders, A B B A, and each such round gives
one ratio: what drifts evenly cancels. The figure is the median of the rounds' ratios. Its interval is the distribution-
free one of the median (by the sign test): the true figure lies in it 19 times out of 20. A row is over its budget only
if the whole interval is.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUNDS = 25
FEWER_ROUNDS = 9  # where one repetition takes longer than a whole sample
SAMPLE_NS = 20_000_000  # how long one sample takes, about

Run = Callable[[int], None]  # does the thing that many times


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    what : str
        What is compared with what.
    ratio, low, high : float
        The median of the rounds, and the interval in which the true one lies 19 times out of 20; ratios, or
        microseconds or milliseconds where `unit` says so.
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

    @property
    def over(self) -> bool:
        """Whether the figure is above its budget, beyond doubt."""
        return self.budget is not None and self.low > self.budget


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval that holds the median of what the values were drawn from 19 times out of 20.

    By the sign test: as many values lie below the true median as heads fall in as many tosses of a coin. The whole
    range if there are fewer than six values.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 0.05:
            break
        rank += 1
    return ordered[max(rank - 1, 0)], ordered[count - max(rank, 1)]


def row(what: str, values: Sequence[float], budget: float | None, unit: str = "x", base_us: float = 0.0) -> Row:
    """Return the row of the rounds' figures."""
    return Row(what, statistics.median(values), *interval(values), budget, unit, base_us)


def sample(run: Run, times: int, clock: Callable[[], int] = time.thread_time_ns) -> float:
    """Return how long one of `times` repetitions takes, in nanoseconds of this thread's processor time.

    Not the wall's: a shared machine would add what others do.
    """
    start = clock()
    run(times)
    return (clock() - start) / times


def compare(
    what: str,
    base: Run,
    ours: Run,
    budget: float | None,
    *,
    before_base: Callable[[], None] = lambda: None,
    before_ours: Callable[[], None] = lambda: None,
    clock: Callable[[], int] = time.thread_time_ns,
) -> Row:
    """Time `ours` against `base`; `before_base` and `before_ours` run untimed before each of their samples.

    So does a quarter of a sample: opening and closing doors makes Python forget what it had specialised.
    """
    before_ours()
    ours(1)
    before_base()
    base(1)
    times = max(1, int(SAMPLE_NS / max(1.0, min(sample(base, 1), sample(base, 1)))))
    once = sample(base, min(times, 1000))
    times = max(1, int(SAMPLE_NS / max(1.0, once)))
    ratios, bases = [], []

    def figure(before: Callable[[], None], run: Run) -> float:
        before()
        run(times // 4 + 1)
        return sample(run, times, clock)

    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS if once < SAMPLE_NS else FEWER_ROUNDS):
            first, second = figure(before_base, base), figure(before_ours, ours)
            third, fourth = figure(before_ours, ours), figure(before_base, base)
            ratios.append((second + third) / (first + fourth))
            bases.append((first + fourth) / 2)
    finally:
        gc.enable()
    return row(what, ratios, budget, base_us=statistics.median(bases) / 1000)
