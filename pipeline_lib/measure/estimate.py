"""From samples per probe to an estimate: probes are added until the matrices' ranking holds still."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# per probe: logical matrix -> an unbiased sample of its mean Hessian or Fisher diagonal
Samples = list[dict[str, float]]


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's τ-b of two rankings of the same things: 1 the same order, −1 the reverse, ties accounted for.

    Two rankings without any order agree (1); one without and one with an order do not (0).
    """
    upper = np.triu_indices(len(a), 1)
    x, y = (np.sign(np.subtract.outer(v, v)[upper]) for v in (np.asarray(a, float), np.asarray(b, float)))
    ordered = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float(x @ y) / ordered if ordered else float(not x.any() and not y.any())


def split_half(samples: Samples) -> float:
    """Kendall's τ between the rankings by the even probes' mean and by the odd probes'. Of the
    whole mean it is an underestimate.
    """
    halves = [
        [float(np.mean([sample[name] for sample in samples[start::2]])) for name in samples[0]]
        for start in (0, 1)
    ]
    return kendall(*halves)


@dataclass(frozen=True)
class Estimate:
    """Samples so far, and how well they agree."""

    samples: Samples
    agreement: float  # split-half Kendall τ
    reached: bool

    def summary(self) -> dict[str, dict[str, float]]:
        """Per matrix: ``trace`` (mean over probes), its ``stderr``, and ``sensitivity`` = max(trace, stderr).

        The floor is for estimates that came out negative or tiny: all that is known of them is that
        they are about as large as their error at most, and whoever ranks or weighs matrices needs
        positive numbers.
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
    """The estimate after each group of probes; the last one is where the halves agree, or where
    ``most`` probes are used up.

    Args:
        sample: the samples of the probes of these numbers.
        at_once: probes in a group.
        agreement: split-half Kendall τ to be reached.
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
    """Median over matrices of the standard error in units of the sensitivity."""
    return float(
        np.median(
            [one["stderr"] / one["sensitivity"] if one["sensitivity"] else 0.0 for one in summary.values()]
        )
    )
