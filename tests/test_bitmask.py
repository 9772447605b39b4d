"""The bitmask format: exact whatever the bits, as small as promised, and never a wrong model from a
damaged file.

Oracles: the original's bits; a reader of our own, written from docs/artifacts.md; transformers' own
loading of the dense checkpoint.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from project import invoke
from pruned import Rounding, card, make_pruned, nearest, random_mask
from tiny import load_full, make_model, token_rows
from transformers import AutoModelForCausalLM

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import load
from pipeline_lib.export.bits import pack, unpack, words
from pipeline_lib.export.encoding import Facts, Plan, decode, encode, plan
from pipeline_lib.export.export import Variant, export
from pipeline_lib.export.groups import Groups
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.recipe.settings import Format

FORMATS: list[Format] = ["dense", "bitmask"]
FLOATS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
PATTERNS = ("unstructured", "2:4", "1:4", "4:8", "full", "empty")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern: NaN with payloads, infinities, −0.0 and subnormal numbers among them."""
    size = torch.iinfo(FLOATS[dtype])
    return torch.randint(size.min, size.max, shape, generator=generator, dtype=FLOATS[dtype]).view(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(words(a), words(b))


# Bits and tensors


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 2**32))
@QUICK
def test_codes_are_one_string_of_bits(bits: int, count: int, seed: int) -> None:
    """Oracle: the binary digits written one after another."""
    codes = [random.Random(seed + place).randrange(2**bits) for place in range(count)]
    digits = "".join(f"{code:0{bits}b}" for code in codes)
    digits += "0" * (-len(digits) % 8)
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == bytes(
        int(digits[start : start + 8], 2) for start in range(0, len(digits), 8)
    )
    assert unpack(packed, bits, count).tolist() == codes


def test_many_codes() -> None:
    """More than are unpacked at a time, and not a whole number of bytes."""
    for bits in (1, 3, 4):
        codes = torch.randint(0, 2**bits, (2**20 + 2**19 + 5,), dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, len(codes)), codes)


def facts(way: Plan) -> Facts:
    """As a reader gets them, found to fit the parts."""
    found = Facts.model_validate({**way.facts, "sha256": ""}, strict=True)
    found.check(way.parts)
    return found


@given(
    st.sampled_from(list(FLOATS)),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(PATTERNS),
    st.integers(0, 2**32),
)
@QUICK
def test_tensors_come_back_bit_for_bit(
    dtype: torch.dtype, rows: int, eights: int, pattern: str, seed: int
) -> None:
    """Shapes, dtypes, patterns and any bits; all-zero and all-kept among them."""
    generator = torch.Generator().manual_seed(seed)
    columns = 8 * eights if ":" in pattern else 8 * eights - int(seed % 8)
    tensor = random_bits((rows, columns), dtype, generator)
    if pattern == "empty":
        tensor = torch.zeros_like(tensor)
    else:
        tensor[~random_mask(rows, columns, pattern, generator)] = 0
    chosen = plan(tensor)
    parts = encode(tensor, chosen)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        name: (blob.dtype, blob.shape) for name, blob in chosen.parts.items()
    }
    assert sum(part.nbytes for part in parts.values()) == chosen.bytes <= tensor.nbytes
    assert same(decode(parts, facts(chosen)), tensor)


def test_special_values_are_kept() -> None:
    """−0.0 is stored, 0.0 is not; a NaN keeps its payload."""
    tensor = torch.zeros(64)
    tensor[:4] = torch.tensor([-0.0, math.nan, math.inf, -math.inf])
    tensor.view(torch.int32)[4] = 0x7FC01234
    parts = encode(tensor, plan(tensor))
    assert len(parts[".values"]) == 5
    assert same(decode(parts, facts(plan(tensor))), tensor)


