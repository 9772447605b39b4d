"""Fits of a sparse block. Oracles: a damage that what moves can undo, finite differences, and the
block's own zeros.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from tiny import FAMILIES, token_rows

from pipeline_lib.fit.fit import Masks, Pairs, Run, Sparse, _Free, block_error, fit
from pipeline_lib.fit.settings import FinetuneParams, FitParams, SpectralParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.stream import BlockModel


def params(weight: float = 0.0, **changes: Any) -> FitParams:
    values = {
        "epochs": 30,
        "parts": ["factors", "biases"],
        "rate": 0.02,
        "bias_rate": 0.02,
        "batch_rows": 2,
        "patience": 100,
        "limit": 2.0,
        "compute_dtype": "float32",
        "spectral": SpectralParams(weight=weight, alpha=1.0, order="spectral", iterations=2),
        "seed": 0,
    }
    return FitParams(**{**values, **changes})


def setting(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, batches: int = 8
) -> tuple[Run, dict[str, torch.Tensor], Sequence[torch.Tensor]]:
    """Block 0 as ``fit`` runs it, half of its weights zeroed, and the stream before it: batches of 4 rows."""
    model = BlockModel(checkpoint, dtype, torch.device("cpu"))
    stream = model.embed(token_rows(4 * batches, 12, seed=1), 4)
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.block(0).items()}
    random = torch.Generator().manual_seed(2)
    for parameter in dict.fromkeys(
        matrix.parameter for matrix in checkpoint.architecture.layouts[0].matrices
    ):
        weight = tensors[parameter]
        tensors[parameter] = weight * (torch.rand(weight.shape, generator=random) < 0.5)
    return functools.partial(model.call, model.block(0), 0), tensors, stream.hidden


def masks_of(tensors: Mapping[str, torch.Tensor], matrices: Sequence[Matrix]) -> Masks:
    """Masks of the matrices' nonzero weights: no kept weight is zero."""
    return {matrix: matrix.view(tensors[matrix.parameter]) != 0 for matrix in matrices}


