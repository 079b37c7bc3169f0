"""Time two ways of doing one thing in turn, and return their ratio with its interval.

The machine's speed drifts, so the two are timed close together and in both orders, A B B A. Each such round gives one
ratio, in which an even drift cancels. The figure is the median of the rounds' ratios. Its interval is that of the sign
test, which assumes no distribution: the true figure lies in it 19 times out of 20. A row is over its budget only if
the whole interval is.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUNDS = 25
FEWER_ROUNDS = 9  # If one repetition takes longer than a sample.
LEAST_ROUNDS = 6  # With fewer, no interval holds the true median 19 times out of 20.
SAMPLE_NS = 20_000_000  # The approximate time of a sample.

Run = Callable[[int], None]  # Repeats the work; the argument is how often.


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    what : str
        The two ways that are compared.
    ratio, low, high : float
        The median of the rounds, and the interval in which the true median lies 19 times out of 20, in `unit`.
    budget : float or None
        The budget of the project's design.
    unit : str
        ``"x"`` for a ratio, otherwise ``"us"`` or ``"ms"``.
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
    """Return the interval that holds the true median of the values 19 times out of 20.

    By the sign test: the number of values below the true median is distributed as the heads in as many tosses of a
    coin. With fewer than six values, the interval is their whole range.
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
    """Return the row for the figures of the rounds."""
    return Row(what, statistics.median(values), *interval(values), budget, unit, base_us)


def sample(run: Run, times: int, clock: Callable[[], int] = time.thread_time_ns) -> float:
    """Return the time of one of `times` repetitions, in nanoseconds of this thread's processor time.

    Wall time would include the work of other programs on the machine.
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

    A quarter of a sample also runs untimed, because opening and closing doors makes Python discard specialised code.
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


def interleave(runs: Sequence[Run], seconds: float = 20.0) -> list[list[float]]:
    """Time several ways of doing one thing in turn, A B C C B A; return for each round each one's wall time, in ns.

    For work that several processes share: how long it takes is not their processor time. Each sample has as many
    repetitions as the fastest way needs for a sample, and one before it that is not timed. After `seconds`, no further
    round begins if there have been enough for an interval.
    """
    for run in runs:
        run(1)
    fastest = min(sample(run, 1, time.perf_counter_ns) for run in runs)
    times = max(1, int(SAMPLE_NS / fastest))

    def figure(run: Run) -> float:
        run(1)
        return sample(run, times, time.perf_counter_ns)

    results: list[list[float]] = []
    start = time.monotonic()
    gc.collect()
    gc.disable()
    try:
        while len(results) < ROUNDS and (len(results) < LEAST_ROUNDS or time.monotonic() - start < seconds):
            there = [figure(run) for run in runs]
            back = [figure(run) for run in reversed(runs)]
            results.append([(one + other) / 2 for one, other in zip(there, reversed(back), strict=True)])
    finally:
        gc.enable()
    return results
