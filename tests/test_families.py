"""The table, family by family: what each config offers, how the parts of fused parameters are
addressed, and pruning end to end.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from project import recipe
from tiny import ALL_FAMILIES, discovered, load_full, make_config, random_factors, token_rows

from pipeline_lib.core.kept import Kept
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.architecture import Coupling, Layout, Matrix, Tie
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.folding import MatrixScales, fold
from pipeline_lib.models.stream import BlockModel
from pipeline_lib.models.transform import Transform
from pipeline_lib.prune.plan import plan
from pipeline_lib.prune.resume import PARTS, FinishedBlocks
from pipeline_lib.prune.run import Rows, Source, prune
from pipeline_lib.recipe.settings import Recipe

CPU = torch.device("cpu")


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# What a config offers


def offered(family: str, **overrides: object) -> set[str]:
    return {coupling.name for coupling in discovered(make_config(family, **overrides)).couplings}


NORMS, ATTENTION = {"attention_norm", "mlp_norm"}, {"v_o", "q_k"}


@pytest.mark.parametrize(
    ("family", "overrides", "couplings"),
    [
        ("llama", {}, {*NORMS, *ATTENTION, "up_down"}),
        ("llama", {"hidden_act": "relu"}, {*NORMS, *ATTENTION, "up_down"}),
        ("mistral", {}, {*NORMS, *ATTENTION, "up_down"}),
        ("qwen2", {}, {*NORMS, *ATTENTION, "up_down"}),
        ("qwen3", {}, {*NORMS, "v_o", "up_down"}),
        ("gemma", {}, {*NORMS, *ATTENTION, "up_down"}),
        ("phi3", {}, {*NORMS, *ATTENTION, "up_down"}),
        ("granite", {}, {*NORMS, *ATTENTION, "up_down"}),
        ("starcoder2", {}, {*NORMS, *ATTENTION}),
        ("starcoder2-relu", {}, {*NORMS, *ATTENTION, "fc1_fc2"}),
        ("opt", {}, {*NORMS, *ATTENTION, "fc1_fc2"}),
        ("opt", {"activation_function": "gelu"}, {*NORMS, *ATTENTION}),
        ("opt", {"layer_norm_elementwise_affine": False}, {*ATTENTION, "fc1_fc2"}),
        ("opt-post", {}, {*ATTENTION, "fc1_fc2"}),
        ("gpt_neox", {}, {*NORMS, *ATTENTION}),
        ("gpt_neox-serial", {}, {*NORMS, *ATTENTION, "fc1_fc2"}),
        ("bloom", {}, {*NORMS, *ATTENTION}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, ATTENTION),
        ("gpt2", {}, {*NORMS, *ATTENTION}),
        ("gpt2", {"activation_function": "leaky_relu"}, {*NORMS, *ATTENTION, "fc1_fc2"}),
    ],
)
def test_options_of_a_config_change_the_table(
    family: str, overrides: dict[str, object], couplings: set[str]
) -> None:
    """GELU carries no factor, a norm that also feeds the residual stream or has no weight absorbs
    none, per-head norms undo Q/K's.
    """
    assert offered(family, **overrides) == couplings


@pytest.mark.parametrize(
    ("family", "overrides", "biased"),
    [
        ("llama", {}, ""),
        ("llama", {"attention_bias": True}, "q k v o"),
        ("llama", {"mlp_bias": True}, "gate up down"),
        ("mistral", {"attention_bias": True}, ""),  # a stray key: the modelling code has no such switch
        ("qwen2", {}, "q k v"),
        ("qwen3", {}, "q k v o"),
        ("qwen3", {"attention_bias": False}, ""),
        ("gemma", {"attention_bias": True}, "q k v o"),
        ("phi3", {}, ""),
        ("granite", {}, ""),
        ("granite", {"attention_bias": True, "mlp_bias": True}, "q k v o gate up down"),
        ("starcoder2", {}, "q k v o fc1 fc2"),
        ("starcoder2-relu", {}, ""),
        ("opt", {}, "q k v o fc1 fc2"),
        ("opt", {"enable_bias": False}, ""),
        ("gpt_neox", {}, "qkv o fc1 fc2"),
        ("gpt_neox-serial", {}, "fc1 fc2"),
        ("bloom", {}, "qkv o fc1 fc2"),
        ("gpt2", {}, "q k v o fc1 fc2"),
    ],
)
def test_biases_follow_the_config(family: str, overrides: dict[str, object], biased: str) -> None:
    matrices = discovered(make_config(family, **overrides)).matrices
    assert " ".join(matrix.kind for matrix in matrices if matrix.bias) == biased


def test_rotated_pairs_and_grouped_queries_share_a_factor() -> None:
    """Oracle: the rotary layout i ↔ i + size/2 and the 2 query heads per key head of the tiny Llama
    (size 8).
    """
    q_k = next(c for c in discovered(make_config("llama")).couplings if c.name == "q_k")
    ties = {tie.parameter: tie for tie in q_k.ties}
    keys, queries = ties["self_attn.k_proj.weight"].index, ties["self_attn.q_proj.weight"].index
    assert q_k.size == 2 * 4
    for head in range(2):
        for i in range(4):
            assert keys[head * 8 + i] == keys[head * 8 + i + 4] == head * 4 + i
    assert tuple(queries) == tuple(keys[(head // 2) * 8 + i] for head in range(4) for i in range(8))


@pytest.mark.parametrize(("family", "heads"), [("phi3", 2), ("gpt_neox", 4)])
def test_channels_that_do_not_rotate_are_free(family: str, heads: int) -> None:
    """Oracle: by hand. Of 8 channels 0–3 rotate (0 with 2, 1 with 3) and 4–7 do not: 6 factors per
    key head.
    """
    q_k = next(c for c in discovered(make_config(family)).couplings if c.name == "q_k")
    assert q_k.size == heads * 6
    assert tuple(q_k.ties[0].index[:16]) == (0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11)


# Parts of fused parameters


def test_bias_view_is_the_part_of_the_matrix_rows() -> None:
    """Oracle: slices by hand, and a write through the view."""
    matrices = {matrix.kind: matrix for matrix in discovered(make_config("gpt2")).matrices}
    bias = torch.arange(96.0)
    assert torch.equal(matrices["k"].bias_view(bias), torch.arange(32.0, 64.0))
    matrices["v"].bias_view(bias).zero_()
    assert torch.equal(bias, torch.cat([torch.arange(64.0), torch.zeros(32)]))
    assert torch.equal(matrices["o"].bias_view(bias[:32]), bias[:32])
    assert torch.equal(Matrix("up", "w", "s", "b", expert=1).bias_view(torch.eye(3)), torch.eye(3)[1])


@pytest.mark.parametrize("axis", [0, 1])
def test_fold_and_entries_touch_their_positions_only(axis: int) -> None:
    """Oracle: the product by hand, on rows and on columns of the stored parameter."""
    weight = torch.arange(1.0, 13.0).view(3, 4)
    tie = Tie("w", axis, (1, 0), -1, positions=(2, 0))
    table = Layout((), (), (Coupling("c", 2, (tie,)),))
    folded = fold({"w": weight}, table, {"c": torch.tensor([2.0, 4.0])})["w"]
    expected = (weight if axis == 0 else weight.T).clone()
    expected[2] /= 4
    expected[0] /= 2
    assert torch.equal(folded if axis == 0 else folded.T, expected)
    assert torch.equal(tie.entries(weight), (weight if axis == 0 else weight.T)[[2, 0]])


@pytest.mark.parametrize("given", ["all", "one", "none"])
def test_matrix_scales_are_what_fold_does(model_paths: dict[str, Path], family: str, given: str) -> None:
    """Oracle: ``fold`` on the stored tensors in float64, seen through ``Matrix.view``."""
    checkpoint = open_checkpoint(model_paths[family])
    table = checkpoint.architecture.layouts[0]
    tensors = {name: tensor.double() for name, tensor in checkpoint.block(0).items()}
    sizes = {c.name: c.size for c in table.couplings[: {"all": None, "one": 1, "none": 0}[given]]}
    factors = random_factors(sizes, seed=1)
    folded = fold(tensors, table, factors)
    for matrix in table.matrices:
        weight = matrix.view(tensors[matrix.parameter])
        logs = {name: factor.log() for name, factor in factors.items()}
        rows, columns = MatrixScales(table, matrix, checkpoint.matrix_shape(0, matrix))(logs)
        assert (len(rows), len(columns)) == weight.shape
        torch.testing.assert_close(
            matrix.view(folded[matrix.parameter]),
            weight * (rows[:, None] + columns).exp(),
            rtol=1e-12,
            atol=0,
        )


def test_gradients_of_matrix_scales_are_those_of_fold(model_paths: dict[str, Path], family: str) -> None:
    """Oracle: autograd through ``fold``, of the sum of log |weight| over all logical matrices."""
    checkpoint = open_checkpoint(model_paths[family])
    table, tensors = checkpoint.architecture.layouts[0], checkpoint.block(0)
    theta = {c.name: torch.zeros(c.size, requires_grad=True) for c in table.couplings}
    folded = fold(tensors, table, {name: value.exp() for name, value in theta.items()})
    logs = [matrix.view(folded[matrix.parameter]).abs().log().sum() for matrix in table.matrices]
    scales = [
        MatrixScales(table, matrix, checkpoint.matrix_shape(0, matrix))(theta) for matrix in table.matrices
    ]
    sums = [(rows[:, None] + columns).sum() for rows, columns in scales]
    expected, actual = (
        torch.autograd.grad(torch.stack(values).sum(), list(theta.values())) for values in (logs, sums)
    )
    torch.testing.assert_close(actual, expected)


# End to end


LITTLE: dict[str, Any] = {"epochs": 2, "batch_rows": 4, "compute_dtype": "float32"}
EVERYTHING: dict[str, Any] = {"statistics": "per_site", "dense_target": 1.0, "finetune_channels": LITTLE}
EVERYTHING |= {
    "finetune": {
        **LITTLE,
        "parts": ["weights", "factors", "biases", "norms"],
        "window": 2,
        "refresh_epochs": 1,
    }
}


def settings(score: str, pattern: str, steps: tuple[str, ...]) -> Recipe:
    selection = {
        "score": score,
        "pattern": pattern,
        "group": "row" if score == "wanda" else "block",
        "block": 16,
    }
    return recipe(
        steps, batch_rows=4, selection=selection, reconstruction=EVERYTHING if "finetune" in steps else {}
    )


@functools.cache
def block_model(path: Path) -> BlockModel:
    return BlockModel(open_checkpoint(path), torch.float32, CPU)


def last_hidden(checkpoint: Checkpoint, rows: torch.Tensor) -> torch.Tensor:
    """What the streamed model's last block gives."""
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(rows, len(rows))
    for index in range(checkpoint.architecture.depth):
        model.advance(model.block(index), index, stream)
    return stream.hidden[0]


