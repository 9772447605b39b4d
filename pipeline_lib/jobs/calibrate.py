"""Statistics of the dense model."""

import torch

from pipeline_lib.core import artifacts, ranks, settings
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.stats.inputs import calibration_rows, open_model
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import InTurn, gram_bytes, walk


def calibrate(workspace: Workspace, source: ModelParams, params: CalibrateParams) -> str:
    """Pass the calibration samples through the dense model, block by block, and collect statistics.
    Returns a summary.
    """
    model = open_model(workspace, source)
    rows = calibration_rows(workspace)
    depth = model.checkpoint.architecture.depth
    grams = gram_bytes(model.checkpoint.architecture) <= settings.gram_bytes()
    walked = walk(model, rows["fit"], rows["held_out"], params, grams, to=[0])
    if not ranks.first():
        for _, sites in walked:
            if isinstance(sites, InTurn):
                sites.follow()
        return ""
    with workspace.directory(workspace.statistics) as directory:
        for index, sites in track(walked, "calibrate", "blocks", depth):
            tensors: dict[str, torch.Tensor] = {}
            for name, statistics in sites.items():
                tensors |= statistics.tensors(name)
            artifacts.write_tensors(artifacts.block_file(directory, index), tensors, {"grams": grams})
    tokens = rows["fit"].numel() + rows["held_out"].numel()
    return (
        f"statistics of {tokens:,} tokens in {depth} blocks, {'with' if grams else 'without'} Gram matrices"
    )
