"""Start the function-preserving factors and shifts from the statistics: factors, not weights."""

from pathlib import Path

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.progress import track
from pipeline_lib.induce.scale import ScaleParams, shifts, starting_factors
from pipeline_lib.models.source import ModelParams, open_source
from pipeline_lib.models.transform import Transform, write_transforms
from pipeline_lib.stats.walk import stored

OUT = Path("build/scale/transform.safetensors")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage("scale", OUT) as tell:
        settings = params.load(ScaleParams, "scale")
        checkpoint = open_source(params.load(ModelParams, "model"))
        entry = checkpoint.architecture
        transforms = {}
        for index in track(range(entry.depth), "scale", "blocks"):
            statistics = stored(Path("build/calibrate"), entry, index)
            factors = starting_factors(entry, checkpoint.block(index), statistics, settings)
            transforms[index] = Transform(factors, shifts(entry, statistics, settings))
        write_transforms(OUT, transforms)
        count = sum(factor.numel() for transform in transforms.values() for factor in transform.factors.values())
        tell(f"scale: {count:,} factors at {len(entry.couplings)} couplings of {entry.depth} blocks, start {settings.start}")


if __name__ == "__main__":
    main()