@pytest.mark.parametrize(
    ("score", "pattern", "steps"),
    [
        ("magnitude", "unstructured", ()),
        ("wanda", "unstructured", ()),
        ("obs", "unstructured", ("obs",)),
        ("obs", "2:4", ("obs",)),
        ("obs", "unstructured", ("obs", "lsq", "finetune_channels", "finetune")),
        ("wanda", "2:4", ("lsq", "finetune")),
    ],
)
def test_pruning_end_to_end(
    model_paths: dict[str, Path],
    family: str,
    tmp_path: Path,
    score: str,
    pattern: str,
    steps: tuple[str, ...],
) -> None:
    """Oracles: counts of zeros in the written files; the whole model that transformers loads from
    them against the streamed one.
    """
    model = block_model(model_paths[family])
    table, depth = model.checkpoint.architecture.layouts[0], model.checkpoint.architecture.depth
    shapes = {matrix: model.checkpoint.matrix_shape(0, matrix) for matrix in table.matrices}
    kept = {
        (index, matrix): rows * columns // 2
        for index in range(depth)
        for matrix, (rows, columns) in shapes.items()
    }
    factors = {
        name: factor.float()
        for name, factor in random_factors({c.name: c.size for c in table.couplings}, 3, decades=1).items()
    }
    how = settings(score, pattern, steps)
    progress = FinishedBlocks(Kept(tmp_path / "scratch", "prune", PARTS), model.checkpoint, how.quantization)
    rows = Rows(*token_rows(6, 12).split((4, 2)), how.batch_rows)
    source = Source(model, [Transform(factors)] * depth, kept)
    for index, block in prune(source, rows, plan(how, model.checkpoint.dtype), lambda _: None):
        progress.keep(index, block)
        for name, mask in block.masks.items():
            assert torch.equal(block.tensors[name] != 0, mask)
        for step in {"finetune_channels", "finetune"} & set(steps):
            assert block.facts[step]["held_out_after"] <= block.facts[step]["held_out_before"]
    progress.publish(Workspace(tmp_path), tmp_path / "out")

    written = open_checkpoint(tmp_path / "out" / "checkpoint")
    for index in range(depth):
        tensors = written.block(index)
        for matrix in table.matrices:
            zeros = matrix.view(tensors[matrix.parameter]) == 0
            assert int(zeros.sum()) == zeros.numel() - kept[index, matrix]
            if pattern == "2:4":
                assert torch.equal(zeros.reshape(-1, 4).sum(1), torch.full((zeros.numel() // 4,), 2))
    whole, states = load_full(written.path), []
    last = whole.base_model.get_submodule(f"{model.checkpoint.architecture.blocks}.{depth - 1}")
    last.register_forward_hook(
        lambda _module, _inputs, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    assert torch.isfinite(whole(token_rows(3, 9)).logits).all()
    assert torch.equal(states[0], last_hidden(written, token_rows(3, 9)))