def fitting(
    run: Any,
    tensors: dict[str, torch.Tensor],
    matrices: Sequence[Matrix],
    rows: Pairs,
    held_out: Pairs,
    how: FitParams,
    where: str,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors and facts that ``fit`` gives."""
    found = fit(Sparse(run, tensors, masks_of(tensors, matrices), where), rows, held_out, how)
    return found.tensors, found.facts


def targets_of(
    run: Run, tensors: dict[str, torch.Tensor], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    with torch.no_grad():
        return [run(hidden, tensors) for hidden in inputs]


def damaged(
    tensors: dict[str, torch.Tensor], matrices: tuple[Matrix, ...], spread: float = 0.4
) -> dict[str, torch.Tensor]:
    """Every row and column of every matrix scaled at random, and every bias moved: what ``fit`` is
    able to undo.
    """
    random = torch.Generator().manual_seed(3)
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for matrix in matrices:
        view = matrix.view(out[matrix.parameter])
        rows, columns = (torch.randn(size, generator=random) * spread for size in view.shape)
        view.mul_((rows[:, None] + columns).exp())
        if matrix.bias is not None:
            matrix.bias_view(out[matrix.bias]).add_(spread * torch.randn(len(view), generator=random))
    return out


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi3", "bloom"])
def test_a_known_scaling_is_undone(checkpoint: Checkpoint) -> None:
    """Oracle: the undamaged block. On other rows than the training rows, most of the damage is
    repaired. Zeros stay zero.
    """
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, matrices)
    held_out = Pairs(inputs[6:], targets[6:])
    fitted, facts = fitting(
        run, broken, matrices, Pairs(inputs[:6], targets[:6]), held_out, params(), "layers.0"
    )
    before, after = block_error(run, broken, held_out), block_error(run, fitted, held_out)
    assert after < 0.3 * before
    assert facts["held_out_before"] == pytest.approx(before)
    assert facts["held_out_after"] == pytest.approx(after, rel=1e-4)
    assert facts["fit_after"] < facts["fit_before"]
    assert 1 <= facts["epochs"] <= 30
    for matrix in matrices:
        assert torch.equal(fitted[matrix.parameter] == 0, tensors[matrix.parameter] == 0)
    untouched = tensors.keys() - {m.parameter for m in matrices} - {m.bias for m in matrices}
    assert untouched
    assert all(torch.equal(fitted[name], tensors[name]) for name in untouched)
    assert not any(tensor.requires_grad for tensor in fitted.values())


@pytest.mark.parametrize("with_held_out", [True, False])
def test_nothing_to_improve_returns_the_input(checkpoint: Checkpoint, with_held_out: bool) -> None:
    """Oracle: the input itself, which is exact here; any step is worse, and ties go to the unfitted block."""
    run, tensors, inputs = setting(checkpoint)
    targets = targets_of(run, tensors, inputs)
    held_out = Pairs(inputs[6:], targets[6:]) if with_held_out else Pairs([], [])
    fitted, facts = fitting(
        run,
        tensors,
        checkpoint.architecture.layouts[0].matrices,
        Pairs(inputs[:2], targets[:2]),
        held_out,
        params(epochs=2),
        "x",
    )
    assert all(torch.equal(fitted[name], tensors[name]) for name in tensors)
    assert facts["epochs"] == 0
    assert facts["held_out_after"] == facts["held_out_before"] == 0


def test_held_out_rows_decide(checkpoint: Checkpoint) -> None:
    """The training rows have another target, so fitting improves them and worsens the held-out
    rows. After ``patience`` epochs, the input is returned.
    """
    run, tensors, inputs = setting(checkpoint)
    targets = targets_of(run, tensors, inputs)
    wrong = [target * 1.5 for target in targets[:2]]
    calls = [0]

    def counted(hidden: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        calls[0] += 1
        return run(hidden, values)

    matrices = checkpoint.architecture.layouts[0].matrices
    fitted, facts = fitting(
        counted,
        tensors,
        matrices,
        Pairs(inputs[:2], wrong),
        Pairs(inputs[6:], targets[6:]),
        params(patience=3),
        "x",
    )  # type: ignore[arg-type]
    assert all(torch.equal(fitted[name], tensors[name]) for name in tensors)
    assert facts["fit_after"] == facts["fit_before"]
    # Before: 1 + 2 batches; each of 3 epochs: 4 steps of a row from each of 2 lanes, 2 held-out
    # batches; after: 1.
    assert calls[0] == 3 + 3 * (4 * 2 + 2) + 1


def test_only_the_given_matrices_change(llama: Checkpoint) -> None:
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.layouts[0].matrices)
    chosen = [m for m in llama.architecture.layouts[0].matrices if m.kind in ("up", "down")]
    fitted, _ = fitting(
        run,
        broken,
        chosen,
        Pairs(inputs[:6], targets[:6]),
        Pairs(inputs[6:], targets[6:]),
        params(epochs=2),
        "x",
    )
    changed = {name for name in tensors if not torch.equal(fitted[name], broken[name])}
    assert changed == {m.parameter for m in chosen}


def test_factors_stay_inside_the_box(llama: Checkpoint) -> None:
    """|log a|, |log r| ≤ limit: no entry moves by more than exp(2·limit), whatever the rate."""
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.layouts[0].matrices)
    fitted, facts = fitting(
        run,
        broken,
        llama.architecture.layouts[0].matrices,
        Pairs(inputs[:6], targets[:6]),
        Pairs([], []),
        params(epochs=3, rate=0.3, limit=0.05),
        "x",
    )
    assert facts["epochs"] > 0
    for matrix in llama.architecture.layouts[0].matrices:
        kept = broken[matrix.parameter] != 0
        ratio = (fitted[matrix.parameter][kept] / broken[matrix.parameter][kept]).log().abs().max()
        assert 0 < float(ratio) <= 0.1 + 1e-5


def test_the_same_seed_gives_the_same_bits_and_the_name_matters(llama: Checkpoint) -> None:
    """Randomness is keyed by (seed, block): equal keys equal bits, other keys other orders of the rows."""
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.layouts[0].matrices)
    name = "mlp.up_proj.weight"

    def run_once(where: str, seed: int) -> torch.Tensor:
        stages = Pairs(inputs[:4], targets[:4]), Pairs(inputs[6:], targets[6:])
        return fitting(
            run, broken, llama.architecture.layouts[0].matrices, *stages, params(epochs=2, seed=seed), where
        )[0][name]

    first = run_once("layers.0", 0)
    assert torch.equal(first, run_once("layers.0", 0))
    assert not torch.equal(first, run_once("layers.1", 0))
    assert not torch.equal(first, run_once("layers.0", 1))


def test_the_regulariser_pulls_norms_up(llama: Checkpoint) -> None:
    """Oracle: exp(−α‖W̃‖/‖W‖) falls as norms grow: with a large λ the fitted norms exceed those
    without it.
    """
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.layouts[0].matrices)
    stages = Pairs(inputs[:4], targets[:4]), Pairs([], [])
    norms = []
    for weight in (0.0, 3.0):
        fitted, _ = fitting(
            run, broken, llama.architecture.layouts[0].matrices, *stages, params(epochs=1, weight=weight), "x"
        )
        norms.append(
            sum(
                float(torch.linalg.matrix_norm(fitted[m.parameter], 2))
                for m in llama.architecture.layouts[0].matrices
            )
        )
    assert norms[1] > norms[0]


def test_block_error_by_hand() -> None:
    """Oracle: by hand. Targets ±1 around 0 have a scale of 4; outputs off by 1 everywhere are wrong
    by 4: error 1.
    """
    target = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]])
    rows = Pairs([target], [target])
    assert block_error(lambda hidden, _tensors: hidden, {}, rows) == 0
    assert block_error(lambda hidden, _tensors: hidden + 1, {}, rows) == pytest.approx(1)
    assert block_error(lambda hidden, _tensors: 0 * hidden, {}, rows) == pytest.approx(1)


def test_block_error_does_not_depend_on_the_batches() -> None:
    """Oracle: one batch of all rows. A short last batch must weigh no more than its rows."""
    random = torch.Generator().manual_seed(4)
    target = torch.randn(7, 3, 2, generator=random) + 5 * torch.randn(7, 1, 1, generator=random)
    whole = block_error(lambda hidden, _tensors: 0.9 * hidden, {}, Pairs([target], [target]))
    parts = list(target.split(6))
    assert block_error(lambda hidden, _tensors: 0.9 * hidden, {}, Pairs(parts, parts)) == pytest.approx(
        whole, rel=1e-5
    )


PARTS: tuple[list[Literal["factors", "biases", "norms"]], ...] = (
    ["factors"],
    ["biases"],
    ["norms"],
    ["norms", "factors"],
)
# biases, norms, fused and transposed parameters
VARIED = ("llama-bias", "opt", "gpt2", "phi3", "gpt_neox", "gemma")
WITHOUT_BIASES = ("phi3", "gemma")


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        (family, parts)
        for family in VARIED
        for parts in PARTS
        if parts != ["biases"] or family not in WITHOUT_BIASES
    ],
)
def test_only_the_named_parts_move(checkpoint: Checkpoint, parts: list[str]) -> None:
    """Oracle: the stored names: matrices are 2-D, norms' weights 1-D, biases end in bias. All else
    stays to the bit, zeros stay zero.
    """
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    broken = damaged(tensors, matrices)
    for name in tensors:
        if "norm" in name or "ln_" in name:
            broken[name] = broken[name] * 1.3
    targets = targets_of(run, tensors, inputs)
    held_out = Pairs(inputs[6:], targets[6:])
    fitted, facts = fitting(
        run, broken, matrices, Pairs(inputs[:6], targets[:6]), held_out, params(epochs=2, parts=parts), "x"
    )
    kinds = {
        name: "factors" if t.ndim == 2 else "biases" if name.endswith("bias") else "norms"
        for name, t in tensors.items()
    }
    biases = {matrix.bias for matrix in matrices}
    movable = {name for name, kind in kinds.items() if kind in parts and (kind != "biases" or name in biases)}
    assert facts["epochs"] > 0
    assert facts["held_out_after"] < facts["held_out_before"]
    assert {name for name in tensors if not torch.equal(fitted[name], broken[name])} == movable
    for name, kind in kinds.items():
        if kind == "factors":
            assert torch.equal(fitted[name] == 0, broken[name] == 0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox-serial"])
def test_a_block_without_the_named_parts_comes_back_unfitted(checkpoint: Checkpoint) -> None:
    """Nothing to move is no error. Oracle: the input, and ``epochs`` 0."""
    table = checkpoint.architecture.layouts[0]
    run, tensors, inputs = setting(checkpoint)
    targets = targets_of(run, tensors, inputs)
    chosen = [matrix for matrix in table.matrices if matrix.bias is None]
    assert chosen
    broken = damaged(tensors, tuple(chosen))
    stages = Pairs(inputs[:2], targets[:2]), Pairs(inputs[6:], targets[6:])
    fitted, facts = fitting(run, broken, chosen, *stages, params(epochs=1, parts=["biases"]), "x")
    assert all(torch.equal(fitted[name], broken[name]) for name in broken)
    assert facts["epochs"] == 0
    assert facts["held_out_after"] == facts["held_out_before"]


@pytest.mark.parametrize("family", VARIED)
def test_mixed_precision_ends_where_single_precision_does(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the fit in float32, to a tenth of what it gains; and ``block_error`` in the same
    precision, which in bfloat16 is within 2% of float32's.
    """
    monkeypatch.setattr("pipeline_lib.core.products.bfloat16_is_faster", lambda: True)
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, matrices, 0.2)
    held_out = Pairs(inputs[6:], targets[6:])
    found = {}
    for dtype in ("float32", "bfloat16"):
        fitted, facts = fitting(
            run,
            broken,
            matrices,
            Pairs(inputs[:6], targets[:6]),
            held_out,
            params(epochs=6, compute_dtype=dtype),
            "x",
        )
        assert {tensor.dtype for tensor in fitted.values()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            assert facts["held_out_after"] == pytest.approx(block_error(run, fitted, held_out), rel=1e-4)
        assert facts["held_out_after"] == pytest.approx(block_error(run, fitted, held_out), rel=0.02)
        found[dtype] = facts
    gained = found["float32"]["held_out_before"] - found["float32"]["held_out_after"]
    assert gained > 0.3 * found["float32"]["held_out_before"]
    assert found["bfloat16"]["held_out_after"] == pytest.approx(
        found["float32"]["held_out_after"], abs=0.1 * gained
    )
    assert found["bfloat16"]["held_out_after"] != found["float32"]["held_out_after"]


@pytest.mark.parametrize("family", ["gpt2", "gpt2-relu"])
def test_transposed_parameters(checkpoint: Checkpoint) -> None:
    """Conv1D keeps W as [inputs, outputs]. Oracle: the unfolded block, whose modules' inputs and
    outputs are multiplied by hooks instead.
    """
    table = checkpoint.architecture.layouts[0]
    run, tensors, inputs = setting(checkpoint)
    assert all(matrix.transposed for matrix in table.matrices)
    assert {matrix.rows is None for matrix in table.matrices} == {True, False}
    factors = _Free(masks_of(tensors, table.matrices), tensors, ["factors"])
    assert all(torch.equal(factors.apply(tensors)[name], tensors[name]) for name in tensors)
    random = torch.Generator().manual_seed(9)
    for group in (factors.rows, factors.columns):
        group[:] = [0.4 * torch.randn(leaf.shape, generator=random) for leaf in group]
    folded = factors.apply(tensors)
    assert {name: tensor.shape for name, tensor in folded.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }

    block = BlockModel(checkpoint, torch.float32, torch.device("cpu")).block(0, tensors)
    numbered = list(enumerate(table.matrices))
    for parameter in dict.fromkeys(matrix.parameter for matrix in table.matrices):
        own = [(number, matrix) for number, matrix in numbered if matrix.parameter == parameter]

        def scaled(
            module: torch.nn.Module, given: tuple[torch.Tensor, ...], _out: torch.Tensor, own: Any = own
        ) -> torch.Tensor:
            outs = []
            for number, matrix in own:
                start, stop = matrix.rows or (0, module.weight.shape[1])
                outs.append(
                    (given[0] * factors.columns[number].exp())
                    @ module.weight[:, start:stop]
                    * factors.rows[number].exp()
                )
            return torch.cat(outs, -1) + module.bias

        block.get_submodule(parameter.removesuffix(".weight")).register_forward_hook(scaled)
    with torch.no_grad():
        expected = run.func(block, 0, inputs[0])  # type: ignore[attr-defined]
        torch.testing.assert_close(
            run(inputs[0], folded), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
        assert float((run(inputs[0], tensors) - expected).abs().max()) > 0.01 * float(expected.abs().max())


FUSED = (
    Matrix("q", "qkv.weight", "x", "qkv.bias", rows=(0, 2)),
    Matrix("v", "qkv.weight", "x", rows=(2, 5)),
    Matrix("o", "o.weight", "y", "o.bias", transposed=True),
    Matrix("up", "experts", "y", expert=1),
)


def fused_tensors() -> dict[str, torch.Tensor]:
    """A fused projection, a transposed weight, a stack of experts, biases: every kind of logical
    matrix; float64.
    """
    random = torch.Generator().manual_seed(5)
    shapes = {
        "qkv.weight": (5, 3),
        "qkv.bias": (5,),
        "o.weight": (3, 2),
        "o.bias": (2,),
        "experts": (2, 3, 2),
    }
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def wide_factors(tensors: dict[str, torch.Tensor]) -> _Free:
    factors = _Free(masks_of(tensors, FUSED), tensors, ("factors", "biases"))
    random = torch.Generator().manual_seed(6)
    for group in (factors.rows, factors.columns):
        group[:] = [0.3 * torch.randn(leaf.shape, generator=random, dtype=torch.float64) for leaf in group]
    return factors


def test_apply_by_hand() -> None:
    """Oracle: diag(r) W diag(a) of each logical matrix written out; what no factor reaches stays."""
    tensors = fused_tensors()
    factors = wide_factors(tensors)
    factors.biases["o.bias"] = torch.tensor([1.0, -2.0], dtype=torch.float64)
    out = factors.apply(tensors)
    r, a = ([leaf.exp() for leaf in group] for group in (factors.rows, factors.columns))
    expected = dict(tensors)
    expected["qkv.weight"] = torch.cat(
        [r[0][:, None] * tensors["qkv.weight"][:2] * a[0], r[1][:, None] * tensors["qkv.weight"][2:] * a[1]]
    )
    expected["o.weight"] = a[2][:, None] * tensors["o.weight"] * r[2]
    expected["experts"] = torch.stack([tensors["experts"][0], r[3][:, None] * tensors["experts"][1] * a[3]])
    expected["o.bias"] = tensors["o.bias"] + torch.tensor([1.0, -2.0])
    assert out.keys() == tensors.keys()
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-12, atol=0)
    before = fused_tensors()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_gradients_of_apply() -> None:
    """Oracle: finite differences in float64 (gradcheck), through every kind of logical matrix and
    every bias.
    """
    tensors = fused_tensors()
    factors = wide_factors(tensors)
    names = list(factors.biases)
    leaves = [*factors.rows, *factors.columns, *(torch.zeros_like(tensors[str(name)]) for name in names)]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(FUSED)
        factors.rows, factors.columns = list(values[:count]), list(values[count : 2 * count])
        factors.biases = dict(zip(names, values[2 * count :], strict=True))
        return tuple(factors.apply(tensors).values())

    assert torch.autograd.gradcheck(function, [leaf.clone().requires_grad_(True) for leaf in leaves])


def test_factors_start_at_the_identity() -> None:
    tensors = fused_tensors()
    factors = _Free(masks_of(tensors, FUSED), tensors, ("factors", "biases"))
    out = factors.apply(tensors)
    assert all(torch.equal(out[name], tensors[name]) for name in tensors)
    leaves = [leaf for group in factors.groups(params()) for leaf in group["params"]]
    assert len(leaves) == 2 * len(FUSED) + 2
    assert all(leaf.requires_grad for leaf in leaves)


# Kept weights


def block_params(**changes: Any) -> FinetuneParams:
    values = {**params().model_dump(), "parts": ["weights"], "epochs": 12, "window": 1, "refresh_epochs": 0}
    return FinetuneParams.model_validate({**values, **changes})


def noisy(
    tensors: Mapping[str, torch.Tensor], matrices: Sequence[Matrix], spread: float = 0.3
) -> dict[str, torch.Tensor]:
    """Every kept weight of these matrices moved, in units of their matrix's scale; zeros stay."""
    random = torch.Generator().manual_seed(3)
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for matrix in matrices:
        view = matrix.view(out[matrix.parameter])
        kept = view != 0
        noise = spread * torch.randn(view.shape, generator=random) * view[kept].square().mean().sqrt()
        view.copy_(view + noise * kept)
    return out


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gpt_neox"])
def test_noise_on_kept_weights_is_undone(checkpoint: Checkpoint) -> None:
    """Oracle: the undamaged block, on rows that the fit did not see; and its zeros, which stay zero
    to the sign bit.
    """
    run, tensors, inputs = setting(checkpoint, batches=20)
    matrices = checkpoint.architecture.layouts[0].matrices
    targets = targets_of(run, tensors, inputs)
    broken = noisy(tensors, matrices)
    held_out = Pairs(inputs[16:], targets[16:])
    sparse = Sparse(run, dict(broken), masks_of(broken, matrices), "layers.0")
    found = fit(sparse, Pairs(inputs[:16], targets[:16]), held_out, block_params(batch_rows=4))
    before, after = block_error(run, broken, held_out), block_error(run, found.tensors, held_out)
    assert after < 0.3 * before
    assert found.masks is None
    assert found.facts["held_out_before"] == pytest.approx(before)
    assert found.facts["held_out_after"] == pytest.approx(after, rel=1e-4)
    for matrix in matrices:
        pruned = matrix.view(tensors[matrix.parameter]) == 0
        assert 0.4 < float(pruned.float().mean()) < 0.6
        left = matrix.view(found.tensors[matrix.parameter])
        assert not left[pruned].view(torch.int32).any()
        assert (left != 0)[~pruned].all()
    assert {name for name in tensors if not torch.equal(found.tensors[name], broken[name])} == {
        m.parameter for m in matrices
    }
    assert not any(tensor.requires_grad for tensor in found.tensors.values())


@pytest.mark.parametrize(("family", "kinds"), [("phi3", {"q", "v", "up"}), ("gpt2", {"k", "fc2"})])
@pytest.mark.parametrize("parts", [["weights"], ["weights", "factors"]])
def test_rows_of_an_excluded_matrix_stay(checkpoint: Checkpoint, kinds: set[str], parts: list[str]) -> None:
    """A fused parameter of which only some matrices are pruned. Oracle: the bits of the other rows;
    no zero of theirs counts as pruned.
    """
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.layouts[0].matrices
    chosen = [matrix for matrix in matrices if matrix.kind in kinds]
    assert {matrix.kind for matrix in chosen} == kinds
    targets = targets_of(run, tensors, inputs)
    broken = noisy(tensors, matrices)
    stages = Pairs(inputs[:6], targets[:6]), Pairs(inputs[6:], targets[6:])
    found = fit(
        Sparse(run, dict(broken), masks_of(broken, chosen), "x"), *stages, block_params(epochs=2, parts=parts)
    ).tensors
    for matrix in matrices:
        same = torch.equal(matrix.view(found[matrix.parameter]), matrix.view(broken[matrix.parameter]))
        assert same == (matrix not in chosen), matrix.label
    untouched = tensors.keys() - {matrix.parameter for matrix in chosen}
    assert all(torch.equal(found[name], broken[name]) for name in untouched)


def sparse_tensors() -> dict[str, torch.Tensor]:
    """``fused_tensors`` with a norm's weight and about half of all matrices' entries zero."""
    random = torch.Generator().manual_seed(7)
    tensors = {
        name: t * (torch.rand(t.shape, generator=random) < 0.5) if t.ndim > 1 else t
        for name, t in fused_tensors().items()
    }
    return tensors | {"norm.weight": torch.rand(3, generator=random, dtype=torch.float64) + 0.5}


def everything(tensors: Mapping[str, torch.Tensor]) -> _Free:
    """All parts moved a little, in float64."""
    free = _Free(masks_of(tensors, FUSED), tensors, ("weights", "factors", "biases", "norms"))
    random = torch.Generator().manual_seed(8)

    def moved(leaf: torch.Tensor) -> torch.Tensor:
        noise = 0.3 * torch.randn(leaf.shape, generator=random, dtype=torch.float64)
        return (leaf.detach().double() + noise).requires_grad_(True)

    free.weights, free.rows, free.columns = (
        [moved(leaf) for leaf in group] for group in (free.weights, free.rows, free.columns)
    )
    free.biases, free.norms = (
        {name: moved(leaf) for name, leaf in group.items()} for group in (free.biases, free.norms)
    )
    return free


def test_gradients_of_apply_with_weights() -> None:
    """Oracle: finite differences in float64 (gradcheck) of every leaf, through every kind of
    logical matrix.
    """
    tensors = sparse_tensors()
    free = everything(tensors)
    count, names = len(FUSED), [*free.biases, *free.norms]
    leaves = [*free.weights, *free.rows, *free.columns, *free.biases.values(), *free.norms.values()]
    assert len(leaves) == 3 * count + 2 + 1

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        free.weights, free.rows, free.columns = (
            list(values[start * count : (start + 1) * count]) for start in range(3)
        )
        rest = dict(zip(names, values[3 * count :], strict=True))
        free.biases, free.norms = (
            {name: rest[name] for name in group} for group in (free.biases, free.norms)
        )
        return tuple(free.apply(tensors).values())

    assert torch.autograd.gradcheck(function, leaves)
    before = sparse_tensors()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("refreshing", [False, True])
def test_gradients_at_pruned_weights(refreshing: bool) -> None:
    """Oracle: by hand, d⟨A, r W a⟩/dW = r A a. Pruned weights get none of it, but all of it while
    masks are chosen anew.
    """
    tensors = sparse_tensors()
    free = everything(tensors)
    free.refreshing = refreshing
    random = torch.Generator().manual_seed(9)
    adjoint = {
        name: torch.randn(tensor.shape, generator=random, dtype=torch.float64)
        for name, tensor in tensors.items()
    }
    out = free.apply(tensors)
    sum((adjoint[name] * out[name]).sum() for name in tensors).backward()
    for matrix, weight, row, column in zip(FUSED, free.weights, free.rows, free.columns, strict=True):
        pruned = matrix.view(tensors[matrix.parameter]) == 0
        assert pruned.any()
        assert not matrix.view(out[matrix.parameter])[pruned].any()
        expected = (row[:, None] + column).exp() * matrix.view(adjoint[matrix.parameter])
        expected = expected if refreshing else expected.masked_fill(pruned, 0)
        torch.testing.assert_close(weight.grad, expected.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_gradients_of_a_block_s_loss(checkpoint: Checkpoint) -> None:
    """Oracle: central differences of the loss in float64, at a few kept weights of every matrix
    (RMSNorm computes in float32).
    """
    run, tensors, inputs = setting(checkpoint, torch.float64, batches=2)
    matrices = checkpoint.architecture.layouts[0].matrices
    target = targets_of(run, tensors, inputs)[0]
    broken = {name: tensor * 1.1 for name, tensor in tensors.items()}
    free = _Free(masks_of(broken, matrices), broken, ["weights"])

    def loss() -> torch.Tensor:
        return (run(inputs[0], free.apply(broken)) - target).square().mean()

    loss().backward()
    for weight, kept in zip(free.weights, free.kept, strict=True):
        gradient, values = weight.grad, weight.detach()
        assert gradient is not None
        assert not gradient[~kept].any()
        largest = gradient.abs().flatten().argsort(descending=True)[:2].tolist()
        for place in [*largest, int(kept.flatten().nonzero()[5])]:
            entry = values.view(-1)[place : place + 1]
            ends = []
            for step in (1e-3, -2e-3, 1e-3):  # and back
                entry += step
                ends.append(float(loss().detach()))
            expected = (ends[0] - ends[1]) / 2e-3
            assert float(gradient.reshape(-1)[place]) == pytest.approx(
                expected, rel=1e-3, abs=1e-3 * float(gradient.abs().max())
            )


def test_step_sizes_are_in_units_of_each_matrix() -> None:
    """Oracle: by hand, the root mean square of the kept weights. A matrix without any weight left
    has nothing to move.
    """
    tensors = sparse_tensors()
    tensors["o.weight"] *= 8
    tensors["experts"] = tensors["experts"].clone()
    tensors["experts"][1] = 0
    free = _Free(masks_of(tensors, FUSED), tensors, ("weights", "biases", "norms"))
    groups = free.groups(params(rate=0.01, bias_rate=0.003))
    rates = {id(leaf): group["lr"] for group in groups for leaf in group["params"]}
    assert len(rates) == 3 + 2 + 1
    for matrix, weight in list(zip(FUSED, free.weights, strict=True))[:3]:
        view = matrix.view(tensors[matrix.parameter])
        assert rates[id(weight)] == pytest.approx(0.01 * float(view[view != 0].square().mean().sqrt()))
    assert {rates[id(leaf)] for leaf in free.norms.values()} == {0.01}
    assert {rates[id(leaf)] for leaf in free.biases.values()} == {0.003}


def test_steps_do_not_depend_on_the_scale_of_a_matrix(llama: Checkpoint) -> None:
    """Up eight times as large and down an eighth is the same block. Oracle: the fit of the unscaled
    one, scaled afterwards.
    """
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = noisy(tensors, llama.architecture.layouts[0].matrices)
    scales = {"mlp.up_proj.weight": 8.0, "mlp.down_proj.weight": 0.125}
    scaled = {name: tensor * scales.get(name, 1.0) for name, tensor in broken.items()}
    stages = Pairs(inputs[:6], targets[:6]), Pairs(inputs[6:], targets[6:])
    masks = masks_of(broken, llama.architecture.layouts[0].matrices)
    plain, other = (
        fit(Sparse(run, dict(start), masks, "x"), *stages, block_params(epochs=3)).tensors
        for start in (broken, scaled)
    )
    for name, scale in scales.items():
        moved = float((plain[name] - broken[name]).square().mean().sqrt())
        assert moved > 0.01 * float(broken[name].square().mean().sqrt())
        torch.testing.assert_close(other[name] / scale, plain[name], rtol=0, atol=0.01 * moved)


def test_a_kept_weight_that_is_zero_moves(llama: Checkpoint) -> None:
    """Oracle: the undamaged block. Two weights that are kept were set to zero; they come back, and
    what is pruned stays zero.
    """
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    matrix = next(m for m in llama.architecture.layouts[0].matrices if m.kind == "down")
    masks = masks_of(tensors, [matrix])
    broken = {name: tensor.clone() for name, tensor in tensors.items()}
    view = matrix.view(broken[matrix.parameter])
    places = (view.abs() * masks[matrix]).flatten().argsort(descending=True)[:2]
    wanted = view.reshape(-1)[places].clone()
    view.view(-1)[places] = 0
    stages = Pairs(inputs[:6], targets[:6]), Pairs(inputs[6:], targets[6:])
    left = matrix.view(
        fit(Sparse(run, dict(broken), masks, "x"), *stages, block_params(epochs=30, rate=0.05)).tensors[
            matrix.parameter
        ]
    )
    assert float((left.reshape(-1)[places] - wanted).abs().max()) < 0.3 * float(wanted.abs().min())
    assert not left[~masks[matrix]].view(torch.int32).any()


@pytest.mark.parametrize("family", ["gemma", "llama"])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_norms_move_in_the_form_that_they_are_stored_in(checkpoint: Checkpoint, spread: float) -> None:
    """Oracle: the block with the right norms. Gemma's are 1 + w, near w = 0 too; at the start
    nothing differs to the last bit.
    """
    run, tensors, inputs = setting(checkpoint)
    offsets = checkpoint.architecture.layouts[0].offsets
    norms = [name for name, tensor in tensors.items() if tensor.ndim == 1 and name.endswith("weight")]
    assert offsets == (dict.fromkeys(norms, 1.0) if checkpoint.architecture.family == "gemma" else {})
    random = torch.Generator().manual_seed(4)
    start = 0.0 if offsets else 1.0
    broken = tensors | {
        name: start + spread * torch.randn(tensors[name].shape, generator=random) for name in norms
    }
    right = {
        name: (broken[name] + 1 - start) * (0.4 * torch.randn(tensors[name].shape, generator=random)).exp()
        + start
        - 1
        for name in norms
    }
    targets = targets_of(run, tensors | right, inputs)
    masks = masks_of(tensors, checkpoint.architecture.layouts[0].matrices)
    plain = _Free(masks, broken, ["norms"], offsets=offsets).apply(broken)
    assert all(torch.equal(plain[name], broken[name]) for name in broken)
    held_out = Pairs(inputs[6:], targets[6:])
    how = params(parts=["norms"], rate=0.05)
    found = fit(
        Sparse(run, dict(broken), masks, "x", offsets=offsets), Pairs(inputs[:6], targets[:6]), held_out, how
    )
    assert found.facts["held_out_after"] < 0.05 * found.facts["held_out_before"]


# The learning rate


@pytest.mark.parametrize(("epochs", "rows"), [(1, 8), (2, 8), (4, 6), (3, 2)])
def test_the_rate_falls_along_a_cosine_to_a_tenth(epochs: int, rows: int) -> None:
    """Oracle: Adam under a gradient that hardly changes moves by its rate: the bias of a toy block
    whose targets are far away, step by step.
    """
    matrix = Matrix("o", "o.weight", "x", "o.bias")
    tensors = {"o.weight": torch.eye(2), "o.bias": torch.zeros(2)}
    seen: list[float] = []

    def run(hidden: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(float(values["o.bias"][0].detach()))
        return hidden @ values["o.weight"].T + values["o.bias"]

    inputs = [torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(0))]
    pairs = Pairs(inputs, [inputs[0] + 100])
    how = params(epochs=epochs, bias_rate=0.01, parts=["biases"])
    seen.append(
        float(
            fit(Sparse(run, dict(tensors), masks_of(tensors, [matrix]), "x"), pairs, pairs, how).tensors[
                "o.bias"
            ][0]
        )
    )
    moves = [after - before for before, after in pairwise(seen) if after != before]  # judging moves nothing
    steps = epochs * rows // 2
    expected = [
        0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / (steps - 1))) / 2) for step in range(steps)
    ]
    assert moves == pytest.approx(expected, rel=1e-2)
    assert expected[0] == 0.01
    assert expected[-1] == pytest.approx(0.001)


