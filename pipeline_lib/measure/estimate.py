"""Estimates from probes, which are added until the ranking of the matrices is stable."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# per probe: logical matrix -> an unbiased sample of its mean Hessian or Fisher diagonal
Samples = list[dict[str, float]]


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's τ-b of two rankings: 1 for the same order, −1 for the reverse; it accounts for ties.

    Two rankings without any order agree (1); one with and one without an order do not (0).
    """
    upper = np.triu_indices(len(a), 1)
    x, y = (np.sign(np.subtract.outer(v, v)[upper]) for v in (np.asarray(a, float), np.asarray(b, float)))
    ordered = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float(x @ y) / ordered if ordered else float(not x.any() and not y.any())


def split_half(samples: Samples) -> float:
    """Kendall's τ between the rankings by the means of the even and of the odd probes. It
    underestimates the reliability of the whole mean.
    """
    halves = [
        [float(np.mean([sample[name] for sample in samples[start::2]])) for name in samples[0]]
        for start in (0, 1)
    ]
    return kendall(*halves)


@dataclass(frozen=True)
class Estimate:
    """Samples so far, and their agreement."""

    samples: Samples
    agreement: float  # split-half Kendall τ
    reached: bool

    def summary(self) -> dict[str, dict[str, float]]:
        """Per matrix: ``trace`` (mean over probes), its ``stderr``, and ``sensitivity`` = max(trace,
        stderr).

        Estimates below their standard error are replaced by it: they are indistinguishable from
        zero, and rankings need positive numbers.
        """
        found = {}
        for name in self.samples[0]:
            values = np.array([sample[name] for sample in self.samples])
            trace, stderr = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
            found[name] = {"trace": trace, "stderr": stderr, "sensitivity": max(trace, stderr)}
        return found


def estimates(
    sample: Callable[[Sequence[int]], Samples], most: int, at_once: int, agreement: float
) -> Iterator[Estimate]:
    """Yield the estimate after each group of probes, until the halves agree or ``most`` probes are
    used.

    Args:
        sample: numbers of probes -> their samples.
        at_once: probes per group.
        agreement: requested split-half Kendall τ.
    """
    samples: Samples = []
    while len(samples) < most:
        samples = samples + sample(range(len(samples), min(len(samples) + at_once, most)))
        if len(samples) > 1:
            tau = split_half(samples)
            yield Estimate(samples, tau, tau >= agreement)
            if tau >= agreement:
                return


def relative_error(summary: Mapping[str, Mapping[str, float]]) -> float:
    """Median over matrices of standard error / sensitivity."""
    return float(
        np.median(
            [one["stderr"] / one["sensitivity"] if one["sensitivity"] else 0.0 for one in summary.values()]
        )
    )
