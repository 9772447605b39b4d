"""How sensitive the loss is to each matrix: trace of its Hessian (hutchinson) or Fisher information (fisher), on the original model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.measure import fisher, hutchinson
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.estimate import Samples, estimates, relative_error
from pipeline_lib.measure.fisher import OutputMoments, moment_bytes
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.source import ModelParams, open_source
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.stats.inputs import calibration_rows

OUT = Path("build/sensitivity")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage("sensitivity", OUT / "sensitivity.json") as tell:
        settings = params.load(SensitivityParams, "sensitivity")
        checkpoint = open_source(params.load(ModelParams, "model"))
        entry = checkpoint.architecture
        included = {m["name"]: m for m in artifacts.read_json(Path("build/prepare/matrices.json")) if m["included"]}
        matrices = {
            index: {name: matrix for matrix in entry.matrices if (name := entry.matrix_name(index, matrix)) in included}
            for index in range(entry.depth)
        }
        # In float32 whatever the checkpoint's dtype: second derivatives are differences of small numbers.
        model = BlockModel(checkpoint, torch.float32, runtime.device())
        # Fitting rows alone: one artifact serves all variants, and in some of them the held-out rows judge what it leads to.
        subject = Subject(model, calibration_rows()["fit"], matrices)

        full = settings.output_moments == "full"
        if full and (size := moment_bytes([m["shape"] for m in included.values()])) > settings.moment_budget_bytes:
            click.echo(f"sensitivity: full output moments take {size:,} bytes, more than moment_budget_bytes; diagonals instead")
            full = False
        wanted = settings.output_moments != "none"

        with artifacts.replacing(OUT / "moments") as directory:
            directory.mkdir()
            moments = OutputMoments(directory, full) if wanted else None

            def sample(probes: Sequence[int]) -> Samples:
                if settings.estimator == "fisher":
                    return fisher.samples(subject, settings, probes, moments)
                if moments is not None:
                    fisher.samples(subject, settings, probes, moments)
                return hutchinson.samples(subject, settings, probes)

            passes = -(-settings.probes // settings.probes_per_pass)
            groups = estimates(sample, settings.probes, settings.probes_per_pass, settings.agreement)
            for found in track(groups, "sensitivity", "passes", passes):
                summary = found.summary()
                if wrong := [name for name, value in summary.items() if not math.isfinite(value["trace"] + value["stderr"])]:
                    raise SparselineError(
                        f"The sensitivity of {wrong[0]} is NaN or infinite; check the model's weights, or its loss on this text."
                    )

        described = {name: value | {k: included[name][k] for k in ("block", "kind")} for name, value in summary.items()}
        artifacts.write_json(OUT / "sensitivity.json", described)
        artifacts.write_json(OUT / "by_depth.json", list(described.values()))
        facts: dict[str, Any] = {
            "estimator": settings.estimator,
            "probes": len(found.samples),
            "rows_per_probe": settings.rows_per_probe,
            "agreement": found.agreement,
            "wanted": settings.agreement,
            "reached": found.reached,
            "relative_error": relative_error(summary),
            "output_moments": ("full" if full else "diagonal") if wanted else "none",
            "wanted_moments": settings.output_moments,
        }
        artifacts.write_json(OUT / "estimate.json", facts)
        tell(
            f"sensitivity: {settings.estimator}, {len(described)} matrices, {facts['probes']} probes; split-half Kendall τ {found.agreement:.2f}, "
            f"{'reached' if found.reached else 'capped below'} {settings.agreement:g}; median relative standard error {facts['relative_error']:.0%}"
        )


if __name__ == "__main__":
    main()
