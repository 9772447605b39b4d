"""Statistics of the dense model, and where factors start."""

import torch

from pipeline_lib.core import artifacts, runtime, settings
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.induce.scale import shifts, starting_factors
from pipeline_lib.induce.settings import ScaleParams
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source
from pipeline_lib.models.transform import Transform, write_transforms
from pipeline_lib.stats.inputs import calibration_rows, open_model
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import gram_bytes, stored, walk


def calibrate(workspace: Workspace, source: ModelParams, params: CalibrateParams) -> str:
    """One dense pass over the calibration rows, block by block; a sentence on it."""
    model = open_model(workspace, source)
    rows = calibration_rows(workspace)
    depth = model.checkpoint.architecture.depth
    grams = gram_bytes(model.checkpoint.architecture) <= settings.gram_bytes()
    with artifacts.replacing(workspace.statistics) as directory:
        directory.mkdir()
        walked = walk(model, rows["fit"], rows["held_out"], params, grams)
        for index, sites in track(walked, "calibrate", "blocks", depth):
            tensors: dict[str, torch.Tensor] = {}
            for name, statistics in sites.items():
                tensors |= statistics.tensors(name)
            artifacts.write_tensors(artifacts.block_file(directory, index), tensors, {"grams": grams})
    tokens = sum(part.numel() for part in rows.values())
    return f"{tokens:,} tokens through {depth} blocks, Gram matrices {'stored' if grams else 'left out'}"


def scale(workspace: Workspace, source: ModelParams, params: ScaleParams) -> str:
    """The function-preserving factors and shifts that induction sets out from; a sentence on them."""
    runtime.compute()
    checkpoint = open_source(workspace, source)
    entry = checkpoint.architecture
    transforms = {}
    for index in track(range(entry.depth), "scale", "blocks"):
        statistics = stored(workspace.statistics, entry, index)
        factors = starting_factors(entry, checkpoint.block(index), statistics, params)
        transforms[index] = Transform(factors, shifts(entry, statistics, params))
    write_transforms(workspace.start, transforms)
    count = sum(factor.numel() for transform in transforms.values() for factor in transform.factors.values())
    return f"{count:,} factors at {len(entry.couplings)} couplings of {entry.depth} blocks, start {params.start}"
