"""Predict memory, disk and rough time for the configured model, before anything runs (not a stage: nothing is written)."""

import click
import torch

from pipeline_lib.allocation.curves import CurvesParams
from pipeline_lib.calibration.capture import CalibrateParams
from pipeline_lib.calibration.texts import TextParams
from pipeline_lib.core import params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.induction.induce import InduceParams
from pipeline_lib.models.checkpoint import locate, open_checkpoint
from pipeline_lib.models.source import ModelParams
from pipeline_lib.planning.estimate import Work, estimate, exporting, measure_speed, pruning
from pipeline_lib.pruning.prune import VariantParams
from pipeline_lib.sensitivity.settings import SensitivityParams


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage():
        model = params.load(ModelParams, "model")
        checkpoint = open_checkpoint(locate(model.path, model.id, model.revision))
        texts = {name: params.load(TextParams, f"texts.{name}") for name in params.section("texts")}
        calibration = next(text for text in texts.values() if text.use == "calibrate")
        names = params.section("variants")
        variants = {name: params.parse(VariantParams, params.merged("prune", f"variants.{name}"), f"variants.{name}") for name in names}
        sensitivity = params.load(SensitivityParams, "sensitivity")
        calibrate = params.load(CalibrateParams, "calibrate")
        activation_bytes = getattr(torch, model.compute_dtype).itemsize
        work = Work(
            rows=calibration.rows,
            length=calibration.length,
            batch_rows=calibrate.batch_rows,
            evaluation_tokens=sum(text.rows * text.length for text in texts.values() if text.use == "evaluate"),
            second_order=sensitivity.estimator == "hutchinson",
            probes=sensitivity.probes,
            agreement=sensitivity.agreement,
            rows_per_probe=sensitivity.rows_per_probe,
            probes_per_pass=sensitivity.probes_per_pass,
            full_moments=sensitivity.output_moments == "full",
            moment_budget_bytes=sensitivity.moment_budget_bytes,
            induction_steps=params.load(InduceParams, "induce").steps,
            densities=len(params.load(CurvesParams, "curves").densities),
            gram_budget_bytes=calibrate.gram_budget_bytes,
            activation_bytes=activation_bytes,
        )
        steps = estimate(checkpoint, work)
        evaluate = steps.pop("evaluate")
        for name, variant in variants.items():
            steps[f"prune {name}"] = pruning(checkpoint, f"prune {name}", variant, calibration.rows, calibration.length, activation_bytes)
        steps["evaluate"] = evaluate
        for name in params.section("exported") or {}:
            if name not in variants:
                raise SparselineError(f"params.yaml: exported.{name} is no variant; name one of variants: {', '.join(variants) or 'none'}.")
            formats = params.parse(ExportParams, params.merged("export", f"exported.{name}"), "export").formats
            steps[f"export {name}"] = exporting(checkpoint, f"export {name}", formats, variants[name].selection.sparsity)
        speed = measure_speed(runtime.device())
        runs = dict.fromkeys(steps, 1) | {
            "induce": len(params.section("induced")),
            "curves": len(params.section("curved")),
            "evaluate": len(variants) + 1,
        }
        click.echo(
            f"{checkpoint.path}: {checkpoint.parameters:,} parameters, {checkpoint.architecture.depth} blocks; {speed / 1e9:.0f} GFLOP/s here\n"
        )
        click.echo(f"{'stage':<20}{'runs':>5}{'memory':>12}{'disk each':>12}{'time each':>18}")
        least = most = 0.0
        for name, step in steps.items():
            if runs[name]:
                # A stage takes a few seconds to start, whatever the model.
                early, late = 4 + step.least * step.seconds(speed), 4 + step.seconds(speed)
                least, most = least + early * runs[name], most + late * runs[name]
                click.echo(f"{name:<20}{runs[name]:>5}{size(step.memory_bytes):>12}{size(step.disk_bytes):>12}{span(early, late):>18}")
        disk = sum(step.disk_bytes * runs[name] for name, step in steps.items())
        peak = max(step.memory_bytes for name, step in steps.items() if runs[name])
        click.echo(
            f"\npeak memory {size(peak)}, disk {size(disk)} (each output also in DVC's cache unless links are set), about {span(least, most)} in all"
        )


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def span(least: float, most: float) -> str:
    return " to ".join(dict.fromkeys((duration(least), duration(most))))


if __name__ == "__main__":
    main()
