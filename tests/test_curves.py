"""Error curves. Oracles: explicit Kronecker products, raw activations of a whole model in
transformers, sorted lists; checkpoints, counted.
"""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from project import build, change_artifact, load_artifact, make_workspace
from safetensors.torch import load_file
from tiny import block_statistics, curved_gram
from torch.utils.flop_counter import FlopCounterMode

from pipeline_lib.core import artifacts
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.masks.rule import Rule
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.measure.curves import counts, errors, measure
from pipeline_lib.measure.settings import CurvesParams
from pipeline_lib.models.checkpoint import Checkpoint
from pipeline_lib.solve.factor import COLUMNS, ROWS, factorise, lost, quadratic
from pipeline_lib.solve.matrix import prune_matrix
from pipeline_lib.stats.dense import DenseBlock

CURVES = CurvesParams(densities=[0.25, 0.5, 0.75], outlier_factor=3.0)


def selection(**changes: Any) -> SelectionParams:
    values = {
        "sparsity": 0.5,
        "pattern": "unstructured",
        "score": "obs",
        "group": "block",
        "block": 16,
        "damping": 0.01,
        "damping_of": "mean",
    }
    return SelectionParams.model_validate(values | changes)


def test_errors_are_quadratic_forms() -> None:
    """Oracle: vec(ΔW)ᵀ (M ⊗ G) vec(ΔW) with torch.kron in float64; M = 1 gives the layer error, M =
    1 and G = 1 the Frobenius norm.
    """
    random = torch.Generator().manual_seed(0)
    difference, (_, gram) = torch.randn(5, 7, generator=random), curved_gram(7, seed=1)
    half = torch.randn(5, 9, generator=random)
    full, diagonal = half @ half.T, torch.rand(5, generator=random)

    def form(moment: torch.Tensor, second: torch.Tensor) -> float:
        flat = difference.double().flatten()
        return float(flat @ torch.kron(moment.double(), second.double()) @ flat)

    for moment in (full, diagonal):
        frobenius, layer, kronecker = errors(difference, gram, moment)
        assert frobenius == pytest.approx(form(torch.eye(5), torch.eye(7)), rel=1e-5)
        assert layer == pytest.approx(form(torch.eye(5), gram), rel=1e-4)
        assert kronecker == pytest.approx(form(moment if moment.ndim == 2 else moment.diag(), gram), rel=1e-4)
    assert torch.equal(errors(difference, gram, None), errors(difference, gram, diagonal)[:2])


@pytest.mark.parametrize("size", [7, COLUMNS, 2 * COLUMNS + 5])
def test_traces_by_symmetry(size: int) -> None:
    """Oracles: tr((W − Ŵ) G (W − Ŵ)ᵀ) in float64, rows one by one; and the operations of a plain
    product W G, of which about half are taken.
    """
    random = torch.Generator().manual_seed(1)
    weight, pruned = torch.randn(2, ROWS + 3, size, generator=random)
    _, gram = curved_gram(size, seed=2, spread=0.3)
    change = (weight - pruned).double()
    expected = ((change @ gram.double()) * change).sum(1)
    torch.testing.assert_close(
        quadratic(weight - pruned, gram), expected, rtol=1e-4, atol=1e-6 * float(expected.max())
    )
    with FlopCounterMode(display=False) as counted:
        found = lost(weight, pruned, gram)
    assert float(found) == pytest.approx(float(expected.sum()), rel=1e-6)
    assert float(lost(weight, None, gram.double())) == pytest.approx(
        float(torch.trace(weight.double() @ gram.double() @ weight.double().T))
    )
    assert counted.get_total_flops() <= (1 + COLUMNS / size) * len(weight) * size * size + 1


def test_which_counts_are_measured() -> None:
    """Oracle: by hand. The densities' nearest counts, each once, neither none nor all; every N of M
    for a pattern.
    """
    assert counts(100, 1, [0.1, 0.5, 0.9]) == [10, 50, 90]
    assert counts(3, 1, [0.1, 0.3, 0.4, 0.9]) == [1]
    assert counts(400, 100, [0.1]) == [100, 200, 300]


