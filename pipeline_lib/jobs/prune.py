"""Prune one variant and write it as a Hugging Face checkpoint with its masks."""

from typing import Any

import click
import torch

from pipeline_lib.core import ranks, runtime, scratch
from pipeline_lib.core.counts import check
from pipeline_lib.core.kept import Kept
from pipeline_lib.core.progress import track
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.places import allowed_storage
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.transform import Transform, read_transforms
from pipeline_lib.prune.plan import REFIT, plan
from pipeline_lib.prune.resume import PARTS, FinishedBlocks
from pipeline_lib.prune.run import Rows, Source, prune, stream_bytes
from pipeline_lib.recipe.settings import FITS, Recipe
from pipeline_lib.solve.settings import QuantizationParams
from pipeline_lib.solve.size import packed_bits
from pipeline_lib.stats.inputs import calibration_facts, calibration_file, calibration_rows, open_model
from pipeline_lib.stats.lanes import share


def prune_variant(workspace: Workspace, source: ModelParams, variant: str, recipe: Recipe) -> str:
    """Prune block by block. A killed run resumes. Returns a summary."""
    what = f"prune {variant}"
    model = open_model(workspace, source)
    entry = model.checkpoint.architecture
    steps = plan(recipe, model.checkpoint.dtype)
    allocation = workspace.load(workspace.allocation(variant))
    inputs = [workspace.model, workspace.allocation(variant)]
    transforms: list[Transform] = [Transform()] * entry.depth
    transform_facts: dict[str, Any] = {}
    if steps.needs.factors:  # a run by hand may find factors of another recipe there
        inputs.append(workspace.opened(workspace.induced(variant)) / "transform.safetensors")
        transforms, transform_facts = read_transforms(inputs[-1], entry.depth)
    listed = workspace.included()
    allocated = {(m["block"], m["label"]): allocation["kept"][m["name"]] for m in listed}
    kept = {
        (block, matrix): allocated[block, matrix.label]
        for block, matrix in entry.places()
        if (block, matrix.label) in allocated
    }
    rows, wanted = None, 0
    if steps.needs.text:
        found = calibration_rows(workspace)
        rows = Rows.of(found, recipe)
        inputs.append(calibration_file(workspace))
        tokens = rows.dealt(steps.judged)[0].numel()
        wanted = stream_bytes(steps, share(tokens), entry.width, model.dtype.itemsize)
        if steps.judged and not len(found["held_out"]):
            click.echo(
                f"{what}: there is no held-out split (held_out: 0), so the training samples decide which"
                " fits are kept"
            )
    described = f"{recipe.model_dump_json()} {source.model_dump_json()}"
    with scratch.hold("prune", runtime.resume_key("prune", described, inputs), what) as held:
        progress = (
            FinishedBlocks(Kept(held.kept, what, PARTS), model.checkpoint, recipe.quantization)
            if ranks.first()
            else None
        )
        if done := progress.done() if progress else 0:
            click.echo(f"{what}: resuming after {done} of {entry.depth} blocks")

        def finished(index: int) -> dict[str, torch.Tensor] | None:
            return ranks.broadcast(progress.finished(index) if progress else None, 0)

        blocks = prune(
            Source(model, transforms, kept),
            rows,
            steps,
            finished,
            allowed_storage(model.device, held.own, wanted),
        )
        for index, block in track(blocks, what, "blocks", entry.depth, done):
            if progress:
                progress.keep(index, block)
            del block  # free before the next
        if not ranks.writes() or progress is None:
            return ""
        by_block = progress.publish(workspace, workspace.pruned(variant))

    matrices = {
        m["name"]: by_block[m["block"]]["matrices"][m["label"]] | {"block": m["block"]} for m in listed
    }
    total, size = (sum(facts[key] for facts in matrices.values()) for key in ("kept", "size"))
    check(total, sum(allocation["kept"].values()), 1)  # counted from the stored masks
    raised = [name for name, facts in matrices.items() if facts.get("damping", 0) > recipe.selection.damping]
    if raised:
        click.echo(f"{what}: damping was raised for {', '.join(raised)}")
    quantised = _quantised(recipe.quantization, listed, matrices)
    zeros = sum(facts["zeros"] for facts in matrices.values())
    summary = {
        "settings": recipe.model_dump(mode="json"),
        "kept": total,
        "prunable": size,
        "sparsity": 1 - total / size,
        "zeros": zeros,
        "matrices": matrices,
        "blocks": {
            str(index): {step: facts[step] for step in (*FITS, REFIT) if step in facts}
            for index, facts in by_block.items()
        },
        "transform": transform_facts,
        "quantization": quantised,
        "calibration": calibration_facts(workspace) if steps.needs.text else None,
    }
    workspace.save(workspace.facts(variant), summary)
    at = ""
    if quantised:
        bits = (
            f"{quantised['bits']} bits, {quantised['bits_per_weight']:.2f} bits a weight with masks and"
            " scales"
        )
        at = f"; at {bits}, {zeros:,} are zero"
    return f"kept {total:,} of {size:,} prunable weights (sparsity {1 - total / size:.4%}){at}"


def _quantised(
    how: QuantizationParams, listed: list[dict[str, Any]], matrices: dict[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Facts about the quantisation of all matrices, or None. The rounding error is the mean over
    all weights.
    """
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
