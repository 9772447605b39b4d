"""Prune one variant block by block and write it as a Hugging Face checkpoint with its masks; resumes after a kill."""

from pathlib import Path
from typing import Any

import click

from pipeline_lib.allocate.budget import Unit
from pipeline_lib.allocate.methods import plan
from pipeline_lib.core import artifacts, params, runtime, scratch
from pipeline_lib.core.counts import target
from pipeline_lib.core.progress import track
from pipeline_lib.models.source import MODEL, ModelParams
from pipeline_lib.models.transform import read_transforms
from pipeline_lib.prune.prune import FITS, REFIT, VariantParams, prune
from pipeline_lib.prune.quantization import QuantizationParams
from pipeline_lib.prune.resume import Progress
from pipeline_lib.prune.size import packed_bits
from pipeline_lib.stats.inputs import CALIBRATION, calibration_facts, calibration_rows, open_model

MATRICES = Path("build/prepare/matrices.json")


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    with runtime.stage(f"prune-{variant}", Path(f"build/facts/{variant}.json")) as tell:
        settings = params.parse(VariantParams, params.merged("prune", f"variants.{variant}"), f"variants.{variant}")
        source = params.load(ModelParams, "model")
        factors, sensitivity = Path("build") / settings.factors, Path("build") / settings.sensitivity
        model = open_model(source)
        entry = model.checkpoint.architecture
        rows = calibration_rows()
        transforms, transform_facts = read_transforms(factors, entry.depth)
        measured = artifacts.read_json(sensitivity)

        listed = [m for m in artifacts.read_json(MATRICES) if m["included"]]
        pattern = settings.selection.shape
        units = [Unit(m["name"], m["block"], m["shape"][0] * m["shape"][1], pattern.quantum(m["name"], tuple(m["shape"]))) for m in listed]
        budget = target(settings.selection.sparsity, sum(unit.size for unit in units))
        counts = plan(units, settings.selection.sparsity, settings.allocation, measured)
        by_label = {matrix.label: matrix for matrix in entry.matrices}
        kept = {(m["block"], by_label[m["label"]]): count for m, count in zip(listed, counts, strict=True)}

        described = f"{settings.model_dump_json()} {source.model_dump_json()}"
        inputs = [Path(__file__), MODEL, MATRICES, factors, sensitivity, *sorted(CALIBRATION.glob("*.safetensors"))]
        click.echo(f"prune {variant}: {settings.model_dump_json()}")
        if settings.reconstruction.fits and not len(rows["held_out"]):
            click.echo(f"prune {variant}: no rows are held out (held_out: 0), so the fitting rows themselves decide which fits are kept")
        with scratch.hold("prune", runtime.resume_key(described, inputs), f"prune {variant}") as held:
            progress = Progress(held.kept, model.checkpoint, settings.quantization)
            if done := progress.done():
                click.echo(f"prune {variant}: resuming after {done} of {entry.depth} blocks")
            blocks = prune(model, rows["fit"], rows["held_out"], kept, transforms, settings, progress.finished, held.own)
            for index, result in track(blocks, f"prune {variant}", "blocks", entry.depth, done):
                progress.keep(index, result)
            by_block = progress.publish(Path(f"build/prune/{variant}"))

        matrices = {}
        for matrix in listed:
            facts = by_block[matrix["block"]]["matrices"][matrix["label"]]
            matrices[matrix["name"]] = facts | {"block": matrix["block"], "sensitivity": _sensitivity(measured.get(matrix["name"]))}
        total = sum(facts["kept"] for facts in matrices.values())
        size = sum(facts["size"] for facts in matrices.values())
        quantum = max(unit.quantum for unit in units)
        if abs(total - budget) > (quantum / 2 if quantum > 1 else 0):
            raise RuntimeError(f"{total} weights kept instead of {budget}")
        damped = [name for name, facts in matrices.items() if facts["damping"] > settings.selection.damping]
        if damped:
            click.echo(f"prune {variant}: damping raised for {', '.join(damped)}")
        summary = {
            "settings": settings.model_dump(mode="json"),
            "kept": total,
            "prunable": size,
            "sparsity": 1 - total / size,
            "zeros": sum(facts["zeros"] for facts in matrices.values()),
            "matrices": matrices,
            "blocks": {str(index): {step: facts[step] for step in (*FITS, REFIT) if step in facts} for index, facts in by_block.items()},
            "transform": transform_facts,
            "quantization": _quantised(settings.quantization, listed, matrices),
            "calibration": calibration_facts(),
        }
        artifacts.write_json(Path(f"build/facts/{variant}.json"), summary)
        quantised = summary["quantization"]
        at = (
            f"; at {quantised['bits']} bits, {quantised['bits_per_weight']:.2f} bits a weight with masks and scales, {summary['zeros']:,} are zero"
            if quantised
            else ""
        )
        tell(f"prune {variant}: kept {total:,} of {size:,} prunable weights (sparsity {1 - total / size:.4%}){at}")


def _quantised(how: QuantizationParams, listed: list[dict[str, Any]], matrices: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What quantisation made of the matrices, or None; the rounding error is their mean, weight by weight."""
    if how.bits is None:
        return None
    size, bits, error = 0, 0, 0.0
    for matrix in listed:
        facts = matrices[matrix["name"]]
        size += facts["size"]
        bits += packed_bits(tuple(matrix["shape"]), facts["kept"], how)
        error += facts["size"] * facts["rounding_error"]
    told = how.model_dump(mode="json", include={"bits", "group", "symmetric"})
    return told | {"bits_per_weight": bits / size, "rounding_error": error / size}


def _sensitivity(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """A matrix's entry of sensitivity.json; curves stay where they are."""
    return entry and {key: entry[key] for key in ("trace", "stderr", "sensitivity", "block", "kind")}


if __name__ == "__main__":
    main()