@pytest.mark.parametrize("densities", [[], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0], [0.6, 0.4]])
def test_densities_are_checked(densities: list[float]) -> None:
    with pytest.raises(ValueError, match="densities"):
        CurvesParams(densities=densities, outlier_factor=5.0)


@pytest.mark.parametrize(
    ("pattern", "compensate"), [("unstructured", True), ("unstructured", False), ("2:4", True)]
)
def test_a_curve_is_what_pruning_does(checkpoint: Checkpoint, pattern: str, compensate: bool) -> None:
    """Oracle: the matrix pruned by hand to each density, and its errors by their definitions, on
    the fitting rows' Gram.
    """
    entry, chosen = checkpoint.architecture.layouts[0], selection(pattern=pattern)
    tensors, sites = checkpoint.block(1), block_statistics(checkpoint)[1]
    left_out = entry.matrices[0]
    moments = {m.label: torch.rand(len(m.view(tensors[m.parameter]))) for m in entry.matrices[2:]}
    found = measure(
        DenseBlock(entry, "here", tensors, sites), entry.matrices[1:], moments, chosen, compensate, CURVES
    )
    assert set(found) == {m.label for m in entry.matrices} - {left_out.label}
    for matrix in entry.matrices[1:]:
        weight, site = matrix.view(tensors[matrix.parameter]), sites[matrix.site]
        assert site.gram is not None
        judging = site.gram.double()
        curve = found[matrix.label]["curve"]
        assert curve["density"] == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert (curve["kronecker"] is None) == (matrix.label not in moments)
        for i, density in enumerate(curve["density"]):
            kept = int(density * weight.numel())
            new, *_ = (
                prune_matrix(
                    weight, factorise(site.gram, 0.01, "mean", "here"), kept, Rule.of(chosen), compensate
                )
                if 0 < density < 1
                else (weight * density,)
            )
            change = (new - weight).double()
            rows = ((change @ judging) * change).sum(1)
            assert curve["frobenius"][i] == pytest.approx(float(change.square().sum()), rel=1e-4)
            assert curve["layer"][i] == pytest.approx(float(rows.sum()), rel=1e-4)
            if matrix.label in moments:
                assert curve["kronecker"][i] == pytest.approx(
                    float(rows @ moments[matrix.label].double()), rel=1e-4
                )
        assert curve["layer"][0] > curve["layer"][2] > curve["layer"][4] == 0
    without = {name: replace(site, held_out_gram=None) for name, site in sites.items()}
    assert (
        measure(
            DenseBlock(entry, "here", tensors, without),
            entry.matrices[1:],
            moments,
            chosen,
            compensate,
            CURVES,
        )
        == found
    )


def test_errors_that_are_no_numbers_are_told(llama: Checkpoint) -> None:
    """Moments that overflow. Oracle: the matrix is named."""
    entry = llama.architecture.layouts[0]
    moments = {
        m.label: torch.full((len(m.view(llama.block(0)[m.parameter])),), float("inf")) for m in entry.matrices
    }
    block = DenseBlock(entry, "here", llama.block(0), block_statistics(llama)[0])
    with pytest.raises(
        SparselineError, match=r"error curve of here\.self_attn\.q_proj contains NaN or infinity"
    ):
        measure(block, entry.matrices, moments, selection(), False, CURVES)


