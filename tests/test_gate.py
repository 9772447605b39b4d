"""The gate of induction. Oracles: the whole model in transformers with one block pruned by hand,
and judges that are known beforehand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project import WANDA, build, change_params, invoke, make_workspace
from tiny import block_statistics, load_full, load_tensors, power_of_two_factors, random_factors, token_rows

from pipeline_lib.core.counts import target
from pipeline_lib.fit.spectral import SpectralParams
from pipeline_lib.induce.gate import BlockError, Gate
from pipeline_lib.induce.induce import Outcome, induce_block
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.folding import fold, site_factor
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.layerwise import Layerwise
from pipeline_lib.prune.window import Block
from pipeline_lib.recipe.settings import InduceParams
from pipeline_lib.stats.dense import DenseBlock
from pipeline_lib.stats.moments import SiteStatistics, refresh

ROWS = token_rows(6, 12, seed=2)
SPECTRAL = SpectralParams(weight=0.0, alpha=1.0, order="spectral", iterations=2)
VARIED = ("llama", "llama-bias", "opt-post", "gpt2-relu", "gpt_neox", "phi3", "bloom")
# score, compensated; masks compared within rows and damping by the own diagonal, so that no factor
# can change them
INVARIANT = [("wanda", False), ("obs", False), ("isc", True)]


def selection(score: str = "wanda", group: str = "row", pattern: str = "unstructured") -> SelectionParams:
    values = {
        "sparsity": 0.5,
        "pattern": pattern,
        "score": score,
        "group": group,
        "block": 16,
        "damping": 0.01,
    }
    return SelectionParams.model_validate(values | {"damping_of": "diagonal"})


def induction(**changes: Any) -> InduceParams:
    values = {
        "factors": True,
        "importance": True,
        "steps": 6,
        "rate": 0.1,
        "temperature": 0.5,
        "limit": 3.0,
        "check_every": 2,
    }
    values |= {"patience": 9, "probes": 0, "seed": 0, "spectral": SPECTRAL}
    return InduceParams.model_validate({**values, **changes})


def counts(checkpoint: Checkpoint, block: int) -> dict[Matrix, int]:
    tensors = checkpoint.block(block)
    return {
        m: target(0.5, m.view(tensors[m.parameter]).numel())
        for m in checkpoint.architecture.layouts[0].matrices
    }


def judges(
    checkpoint: Checkpoint,
    statistics: list[dict[str, SiteStatistics]],
    chosen: SelectionParams,
    compensate: bool,
) -> list[BlockError]:
    """The error functions of all blocks. The dense stream of ``ROWS`` is in batches of 4 and 2."""
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    gate = Gate(model, ROWS, 4, chosen, compensate)
    blocks = [
        DenseBlock(checkpoint.architecture.layouts[0], f"block {i}", checkpoint.block(i), sites)
        for i, sites in enumerate(statistics)
    ]
    return [gate.enter(i, block, counts(checkpoint, i)) for i, block in enumerate(blocks)]


def moderate(checkpoint: Checkpoint, seed: int, decades: float = 1.5) -> dict[str, torch.Tensor]:
    sizes = {coupling.name: coupling.size for coupling in checkpoint.architecture.layouts[0].couplings}
    return {name: factor.float() for name, factor in random_factors(sizes, seed, decades).items()}


def block_outputs(checkpoint: Checkpoint, block: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of one block inside the whole model, all blocks before it dense."""
    model = load_full(checkpoint.path)
    load_tensors(model, checkpoint, block, tensors)
    seen: list[torch.Tensor] = []
    module = model.base_model.get_submodule(f"{checkpoint.architecture.blocks}.{block}")
    module.register_forward_hook(
        lambda _module, _given, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ROWS)
    return seen[0].double()