# Masks chosen anew


def poorly_masked(checkpoint: Checkpoint) -> tuple[Run, dict[str, torch.Tensor], Masks, Masks, Pairs, Pairs]:
    """A dense block as the target, and it with the larger half of ``down`` (or fc2) pruned: run,
    tensors, masks, better masks, rows.
    """
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    inputs = model.embed(token_rows(48, 12, seed=1), 4).hidden
    run = functools.partial(model.call, model.block(0), 0)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.block(0).items()}
    targets = targets_of(run, tensors, inputs)
    matrices = [
        matrix for matrix in checkpoint.architecture.layouts[0].matrices if matrix.kind in ("down", "fc2")
    ]
    best = {}
    for matrix in matrices:
        view = matrix.view(tensors[matrix.parameter])
        best[matrix] = view.abs() > view.abs().median()
        view.masked_fill_(best[matrix], 0)
    masks = {matrix: matrix.view(tensors[matrix.parameter]) != 0 for matrix in matrices}
    return run, tensors, masks, best, Pairs(inputs[:10], targets[:10]), Pairs(inputs[10:], targets[10:])


def largest(counts: Mapping[Matrix, int], tensors: Mapping[str, torch.Tensor]) -> Masks:
    """As many of the largest weights of each matrix."""
    masks = {}
    for matrix, count in counts.items():
        size = matrix.view(tensors[matrix.parameter]).abs()
        masks[matrix] = torch.zeros(size.shape, dtype=torch.bool)
        masks[matrix].view(-1)[size.flatten().argsort(descending=True)[:count]] = True
    return masks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_are_chosen_anew(checkpoint: Checkpoint) -> None:
    """A mask that keeps the smaller half. Oracles: the larger half, more of which is kept; the
    error without refreshing; the counts.
    """
    run, tensors, masks, best, fitting_rows, held_out = poorly_masked(checkpoint)
    counts = {matrix: int(mask.sum()) for matrix, mask in masks.items()}
    asked = [0]

    def remask(tensors: Mapping[str, torch.Tensor]) -> Masks:
        asked[0] += 1
        return largest(counts, tensors)

    refreshed = fit(
        Sparse(run, dict(tensors), masks, "x", remask),
        fitting_rows,
        held_out,
        block_params(epochs=8, refresh_epochs=4),
    )
    assert asked == [4]
    fixed = fit(
        Sparse(run, dict(tensors), masks, "x", remask), fitting_rows, held_out, block_params(epochs=8)
    )
    unasked = fit(
        Sparse(run, dict(tensors), masks, "x"),
        fitting_rows,
        held_out,
        block_params(epochs=1, refresh_epochs=1),
    )
    assert asked == [4]
    assert fixed.masks is None
    assert unasked.masks is None
    assert refreshed.masks is not None
    assert refreshed.masks.keys() == masks.keys()
    for matrix, mask in refreshed.masks.items():
        left = matrix.view(refreshed.tensors[matrix.parameter])
        assert int(mask.sum()) == counts[matrix]
        assert not left[~mask].view(torch.int32).any()
        assert int((mask & best[matrix]).sum()) > 0.2 * counts[matrix]
        assert torch.equal(matrix.view(fixed.tensors[matrix.parameter]) != 0, masks[matrix])
    assert refreshed.facts["held_out_after"] == pytest.approx(
        block_error(run, refreshed.tensors, held_out), rel=1e-4
    )
    assert refreshed.facts["held_out_after"] < 0.9 * fixed.facts["held_out_after"]