def groups_of(weight: torch.Tensor, how: Rounding, transposed: bool = False) -> tuple[torch.Tensor, Groups]:
    """Rounded weights in the stored orientation with what says so."""
    rounded, found = nearest(weight, how)
    zero = found["zero_point"].to(torch.uint8) if "zero_point" in found else None
    groups = Groups(how.bits, how.group or weight.shape[1], found["scale"].to(weight.dtype), zero, transposed)
    return (rounded.T.contiguous() if transposed else rounded), groups


@given(
    st.sampled_from(list(FLOATS)),
    st.tuples(st.integers(1, 7), st.integers(1, 40)),
    st.builds(Rounding, st.sampled_from([3, 4, 8]), st.sampled_from([None, 8, 16]), st.booleans()),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 2**32),
)
@QUICK
def test_quantised_tensors_come_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, int], how: Rounding, zeros: float, transposed: bool, seed: int
) -> None:
    """Ragged groups, both orientations, −0.0 where a small weight was rounded; and no format takes
    more than the weights themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < zeros] = 0
    tensor, groups = groups_of(weight, how, transposed)
    chosen = plan(tensor, groups)
    assert chosen.bytes <= tensor.nbytes
    assert same(decode(encode(tensor, chosen, groups), facts(chosen)), tensor)


def test_a_negative_zero_among_codes() -> None:
    """Rounding gives −0.0. Codes for all weights have only one zero, so the tensor has a mask."""
    tensor, groups = groups_of(
        torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).bfloat16(), Rounding(4, 128)
    )
    assert ".mask" not in plan(tensor.abs(), Groups(4, 128, groups.scale, None, False)).parts
    tensor[0, 0] = -0.0
    chosen = plan(tensor, groups)
    assert {".mask", ".codes"} <= chosen.parts.keys()
    assert same(decode(encode(tensor, chosen, groups), facts(chosen)), tensor)


def test_weights_that_are_no_codes_are_refused() -> None:
    tensor, groups = groups_of(torch.randn(4, 256).bfloat16(), Rounding(4, 128))
    tensor[1, tensor[1].abs().argmax()] *= 1.02  # not a zero, which would stay one
    with pytest.raises(ValueError, match="not their scales times whole codes"):
        groups.codes(tensor)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_half_of_bfloat16_takes_nine_bits(pattern: str) -> None:
    """At most 0.57 of the dense bytes: (1 + 8) / 16 = 0.5625. Oracle: the parts' own bytes."""
    tensor = torch.randn(256, 512).bfloat16()
    tensor[~random_mask(256, 512, pattern, torch.Generator().manual_seed(0))] = 0
    assert sum(part.nbytes for part in encode(tensor, plan(tensor)).values()) <= 0.57 * tensor.nbytes


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_of_four_bits_takes_three(symmetric: bool) -> None:
    """At most 3.2 bits a weight with groups of 128: 1 + 2 + 16 / 128, and 4 / 128 for a zero point.
    Without zeros, 4.125.
    """
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensor, groups = groups_of(weight, Rounding(4, 128, symmetric))
    assert (
        sum(part.nbytes for part in encode(tensor, plan(tensor, groups), groups).values())
        <= tensor.numel() * 4.16 / 8
    )
    mask = random_mask(256, 512, "unstructured", torch.Generator().manual_seed(1))
    tensor, groups = groups_of(weight * mask, Rounding(4, 128, symmetric))
    tensor[~mask] = 0
    assert (
        sum(part.nbytes for part in encode(tensor, plan(tensor, groups), groups).values())
        <= tensor.numel() * 3.2 / 8
    )


# Whole checkpoints


