"""Channel compensation. Oracles: a damage that factors can undo, finite differences, and the block's own zeros."""

import functools
from typing import Any, Literal

import pytest
import torch
from tiny import FAMILIES, token_rows

from pipeline_lib.induction.spectral import SpectralParams
from pipeline_lib.models.architecture import Matrix
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.reconstruction.fit import FitParams, Pairs, Run, _Free, block_error, fit


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


def setting(checkpoint: Checkpoint) -> tuple[Run, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Block 0 as ``fit`` runs it, half of its weights zeroed, and the stream before it: 8 batches of 4 rows."""
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    stream = model.embed(token_rows(32, 12, seed=1), 4)
    tensors = checkpoint.block(0)
    random = torch.Generator().manual_seed(2)
    for parameter in dict.fromkeys(matrix.parameter for matrix in checkpoint.architecture.matrices):
        weight = tensors[parameter]
        tensors[parameter] = weight * (torch.rand(weight.shape, generator=random) < 0.5)
    return functools.partial(model.call, model.block(0), 0), tensors, stream.hidden


def fitting(*arguments: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors and facts that ``fit`` gives."""
    found = fit(*arguments)
    return found.tensors, found.facts


def targets_of(run: Run, tensors: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [run(hidden, tensors) for hidden in inputs]


def damaged(tensors: dict[str, torch.Tensor], matrices: tuple[Matrix, ...], spread: float = 0.4) -> dict[str, torch.Tensor]:
    """Every row and column of every matrix scaled at random, and every bias moved: what ``fit`` is able to undo."""
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
    """Oracle: the undamaged block. On rows it was not fitted on, most of the damage goes; no zero stops being one."""
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.matrices
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, matrices)
    held_out = Pairs(inputs[6:], targets[6:])
    fitted, facts = fitting(run, broken, matrices, Pairs(inputs[:6], targets[:6]), held_out, params(), "layers.0")
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
    fitted, facts = fitting(run, tensors, checkpoint.architecture.matrices, Pairs(inputs[:2], targets[:2]), held_out, params(epochs=2), "x")
    assert all(torch.equal(fitted[name], tensors[name]) for name in tensors)
    assert facts["epochs"] == 0
    assert facts["held_out_after"] == facts["held_out_before"] == 0


def test_held_out_rows_decide(checkpoint: Checkpoint) -> None:
    """Fitting rows that want something else improve, the held-out rows get worse: the input comes back, after ``patience`` epochs."""
    run, tensors, inputs = setting(checkpoint)
    targets = targets_of(run, tensors, inputs)
    wrong = [target * 1.5 for target in targets[:2]]
    calls = [0]

    def counted(hidden: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        calls[0] += 1
        return run(hidden, values)

    matrices = checkpoint.architecture.matrices
    fitted, facts = fitting(counted, tensors, matrices, Pairs(inputs[:2], wrong), Pairs(inputs[6:], targets[6:]), params(patience=3), "x")  # type: ignore[arg-type]
    assert all(torch.equal(fitted[name], tensors[name]) for name in tensors)
    assert facts["fit_after"] == facts["fit_before"]
    # Before: 1 + 2 batches; each of 3 epochs: 2 batches in 2 steps each, 2 held-out ones; after: 1.
    assert calls[0] == 3 + 3 * (4 + 2) + 1


def test_only_the_given_matrices_change(llama: Checkpoint) -> None:
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.matrices)
    chosen = [m for m in llama.architecture.matrices if m.kind in ("up", "down")]
    fitted, _ = fitting(run, broken, chosen, Pairs(inputs[:6], targets[:6]), Pairs(inputs[6:], targets[6:]), params(epochs=2), "x")
    changed = {name for name in tensors if not torch.equal(fitted[name], broken[name])}
    assert changed == {m.parameter for m in chosen}


def test_factors_stay_inside_the_box(llama: Checkpoint) -> None:
    """|log a|, |log r| ≤ limit: no entry moves by more than exp(2·limit), whatever the rate."""
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.matrices)
    fitted, facts = fitting(
        run, broken, llama.architecture.matrices, Pairs(inputs[:6], targets[:6]), Pairs([], []), params(epochs=3, rate=0.3, limit=0.05), "x"
    )
    assert facts["epochs"] > 0
    for matrix in llama.architecture.matrices:
        kept = broken[matrix.parameter] != 0
        ratio = (fitted[matrix.parameter][kept] / broken[matrix.parameter][kept]).log().abs().max()
        assert 0 < float(ratio) <= 0.1 + 1e-5


