"""Learn one variant's factors and selection weights."""

import click
import torch

from pipeline_lib.core import artifacts, ranks, runtime, scratch
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.kept import Kept
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.induce.gate import Gate
from pipeline_lib.induce.induce import induce_block
from pipeline_lib.induce.resume import finished, keep
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.transform import read_transforms, write_transforms
from pipeline_lib.recipe.variants import InducePart
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.inputs import calibration_file, calibration_rows, open_model
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import InTurn, stored_or_walked


def induce(
    workspace: Workspace, source: ModelParams, variant: str, part: InducePart, calibrate: CalibrateParams
) -> str:
    """Learn factors block by block, and keep them if they are better on the held-out split. A
    killed run resumes. Returns a summary.
    """
    what = f"induce {variant}"
    model = open_model(workspace, source)
    entry, checkpoint = model.checkpoint.architecture, model.checkpoint
    allocated = workspace.load(workspace.allocation(variant))["kept"]
    starts, _ = read_transforms(workspace.opened(workspace.start.parent) / workspace.start.name, entry.depth)
    rows = calibration_rows(workspace)
    judging = rows["held_out"]
    if not len(judging):
        click.echo(
            f"{what}: there is no held-out split (held_out: 0), so the training samples decide what is kept"
        )
        judging = rows["fit"]
    gate = Gate(model, judging, calibrate.batch_rows, part.selection, part.compensate)
    # The statistics follow from the model, the rows and `calibrate`; their own files may be too
    # large to hash.
    described = " ".join(one.model_dump_json() for one in (part, source, calibrate))
    inputs = [workspace.model, workspace.allocation(variant), workspace.start, calibration_file(workspace)]
    with scratch.hold("induce", runtime.resume_key("induce", described, inputs), what) as held:
        kept = Kept(held.kept, what) if ranks.first() else None
        if done := sum(map(kept.finished, range(entry.depth))) if kept else 0:
            click.echo(f"{what}: resuming after {done} of {entry.depth} blocks")
        outcomes = {}
        statistics = stored_or_walked(
            workspace.opened(workspace.statistics), model, rows["fit"], rows["held_out"], calibrate
        )
        for index, sites in track(statistics, what, "blocks", entry.depth):
            if isinstance(sites, InTurn):  # every step needs all of them
                raise SparselineError(
                    f"{what}: the Gram matrices of the experts of block {index} are larger than"
                    f" SPARSELINE_GRAM_BYTES; raise it, or set variants.{variant}.induce to null."
                )
            tensors = {
                name: tensor.to(model.device, torch.float32)
                for name, tensor in checkpoint.block(index).items()
            }
            names = {matrix: entry.matrix_name(index, matrix) for matrix in entry.layouts[index].matrices}
            counts = {matrix: allocated[name] for matrix, name in names.items() if name in allocated}
            dense = DenseBlock(entry.layouts[index], f"{entry.blocks}.{index}", tensors, sites)
            error_of = gate.enter(index, dense, counts)
            if not counts:
                continue
            outcome = ranks.broadcast(finished(kept, index) if kept else None, 0)
            if outcome is None:
                outcome = induce_block(dense, counts, starts[index], part.selection, part.induce, error_of)
                if kept:
                    keep(kept, index, outcome)
            outcomes[index] = outcome
        if not ranks.writes():
            return ""
        curve = [{"block": index, **point} for index, outcome in outcomes.items() for point in outcome.curve]
        facts = {
            "settings": part.induce.model_dump(mode="json"),
            "induction": {str(index): outcome.facts() for index, outcome in outcomes.items()},
            "curve": curve,
        }
        with workspace.directory(workspace.induced(variant)) as directory:
            write_transforms(
                directory / "transform.safetensors",
                {index: outcome.transform for index, outcome in outcomes.items()},
                facts,
            )
            artifacts.write_json(directory / "curve.json", curve)
    choices = [outcome.choice for outcome in outcomes.values()]
    tally = ", ".join(f"{choice} in {choices.count(choice)}" for choice in ("learned", "start", "none"))
    changed = sum(outcome.mask_changed for outcome in outcomes.values()) / max(1, len(outcomes))
    return f"of {len(choices)} blocks, the gate kept {tally}; {changed:.1%} of the mask entries changed"
