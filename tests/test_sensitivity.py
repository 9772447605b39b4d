"""Sensitivities. Oracles: transformers' whole model under autograd, exact Hessians and Fisher
matrices of small models, arithmetic by hand.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from architectures import make_checkpoint
from project import build, change_params, load_artifact, make_workspace, tree
from scipy.stats import kendalltau
from tiny import ALL_FAMILIES, load_full, make_model, token_rows
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pipeline_lib.core.artifacts import block_file, read_json, read_tensors
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.random import generator
from pipeline_lib.measure import fisher, hutchinson
from pipeline_lib.measure.backward import Subject
from pipeline_lib.measure.estimate import Estimate, estimates, kendall, relative_error, split_half
from pipeline_lib.measure.fisher import OutputMoments, at_once, batches, drawn, moment_bytes
from pipeline_lib.measure.hutchinson import probe_vector
from pipeline_lib.measure.settings import SensitivityParams
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint
from pipeline_lib.models.stream import BlockModel

CPU = torch.device("cpu")
DISTRIBUTIONS = get_args(SensitivityParams.model_fields["distribution"].annotation)
# float64 throughout: LayerNorm and scaled-dot-product attention; the others cast to float32 inside
# (RMSNorm, eager softmax).
FLOAT64 = ("opt", "opt-post", "gpt_neox", "gpt_neox-serial", "gpt2", "gpt2-relu")


def params(**values: Any) -> SensitivityParams:
    shipped = {
        "estimator": "fisher",
        "probes": 4,
        "agreement": 1.0,
        "rows_per_probe": 2,
        "probes_per_pass": 2,
        "distribution": "rademacher",
        "seed": 0,
        "output_moments": "none",
        "moment_budget_bytes": 10**9,
    }
    return SensitivityParams.model_validate(shipped | values)


def subject(
    checkpoint: Checkpoint,
    rows: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    leave_out: Sequence[str] = (),
) -> Subject:
    entry = checkpoint.architecture
    matrices = {
        i: {entry.matrix_name(i, m): m for m in entry.layouts[0].matrices if m.kind not in leave_out}
        for i in range(entry.depth)
    }
    return Subject(BlockModel(checkpoint, dtype, CPU), rows, matrices)


def parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every parameter of the whole model that holds a matrix, by its name in the base model, ready
    to differentiate.
    """
    entry = checkpoint.architecture
    names = sorted(
        {f"{entry.blocks}.{i}.{m.parameter}" for i in range(entry.depth) for m in entry.layouts[0].matrices}
    )
    return {name: model.base_model.get_parameter(name).requires_grad_(True) for name in names}


