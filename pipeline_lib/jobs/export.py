"""Write one variant in its formats, and record the sizes."""

from functools import partial

from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.export.card import Measured, Pruned, card
from pipeline_lib.export.export import Variant, export
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.jobs.verdict import verdict
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source


def export_variant(workspace: Workspace, source: ModelParams, variant: str, params: ExportParams) -> str:
    """Write each format with a model card. Returns a summary of the sizes."""
    facts = workspace.load(workspace.facts(variant))
    pruned = Pruned(
        variant, workspace.load(workspace.model), facts, workspace.load(workspace.training(variant))
    )
    own, dense = (workspace.load(workspace.evaluation(name)) for name in (variant, DENSE))
    judged = verdict(workspace, variant, params.verdict)
    written = partial(
        card, pruned, Measured(own["perplexity"], dense["perplexity"], own["divergence"], judged)
    )
    directory = workspace.opened(workspace.pruned(variant))
    left = Variant(variant, facts["settings"]["selection"]["pattern"], directory, workspace.trained(variant))
    sizes = export(open_source(workspace, source), left, workspace.export(variant), params.formats, written)
    workspace.save(workspace.sizes(variant), sizes)
    told = ", ".join(f"{name} {one['bits']:.2f}" for name, one in sizes["formats"].items())
    return f"bits per weight: {told} (theoretical limit {sizes['theoretical_bits']:.2f})"
