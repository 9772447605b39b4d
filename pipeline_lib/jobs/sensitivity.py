"""Sensitivity of the loss to the weights of the dense model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from pipeline_lib.core import artifacts, ranks, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.measure import fisher, hutchinson
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.estimate import Estimate, Samples, estimates, relative_error
from pipeline_lib.measure.fisher import OutputMoments, moment_bytes
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.stats.inputs import calibration_rows


def sensitivity(workspace: Workspace, source: ModelParams, params: SensitivityParams) -> str:
    """Estimate the trace of every matrix's Hessian (hutchinson) or Fisher information (fisher).
    Returns a summary.

    Raises:
        SparselineError: a trace is NaN or infinite.
    """
    device = runtime.compute()
    checkpoint = open_source(workspace, source)
    entry = checkpoint.architecture
    listed = {matrix["name"]: matrix for matrix in workspace.included()}
    matrices = {
        index: {
            name: matrix
            for matrix in entry.layouts[index].matrices
            if (name := entry.matrix_name(index, matrix)) in listed
        }
        for index in range(entry.depth)
    }
    # In float32 whatever the checkpoint's dtype: second derivatives are differences of small numbers.
    model = BlockModel(checkpoint, torch.float32, device)
    # Only the training split: one artifact serves all variants, and some variants judge its effects
    # on the held-out split.
    subject = Subject(model, calibration_rows(workspace)["fit"], matrices)
    full = params.output_moments == "full"
    if (
        full
        and (size := moment_bytes([matrix["shape"] for matrix in listed.values()]))
        > params.moment_budget_bytes
    ):
        click.echo(
            f"sensitivity: full output moments take {size:,} bytes, more than moment_budget_bytes; diagonals"
            " instead"
        )
        full = False
    wanted = params.output_moments != "none"
    with _moments(workspace) as directory:
        moments = OutputMoments(directory, full) if wanted else None
        found = _estimate(subject, params, moments)
        if moments is not None:
            moments.finish(entry.depth)
        if not ranks.writes():
            return ""
    summary = found.summary()
    described = {
        name: value | {key: listed[name][key] for key in ("block", "kind")} for name, value in summary.items()
    }
    workspace.save(workspace.sensitivity / "sensitivity.json", described)
    artifacts.write_json(workspace.sensitivity / "by_depth.json", list(described.values()))
    facts: dict[str, Any] = {
        "estimator": params.estimator,
        "probes": len(found.samples),
        "rows_per_probe": params.rows_per_probe,
        "agreement": found.agreement,
        "wanted": params.agreement,
        "reached": found.reached,
        "relative_error": relative_error(summary),
        "output_moments": ("full" if full else "diagonal") if wanted else "none",
        "wanted_moments": params.output_moments,
    }
    workspace.save(workspace.sensitivity / "estimate.json", facts)
    reached = f"{'reached' if found.reached else 'below'} {params.agreement:g}"
    return (
        f"{len(described)} matrices by {facts['probes']} probes ({params.estimator}); rankings by both halves"
        f" agree to τ = {found.agreement:.2f} ({reached}), median standard error"
        f" {facts['relative_error']:.0%}"
    )


@contextmanager
def _moments(workspace: Workspace) -> Iterator[Path]:
    """The directory in which this process collects moments. That of the first process becomes the
    artifact.
    """
    path = workspace.sensitivity / "moments"
    if ranks.first():
        with workspace.directory(path) as directory:
            yield directory
        return
    own = artifacts.temporary_name(path)
    own.mkdir(parents=True)
    try:
        yield own
    finally:
        artifacts.remove(own)


def _estimate(subject: Subject, params: SensitivityParams, moments: OutputMoments | None) -> Estimate:
    """Add probes until the rankings agree or all are used, and return the last estimate."""

    def sample(probes: Sequence[int]) -> Samples:
        if params.estimator == "fisher":
            return fisher.samples(subject, params, probes, moments)
        if moments is not None:
            fisher.samples(subject, params, probes, moments)
        return hutchinson.samples(subject, params, probes)

    passes = -(-params.probes // params.probes_per_pass)
    groups = estimates(sample, params.probes, params.probes_per_pass, params.agreement)
    for found in track(groups, "sensitivity", "passes", passes):
        for name, value in found.summary().items():
            if not math.isfinite(value["trace"] + value["stderr"]):
                raise SparselineError(
                    f"The sensitivity of {name} is NaN or infinite; check the model's weights, or its loss on"
                    " this text."
                )
    return found