def by_matrix(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parts of whole parameters (or of anything shaped like them), by logical matrix."""
    entry = checkpoint.architecture
    places = ((i, m) for i in range(entry.depth) for m in entry.layouts[0].matrices)
    return {entry.matrix_name(i, m): m.view(tensors[f"{entry.blocks}.{i}.{m.parameter}"]) for i, m in places}


def labels_of(scores: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Labels for scores [T, V], one by one: the first whose probability and those before it come to
    more than a uniform number.
    """
    uniform = torch.rand(len(scores), generator=random, dtype=torch.float64).tolist()
    found = []
    for number, probabilities in zip(uniform, scores.detach().softmax(-1).double().tolist(), strict=True):
        whole = math.fsum(probabilities)
        found.append(
            next(label for label, before in enumerate(accumulate(probabilities)) if before > number * whole)
        )
    return torch.tensor(found)


# The chain rule, block by block


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_products_are_those_of_the_whole_model(
    model_paths: dict[str, Path], family: str, distribution: str
) -> None:
    """Oracle: double backward through transformers' own model and loss, eager attention, with the
    same z and rows.
    """
    checkpoint = open_checkpoint(model_paths[family])
    dtype = torch.float64 if family in FLOAT64 else torch.float32
    rows, settings = token_rows(5, 9, seed=1), params(distribution=distribution)
    found = hutchinson.samples(subject(checkpoint, rows, dtype), settings, [1, 2])
    model = load_full(checkpoint.path, dtype)
    model.set_attn_implementation("eager")
    tensors = parameters(model, checkpoint)
    for probe, sample, ids in zip((1, 2), found, (rows[[2, 3]], rows[[4, 0]]), strict=True):
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        z = [probe_vector(name, tensor, settings.distribution, 0, probe) for name, tensor in tensors.items()]
        gradients = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
        products = torch.autograd.grad(gradients, list(tensors.values()), z)
        quadratic = dict(zip(tensors, (a * b for a, b in zip(z, products, strict=True)), strict=True))
        exact = {name: float(part.double().mean()) for name, part in by_matrix(checkpoint, quadratic).items()}
        scale = max(map(abs, exact.values()))
        assert exact.keys() == sample.keys()
        for name, value in exact.items():
            assert sample[name] == pytest.approx(
                value, rel=1e-9 if family in FLOAT64 else 2e-3, abs=1e-6 * scale
            ), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradients_are_those_of_the_whole_model(model_paths: dict[str, Path], family: str) -> None:
    """Oracle: ‖∂ℓ/∂W‖² of transformers' own model, row by row, for the labels that its logits and
    the keyed generator give.

    Row slices and transposed parameters (Phi-3, GPT-2) included; and the gradients of the outputs,
    from the biases' where there are any.
    """
    checkpoint = open_checkpoint(model_paths[family])
    dtype = torch.float64 if family in FLOAT64 else torch.float32
    rows = token_rows(5, 9, seed=1)
    found = fisher.samples(subject(checkpoint, rows, dtype), params(), [1, 2])
    model = load_full(checkpoint.path, dtype)
    tensors = parameters(model, checkpoint)
    for probe, sample, ids in zip((1, 2), found, (rows[[2, 3]], rows[[4, 0]]), strict=True):
        random = generator(0, f"labels:{probe}")
        squares = dict.fromkeys(sample, 0.0)
        for row in ids.split(1):
            scores = model(row, use_cache=False).logits[0, :-1]
            labels = labels_of(scores, random)
            gradients = torch.autograd.grad(
                cross_entropy(scores, labels, reduction="sum"), list(tensors.values())
            )
            parts = by_matrix(checkpoint, dict(zip(tensors, gradients, strict=True)))
            squares = {name: squares[name] + float(part.square().mean()) for name, part in parts.items()}
        for name, value in squares.items():
            assert sample[name] == pytest.approx(value / (2 * 8), rel=1e-9 if family in FLOAT64 else 1e-4), (
                name
            )


@pytest.mark.parametrize("estimator", [hutchinson, fisher])
def test_sharing_a_pass_changes_nothing(llama: Checkpoint, estimator: Any) -> None:
    """Oracle: each probe alone. Excluded matrices take no part (fisher), or do not change the
    expectation of others.
    """
    whole = subject(llama, token_rows(5, 9))
    alone = [estimator.samples(whole, params(), [probe])[0] for probe in range(3)]
    assert estimator.samples(whole, params(), range(3)) == alone
    part = estimator.samples(subject(llama, token_rows(5, 9), leave_out=("q", "down")), params(), [0])[0]
    assert part.keys() == {name for name in alone[0] if "q_proj" not in name and "down" not in name}
    if estimator is fisher:
        assert all(part[name] == alone[0][name] for name in part)


def test_which_probes_share_a_batch() -> None:
    """By hand: of one lane, next to each other in it, whatever else shares the pass; in the lanes' order."""
    assert batches([9, 0, 4, 1, 8, 12, 16, 20], 4) == [[0, 4, 8, 12], [16, 20], [1, 9]]
    assert batches([4, 8], 1) == [[4], [8]]
    assert batches([4, 8], 2) == [[4], [8]]  # 0 and 4 would be one batch
    assert sorted(batches(range(32), 4)) == sorted(batches(range(16), 4) + batches(range(16, 32), 4))


def test_how_many_probes_share_a_batch() -> None:
    """By hand: four rows, 2048 tokens, never less than a probe."""
    assert [at_once(1, length) for length in (9, 512, 513, 1024, 2048, 4096)] == [4, 4, 2, 2, 1, 1]
    assert [at_once(rows, 512) for rows in (1, 2, 3, 4, 5)] == [4, 2, 1, 1, 1]


def test_probes_of_a_lane_share_a_batch(llama: Checkpoint, tmp_path: Path) -> None:
    """Oracle: each probe alone, within rounding of the activations; passes of 16 and of 32 probes
    agree bit for bit, moments included.
    """
    whole, settings = subject(llama, token_rows(40, 9)), params(rows_per_probe=1)
    once = OutputMoments(tmp_path / "once", True)
    together = fisher.samples(whole, settings, range(32), once)
    twice = OutputMoments(tmp_path / "twice", True)
    halves = [
        sample
        for probes in (range(16), range(16, 32))
        for sample in fisher.samples(whole, settings, probes, twice)
    ]
    for moments in (once, twice):
        moments.finish(llama.architecture.depth)
    assert together == halves
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")
    for probe, sample in enumerate(together):
        assert fisher.samples(whole, settings, [probe])[0] == pytest.approx(sample, rel=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral"])
def test_probes_of_a_mixture_go_alone(model_type: str, tmp_path: Path) -> None:
    """An expert's tokens do not tell which probe they belong to. Oracle: each probe alone, bit for bit."""
    whole, settings = (
        subject(open_checkpoint(make_checkpoint(tmp_path, model_type)), token_rows(9, 9)),
        params(rows_per_probe=1),
    )
    assert fisher.samples(whole, settings, [0, 4, 8]) == [
        fisher.samples(whole, settings, [probe])[0] for probe in (0, 4, 8)
    ]


def test_the_head_takes_a_row_in_pieces(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: whole rows. Twelve predicted tokens in pieces of 5, 5 and 2."""
    whole = subject(llama, token_rows(5, 13))
    expected = fisher.samples(whole, params(), [0])[0]
    monkeypatch.setattr(fisher, "HEAD_TOKENS", 5)
    assert fisher.samples(whole, params(), [0])[0] == pytest.approx(expected, rel=1e-5)


def test_each_probe_takes_the_next_rows(llama: Checkpoint) -> None:
    """Three rows a probe out of five: 0 1 2, 3 4 0, 1 2 3."""
    rows = token_rows(5, 9)
    one = subject(llama, rows)
    assert [one.batch(probe, 3)[:, 0].tolist() for probe in range(3)] == [
        rows[i, 0].tolist() for i in ([0, 1, 2], [3, 4, 0], [1, 2, 3])
    ]


# Expectations


def test_labels_are_drawn_from_the_probabilities() -> None:
    """Oracle: the multinomial's own spread; what has probability 0 is never drawn, first and last
    included.
    """
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    labels = drawn(probabilities.expand(40_000, -1), generator(0, "labels"))
    assert labels.shape == (40_000, 1)
    counts = labels.flatten().bincount(minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    spread = (probabilities * (1 - probabilities) * 40_000).sqrt()
    assert bool(((counts - probabilities * 40_000).abs() <= 4 * spread).all())


def small(directory: Path, family: str) -> Checkpoint:
    """One block, few enough weights for whole Hessians."""
    sizes = {"hidden_size": 8, "vocab_size": 11, "num_attention_heads": 2}
    if family == "gpt2":
        sizes = {"n_embd": 8, "n_inner": 6, "vocab_size": 11, "n_head": 2}
    elif family == "llama":
        sizes |= {"intermediate_size": 6, "num_key_value_heads": 1}
    return open_checkpoint(make_model(directory, family, 1, tokenizer=False, **sizes))


def power(found: dict[str, dict[str, float]], exact: dict[str, float]) -> None:
    """Every estimate within four standard errors, and the errors small against the values, so that
    a wrong factor of 2 would show.
    """
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert abs(found[name]["trace"] - value) < 4 * found[name]["stderr"], name
    largest = max(exact, key=lambda name: exact[name])
    assert found[largest]["stderr"] < 0.15 * exact[largest]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hutchinson_estimates_the_hessian(tmp_path: Path, family: str) -> None:
    """Oracle: the exact Hessian's diagonal, by one product per unit vector, of the mean loss over
    the rows.
    """
    checkpoint, rows = small(tmp_path / "model", family), token_rows(2, 6) % 11
    settings = params(probes=200)
    found = Estimate(hutchinson.samples(subject(checkpoint, rows), settings, range(200)), 0, False).summary()
    model = load_full(checkpoint.path)
    model.set_attn_implementation("eager")
    tensors = parameters(model, checkpoint)
    loss = cross_entropy(model(rows, use_cache=False).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    gradients = dict(
        zip(tensors, torch.autograd.grad(loss, list(tensors.values()), create_graph=True), strict=True)
    )
    diagonals = {}
    for name, tensor in tensors.items():
        entries = [
            torch.autograd.grad(g, tensor, retain_graph=True)[0].flatten()[i]
            for i, g in enumerate(gradients[name].flatten())
        ]
        diagonals[name] = torch.stack(entries).view(tensor.shape)
    power(found, {name: float(part.mean()) for name, part in by_matrix(checkpoint, diagonals).items()})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_estimates_the_fisher(tmp_path: Path, family: str) -> None:
    """Oracle: the exact Fisher diagonal: every label at every position, weighted with its probability."""
    checkpoint, rows = small(tmp_path / "model", family), token_rows(4, 6) % 11
    found = Estimate(
        fisher.samples(subject(checkpoint, rows), params(probes=400), range(400)), 0, False
    ).summary()
    model = load_full(checkpoint.path)
    tensors = parameters(model, checkpoint)
    scores = model(rows, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    diagonals = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for position in scores:
        for log_probability in position:
            gradients = torch.autograd.grad(log_probability, list(tensors.values()), retain_graph=True)
            for diagonal, gradient in zip(diagonals.values(), gradients, strict=True):
                diagonal += log_probability.detach().exp() * gradient.square() / len(scores)
    power(found, {name: float(part.mean()) for name, part in by_matrix(checkpoint, diagonals).items()})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_standard_error_is_calibrated(distribution: Any) -> None:
    """Oracle: z-scores (estimate − exact)/stderr over 60 independent seeds: spread 1, centre 0
    within their own errors.
    """
    random = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=random)
    hessian = root + root.T

    def estimate(seed: int) -> dict[str, float]:
        vectors = [probe_vector("w", torch.zeros(12), distribution, seed, probe) for probe in range(48)]
        return Estimate([{"w": float(z @ hessian @ z) / 12} for z in vectors], 0, False).summary()["w"]

    repeats = [estimate(seed) for seed in range(60)]
    z = torch.tensor([(one["trace"] - float(hessian.diagonal().mean())) / one["stderr"] for one in repeats])
    assert 0.75 < float(z.std()) < 1.3
    assert abs(float(z.mean())) < 0.5


def test_rademacher_is_exact_for_a_diagonal_hessian() -> None:
    """Oracle: z_i² = 1, so that zᵀ diag(h) z is Σ h_i at every probe; a Gaussian's only in the mean."""
    h = torch.arange(6.0)
    by_kind = {
        d: [float((h * probe_vector("w", h, d, 0, probe) ** 2).sum()) for probe in range(3)]
        for d in DISTRIBUTIONS
    }
    assert by_kind["rademacher"] == [15, 15, 15]
    assert len(set(by_kind["gaussian"])) == 3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probe_vectors_are_white_and_keyed(distribution: Any) -> None:
    """E[zzᵀ] = 1; the same for the same seed, name and probe, another for any other."""
    like = torch.zeros(200, 200)
    z = probe_vector("a", like, distribution, 0, 0)
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(z, probe_vector("a", like, distribution, 0, 0))
    for name, seed, probe in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        assert abs(float((z * probe_vector(name, like, distribution, seed, probe)).mean())) < 0.03
    if distribution == "rademacher":
        assert set(z.unique().tolist()) == {-1.0, 1.0}


# Second moments of output gradients


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "bloom"])
def test_output_moments(model_paths: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Oracle: gradients at the outputs of the whole model's own linears, from hooks; the diagonal
    is that of the full one.
    """
    checkpoint = open_checkpoint(model_paths[family])
    rows, full, diagonal = (
        token_rows(6, 9),
        OutputMoments(tmp_path / "full", True),
        OutputMoments(tmp_path / "diagonal", False),
    )
    for moments in (full, diagonal):
        for probes in ([0], [1, 2]):
            fisher.samples(subject(checkpoint, rows), params(), probes, moments)
        moments.finish(checkpoint.architecture.depth)
    model = load_full(checkpoint.path)
    parameters(model, checkpoint)  # so that gradients are asked for
    taken: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def take(gradient: torch.Tensor) -> None:
            taken.setdefault(name, []).append(gradient.flatten(0, -2))

        return lambda _module, _inputs, output: output.register_hook(take) and None

    for name in {name.removesuffix(".weight") for name in parameters(model, checkpoint)}:
        model.base_model.get_submodule(name).register_forward_hook(watch(name))
    for probe in range(3):
        random = generator(0, f"labels:{probe}")
        for row in rows[2 * probe : 2 * probe + 2].split(1):
            scores = model(row, use_cache=False).logits[0, :-1]
            labels = labels_of(scores, random)
            cross_entropy(scores, labels, reduction="sum").backward()
    entry = checkpoint.architecture
    for index in range(entry.depth):
        tensors, facts = read_tensors(block_file(full.directory, index))
        assert facts == {"full": True, "tokens": 6 * 8}
        diagonals, _ = read_tensors(block_file(diagonal.directory, index))
        for matrix in entry.layouts[0].matrices:
            module = f"{entry.blocks}.{index}.{matrix.parameter.removesuffix('.weight')}"
            g = torch.cat(taken[module])[:, slice(*(matrix.rows or (None,)))]
            expected = g.T @ g / (6 * 8)
            found = tensors[matrix.label]
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-5 * float(expected.diagonal().max())
            )
            torch.testing.assert_close(diagonals[matrix.label], found.diagonal(), rtol=1e-4, atol=0)


def test_moments_in_panels(llama: Checkpoint, tmp_path: Path) -> None:
    """Oracle: float64; symmetric to the bit. Outputs of two panels and a part of one."""
    matrix = llama.architecture.layouts[0].matrices[0]
    gradients = torch.randn(2, 5, 2 * 256 + 33, generator=torch.Generator().manual_seed(0))
    moments = OutputMoments(tmp_path / "moments", True)
    moments.open(0, 0)
    moments.add(matrix, gradients)
    moments.close(0, 0, 8)
    moments.finish(1)
    found = read_tensors(block_file(moments.directory, 0))[0][matrix.label]
    wide = gradients.flatten(0, 1).double()
    torch.testing.assert_close(found.double(), wide.T @ wide / 8, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, found.T)


def test_bytes_of_moments() -> None:
    assert moment_bytes([(3, 100), (5, 7)]) == 4 * (9 + 25)


# Rankings, and when to stop


def test_kendall() -> None:
    """Oracle: scipy's τ-b, ties and reversals included; what it calls NaN is told apart."""
    random = torch.Generator().manual_seed(0)
    for size in (2, 3, 10, 42):
        for _ in range(20):
            a, b = torch.randint(0, size, (2, size), generator=random).tolist()
            expected = kendalltau(a, b).statistic
            if not math.isnan(expected):
                assert kendall(a, b) == pytest.approx(expected, abs=1e-12)
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 1], [2, 2]) == kendall([5], [5]) == 1
    assert kendall([1, 1], [1, 2]) == 0


