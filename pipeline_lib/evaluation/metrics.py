"""The supported metrics of lm-eval. Imports nothing heavy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """Description of one metric."""

    words: str
    share: bool  # in [0, 1], where more is better; else a positive number, where less is better


METRICS = {  # the first one that a task has is its main metric
    "acc": Metric("accuracy", True),
    "exact_match": Metric("exact match", True),
    "acc_norm": Metric("accuracy normalised by length", True),
    "word_perplexity": Metric("perplexity per word", False),
    "byte_perplexity": Metric("perplexity per byte", False),
    "bits_per_byte": Metric("bits per byte", False),
    "perplexity": Metric("perplexity of the target", False),
}


def metric(name: str) -> Metric:
    """The metric of a key in build/tasks: a name, or ``<metric>, <filter>`` if a task filters its
    answers.
    """
    return METRICS[name.split(", ")[0]]


def by_task(
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]], several: bool
) -> dict[str, Mapping[str, Any]]:
    """Task -> its facts, from preset -> task -> facts; with ``several`` presets, the preset's name
    precedes the task's.
    """
    return {
        f"{preset} {task}" if several else task: facts
        for preset, tasks in presets.items()
        for task, facts in tasks.items()
    }


def ordered(names: Iterable[str]) -> list[str]:
    """Names of metrics, the main one first; filters of a metric in alphabetical order."""
    known = list(METRICS)
    return sorted(names, key=lambda name: (known.index(name.split(", ")[0]), name))