def read_as_documented(directory: Path) -> dict[str, torch.Tensor]:
    """docs/artifacts.md in numpy: no code of ours, and every checksum."""
    manifest = json.loads((directory / "bitmask.json").read_text(encoding="utf-8"))
    digest = manifest.pop("sha256")
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    assert (manifest["format"], manifest["version"]) == ("sparseline-bitmask", 1)
    assert all(
        hashlib.sha256((directory / name).read_bytes()).hexdigest() == sha
        for name, sha in manifest["files"].items()
    )
    widths = {"U8": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found: dict[str, torch.Tensor] = {}
    for file, entry in manifest["weights"].items():
        raw = (directory / file).read_bytes()
        assert len(raw) == entry["bytes"]
        start = 8 + int.from_bytes(raw[:8], "little")
        assert hashlib.sha256(raw[:start]).hexdigest() == entry["header_sha256"]
        header = json.loads(raw[8:start])
        facts = json.loads(header.pop("__metadata__")["sparseline"])

        def part(name: str, header: dict[str, Any] = header, raw: bytes = raw, start: int = start) -> Any:
            if name not in header:
                return None
            first, end = header[name]["data_offsets"]
            return np.frombuffer(raw[start + first : start + end], widths[header[name]["dtype"]]).reshape(
                header[name]["shape"]
            )

        for name, told in facts["tensors"].items():
            suffixes = ("", ".codes", ".mask", ".scale", ".values", ".zero_point")
            parts = {suffix: one for suffix in suffixes if (one := part(name + suffix)) is not None}
            assert (
                hashlib.sha256(b"".join(one.tobytes() for one in parts.values())).hexdigest()
                == told["sha256"]
            )
            if "" in parts:
                found[name] = as_torch(parts[""], kinds[header[name]["dtype"]])
                continue
            shape, kind = told["shape"], kinds[told["dtype"]]
            total = math.prod(shape)
            mask = (
                np.unpackbits(parts[".mask"], count=total).astype(bool)
                if ".mask" in parts
                else np.ones(total, bool)
            )
            if ".values" in parts:
                dense = np.zeros(total, parts[".values"].dtype)
                dense[mask] = parts[".values"]
                found[name] = as_torch(dense, kind).reshape(shape)
                continue
            bits = told["bits"]
            digits = np.unpackbits(parts[".codes"], count=int(mask.sum()) * bits).reshape(-1, bits)
            codes = np.zeros(total, np.int64)
            codes[mask] = digits @ (2 ** np.arange(bits)[::-1])
            scale = as_torch(parts[".scale"], kind).double().numpy()
            zero = np.full(scale.shape, 2 ** (bits - 1))
            if ".zero_point" in parts:
                zero = np.unpackbits(parts[".zero_point"], count=scale.size * bits).reshape(-1, bits) @ (
                    2 ** np.arange(bits)[::-1]
                )
                zero = zero.reshape(scale.shape)
            codes, mask = codes.reshape(shape), mask.reshape(shape)
            logical = codes.T if told["transposed"] else codes
            group = np.arange(logical.shape[1]) // told["group"]
            steps = logical - zero[:, group]
            weight = torch.from_numpy(scale[:, group] * steps).to(kind)
            weight[torch.from_numpy((steps == 0) & (".mask" in parts))] = -0.0
            weight = weight.T.contiguous() if told["transposed"] else weight
            weight[torch.from_numpy(~mask)] = 0.0
            found[name] = weight
    return found


def as_torch(array: np.ndarray, kind: torch.dtype) -> torch.Tensor:
    """uint16 stands for bfloat16, which numpy does not have."""
    return torch.from_numpy(array.copy()).view(kind)


def exported(
    directory: Path, family: str, dtype: torch.dtype, rounding: Rounding | None, shard_size: str = "1GB"
) -> tuple[Path, Path]:
    """A source and, beside it, its exported variant."""
    source = open_checkpoint(make_model(directory / "source", family, dtype=dtype, shard_size=shard_size))
    make_pruned(directory / "prune", source, "unstructured", rounding)
    export(source, Variant("mine", "unstructured", directory / "prune"), directory / "export", FORMATS, card)
    return source.path, directory / "export"


CASES: dict[str, tuple[str, torch.dtype, Rounding | None, str]] = {
    "llama in shards": ("llama", torch.bfloat16, None, "30kB"),
    "tied": ("gemma", torch.float16, None, "1GB"),
    "post-norm": ("opt-post", torch.float32, None, "1GB"),
    "four bits": ("llama", torch.bfloat16, Rounding(4, 16), "30kB"),
    "fused, asymmetric": ("phi3", torch.bfloat16, Rounding(4, 16, False), "1GB"),
    "transposed, ragged": ("gpt2", torch.float16, Rounding(3, 20, False), "1GB"),
    "rows": ("gpt_neox", torch.float32, Rounding(4, None), "1GB"),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return exported(tmp_path_factory.mktemp("bitmask"), *CASES[request.param])


def test_a_reader_from_the_documentation_agrees(case: tuple[Path, Path]) -> None:
    """And what it reads is the pruned checkpoint, bit for bit."""
    _, out = case
    found = read_as_documented(out / "bitmask")
    pruned = open_checkpoint(out.parent / "prune" / "checkpoint")
    assert found.keys() == pruned.files.keys()
    assert all(same(found[name], tensor) for name, tensor in pruned.read(list(pruned.files)))
    assert all(same(found[name], tensor) for name, tensor in load.tensors(out / "bitmask"))


def test_the_model_is_the_dense_one(case: tuple[Path, Path]) -> None:
    """Parameters, buffers and logits. Oracle: ``from_pretrained`` of the dense checkpoint."""
    _, out = case
    model, oracle = (
        load.load_model(out / "bitmask"),
        AutoModelForCausalLM.from_pretrained(out / "dense", dtype="auto").eval(),
    )
    assert not model.training
    expected = oracle.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(same(tensor, expected[name]) for name, tensor in model.state_dict().items())
    rows = token_rows(2, 12)
    with torch.no_grad():
        assert torch.equal(model(rows).logits, oracle(rows).logits)
    assert model.generation_config.to_dict() == oracle.generation_config.to_dict()


def test_the_model_is_there_once(case: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading keeps the tensors that were decoded: nothing is copied. Oracle: their addresses."""
    decoded: set[int] = set()
    original = load.tensors

    def noted(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in original(path):
            decoded.add(tensor.data_ptr())
            yield name, tensor

    monkeypatch.setattr(load, "tensors", noted)
    assert {
        parameter.data_ptr() for parameter in load.load_model(case[1] / "bitmask").parameters()
    } == decoded


def test_dense_is_cut_like_the_source(case: tuple[Path, Path]) -> None:
    """The same files, each with the same tensors, index included; and ``unpack`` writes them byte
    for byte, the card of the bitmask with them.
    """
    source, out = case
    assert {p.name for p in (out / "dense").iterdir()} == {p.name for p in source.iterdir()} | {"README.md"}
    assert open_checkpoint(out / "dense").files == open_checkpoint(source).files
    for path in source.iterdir():
        if path.name == "model.safetensors.index.json":
            indices = [
                json.loads((directory / path.name).read_text(encoding="utf-8"))
                for directory in (source, out / "dense")
            ]
            assert indices[0]["weight_map"] == indices[1]["weight_map"]
            assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
        elif path.suffix != ".safetensors":
            assert (out / "dense" / path.name).read_bytes() == path.read_bytes(), path.name
    result = invoke("unpack", str(out / "bitmask"), str(out.parent / "unpacked"))
    assert result.exit_code == 0, result.output
    assert (out.parent / "unpacked" / "README.md").read_text(encoding="utf-8").startswith("bitmask ")
    for path in {*(out / "dense").iterdir()} - {out / "dense" / "README.md"}:
        assert (out.parent / "unpacked" / path.name).read_bytes() == path.read_bytes(), path.name


def test_transformers_does_not_take_it_for_a_model(case: tuple[Path, Path]) -> None:
    """A directory that ``from_pretrained`` would load with random weights would be a wrong model."""
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(case[1] / "bitmask")


def test_the_same_bytes_again(tmp_path: Path) -> None:
    """Oracle: a second export."""
    found = []
    for name in ("a", "b"):
        _, out = exported(tmp_path / name, "llama", torch.bfloat16, Rounding(4, 16, False), "30kB")
        found.append({str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
    assert found[0] == found[1]
    assert len(found[0]) > 10


# Damage


def damage(data: bytes, draw: random.Random) -> bytes:
    """A flipped bit (half of them near the start, where headers are), a cut, or a run of zeros that
    changes something.
    """
    kind = draw.choice(["flip", "flip", "flip", "cut", "blank"])
    place = draw.randrange(min(len(data), 4000) if draw.random() < 0.5 else len(data))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    blank = data[:place] + bytes(min(16, len(data) - place)) + data[place + 16 :]
    return data[:place] if kind == "cut" or blank == data else blank


@pytest.mark.parametrize("rounding", [None, Rounding(4, 16, False)], ids=["values", "codes"])
def test_a_hundred_corruptions_are_a_hundred_sentences(tmp_path: Path, rounding: Rounding | None) -> None:
    """Weights, headers, manifest, config and tokenizer; each time one sentence that names the file,
    and no tensor that is wrong.
    """
    _, out = exported(tmp_path, "llama", torch.bfloat16, rounding, "30kB")
    directory, draw = out / "bitmask", random.Random(0)
    right = dict(load.tensors(directory))
    files = sorted(directory.iterdir())
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) > 1
    for _ in range(100):
        path = draw.choice(weights) if draw.random() < 0.6 else draw.choice(files)
        original = path.read_bytes()
        path.write_bytes(damage(original, draw))
        assert path.read_bytes() != original
        with pytest.raises(SparselineError) as told:
            for name, tensor in load.tensors(directory):
                assert same(tensor, right[name])
        assert path.name in str(told.value)
        assert "\n" not in str(told.value)
        path.write_bytes(original)
    assert all(same(tensor, right[name]) for name, tensor in load.tensors(directory))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """By every reader; ``unpack`` ends with code 2 and leaves nothing behind."""
    _, out = exported(tmp_path, "llama", torch.bfloat16, None, "30kB")
    for path in sorted((out / "bitmask").iterdir()):
        aside = tmp_path / "aside"
        shutil.move(path, aside)
        result = invoke("unpack", str(out / "bitmask"), str(tmp_path / "unpacked"))
        assert result.exit_code == 2
        assert path.name in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "unpacked").exists()
        with pytest.raises(SparselineError, match=path.name):
            load.load_model(out / "bitmask")
        shutil.move(aside, path)


def test_another_version_is_told(tmp_path: Path) -> None:
    """A manifest that is whole, but says something else; names outside the directory are refused too."""
    _, out = exported(tmp_path, "llama", torch.bfloat16, None)
    path = out / "bitmask" / "bitmask.json"
    whole = json.loads(path.read_text(encoding="utf-8"))

    def written(**changes: Any) -> Path:
        value = {key: one for key, one in {**whole, **changes}.items() if key != "sha256"}
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return out / "bitmask"

    with pytest.raises(SparselineError, match="version 2; this reads 'sparseline-bitmask', version 1"):
        next(load.tensors(written(version=2)))
    with pytest.raises(SparselineError, match="names files outside"):
        next(load.tensors(written(files={"../source/config.json": "0"})))


def test_weights_changed_by_hand_are_told(tmp_path: Path) -> None:
    """A quantised variant whose checkpoint was edited has no codes any more: a sentence with the
    tensor's name, and no file.
    """
    source = open_checkpoint(make_model(tmp_path / "source", "llama", dtype=torch.bfloat16))
    make_pruned(tmp_path / "prune", source, "unstructured", Rounding(4, 16))
    pruned = tmp_path / "prune" / "checkpoint"
    full = load_full(pruned, torch.bfloat16)
    full.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    full.save_pretrained(pruned)
    for shard in pruned.glob("model-*.safetensors"):
        shard.unlink()
    (pruned / "model.safetensors.index.json").unlink()
    with pytest.raises(
        SparselineError,
        match=r"layers\.1\.mlp\.up_proj\.weight: weights are not their scales times whole codes",
    ):
        export(
            source, Variant("mine", "unstructured", tmp_path / "prune"), tmp_path / "export", FORMATS, card
        )
    assert not (tmp_path / "export").exists()
