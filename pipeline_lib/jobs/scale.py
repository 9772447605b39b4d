"""Initial factors and shifts."""

from pipeline_lib.core import runtime
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.induce.scale import shifts, starting_factors
from pipeline_lib.induce.settings import ScaleParams
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source
from pipeline_lib.models.transform import Transform, write_transforms
from pipeline_lib.stats.walk import stored


def scale(workspace: Workspace, source: ModelParams, params: ScaleParams) -> str:
    """Compute the function-preserving factors and shifts from which induction starts. Returns a
    summary.
    """
    runtime.compute()
    checkpoint = open_source(workspace, source)
    entry = checkpoint.architecture
    directory = workspace.opened(workspace.statistics)
    transforms = {}
    for index in track(range(entry.depth), "scale", "blocks"):
        statistics = stored(directory, entry.layouts[index], index)
        factors = starting_factors(entry.layouts[index], checkpoint.block(index), statistics, params)
        transforms[index] = Transform(factors, shifts(entry.layouts[index], statistics, params))
    with workspace.directory(workspace.start.parent) as made:
        write_transforms(made / workspace.start.name, transforms)
    count = sum(factor.numel() for transform in transforms.values() for factor in transform.factors.values())
    return (
        f"{count:,} initial factors ({params.start}) for"
        f" {sum(len(layout.couplings) for layout in entry.layouts)} couplings in {entry.depth} blocks"
    )
