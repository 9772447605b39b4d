"""The export stage: sizes, compressed-tensors, 2:4. Oracles: files on disk, arithmetic by hand,
transformers' loading, torch's own checks.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned import Rounding, card, make_pruned
from safetensors import safe_open
from tiny import load_full, make_model, token_rows
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import Progress
from pipeline_lib.export import packed, tensorfile
from pipeline_lib.export.export import Variant, export
from pipeline_lib.export.semi_structured import verdict
from pipeline_lib.export.sizes import Weights, theoretical_bits
from pipeline_lib.export.tensorfile import blob
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.recipe.settings import Format

PACKED = "compressed-tensors"


def exported(
    directory: Path,
    formats: list[Format],
    rounding: Rounding | None = None,
    pattern: str = "unstructured",
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    **model: Any,
) -> dict[str, Any]:
    """What build/sizes would hold; the files are in ``directory / "export"``."""
    source = open_checkpoint(make_model(directory / "source", family, dtype=dtype, **model))
    make_pruned(directory / "prune", source, pattern, rounding)
    return export(source, Variant("mine", pattern, directory / "prune"), directory / "export", formats, card)


def stored(directory: Path) -> dict[str, int]:
    """Tensor name -> bytes, of all safetensors files. Oracle: the official reader."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).nbytes for name in file.keys()}
    return found