def test_masks_stay_while_they_are_refreshed_to_themselves(llama: Checkpoint) -> None:
    """A choice that always falls on the same weights. Oracle: the masks, and zeros to the sign bit
    after the refreshing epochs too.
    """
    run, tensors, masks, _, fitting_rows, held_out = poorly_masked(llama)
    found = fit(
        Sparse(run, dict(tensors), masks, "x", lambda _: masks),
        fitting_rows,
        held_out,
        block_params(epochs=2, refresh_epochs=2),
    )
    assert found.masks is not None
    assert found.facts["epochs"] > 0
    for matrix, mask in masks.items():
        assert torch.equal(found.masks[matrix], mask)
        left = matrix.view(found.tensors[matrix.parameter])
        assert not left[~mask].view(torch.int32).any()
        assert (left[mask] != 0).all()


def test_masks_that_made_it_worse_are_not_returned(llama: Checkpoint) -> None:
    """Oracle: the input. Masks that only destroy lose to the unfitted block, whose masks stay."""
    run, tensors, masks, _, fitting_rows, held_out = poorly_masked(llama)
    targets = targets_of(run, tensors, held_out.inputs)
    worse = {matrix: ~mask for matrix, mask in masks.items()}
    how = block_params(epochs=1, refresh_epochs=1)
    found = fit(
        Sparse(run, dict(tensors), masks, "x", lambda _: worse),
        fitting_rows,
        Pairs(held_out.inputs, targets),
        how,
    )
    assert found.masks is None
    assert found.facts["epochs"] == 0
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