def test_the_same_seed_gives_the_same_bits_and_the_name_matters(llama: Checkpoint) -> None:
    """Randomness is keyed by (seed, block): equal keys equal bits, other keys other orders of the rows."""
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.matrices)
    name = "mlp.up_proj.weight"

    def run_once(where: str, seed: int) -> torch.Tensor:
        stages = Pairs(inputs[:4], targets[:4]), Pairs(inputs[6:], targets[6:])
        return fitting(run, broken, llama.architecture.matrices, *stages, params(epochs=2, seed=seed), where)[0][name]

    first = run_once("layers.0", 0)
    assert torch.equal(first, run_once("layers.0", 0))
    assert not torch.equal(first, run_once("layers.1", 0))
    assert not torch.equal(first, run_once("layers.0", 1))


def test_the_regulariser_pulls_norms_up(llama: Checkpoint) -> None:
    """Oracle: exp(−α‖W̃‖/‖W‖) falls as norms grow: with a large λ the fitted norms exceed those without it."""
    run, tensors, inputs = setting(llama)
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, llama.architecture.matrices)
    stages = Pairs(inputs[:4], targets[:4]), Pairs([], [])
    norms = []
    for weight in (0.0, 3.0):
        fitted, _ = fitting(run, broken, llama.architecture.matrices, *stages, params(epochs=1, weight=weight), "x")
        norms.append(sum(float(torch.linalg.matrix_norm(fitted[m.parameter], 2)) for m in llama.architecture.matrices))
    assert norms[1] > norms[0]


def test_block_error_by_hand() -> None:
    """Oracle: by hand. Targets ±1 around 0 have a scale of 4; outputs off by 1 everywhere are wrong by 4: error 1."""
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
    assert block_error(lambda hidden, _tensors: 0.9 * hidden, {}, Pairs(parts, parts)) == pytest.approx(whole, rel=1e-5)


PARTS: tuple[list[Literal["factors", "biases", "norms"]], ...] = (["factors"], ["biases"], ["norms"], ["norms", "factors"])
VARIED = ("llama-bias", "opt", "gpt2", "phi3", "gpt_neox", "gemma")  # biases, norms, fused and transposed parameters
WITHOUT_BIASES = ("phi3", "gemma")


@pytest.mark.parametrize(
    ("family", "parts"), [(family, parts) for family in VARIED for parts in PARTS if parts != ["biases"] or family not in WITHOUT_BIASES]
)
def test_only_the_named_parts_move(checkpoint: Checkpoint, parts: list[str]) -> None:
    """Oracle: the stored names: matrices are 2-D, norms' weights 1-D, biases end in bias. All else stays to the bit, zeros stay zero."""
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.matrices
    broken = damaged(tensors, matrices)
    for name in tensors:
        if "norm" in name or "ln_" in name:
            broken[name] = broken[name] * 1.3
    targets = targets_of(run, tensors, inputs)
    held_out = Pairs(inputs[6:], targets[6:])
    fitted, facts = fitting(run, broken, matrices, Pairs(inputs[:6], targets[:6]), held_out, params(epochs=2, parts=parts), "x")
    kinds = {name: "factors" if t.ndim == 2 else "biases" if name.endswith("bias") else "norms" for name, t in tensors.items()}
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
    table = checkpoint.architecture
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
def test_mixed_precision_ends_where_single_precision_does(checkpoint: Checkpoint) -> None:
    """Oracle: the fit in float32, to a tenth of what it gains; and ``block_error`` in float32, which judges either."""
    run, tensors, inputs = setting(checkpoint)
    matrices = checkpoint.architecture.matrices
    targets = targets_of(run, tensors, inputs)
    broken = damaged(tensors, matrices, 0.2)
    held_out = Pairs(inputs[6:], targets[6:])
    found = {}
    for dtype in ("float32", "bfloat16"):
        fitted, facts = fitting(run, broken, matrices, Pairs(inputs[:6], targets[:6]), held_out, params(epochs=6, compute_dtype=dtype), "x")
        assert {tensor.dtype for tensor in fitted.values()} == {torch.float32}
        assert facts["held_out_after"] == pytest.approx(block_error(run, fitted, held_out), rel=1e-4)
        found[dtype] = facts
    gained = found["float32"]["held_out_before"] - found["float32"]["held_out_after"]
    assert gained > 0.3 * found["float32"]["held_out_before"]
    assert found["bfloat16"]["held_out_after"] == pytest.approx(found["float32"]["held_out_after"], abs=0.1 * gained)
    assert found["bfloat16"]["held_out_after"] != found["float32"]["held_out_after"]