@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize(
    ("score", "compensate", "pattern"), [("wanda", False, "unstructured"), ("obs", True, "2:4")]
)
def test_a_judge_gives_the_block_error(
    checkpoint: Checkpoint, score: str, compensate: bool, pattern: str
) -> None:
    """Oracle: E‖Y − Ŷ‖²/E‖Y − EY‖² of the block inside the whole model, pruned by hand, folded or
    not, for every block in turn.
    """
    table, chosen = checkpoint.architecture.layouts[0], selection(score, "row", pattern)
    statistics = block_statistics(checkpoint)
    for index, judge in enumerate(judges(checkpoint, statistics, chosen, compensate)):
        tensors = checkpoint.block(index)
        dense = block_outputs(checkpoint, index, tensors)
        for transform in (Transform(), Transform(moderate(checkpoint, 3))):
            folded = fold(tensors, table, transform.factors)
            moved = {
                name: refresh(site, site_factor(table, name, transform.factors)).moments
                for name, site in statistics[index].items()
            }
            pruned = Block(table, "x", transform, counts(checkpoint, index), folded)
            Layerwise(chosen, compensate).prune_block(pruned, moved)
            sparse = block_outputs(checkpoint, index, pruned.tensors)
            expected = (sparse - dense).square().sum() / (dense - dense.mean((0, 1))).square().sum()
            assert judge(transform) == pytest.approx(float(expected), rel=1e-4)
            assert 0.001 < float(expected) < 10


@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize(("score", "compensate"), INVARIANT)
def test_judges_do_not_see_factors_that_change_no_mask(
    checkpoint: Checkpoint, score: str, compensate: bool
) -> None:
    """Oracle: the unfolded block's error. Within rows, folding does not change how these scores
    rank; with Magnitude it does.
    """
    statistics = block_statistics(checkpoint)
    sizes = {coupling.name: coupling.size for coupling in checkpoint.architecture.layouts[0].couplings}
    judge = judges(checkpoint, statistics, selection(score), compensate)[0]
    plain = judge(Transform())
    assert judge(Transform(power_of_two_factors(sizes, 4, largest=3))) == pytest.approx(plain, rel=1e-3)
    assert judge(Transform(moderate(checkpoint, 5))) == pytest.approx(plain, rel=1e-2)
    magnitude = judges(checkpoint, statistics, selection("magnitude"), compensate)[0]
    assert abs(magnitude(Transform(moderate(checkpoint, 5))) / magnitude(Transform()) - 1) > 0.03


def run(
    checkpoint: Checkpoint,
    start: Transform,
    chosen: SelectionParams,
    judge: Callable[[Transform], float],
    **changes: Any,
) -> Outcome:
    statistics = block_statistics(checkpoint)[0]
    block = DenseBlock(checkpoint.architecture.layouts[0], "block 0", checkpoint.block(0), statistics)
    return induce_block(block, counts(checkpoint, 0), start, chosen, induction(**changes), judge)


@pytest.mark.parametrize(
    ("score", "group"), [("magnitude", "matrix"), ("magnitude", "row"), ("wanda", "row"), ("obs", "block")]
)
def test_never_judged_worse_than_nothing(checkpoint: Checkpoint, score: str, group: str) -> None:
    """Oracle: the judge itself, asked again about the transform that came out; a start at random
    must not get through.
    """
    chosen = selection(score, group)
    judge = judges(checkpoint, block_statistics(checkpoint), chosen, compensate=score == "obs")[0]
    outcome = run(checkpoint, Transform(moderate(checkpoint, 6)), chosen, judge)
    assert outcome.judged["none"] == judge(Transform())
    assert outcome.judged[outcome.choice] == min(outcome.judged.values()) <= outcome.judged["none"]
    assert judge(outcome.transform) == pytest.approx(outcome.judged[outcome.choice], rel=1e-4)
    assert outcome.held_out.keys() == outcome.judged.keys()
    assert outcome.facts()["judged"] == outcome.judged


@pytest.mark.parametrize(
    ("errors", "choice"),
    [
        ({"none": 1.0, "start": 2.0, "learned": 3.0}, "none"),
        ({"none": 3.0, "start": 2.0, "learned": 4.0}, "start"),
        ({"none": 3.0, "start": 2.0, "learned": 1.0}, "learned"),
        ({"none": 2.0, "start": 2.0, "learned": 2.0}, "none"),
        ({"none": 2.0, "start": 1.0, "learned": 1.0}, "start"),
    ],
)
def test_the_judge_decides_and_ties_go_to_less(
    llama: Checkpoint, errors: dict[str, float], choice: str
) -> None:
    """Oracle: given errors, one per kind of transform, independent of the layers' errors."""
    start = Transform(moderate(llama, 6))

    def judge(transform: Transform) -> float:
        if not transform.factors and not transform.importance:
            return errors["none"]
        same = all(torch.equal(transform.factors[name], factor) for name, factor in start.factors.items())
        return errors["start" if same and not transform.importance else "learned"]

    outcome = run(llama, start, selection("magnitude", "matrix"), judge)
    assert outcome.judged == errors
    assert outcome.choice == choice
    if choice == "none":
        assert outcome.transform == Transform()
        assert outcome.mask_changed == 0
    if choice == "start":
        assert not outcome.transform.importance
        for name, factor in outcome.transform.factors.items():
            torch.testing.assert_close(factor, start.factors[name], rtol=1e-5, atol=0)
    if choice == "learned":
        assert outcome.transform.importance


