"""The verdict on a pruned model, by thresholds. Imports nothing heavy."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline_lib.evaluation.metrics import metric, ordered
from pipeline_lib.evaluation.settings import VerdictParams


@dataclass(frozen=True)
class Measured:
    """Results of the evaluation of one model."""

    perplexity: Mapping[str, float]  # text -> value
    divergence: Mapping[str, Mapping[str, float]]  # text -> figure -> value; empty for the dense model
    tasks: Mapping[str, Mapping[str, Any]]  # task -> its facts


@dataclass(frozen=True)
class Finding:
    """One result and its limit."""

    figure: str
    where: str  # text or task
    value: float
    most: float

    @property
    def met(self) -> bool:
        return self.value <= self.most

    def __str__(self) -> str:
        return f"{self.figure} {self.where} {self.value:.4g} {'<=' if self.met else '>'} {self.most:g}"


@dataclass(frozen=True)
class Verdict:
    """ACCEPT if every result with a limit meets it."""

    findings: tuple[Finding, ...]

    @property
    def accepted(self) -> bool:
        return all(finding.met for finding in self.findings)

    @property
    def word(self) -> str:
        """``not judged`` if no result has a limit."""
        return ("ACCEPT" if self.accepted else "REGRESSION") if self.findings else "not judged"

    @property
    def reasons(self) -> str:
        """The limits that are exceeded; if none is, all comparisons."""
        told = [finding for finding in self.findings if not finding.met] or self.findings
        return ", ".join(map(str, told))


def judge(params: VerdictParams, own: Measured, dense: Measured) -> Verdict:
    """Compare every text's perplexity and divergence, and the main accuracy of every task that both
    models were measured on.
    """
    return Verdict(tuple(_findings(params, own, dense)))


def _findings(params: VerdictParams, own: Measured, dense: Measured) -> Iterator[Finding]:
    if params.perplexity_ratio is not None:
        for text, value in own.perplexity.items():
            yield Finding("perplexity ratio", text, value / dense.perplexity[text], params.perplexity_ratio)
    if params.kl is not None:
        for text, found in own.divergence.items():
            yield Finding("KL", text, found["kl"], params.kl)
    if params.accuracy_drop is not None:
        for task in (task for task in own.tasks if task in dense.tasks):
            name = ordered(own.tasks[task]["metrics"])[0]
            if metric(name).share:
                mine, theirs = (one.tasks[task]["metrics"][name] for one in (own, dense))
                yield Finding(
                    "accuracy drop",
                    task,
                    _errors(theirs["value"] - mine["value"], mine, theirs),
                    params.accuracy_drop,
                )


def _errors(drop: float, *figures: Mapping[str, float | None]) -> float:
    """A difference of two means in units of its standard error, as if the two were independent. If
    both are of the same items, the true error is smaller.
    """
    error = math.hypot(*(figure["stderr"] or 0.0 for figure in figures))
    return drop / error if error else math.inf if drop > 0 else 0.0