def noisy(noise: float, asked: list[list[int]] | None = None) -> Any:
    """Samples of ten matrices with the values 0 … 9 and noise of this size."""

    def sample(probes: Sequence[int]) -> list[dict[str, float]]:
        if asked is not None:
            asked.append(list(probes))
        draws = [torch.randn(10, generator=generator(0, str(probe)), dtype=torch.float64) for probe in probes]
        return [{str(i): i + noise * float(draw[i]) for i in range(10)} for draw in draws]

    return sample


def test_probes_are_added_until_the_halves_agree() -> None:
    """Oracle: the asked-for probe numbers. Without noise one group is enough; with much, the cap
    ends it, in a smaller last group.
    """
    asked: list[list[int]] = []
    (only,) = estimates(noisy(0.0, asked), most=20, at_once=3, agreement=0.9)
    assert asked == [[0, 1, 2]]
    assert (only.agreement, only.reached, len(only.samples)) == (1, True, 3)
    asked.clear()
    *_, last = estimates(noisy(100.0, asked), most=8, at_once=3, agreement=0.9)
    assert asked == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert not last.reached
    assert len(last.samples) == 8
    found = list(estimates(noisy(5.0), most=500, at_once=4, agreement=0.9))
    assert [one.reached for one in found] == [False] * (len(found) - 1) + [True]
    assert 8 < len(found[-1].samples) < 500


