"""Predict memory, disk and rough time for the configured model, before anything runs (not a stage: nothing is written)."""

import click
import torch

from pipeline_lib.core import names, params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.evaluation.settings import EvaluateParams
from pipeline_lib.evaluation.tasks import Preset, TasksParams, Unread, request_lengths
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.induce.induce import InduceParams
from pipeline_lib.measure.curves import CurvesParams
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.models.source import ModelParams, fetch
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.planning.estimate import Work, answering, estimate, evaluating, exporting, measure_speed, pruning
from pipeline_lib.prune.prune import VariantParams
from pipeline_lib.stats.walk import CalibrateParams
from pipeline_lib.texts.texts import TextParams


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage():
        names.check()
        model = params.load(ModelParams, "model")
        checkpoint = open_checkpoint(fetch(model))
        texts = {name: params.load(TextParams, f"texts.{name}") for name in params.section("texts")}
        calibrating = [text for text in texts.values() if text.use == "calibrate"]
        if len(calibrating) != 1:
            raise SparselineError(f"params.yaml: texts must hold exactly one text with use: calibrate, not {len(calibrating)}.")
        (calibration,) = calibrating
        measured = [(text.rows, text.length) for text in texts.values() if text.use == "evaluate"]
        listed, induced_names, curved_names, exported = (
            params.section(name) or {} for name in ("variants", "induced", "curved", "exported")
        )
        variants = {name: params.parse(VariantParams, params.merged("prune", f"variants.{name}"), f"variants.{name}") for name in listed}
        tasks = params.load(TasksParams, "tasks")
        presets = {name: params.load(Preset, f"presets.{name}") for name in tasks.presets}
        induced = [params.parse(InduceParams, params.merged("induce", f"induced.{name}"), f"induced.{name}") for name in induced_names]
        curved = [params.parse(CurvesParams, params.merged("curves", f"curved.{name}"), f"curved.{name}") for name in curved_names]
        sensitivity = params.load(SensitivityParams, "sensitivity")
        calibrate = params.load(CalibrateParams, "calibrate")
        compute_dtype = getattr(torch, model.compute_dtype)
        work = Work(
            rows=calibration.rows,
            length=calibration.length,
            held_out=calibration.held_out,
            compute_dtype=compute_dtype,
            batch_rows=calibrate.batch_rows,
            median_tokens=calibrate.median_tokens,
            second_order=sensitivity.estimator == "hutchinson",
            probes=sensitivity.probes,
            agreement=sensitivity.agreement,
            rows_per_probe=sensitivity.rows_per_probe,
            probes_per_pass=sensitivity.probes_per_pass,
            full_moments=sensitivity.output_moments == "full",
            moment_budget_bytes=sensitivity.moment_budget_bytes,
            induction_steps=max((settings.steps for settings in induced), default=0),
            densities=max((len(settings.densities) for settings in curved), default=0),
            gram_budget_bytes=calibrate.gram_budget_bytes,
        )
        steps = estimate(checkpoint, work)
        runs = dict.fromkeys(steps, 1) | {"induce": len(induced), "curves": len(curved)}
        for name, variant in variants.items():
            steps[f"prune {name}"] = pruning(checkpoint, f"prune {name}", variant, calibration.rows, calibration.length, compute_dtype)
        steps["evaluate"] = evaluating(checkpoint, params.load(EvaluateParams, "evaluate"), measured)
        runs["evaluate"] = len(variants) + 1
        unknown = []
        for name, preset in presets.items():
            try:
                lengths = request_lengths(load_tokenizer(checkpoint.path, checkpoint.config.vocab_size), tasks.path, preset)
            except Unread as error:
                unknown.append(f"tasks {name} are not counted. {error}")
                continue
            steps[f"tasks {name}"] = answering(checkpoint, f"tasks {name}", tasks, lengths)
            runs[f"tasks {name}"] = len(tasks.variants) + 1
        for name in exported:
            formats = params.parse(ExportParams, params.merged("export", f"exported.{name}"), "export").formats
            steps[f"export {name}"] = exporting(checkpoint, f"export {name}", formats, variants[name].selection.sparsity)
        speed = measure_speed(runtime.device())
        click.echo(
            f"{checkpoint.path}: {checkpoint.parameters:,} parameters, {checkpoint.architecture.depth} blocks; {speed / 1e9:.0f} GFLOP/s here\n"
        )
        click.echo(f"{'stage':<20}{'runs':>5}{'memory':>12}{'disk each':>12}{'time each':>18}")
        least = most = 0.0
        for name, step in steps.items():
            if runs.get(name, 1):
                # A stage takes a few seconds to start, whatever the model.
                early, late = 4 + step.least * step.seconds(speed), 4 + step.seconds(speed)
                least, most = least + early * runs.get(name, 1), most + late * runs.get(name, 1)
                click.echo(
                    f"{name:<20}{runs.get(name, 1):>5}{size(step.memory_bytes):>12}{size(step.disk_bytes):>12}{span(early, late):>18}"
                )
        disk = sum(step.disk_bytes * runs.get(name, 1) for name, step in steps.items())
        peak = max(step.memory_bytes for name, step in steps.items() if runs.get(name, 1))
        for told in unknown:
            click.echo(told)
        click.echo(
            f"\npeak memory {size(peak)}, disk {size(disk)} (each output also in DVC's cache unless links are set), about {span(least, most)} in all"
        )
        click.echo("text, choose and report are left out: text holds the text that it reads and its tokens, the others next to nothing")


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def span(least: float, most: float) -> str:
    return " to ".join(dict.fromkeys((duration(least), duration(most))))


if __name__ == "__main__":
    main()
