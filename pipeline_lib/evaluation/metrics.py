"""Which of lm-eval's metrics are read of a task, and what they are. Imports nothing heavy."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a reader needs to know of one."""

    words: str
    share: bool  # in [0, 1], where more is better; else a positive number, where less is better


METRICS = {  # the first of a task's is its main one
    "acc": Metric("accuracy", True),
    "exact_match": Metric("exact match", True),
    "acc_norm": Metric("accuracy normalised by length", True),
    "word_perplexity": Metric("perplexity per word", False),
    "byte_perplexity": Metric("perplexity per byte", False),
    "bits_per_byte": Metric("bits per byte", False),
    "perplexity": Metric("perplexity of the target", False),
}


def metric(name: str) -> Metric:
    """Of a figure in build/tasks: a metric, or ``<metric>, <filter>`` where a task filters its answers."""
    return METRICS[name.split(", ")[0]]


def ordered(names: Iterable[str]) -> list[str]:
    """Names of figures, the main one first; filters of a metric in alphabetical order."""
    known = list(METRICS)
    return sorted(names, key=lambda name: (known.index(name.split(", ")[0]), name))