def test_split_half_by_hand() -> None:
    """Even probes 0 and 2: means 2, 3, 4; odd probe 1: 1, 3, 2. One of three pairs is reversed: τ = 1/3."""
    samples = [{"a": 1.0, "b": 3.0, "c": 5.0}, {"a": 1.0, "b": 3.0, "c": 2.0}, {"a": 3.0, "b": 3.0, "c": 3.0}]
    assert split_half(samples) == pytest.approx(1 / 3)


def test_a_single_probe_at_once_waits_for_a_second() -> None:
    assert [len(one.samples) for one in estimates(noisy(100.0), most=3, at_once=1, agreement=1.0)] == [2, 3]


def test_summary_by_hand() -> None:
    """Oracle: mean 2, sample variance 4, three probes: standard error 2/√3. A negative estimate
    stands at its error.
    """
    found = Estimate(
        [{"a": 0.0, "b": -3.0}, {"a": 2.0, "b": -1.0}, {"a": 4.0, "b": 1.0}], 0.0, False
    ).summary()
    assert found["a"] == pytest.approx({"trace": 2, "stderr": 2 / 3**0.5, "sensitivity": 2})
    assert found["b"] == pytest.approx({"trace": -1, "stderr": 2 / 3**0.5, "sensitivity": 2 / 3**0.5})
    assert relative_error(found) == pytest.approx((1 / 3**0.5 + 1) / 2)


