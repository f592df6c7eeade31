"""Means, standard deviations and bootstrap intervals over seeds and tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000


class Spread(NamedTuple):
    """Mean and sample standard deviation; the deviation of a single value is NaN."""

    mean: float
    std: float


class Estimate(NamedTuple):
    """A value and its interval; the bounds are NaN where the data do not determine them."""

    value: float
    low: float
    high: float


def spread(values: ArrayLike) -> Spread:
    r"""Mean and sample standard deviation (divisor n - 1).

    Args:
        values: the n values.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        Spread(mean=2.0, std=1.0)
        >>> spread([1.0])
        Spread(mean=1.0, std=nan)
    """
    x = np.asarray(values, dtype=float)
    return Spread(float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else math.nan)


def mean(scores: ArrayLike) -> NDArray[np.floating]:
    """Return the mean along the last axis."""
    return np.asarray(scores, dtype=float).mean(-1)


def iqm(scores: ArrayLike) -> NDArray[np.floating]:
    r"""Interquartile mean along the last axis: the mean of the middle half.

    Of n sorted values the first and the last ``floor(n / 4)`` are dropped; with n up to three this
    is the plain mean. The same as ``scipy.stats.trim_mean(scores, 0.25, axis=-1)``.

    Args:
        scores: the values, ``[..., n]``.

    Returns:
        The interquartile means, ``[...]``.

    Source: Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*,
    2021, arXiv:2108.13264.

    Example:
        >>> float(iqm([0.0, 1.0, 2.0, 30.0]))
        1.5
    """
    x = np.sort(np.asarray(scores, dtype=float), axis=-1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(-1)


def bootstrap(
    strata: Sequence[ArrayLike],
    statistic: Callable[[ArrayLike], NDArray[np.floating]] = iqm,
    *,
    level: float = 0.95,
) -> Estimate:
    r"""A statistic of all runs of a study, with its stratified bootstrap interval.

    Each of `RESAMPLES` resamples draws the runs of every task with replacement, as many as the task
    has. The interval lies between the percentiles ``100 (1 -+ level) / 2`` of the statistic over
    the resamples. The generator is seeded, so that equal scores give equal intervals.

    Args:
        strata: one array of scores per task; lengths may differ.
        statistic: maps ``[..., n]`` to ``[...]``. Defaults to :func:`iqm`.
        level: coverage probability of the interval. Defaults to ``0.95``.

    Returns:
        The statistic of all scores pooled. The bounds are NaN if no task has two runs, because the
        variation over seeds is then unknown.

    Source: Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*,
    2021, arXiv:2108.13264; the procedure of their library rliable.

    Example:
        >>> bootstrap([[10.0, 20.0, 30.0, 40.0], [60.0, 60.0]])
        Estimate(value=37.5, low=27.5, high=45.0)
        >>> bootstrap([[10.0], [60.0]])
        Estimate(value=35.0, low=nan, high=nan)
    """
    arrays = [np.asarray(stratum, dtype=float) for stratum in strata]
    value = float(statistic(np.concatenate(arrays)))
    if max(x.size for x in arrays) == 1:
        return Estimate(value, math.nan, math.nan)
    rng = np.random.default_rng(0)
    resamples = [x[rng.integers(x.size, size=(RESAMPLES, x.size))] for x in arrays]
    outside = 50 * (1 - level)
    low, high = np.percentile(
        statistic(np.concatenate(resamples, axis=-1)), [outside, 100 - outside]
    )
    return Estimate(value, float(low), float(high))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    r"""Spearman's rank correlation of two samples; equal values share their mean rank.

    The same as ``scipy.stats.spearmanr(x, y).statistic``.

    Args:
        x: the n values of one quantity.
        y: the n values of the other.

    Returns:
        The correlation in [-1, 1]; NaN if one of the samples is constant.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    ranks = []
    for sample in (x, y):
        _, inverse, counts = np.unique(sample, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    first, second = (rank - rank.mean() for rank in ranks)
    return float((first @ second / np.sqrt(first @ first * (second @ second))).round(12))