# Files


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16, torch.float32, torch.uint8, torch.int64)]
)
def test_files_are_those_of_the_official_package(tmp_path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    """Byte for byte, whatever the order of writing: mixed types, odd sizes, scalars, empty tensors,
    names beyond ASCII.
    """
    shapes = [(), (0,), (3,), (5, 7), (2, 3, 4)]
    tensors = {
        f"ä{n}.{dtype}": torch.full(shape, n + 1, dtype=dtype)
        for n, shape in enumerate(shapes)
        for dtype in dtypes
    }
    official = tmp_path / "official.safetensors"
    from safetensors.torch import save_file

    save_file(tensors, official, metadata={"format": "pt"})
    path = tmp_path / "own.safetensors"
    blobs = {name: blob(tensor) for name, tensor in tensors.items()}
    tensorfile.write(path, blobs, {"format": "pt"}, reversed(tensors.items()))
    assert path.read_bytes() == official.read_bytes()
    assert path.stat().st_size == tensorfile.size(blobs, {"format": "pt"})


def test_a_file_without_all_its_tensors_does_not_appear(tmp_path: Path) -> None:
    blobs = {"a": blob(torch.zeros(2)), "b": blob(torch.zeros(3))}
    with pytest.raises(RuntimeError, match="were not written"):
        tensorfile.write(tmp_path / "x.safetensors", blobs, {}, [("a", torch.zeros(2))])
    assert not list(tmp_path.iterdir())


# Sizes


def test_theory_by_hand() -> None:
    """H(1/2) = 1 and half of 16 bits; H(1/4) = 2 − 3/4·log2 3 and a quarter of 4; nothing and
    everything cost no mask.
    """
    assert theoretical_bits([Weights(100, 50, 16)]) == 9
    assert theoretical_bits([Weights(400, 100, 4)]) == pytest.approx(2 - 0.75 * math.log2(3) + 1)
    assert theoretical_bits([Weights(100, 0, 16), Weights(100, 100, 16)]) == 8


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """Oracle: the official reader's tensors of every pruned matrix, and the files' sizes."""
    found = exported(tmp_path, ["dense", "bitmask", PACKED], Rounding(4, 16), shard_size="30kB")
    assert list(found["formats"]) == ["dense", "bitmask", PACKED]
    for name, sizes in found["formats"].items():
        directory = tmp_path / "export" / name
        parts = stored(directory)
        own = {part: size for part, size in parts.items() if "_proj." in part}
        assert sizes["matrix_bytes"] == sum(own.values()), name
        assert sizes["file_bytes"] == sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        assert sizes["bits"] == pytest.approx(8 * sizes["matrix_bytes"] / found["weights"], abs=1e-6)
    assert found["formats"]["dense"]["bits"] == 16
    pruned = open_checkpoint(tmp_path / "prune" / "checkpoint")
    zeros = sum(
        int((tensor == 0).sum()) for name, tensor in pruned.read(list(pruned.files)) if "_proj." in name
    )
    assert found["zeros"] == zeros >= found["weights"] / 2


def test_dense_is_weighed_without_being_written(tmp_path: Path) -> None:
    """Prune's own checkpoint is there already. Oracle: the sizes where it is written."""
    without = exported(tmp_path / "a", ["bitmask"])
    assert not (tmp_path / "a" / "export" / "dense").exists()
    assert without == exported(tmp_path / "b", ["dense", "bitmask"])


# compressed-tensors


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gemma", "gpt_neox"])
@pytest.mark.parametrize(
    "rounding", [Rounding(4, 16), Rounding(4, 16, False), Rounding(4, None), Rounding(8, 16)], ids=str
)
def test_transformers_loads_what_was_in_memory(tmp_path: Path, family: str, rounding: Rounding) -> None:
    """Logits and weights after loading without a word about the format, but for zero points, which
    transformers 5.23 can read only if it dequantises at once. Oracle: the pruned checkpoint, loaded
    as it is.
    """
    pytest.importorskip("compressed_tensors")
    exported(tmp_path, [PACKED], rounding, family=family, shard_size="30kB")
    oracle = load_full(tmp_path / "prune" / "checkpoint", torch.bfloat16)
    how = {} if rounding.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export" / PACKED, dtype=torch.bfloat16, **how
    ).eval()
    rows = token_rows(2, 12)
    with torch.no_grad():
        assert torch.equal(model(rows).logits, oracle(rows).logits)
    expected = dict(oracle.named_parameters())
    matched = [
        name
        for name, parameter in model.named_parameters()
        if name in expected and torch.equal(parameter, expected[name])
    ]
    assert set(matched) == set(expected)
    assert any(name.endswith("weight_packed") for name in stored(tmp_path / "export" / PACKED))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not quantised": ({}, "it is not quantised"),
    "three bits": ({"rounding": Rounding(3, 16)}, "readers of the format take 4 or 8 bits, not 3"),
    "ragged": ({"rounding": Rounding(4, 20)}, r"the 32 inputs of \S+ are not a multiple of its groups of 20"),
    "Conv1D": (
        {"rounding": Rounding(4, 16), "family": "gpt2"},
        r"is stored transposed \(Conv1D\)",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_the_format_cannot_say_is_told(tmp_path: Path, name: str) -> None:
    """One sentence with the key to change, before anything is written."""
    pytest.importorskip("compressed_tensors")
    changes, reason = REFUSED[name]
    with pytest.raises(
        SparselineError,
        match=(
            f"^mine cannot be written as compressed-tensors: .*{reason}; remove it from variants.mine.export"
        ),
    ):
        exported(tmp_path, ["dense", PACKED], **changes)
    assert not (tmp_path / "export").exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other formats do not need it."""
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    exported(tmp_path / "a", ["dense", "bitmask"], Rounding(4, 16))
    with pytest.raises(
        SparselineError, match=r"its package is not installed \(pip install compressed-tensors\)"
    ):
        exported(tmp_path / "b", [PACKED], Rounding(4, 16))


def test_it_is_no_smaller_than_four_bits(tmp_path: Path) -> None:
    """4 bits and a 16-bit scale for every group, pruned or not: zeros cost what others do."""
    sizes = exported(tmp_path, [PACKED], Rounding(4, 16), shard_size="30kB")["formats"][PACKED]
    assert 5 <= sizes["bits"] < 5.2  # and two whole numbers a matrix for its shape
    assert packed.BITS == (4, 8)


# 2:4


def test_two_of_four_is_verified(tmp_path: Path) -> None:
    """The facts say which matrices torch takes. Oracle: its documented multiples, by hand for [32,
    32], [16, 32], [48, 32], [32, 48].
    """
    exported(tmp_path, ["bitmask"], pattern="2:4")
    facts = json.loads((tmp_path / "export" / "semi_structured.json").read_text(encoding="utf-8"))
    assert facts["cutlass"]["qualify"] == []  # in bfloat16 it wants multiples of [32, 64]
    assert (
        facts["cutlass"]["refused"]["model.layers.0.self_attn.k_proj.weight"]
        == "[16, 32] is not a multiple of [32, 64]"
    )
    assert len(facts["cusparselt"]["qualify"]) == 14  # multiples of [16, 16]
    assert facts["cusparselt"]["refused"] == {}


def test_other_patterns_are_not_judged(tmp_path: Path) -> None:
    exported(tmp_path, ["bitmask"], pattern="4:8")
    assert not (tmp_path / "export" / "semi_structured.json").exists()


def test_a_broken_two_of_four_is_told(tmp_path: Path) -> None:
    """Three of four kept, a weight outside the mask, or a number of columns that 4 does not divide."""
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    verdict("w", mask.float(), mask, transposed=False)
    verdict("w", mask.float().T, mask.T, transposed=True)
    three = mask | torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    for weight, bits in ((three, three), (three, mask), (mask[:, :6], mask[:, :6])):
        with pytest.raises(SparselineError, match=r"^w is not exactly 2:4"):
            verdict("w", weight.float(), bits, transposed=False)


@pytest.mark.parametrize(
    "kind",
    [SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT],
    ids=lambda kind: kind.BACKEND,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (32, 64), (48, 64), (64, 32), (64, 48), (8, 128)])
def test_the_verdict_is_torchs(kind: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Oracle: the very check that ``to_sparse_semi_structured`` makes, on a tensor that says it is
    on a GPU.
    """

    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    mask = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(shape[0], shape[1] // 4)
    weight = mask.to(dtype)
    found = verdict("w", weight, mask, transposed=False)[kind.BACKEND]
    try:
        kind._validate_device_dim_dtype_shape(weight.as_subclass(OnGPU))
    except RuntimeError:
        assert found is not None
    else:
        assert found is None


# Cards and progress


def test_every_format_has_its_card(tmp_path: Path) -> None:
    """Written with the sizes that are returned, under the bitmask's checksums. Oracle: files on disk."""
    found = exported(tmp_path, ["dense", "bitmask", PACKED], Rounding(4, 16))
    for name in ("dense", "bitmask", PACKED):
        taken = sum(path.stat().st_size for path in (tmp_path / "export" / name).glob("*.safetensors"))
        assert (tmp_path / "export" / name / "README.md").read_text(encoding="utf-8") == f"{name} {taken}\n"
        assert found["formats"][name]["file_bytes"] == taken
    assert (
        "README.md"
        in json.loads((tmp_path / "export" / "bitmask" / "bitmask.json").read_text(encoding="utf-8"))["files"]
    )


@pytest.mark.parametrize(
    "formats", [[], ["dense"], ["bitmask"], ["gguf"], ["dense", "bitmask", PACKED, "gguf"]]
)
def test_progress_ends_at_its_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: list[str]
) -> None:
    """Every read of a tensor counts once. Oracle: the total that was announced."""
    counted: list[tuple[int, int]] = []
    original = Progress.__exit__

    def noted(self: Progress, *error: Any) -> None:
        counted.append((self._done, self._total))
        original(self, *error)

    monkeypatch.setattr(Progress, "__exit__", noted)
    exported(tmp_path, formats, Rounding(4, 16))
    ((done, total),) = counted
    assert done == total > 0