@pytest.mark.parametrize("family", ["gpt2", "gpt2-relu"])
def test_transposed_parameters(checkpoint: Checkpoint) -> None:
    """Conv1D keeps W as [inputs, outputs]. Oracle: the unfolded block, whose modules' inputs and outputs are multiplied by hooks instead."""
    table = checkpoint.architecture
    run, tensors, inputs = setting(checkpoint)
    assert all(matrix.transposed for matrix in table.matrices)
    assert {matrix.rows is None for matrix in table.matrices} == {True, False}
    factors = _Free(table.matrices, tensors, ["factors"])
    assert all(torch.equal(factors.apply(tensors)[name], tensors[name]) for name in tensors)
    random = torch.Generator().manual_seed(9)
    for group in (factors.rows, factors.columns):
        group[:] = [0.4 * torch.randn(leaf.shape, generator=random) for leaf in group]
    folded = factors.apply(tensors)
    assert {name: tensor.shape for name, tensor in folded.items()} == {name: tensor.shape for name, tensor in tensors.items()}

    block = BlockModel(checkpoint, torch.float32, torch.device("cpu")).block(0, tensors)
    numbered = list(enumerate(table.matrices))
    for parameter in dict.fromkeys(matrix.parameter for matrix in table.matrices):
        own = [(number, matrix) for number, matrix in numbered if matrix.parameter == parameter]

        def scaled(module: torch.nn.Module, given: tuple[torch.Tensor, ...], _out: torch.Tensor, own: Any = own) -> torch.Tensor:
            outs = []
            for number, matrix in own:
                start, stop = matrix.rows or (0, module.weight.shape[1])
                outs.append((given[0] * factors.columns[number].exp()) @ module.weight[:, start:stop] * factors.rows[number].exp())
            return torch.cat(outs, -1) + module.bias

        block.get_submodule(parameter.removesuffix(".weight")).register_forward_hook(scaled)
    with torch.no_grad():
        expected = run.func(block, 0, inputs[0])  # type: ignore[attr-defined]
        torch.testing.assert_close(run(inputs[0], folded), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert float((run(inputs[0], tensors) - expected).abs().max()) > 0.01 * float(expected.abs().max())


FUSED = (
    Matrix("q", "qkv.weight", "x", "qkv.bias", rows=(0, 2)),
    Matrix("v", "qkv.weight", "x", rows=(2, 5)),
    Matrix("o", "o.weight", "y", "o.bias", transposed=True),
    Matrix("up", "experts", "y", expert=1),
)


def fused_tensors() -> dict[str, torch.Tensor]:
    """A fused projection, a transposed weight, a stack of experts, biases: every kind of logical matrix; float64."""
    random = torch.Generator().manual_seed(5)
    shapes = {"qkv.weight": (5, 3), "qkv.bias": (5,), "o.weight": (3, 2), "o.bias": (2,), "experts": (2, 3, 2)}
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def wide_factors(tensors: dict[str, torch.Tensor]) -> _Free:
    factors = _Free(FUSED, tensors, ("factors", "biases"))
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
    expected["qkv.weight"] = torch.cat([r[0][:, None] * tensors["qkv.weight"][:2] * a[0], r[1][:, None] * tensors["qkv.weight"][2:] * a[1]])
    expected["o.weight"] = a[2][:, None] * tensors["o.weight"] * r[2]
    expected["experts"] = torch.stack([tensors["experts"][0], r[3][:, None] * tensors["experts"][1] * a[3]])
    expected["o.bias"] = tensors["o.bias"] + torch.tensor([1.0, -2.0])
    assert out.keys() == tensors.keys()
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-12, atol=0)
    before = fused_tensors()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_gradients_of_apply() -> None:
    """Oracle: finite differences in float64 (gradcheck), through every kind of logical matrix and every bias."""
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
    factors = _Free(FUSED, tensors, ("factors", "biases"))
    out = factors.apply(tensors)
    assert all(torch.equal(out[name], tensors[name]) for name in tensors)
    leaves = [leaf for group in factors.groups(params()) for leaf in group["params"]]
    assert len(leaves) == 2 * len(FUSED) + 2
    assert all(leaf.requires_grad for leaf in leaves)
