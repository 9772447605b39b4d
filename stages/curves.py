"""Measure one variant's error curves: every matrix pruned to a few densities, what that changes, weighted by what the loss feels."""

from pathlib import Path
from typing import Any

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.core.progress import track
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.measure.curves import CurvesParams, measure
from pipeline_lib.models.source import ModelParams
from pipeline_lib.prune.settings import StepsParams
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.inputs import calibration_rows, open_model
from pipeline_lib.stats.walk import CalibrateParams, stored_or_walked

MATRICES = Path("build/prepare/matrices.json")
STATISTICS = Path("build/calibrate")
SENSITIVITY = Path("build/sensitivity")


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    with runtime.stage(f"curves-{variant}", Path(f"build/curves/{variant}.json")) as tell:
        settings = params.parse(CurvesParams, params.merged("curves", f"curved.{variant}"), f"curved.{variant}")
        merged = params.merged("prune.selection", f"variants.{variant}.selection")
        selection = params.parse(SelectionParams, merged, f"variants.{variant}.selection")
        merged = params.merged("prune.reconstruction", f"variants.{variant}.reconstruction")
        steps = params.parse(StepsParams, merged.only(StepsParams), f"variants.{variant}.reconstruction").steps
        calibrate = params.load(CalibrateParams, "calibrate")
        model = open_model(params.load(ModelParams, "model"))
        entry, checkpoint = model.checkpoint.architecture, model.checkpoint
        listed = {m["name"]: m for m in artifacts.read_json(MATRICES) if m["included"]}
        for name, m in listed.items():
            selection.shape.quantum(name, tuple(m["shape"]))  # refuses an N:M that does not divide
        sensitivities = artifacts.read_json(SENSITIVITY / "sensitivity.json")
        fit = calibration_rows()["fit"]
        curves: dict[str, dict[str, Any]] = {}
        statistics = stored_or_walked(STATISTICS, model, fit, fit[:0], calibrate)
        for index, sites in track(statistics, f"curves {variant}", "blocks", entry.depth):
            tensors = checkpoint.block(index)
            included = [matrix for matrix in entry.matrices if entry.matrix_name(index, matrix) in listed]
            path = artifacts.block_file(SENSITIVITY / "moments", index)
            moments = artifacts.read_tensors(path)[0] if path.exists() else {}
            where = f"{entry.blocks}.{index}"
            found = measure(DenseBlock(entry, where, tensors, sites), included, moments, selection, "obs" in steps, settings)
            curves |= {f"{where}.{label}": sensitivities[f"{where}.{label}"] | facts for label, facts in found.items()}
        artifacts.write_json(Path(f"build/curves/{variant}.json"), curves)
        points = len(next(iter(curves.values()))["curve"]["density"])
        tell(f"curves {variant}: {len(curves)} matrices at {points} densities, moments in {'use' if moments else 'none'}")


if __name__ == "__main__":
    main()
