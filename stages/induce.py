"""Learn one variant's factors and selection weights, block by block, kept only where the held-out rows agree; resumes after a kill."""

from pathlib import Path

import click
import torch

from pipeline_lib.allocation.budget import target
from pipeline_lib.calibration.capture import CalibrateParams, stored_or_walked
from pipeline_lib.calibration.inputs import CALIBRATION, calibration_rows, open_model
from pipeline_lib.core import artifacts, params, runtime, scratch
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.induction.gate import Gate
from pipeline_lib.induction.induce import InduceParams, induce_block
from pipeline_lib.induction.resume import keep, kept
from pipeline_lib.models.source import MODEL, ModelParams
from pipeline_lib.pruning.settings import SelectionParams, StepsParams
from pipeline_lib.transforms.transform import read_transforms, write_transforms

MATRICES = Path("build/prepare/matrices.json")
STATISTICS = Path("build/calibrate")
START = Path("build/scale/transform.safetensors")


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    with runtime.stage(f"induce-{variant}", Path(f"build/induce/{variant}/transform.safetensors")) as tell:
        settings = params.parse(InduceParams, params.merged("induce", f"induced.{variant}"), f"induced.{variant}")
        merged = params.merged("prune.selection", f"variants.{variant}.selection")
        selection = params.parse(SelectionParams, merged, f"variants.{variant}.selection")
        if selection.sparsity == 0:
            raise SparselineError(
                f"params.yaml: variants.{variant} prunes nothing (sparsity 0), so that there is nothing to induce; take it out of `induced`."
            )
        merged = params.merged("prune.reconstruction", f"variants.{variant}.reconstruction")
        steps = params.parse(StepsParams, merged.only(StepsParams), f"variants.{variant}.reconstruction").steps
        source = params.load(ModelParams, "model")
        model = open_model(source)
        entry, checkpoint = model.checkpoint.architecture, model.checkpoint
        listed = [m for m in artifacts.read_json(MATRICES) if m["included"]]
        for m in listed:
            selection.shape.quantum(m["name"], tuple(m["shape"]))  # refuses an N:M that does not divide
        included = {m["name"] for m in listed}
        starts, _ = read_transforms(START, entry.depth)
        rows = calibration_rows()
        calibrate = params.load(CalibrateParams, "calibrate")
        judging = rows["held_out"]
        if not len(judging):
            click.echo(f"induce {variant}: no rows are held out (held_out: 0), so the fitting rows themselves decide what is kept")
            judging = rows["fit"]
        gate = Gate(model, judging, calibrate.batch_rows, selection, compensate="obs" in steps)
        # The statistics follow from the model, the rows and `calibrate`; their own files may be too large to hash.
        described = f"{steps} {' '.join(part.model_dump_json() for part in (settings, selection, source, calibrate))}"
        inputs = [Path(__file__), MODEL, MATRICES, START, *sorted(CALIBRATION.glob("*.safetensors"))]
        with scratch.hold("induce", runtime.resume_key(described, inputs), f"induce {variant}") as held:
            if done := sum(kept(held.kept, index) is not None for index in range(entry.depth)):
                click.echo(f"induce {variant}: resuming after {done} of {entry.depth} blocks")
            outcomes = {}
            statistics = stored_or_walked(STATISTICS, model, rows["fit"], rows["held_out"], calibrate)
            for index, sites in track(statistics, f"induce {variant}", "blocks", entry.depth):
                tensors = {name: tensor.to(torch.float32) for name, tensor in checkpoint.block(index).items()}
                where = f"{entry.blocks}.{index}"
                views = {m: m.view(tensors[m.parameter]) for m in entry.matrices if entry.matrix_name(index, m) in included}
                counts = {matrix: target(selection.sparsity, view.numel()) for matrix, view in views.items()}
                judge = gate.enter(index, tensors, sites, counts)
                if not counts:
                    continue
                outcome = kept(held.kept, index)
                if outcome is None:
                    outcome = induce_block(entry, tensors, set(counts), sites, starts[index], selection, settings, where, judge)
                    keep(held.kept, index, outcome)
                outcomes[index] = outcome
            out = Path(f"build/induce/{variant}")
            curve = [{"block": index, **point} for index, outcome in outcomes.items() for point in outcome.curve]
            facts = {
                "settings": settings.model_dump(mode="json"),
                "induction": {str(index): outcome.facts() for index, outcome in outcomes.items()},
                "curve": curve,
            }
            write_transforms(out / "transform.safetensors", {index: outcome.transform for index, outcome in outcomes.items()}, facts)
            artifacts.write_json(out / "curve.json", curve)
        choices = [outcome.choice for outcome in outcomes.values()]
        tally = ", ".join(f"{choice} in {choices.count(choice)}" for choice in ("learned", "start", "none"))
        changed = sum(outcome.mask_changed for outcome in outcomes.values()) / max(1, len(outcomes))
        tell(f"induce {variant}: of {len(choices)} blocks the gate kept {tally}; {changed:.1%} of mask entries changed")


if __name__ == "__main__":
    main()
