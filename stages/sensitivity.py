"""Hutchinson trace of the cross-entropy Hessian per logical matrix, on the original model."""

import math
from pathlib import Path

import click
import torch
from tqdm import tqdm

from pipeline_lib import artifacts, params, runtime
from pipeline_lib.calibration.inputs import calibration_rows
from pipeline_lib.errors import SparselineError
from pipeline_lib.models.source import ModelParams, open_source
from pipeline_lib.models.whole import load_model
from pipeline_lib.sensitivity.hutchinson import SensitivityParams, summarise, traces

OUT = Path("build/sensitivity")


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage(Path("build/costs/sensitivity.json")):
        settings = params.load(SensitivityParams, "sensitivity")
        source = params.load(ModelParams, "model")
        checkpoint = open_source(source)
        entry = checkpoint.architecture
        included = {m["name"]: m for m in artifacts.read_json(Path("build/prepare/matrices.json")) if m["included"]}
        model = load_model(checkpoint.path, "float32", runtime.device())
        matrices, parameters = {}, {}
        for index in range(entry.depth):
            for matrix in entry.matrices:
                if (name := entry.matrix_name(index, matrix)) in included:
                    path = f"{entry.blocks}.{index}.{matrix.parameter}"
                    matrices[name] = (path, matrix)
                    parameters[path] = model.base_model.get_parameter(path).requires_grad_(True)
        rows = torch.cat(list(calibration_rows().values()))
        chunks = rows.repeat(-(-settings.probes * settings.rows_per_probe // len(rows)), 1).split(settings.rows_per_probe)

        def loss(probe: int) -> torch.Tensor:
            ids = chunks[probe].to(runtime.device())
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

        samples = list(tqdm(traces(loss, parameters, matrices, settings), total=settings.probes, desc="sensitivity", unit="probe"))
        summary = {name: value | {k: included[name][k] for k in ("block", "kind")} for name, value in summarise(samples).items()}
        if wrong := [name for name, value in summary.items() if not math.isfinite(value["trace"] + value["stderr"])]:
            raise SparselineError(f"The sensitivity of {wrong[0]} is NaN or infinite; check the model's weights, or its loss on this text.")
        artifacts.write_json(OUT / "sensitivity.json", summary)
        points = [{"block": value["block"], "trace": value["trace"], "kind": value["kind"]} for value in summary.values()]
        artifacts.write_json(OUT / "by_depth.json", points)
        noise = sorted(abs(value["stderr"] / value["trace"]) if value["trace"] else float("inf") for value in summary.values())
        click.echo(
            f"sensitivity: {settings.probes} probes, {len(summary)} matrices, median relative standard error {noise[len(noise) // 2]:.0%}"
        )


if __name__ == "__main__":
    main()