def test_outliers_and_median_are_of_the_block(llama: Checkpoint) -> None:
    """Oracle: |w|·‖X‖ of all included matrices in one sorted list (2310.05175, Sec. 3; 2505.23807)."""
    entry, sites = llama.architecture.layouts[0], block_statistics(llama)[0]
    tensors, some = llama.block(0), llama.architecture.layouts[0].matrices[:3]
    found = measure(DenseBlock(entry, "here", tensors, sites), some, {}, selection(), False, CURVES)
    products = sorted(
        abs(float(w)) * float(second) ** 0.5
        for m in some
        for row in m.view(tensors[m.parameter]).double()
        for w, second in zip(row, sites[m.site].second_moment.double(), strict=True)
    )
    share = sum(x > 3.0 * sum(products) / len(products) for x in products) / len(products)
    assert 0 < share < 0.5
    for facts in found.values():
        assert facts["outliers"] == pytest.approx(share, rel=1e-6)
        assert facts["median"] == pytest.approx(products[(len(products) - 1) // 2], rel=1e-5)


# Through the stages

MIXED = {
    "selection": {"pattern": "2:4"},
    "allocation": {"method": "predicted", "alpha": 1.0, "weighting": "trace", "density_bounds": [0.0, 1.0]},
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One variant of mixed N:M, measured."""
    made = make_workspace(tmp_path / "project", variants={"mixed": MIXED})
    monkeypatch.setenv("SPARSELINE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(made)
    build("prepare", "text calibration", "calibrate", "sensitivity", "curves mixed")
    return made


def test_n_of_m_is_mixed_under_the_budget(workspace: Path) -> None:
    """Oracle: the checkpoint's non-zeros. One N in all groups of a matrix, several N in the model,
    half of all weights kept.
    """
    path = workspace / "build" / "curves" / "mixed.json"
    curves = load_artifact(path)
    dense, first = sorted(curves)[3], sorted(curves)[0]
    curves[dense]["sensitivity"] = 1e9  # one that must stay whole, one that costs nothing
    curves[first]["sensitivity"] = 0.0
    change_artifact(path, lambda _: curves)
    build("prune mixed")
    facts = artifacts.read_json(workspace / "build" / "facts" / "mixed.json")
    shares: dict[str, Fraction] = {}
    total = size = 0
    for shard in (workspace / "build" / "prune" / "mixed" / "checkpoint").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if ".layers." in name and tensor.ndim == 2:
                per_group = (tensor.reshape(-1, 4) != 0).sum(1).unique().tolist()
                assert len(per_group) == 1, name
                shares[name.removeprefix("model.").removesuffix(".weight")] = Fraction(per_group[0], 4)
                total, size = total + int((tensor != 0).sum()), size + tensor.numel()
    assert shares == {
        name: Fraction(matrix["kept"], matrix["size"]) for name, matrix in facts["matrices"].items()
    }
    assert (shares[dense], shares[first]) == (1, 0)
    assert len(set(shares.values())) >= 3
    assert abs(2 * total - size) <= max(matrix["size"] for matrix in facts["matrices"].values()) / 4
    assert curves[first].keys() == {
        "trace",
        "stderr",
        "sensitivity",
        "block",
        "kind",
        "curve",
        "damping",
        "outliers",
        "median",
    }


def test_grams_over_budget_give_the_same_curves(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grams that calibrate did not store are collected again. Oracle: the curves with stored ones."""
    path = workspace / "build" / "curves" / "mixed.json"
    before = path.read_bytes()
    monkeypatch.setenv("SPARSELINE_GRAM_BYTES", "0")
    build("calibrate", "curves mixed")
    assert path.read_bytes() == before


@pytest.mark.parametrize("diagonal", [False, True])
def test_stored_moments_are_used(workspace: Path, diagonal: bool) -> None:
    """Moments c·1 make the Kronecker error c times the layer error, as a matrix or as its diagonal.
    Oracle: that.
    """
    path = workspace / "build" / "curves" / "mixed.json"
    directory = workspace / "build" / "sensitivity" / "moments"
    Workspace(workspace).leave_empty(directory)
    build("curves mixed")
    plain = load_artifact(path)
    matrices, tensors = artifacts.read_json(workspace / "build" / "prepare" / "matrices.json"), {}
    for block in range(2):
        moments = tensors[block] = {}
        for listed in matrices:
            if listed["block"] == block:
                unit = torch.ones(listed["shape"][0])
                moments[listed["label"]] = 3 * (unit if diagonal else unit.diag())
    with Workspace(workspace).directory(directory) as made:
        for block, moments in tensors.items():
            artifacts.write_tensors(artifacts.block_file(made, block), moments)
    build("curves mixed")
    for name, entry in load_artifact(path).items():
        assert plain[name]["curve"]["kronecker"] is None
        assert entry["curve"]["layer"] == plain[name]["curve"]["layer"]
        assert np.allclose(entry["curve"]["kronecker"], 3 * np.array(entry["curve"]["layer"]), rtol=1e-5)