@pytest.mark.parametrize("family", ["opt", "llama-bias"])
def test_only_shifts_that_help_are_kept(checkpoint: Checkpoint) -> None:
    """Oracle: an effect per site made up beforehand: one harms, one does nothing, the others help;
    the harm is undone for all candidates.
    """
    sites = [site.name for site in checkpoint.architecture.layouts[0].sites]
    effects = dict.fromkeys(sites, -0.1) | {sites[1]: 0.2, sites[2]: 0.0}
    statistics = block_statistics(checkpoint)[0]
    start = Transform({}, {name: statistics[name].mean for name in sites}, {})
    asked: list[set[str]] = []

    def judge(transform: Transform) -> float:
        asked.append(set(transform.shifts))
        return 1.0 + sum(effects[name] for name in transform.shifts)

    outcome = run(checkpoint, start, selection("wanda"), judge)
    helpful = {name for name in sites if effects[name] < 0}
    assert set(outcome.transform.shifts) == helpful
    assert all(torch.equal(outcome.transform.shifts[name], start.shifts[name]) for name in helpful)
    assert asked[-3:] == [helpful] * 3  # none, start and learned stand on the same shifts
    assert outcome.judged["none"] == pytest.approx(1.0 - 0.1 * len(helpful))


@pytest.mark.parametrize("family", ["opt", "llama-bias", "gpt2", "gpt_neox"])
def test_kept_shifts_lower_the_real_error(checkpoint: Checkpoint) -> None:
    """Oracle: the gate on the plain block. Shifts by ten standard deviations as well as by the
    mean: what is kept is no worse.
    """
    table, chosen = checkpoint.architecture.layouts[0], selection("wanda")
    statistics = block_statistics(checkpoint)
    judge = judges(checkpoint, statistics, chosen, compensate=False)[0]
    far = {
        name: site.mean + 10 * (site.second_moment - site.mean.square()).clamp_min(0).sqrt()
        for name, site in statistics[0].items()
    }
    worst = max(judge(Transform({}, {name: far[name]}, {})) for name in far)
    assert worst > judge(Transform())
    for shifts in (far, {site.name: statistics[0][site.name].mean for site in table.sites}):
        outcome = run(checkpoint, Transform({}, shifts, {}), chosen, judge)
        assert outcome.judged["none"] <= judge(Transform())
        assert outcome.transform.shifts.keys() < far.keys() or shifts is not far


def test_an_empty_gate_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``held_out: 0``. Oracle: the line in the log of a variant with a fit, and of induction;
    no line without a gate, or with a held-out split.
    """
    fitted = {**WANDA, "induce": {}, "reconstruction": {"steps": ["finetune_channels"]}}
    made = make_workspace(tmp_path / "project", variants={"wanda": WANDA, "sparseline": fitted})
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(made)
    for held_out in (0.25, 0):
        change_params(made, "texts.calibration.held_out", held_out)
        build("prepare", "text calibration", "calibrate", "scale", "allocate sparseline")
        induced, pruned, plain = (
            invoke(*step) for step in (("induce", "sparseline"), ("prune", "sparseline"), ("prune", "wanda"))
        )
        assert ("induce sparseline: there is no held-out split (held_out: 0)" in induced.output) == (
            held_out == 0
        )
        assert ("prune sparseline: there is no held-out split (held_out: 0)" in pruned.output) == (
            held_out == 0
        )
        assert "there is no held-out split" not in plain.output
        assert [one.exit_code for one in (induced, pruned, plain)] == [0, 0, 0]