# Failures, and the stage


@pytest.mark.parametrize("estimator", [hutchinson, fisher])
def test_infinite_activations_are_named(llama: Checkpoint, estimator: Any) -> None:
    broken = subject(llama, token_rows(2, 6))
    first = broken.model.block
    broken.model.block = lambda index: first(
        index, {n: t * 1e30 if t.ndim == 2 else t for n, t in llama.block(index).items()}
    )  # type: ignore[method-assign]
    with pytest.raises(SparselineError, match=r"layers\.\d contain NaN or infinity"):
        estimator.samples(broken, params(), [0])


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared, in the current directory: a Llama of two blocks and eight rows of 32 tokens."""
    made = make_workspace(tmp_path / "project")
    monkeypatch.chdir(made)
    build("prepare", "text calibration")
    return made


@pytest.mark.parametrize("estimator", ["fisher", "hutchinson"])
def test_the_stage_writes_what_it_estimated(workspace: Path, estimator: str) -> None:
    """Oracle: the library called by hand on the fitting rows with the same settings; the moments of
    a fisher pass either way.
    """
    for key, value in {"estimator": estimator, "probes": 4, "agreement": 1, "output_moments": "full"}.items():
        change_params(workspace, f"sensitivity.{key}", value)
    build("sensitivity")
    out = workspace / "build" / "sensitivity"
    checkpoint = open_checkpoint(workspace / "data" / "model")
    texts = read_tensors(workspace / "build" / "texts" / "calibrate" / "calibration.safetensors")[0]
    assert len(texts["held_out"]) == 2
    rows = texts["fit"]
    settings, moments = params(distribution="rademacher"), OutputMoments(workspace / "moments", True)
    samples = []
    for probes in ([0, 1], [2, 3]):
        gradients = fisher.samples(subject(checkpoint, rows), settings, probes, moments)
        samples += (
            gradients
            if estimator == "fisher"
            else hutchinson.samples(subject(checkpoint, rows), settings, probes)
        )
    moments.finish(checkpoint.architecture.depth)
    written = load_artifact(out / "sensitivity.json")
    expected = Estimate(samples, 0, False).summary()
    assert {
        name: {key: one[key] for key in ("trace", "stderr", "sensitivity")} for name, one in written.items()
    } == expected
    assert written["layers.1.mlp.down_proj"]["kind"] == "down"
    assert written["layers.1.mlp.down_proj"]["block"] == 1
    facts = read_json(out / "estimate.json")
    assert {key: facts[key] for key in ("estimator", "probes", "rows_per_probe", "output_moments")} == {
        "estimator": estimator,
        "probes": 4,
        "rows_per_probe": 2,
        "output_moments": "full",
    }
    assert facts["agreement"] == split_half(samples)
    assert facts["reached"] == (split_half(samples) >= 1)
    assert {name: digest for name, digest in tree(out / "moments").items() if name != "seal.json"} == tree(
        workspace / "moments"
    )
    assert read_tensors(out / "moments" / "block-001.safetensors")[1] == {"full": True, "tokens": 8 * 31}


def test_moments_beyond_the_budget_fall_back(workspace: Path) -> None:
    """Oracle: the shapes in the files, and the fact that says so."""
    for key, value in {"output_moments": "full", "moment_budget_bytes": 1000}.items():
        change_params(workspace, f"sensitivity.{key}", value)
    build("sensitivity")
    out = workspace / "build" / "sensitivity"
    tensors, header = read_tensors(out / "moments" / "block-000.safetensors")
    assert not header["full"]
    assert tensors["mlp.up_proj"].shape == (48,)
    assert read_json(out / "estimate.json")["output_moments"] == "diagonal"


def test_without_moments_there_are_none(workspace: Path) -> None:
    change_params(workspace, "sensitivity.output_moments", "none")
    build("sensitivity")
    assert tree(workspace / "build" / "sensitivity" / "moments").keys() == {"seal.json"}
