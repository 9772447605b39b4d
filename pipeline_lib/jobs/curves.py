"""Error curves: the errors of the dense model's matrices at several densities, and their effect on the
loss.
"""

from typing import Any

from pipeline_lib.core import artifacts, ranks
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.measure.curves import measure
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.recipe.variants import CurvesPart
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.inputs import calibration_rows, open_model
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import stored_or_walked


def curves(
    workspace: Workspace, source: ModelParams, variant: str, part: CurvesPart, calibrate: CalibrateParams
) -> str:
    """Prune every matrix to a few densities and measure the errors. Returns a summary.

    Raises:
        SparselineError: an N:M pattern does not divide a matrix, or an error is NaN or infinite.
    """
    model = open_model(workspace, source)
    entry, checkpoint = model.checkpoint.architecture, model.checkpoint
    listed = {matrix["name"]: matrix for matrix in workspace.included()}
    for name, matrix in listed.items():
        part.selection.shape.quantum(name, tuple(matrix["shape"]))
    sensitivities = workspace.load(workspace.sensitivity / "sensitivity.json")
    directory = workspace.opened(workspace.sensitivity / "moments")
    fit = calibration_rows(workspace)["fit"]
    found: dict[str, dict[str, Any]] = {}
    weighted = False
    statistics = stored_or_walked(workspace.opened(workspace.statistics), model, fit, fit[:0], calibrate)
    for index, sites in track(statistics, f"curves {variant}", "blocks", entry.depth):
        own = [
            matrix for matrix in entry.layouts[index].matrices if entry.matrix_name(index, matrix) in listed
        ]
        path = artifacts.block_file(directory, index)
        moments = artifacts.read_tensors(path)[0] if path.exists() else {}
        weighted = weighted or bool(moments)
        where = f"{entry.blocks}.{index}"
        tensors = {name: tensor.to(model.device) for name, tensor in checkpoint.block(index).items()}
        block = DenseBlock(entry.layouts[index], where, tensors, sites)
        measured = measure(block, own, moments, part.selection, part.compensate, part.curves)
        for label, facts in measured.items():
            found[f"{where}.{label}"] = sensitivities.get(f"{where}.{label}", {}) | facts
    if not ranks.writes():
        return ""
    workspace.save(workspace.curves(variant), found)
    points = len(next(iter(found.values()))["curve"]["density"])
    with_or_without = "with" if weighted else "without"
    return f"errors of {len(found)} matrices at {points} densities, {with_or_without} output moments"
