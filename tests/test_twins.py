"""Gauge twins: one function in other coordinates. What a criterion, or the start, makes of a model
must not depend on which it is given.

A twin has random factors (log-normal, spread 1) folded into every block. Oracles: the original's
logits and the original's masks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import block_statistics, load_full, token_rows

from pipeline_lib.core.counts import target
from pipeline_lib.induce.scale import ScaleParams, starting_factors
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter, open_checkpoint
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.layerwise import Layerwise
from pipeline_lib.prune.window import Block
from pipeline_lib.stats.moments import SiteStatistics, refresh

# plain, biased, 1 + w, fused, interleaved and uncoupled, transposed
FAMILIES = ("llama", "opt", "gemma", "phi3", "gpt_neox", "gpt2-relu")
START = ScaleParams(
    start="second_moment", monotone="identity", power=0.5, limit=50.0, pairs="balance", shift="none"
)
PATTERNS = ("unstructured", "2:4")
HANDFUL = 5  # entries of a model whose scores rounding may swap, of about 15,000


class Model(NamedTuple):
    """A checkpoint, and the statistics of a streamed pass of its own."""

    checkpoint: Checkpoint
    statistics: list[dict[str, SiteStatistics]]


class Pair(NamedTuple):
    original: Model
    twin: Model


@pytest.fixture(params=FAMILIES, scope="module")
def pair(
    request: pytest.FixtureRequest, model_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    source = open_checkpoint(model_paths[str(request.param)])
    table, random = source.architecture.layouts[0], torch.Generator().manual_seed(11)
    path = tmp_path_factory.mktemp("twin") / "model"
    writer = ShardWriter(source, path)
    for block in range(source.architecture.depth):
        factors = {c.name: torch.randn(c.size, generator=random).exp() for c in table.couplings}
        writer.write(block, fold(source.block(block), table, factors))
    writer.finish()
    models = [
        Model(checkpoint, block_statistics(checkpoint, fit=32))
        for checkpoint in (source, open_checkpoint(path))
    ]
    return Pair(*models)


def selection(
    score: str, group: str, pattern: str, of: str = "diagonal", damping: float = 0.01
) -> SelectionParams:
    """60%, since it leaves spare weights to hand out among rows."""
    sparsity = 0.6 if pattern == "unstructured" else 0.5
    values = {
        "sparsity": sparsity,
        "pattern": pattern,
        "score": score,
        "group": group,
        "block": 16,
        "damping": damping,
        "damping_of": of,
    }
    return SelectionParams.model_validate(values)


def masks(
    model: Model,
    chosen: SelectionParams,
    compensate: bool,
    start: Callable[..., dict[str, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Of all blocks on the dense stream, one flat tensor; with ``start``, of the blocks folded by
    what it gives.
    """
    table, found = model.checkpoint.architecture.layouts[0], []
    for block, statistics in enumerate(model.statistics):
        tensors = model.checkpoint.block(block)
        factors = start(table, tensors, statistics, START) if start else {}
        moved = {
            name: refresh(site, site_factor(table, name, factors)).moments
            for name, site in statistics.items()
        }
        kept = {m: target(chosen.sparsity, m.view(tensors[m.parameter]).numel()) for m in table.matrices}
        pruned = Block(table, "x", Transform(factors), kept, fold(tensors, table, factors))
        Layerwise(chosen, compensate).prune_block(pruned, moved)
        found += [mask.flatten() for _, mask in sorted(pruned.masks.items())]
    return torch.cat(found)


def differing(
    pair: Pair,
    chosen: SelectionParams,
    compensate: bool,
    start: Callable[..., dict[str, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Entry by entry, whether the twin's masks differ from the original's."""
    return masks(pair.twin, chosen, compensate, start) != masks(pair.original, chosen, compensate, start)


def test_a_twin_computes_the_same(pair: Pair) -> None:
    """Oracle: the original's logits, from transformers; and its weights, which are far away."""
    rows = token_rows(4, 12, seed=3)
    with torch.no_grad():
        logits, other = (load_full(model.checkpoint.path)(rows).logits for model in pair)
    torch.testing.assert_close(other, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    for matrix in pair.original.checkpoint.architecture.layouts[0].matrices:
        a, b = (matrix.view(model.checkpoint.block(0)[matrix.parameter]) for model in pair)
        uncoupled = (
            matrix.site == "mlp_inner"
            and pair.original.checkpoint.architecture.layouts[0].site(matrix.site).coupling is None
        )
        assert float((a - b).norm() / a.norm()) > 0.5 or uncoupled


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_chooses_alike(pair: Pair, pattern: str) -> None:
    """Within rows |w|·‖X‖ is the same in any coordinates."""
    assert int(differing(pair, selection("wanda", "row", pattern), compensate=False).sum()) <= HANDFUL


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("of", "damping"), [("diagonal", 0.01), ("mean", 1e-7)])
@pytest.mark.parametrize("score", ["obs", "isc"])
def test_obs_chooses_alike(pair: Pair, score: str, of: str, damping: float, pattern: str) -> None:
    """With its own diagonal for damping H turns into D H D exactly, with hardly any damping too;
    compensated, or chosen all at once.
    """
    chosen = selection(score, "row", pattern, of, damping)
    assert int(differing(pair, chosen, compensate=True).sum()) <= HANDFUL
    assert int(differing(pair, chosen, compensate=False).sum()) <= HANDFUL


@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude_does_not(pair: Pair, group: str, pattern: str) -> None:
    """Without this difference, the agreement in the other tests would show nothing."""
    assert differing(pair, selection("magnitude", group, pattern), compensate=False).double().mean() > 0.05


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_start_undoes_the_scrambling(pair: Pair, pattern: str) -> None:
    """Folded into either, the start leads to one set of coordinates: Magnitude, which sees them
    all, chooses alike.

    ``qkv`` in one matrix: its parts keep a scale of their own, since each factor has geometric mean
    1, so only rows can be compared.
    """
    fused = any(matrix.kind == "qkv" for matrix in pair.original.checkpoint.architecture.layouts[0].matrices)
    for group in ("row",) if fused else ("row", "matrix"):
        assert (
            differing(pair, selection("magnitude", group, pattern), False, starting_factors).double().mean()
            < 0.005
        )


def test_the_start_is_canonical_weight_by_weight(pair: Pair) -> None:
    """Oracle: the original's folded weights: the twin's are these times one number per matrix (part
    of a fused one excepted).
    """
    table = pair.original.checkpoint.architecture.layouts[0]
    folded = []
    for model in pair:
        tensors = model.checkpoint.block(0)
        folded.append(fold(tensors, table, starting_factors(table, tensors, model.statistics[0], START)))
    for matrix in table.matrices:
        a, b = (matrix.view(tensors[matrix.parameter]) for tensors in folded)
        ratio = a / b
        if matrix.kind == "qkv":
            ratio = ratio / ratio.median(1, keepdim=True).values
        assert float((ratio / ratio.median() - 1).abs().quantile(0.99)) < 0.01
