"""One dense pass over the calibration rows, block by block: statistics of every site's inputs."""

from pathlib import Path

import click
import torch

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.core.progress import track
from pipeline_lib.models.source import ModelParams
from pipeline_lib.stats.inputs import calibration_rows, open_model
from pipeline_lib.stats.walk import CalibrateParams, gram_bytes, walk

OUT = Path("build/calibrate")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage("calibrate", artifacts.block_file(OUT, 0)) as tell:
        settings = params.load(CalibrateParams, "calibrate")
        model = open_model(params.load(ModelParams, "model"))
        rows = calibration_rows()
        depth = model.checkpoint.architecture.depth
        grams = gram_bytes(model.checkpoint.architecture) <= settings.gram_budget_bytes
        with artifacts.replacing(OUT) as directory:
            directory.mkdir()
            walked = walk(model, rows["fit"], rows["held_out"], settings, grams)
            for index, sites in track(walked, "calibrate", "blocks", depth):
                tensors: dict[str, torch.Tensor] = {}
                for name, statistics in sites.items():
                    tensors |= statistics.tensors(name)
                artifacts.write_tensors(artifacts.block_file(directory, index), tensors, {"grams": grams})
        tell(
            f"calibrate: {sum(r.numel() for r in rows.values()):,} tokens through {depth} blocks, Gram matrices {'stored' if grams else 'left out'}"
        )


if __name__ == "__main__":
    main()
