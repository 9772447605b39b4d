"""Checkpoints on disk and block-by-block streaming. Oracle: transformers' own model on the same files."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ALL_FAMILIES, FAMILIES, all_tensors, load_full, make_model, make_tokenizer, token_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.checkpoint import Checkpoint, ShardWriter, locate, open_checkpoint
from pipeline_lib.models.files import INDEX
from pipeline_lib.models.places import Batches, Storage, _Link, allowed_storage
from pipeline_lib.models.stream import BlockModel, Stream
from pipeline_lib.models.whole import load_model

CPU = torch.device("cpu")


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family of the table and every kind of config, instead of the few that other tests run on."""
    return str(request.param)


def layer_outputs(
    checkpoint: Checkpoint, rows: torch.Tensor, dtype: torch.dtype, model: PreTrainedModel | None = None
) -> list[torch.Tensor]:
    """Hidden states before the first block and after each, from hooks on the whole model."""
    model = model or load_full(checkpoint.path, dtype)
    states: list[torch.Tensor] = []

    def before(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        states.append(inputs[0] if inputs else kwargs["hidden_states"])

    def after(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = list(model.base_model.get_submodule(checkpoint.architecture.blocks))
    handles = [
        layers[0].register_forward_pre_hook(before, with_kwargs=True),
        *(layer.register_forward_hook(after) for layer in layers),
    ]
    with torch.no_grad():
        model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "length"), [(5, 12), (4, 2)])
def test_streaming_equals_the_whole_model(
    checkpoint: Checkpoint, dtype: torch.dtype, count: int, length: int
) -> None:
    """Oracle: hooks on the whole model, batch by batch, to the last bit. 4 rows of 2 tokens: batch
    size and length are alike.

    Rows of 12 are longer than the sliding windows of the tiny Mistral (all layers) and Qwen2 (the second).
    """
    rows = token_rows(count, length, seed=1)
    model = BlockModel(checkpoint, dtype, CPU)
    stream = model.embed(rows, batch_rows=2)
    whole = load_full(checkpoint.path, dtype)
    expected = [layer_outputs(checkpoint, batch, dtype, whole) for batch in rows.split(2)]
    for index in range(checkpoint.architecture.depth + 1):
        assert len(stream.hidden) == len(expected)
        for hidden, states in zip(stream.hidden, expected, strict=True):
            assert hidden.dtype == dtype
            assert torch.equal(hidden, states[index])
        if index < checkpoint.architecture.depth:
            model.advance(model.block(index), index, stream)


@pytest.mark.parametrize("length", [7, 4])
def test_fewer_rows_than_any_batch_get_fitting_arguments(checkpoint: Checkpoint, length: int) -> None:
    """Oracle: the same rows inside their batch. With 4 tokens a row, a batch of 4 must not be
    mistaken for a row.
    """
    rows = token_rows(4, length, seed=2)
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(rows, batch_rows=4)
    block = model.block(0)
    with torch.no_grad():
        whole = model.call(block, 0, stream.hidden[0])
        for count in (3, 1):
            torch.testing.assert_close(
                model.call(block, 0, stream.hidden[0][:count]), whole[:count], rtol=1e-5, atol=1e-5
            )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, tuple | list) else a == b


@pytest.mark.parametrize("length", [9, 4, 3, 12])
def test_arguments_for_fewer_rows_are_what_the_model_gives_them(checkpoint: Checkpoint, length: int) -> None:
    """Oracle: the arguments noted for so many rows. Lengths that equal the batch, the part, and
    batch · heads (12: 3 · 4, ALiBi).
    """
    model, fresh = (BlockModel(checkpoint, torch.float32, CPU) for _ in range(2))
    model.embed(token_rows(4, length), batch_rows=4)
    for count in (3, 1):
        fresh.embed(token_rows(count, length, seed=1), batch_rows=count)
        for index in range(checkpoint.architecture.depth):
            assert same(model.arguments(index, count), fresh.arguments(index, count))


def streamed_logits(model: BlockModel, rows: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by way of every block and the head."""
    stream = model.embed(rows, len(rows))
    for index in range(model.checkpoint.architecture.depth):
        model.advance(model.block(index), index, stream)
    with model.head() as logits, torch.no_grad():
        return logits(stream.hidden[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2])
def test_streamed_logits_equal_the_whole_model_s(
    family: str, tmp_path: Path, dtype: torch.dtype, layers: int
) -> None:
    """Oracle: transformers' logits, to the last bit: last norm, projection, tied or untied head.
    Afterwards nothing is held.
    """
    checkpoint = open_checkpoint(make_model(tmp_path, family, layers))
    rows = token_rows(3, 12, seed=1)
    model = BlockModel(checkpoint, dtype, CPU)
    with torch.no_grad():
        assert torch.equal(
            streamed_logits(model, rows), load_full(checkpoint.path, dtype)(rows, use_cache=False).logits
        )
    assert {parameter.device.type for parameter in model.whole.parameters()} == {"meta"}


def test_the_head_is_differentiable_in_the_hidden_states(checkpoint: Checkpoint) -> None:
    """Oracle: differences of the logits along a random direction, in float64 (the norms' float32
    inside sets the tolerance).
    """
    model = BlockModel(checkpoint, torch.float64, CPU)
    hidden = model.embed(token_rows(2, 6), 2).hidden[0].requires_grad_(True)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with model.head() as logits:
        weights = torch.randn(2, 6, 320, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((weights * logits(hidden)).sum(), hidden)
        with torch.no_grad():
            ahead, behind = ((weights * logits(hidden + step * direction)).sum() for step in (1e-2, -1e-2))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-2, rel=1e-3)


def test_a_deep_model_whose_blocks_return_tuples(tmp_path: Path) -> None:
    """Oracle: the whole model. BLOOM takes the first part of what each block returns, six times here."""
    checkpoint = open_checkpoint(make_model(tmp_path, "bloom", layers=6))
    rows = token_rows(2, 5)
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(rows, 2)
    for index in range(6):
        model.advance(model.block(index), index, stream)
    assert torch.equal(stream.hidden[0], layer_outputs(checkpoint, rows, torch.float32)[-1])


def test_the_sliding_window_is_honoured(copy_of: Callable[[str], Path], model_paths: dict[str, Path]) -> None:
    """Oracle: the same weights without a window, which agree on rows within it (5 tokens) and on no
    longer ones.
    """
    path = copy_of("mistral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    for length, agree in ((5, True), (12, False)):
        outputs = []
        for checkpoint in (open_checkpoint(path), open_checkpoint(model_paths["mistral"])):
            model = BlockModel(checkpoint, torch.float32, CPU)
            stream = model.embed(token_rows(2, length), 2)
            outputs.append(model.call(model.block(0), 0, stream.hidden[0]))
        assert torch.allclose(*outputs, atol=1e-5) == agree


def test_rows_of_another_length_get_arguments_of_their_own(checkpoint: Checkpoint) -> None:
    """Oracle: the whole model. The arguments noted for 9 tokens must not serve rows of 5, whatever
    the batch sizes.
    """
    model = BlockModel(checkpoint, torch.float32, CPU)
    model.embed(token_rows(4, 9, seed=3), batch_rows=4)
    rows = token_rows(6, 5, seed=4)
    stream = model.embed(rows, batch_rows=6)
    expected = layer_outputs(checkpoint, rows, torch.float32)[1]
    with torch.no_grad():
        for count in (4, 3):
            out = model.call(model.block(0), 0, stream.hidden[0][:count])
            torch.testing.assert_close(out, expected[:count], rtol=1e-5, atol=1e-5)


def test_call_with_tensors_equals_a_block_that_holds_them(checkpoint: Checkpoint) -> None:
    """Oracle: a block built from the same tensors; and gradients reach them."""
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(token_rows(2, 6), batch_rows=2)
    changed = {name: tensor * 1.1 for name, tensor in checkpoint.block(0).items()}
    with torch.no_grad():
        expected = model.call(model.block(0, changed), 0, stream.hidden[0])
    name = checkpoint.architecture.layouts[0].matrices[0].parameter
    changed[name].requires_grad_(True)
    out = model.call(model.block(0), 0, stream.hidden[0], changed)
    assert torch.equal(out.detach(), expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), changed[name])
    assert gradient.abs().max() > 0


def test_only_asked_for_blocks_hold_memory(checkpoint: Checkpoint) -> None:
    """After embedding, every parameter of the skeleton is back on the meta device."""
    model = BlockModel(checkpoint, torch.float32, CPU)
    model.embed(token_rows(2, 6), batch_rows=2)
    assert {parameter.device.type for parameter in model.base.parameters()} == {"meta"}
    model.block(1)
    assert {parameter.device.type for parameter in model.base.parameters()} == {"meta"}


def test_infinite_activations_are_named(checkpoint: Checkpoint) -> None:
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(token_rows(2, 6), batch_rows=2)
    huge = {
        name: tensor * 1e30 if tensor.ndim == 2 else tensor for name, tensor in checkpoint.block(1).items()
    }
    with pytest.raises(
        SparselineError, match=rf"{checkpoint.architecture.blocks}\.1 contain NaN or infinity"
    ):
        model.advance(model.block(1, huge), 1, stream)


def test_an_infinite_hidden_state_is_named(llama: Checkpoint) -> None:
    model = BlockModel(llama, torch.float32, CPU)
    stream = model.embed(token_rows(1, 4), batch_rows=1)
    with pytest.raises(SparselineError, match=r"layers\.0 contain NaN or infinity"):
        stream.hidden[0] = torch.full_like(stream.hidden[0], float("inf"))
        model.advance(model.block(0), 0, stream)


# Where streams lie


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(number)) for number in range(count)]


@pytest.mark.parametrize("where", ["device", "host", "disk", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_a_list_wherever_they_lie(tmp_path: Path, dtype: torch.dtype, where: str) -> None:
    """Oracle: a list that is used the same way. Bits, dtypes and shapes come back, transposed
    tensors included; slices share the places.
    """
    random = torch.Generator().manual_seed(0)
    model = [torch.randn(size, 4, 3, generator=random).to(dtype) for size in (2, 2, 1)]
    model[1] = model[1].transpose(0, 2)
    batches = Batches(3, CPU, storages(tmp_path, 24 * dtype.itemsize)[where], "x")
    for number, hidden in enumerate(model):
        batches[number] = hidden
    assert len(list(tmp_path.rglob("x-*"))) == {"device": 0, "host": 0, "disk": 3, "mixed": 1}[where]
    assert len(batches) == 3
    assert same(list(batches), model)
    for part in (slice(None, 2), slice(2, None), slice(-1, None), slice(None, -1), slice(0, 0), slice(1, 3)):
        assert len(batches[part]) == len(model[part])
        assert same(list(batches[part]), model[part])
        assert batches[part].sizes() == [len(hidden) for hidden in model[part]]
    assert same(batches[-1], model[-1]) and same(batches[-2], model[-2])
    assert same(list(reversed(batches)), model[::-1])
    assert same(batches.row(0, 1), model[0][1:2]) and same(batches[1:].row(0, 2), model[1][2:])
    with pytest.raises(IndexError):
        batches[3]
    part = batches[1:]
    kept = batches[1]
    part[0] = batches[2] + 1
    batches[2] = batches[2].clone()  # as advance does: what was read is written in the same place
    assert same(batches[1], model[2] + 1)
    assert same(kept, model[1])
    assert same(batches[2], model[2])


def storages(directory: Path, size: int) -> dict[str, Storage]:
    """A storage for every kind of place; and one for a batch of ``size`` bytes on the device, one in
    host memory, and the rest in files.
    """
    mixed = Storage(size, size + size // 4, directory / "mixed")  # what is left would not hold half a batch
    return {"device": Storage(), "host": Storage(0), "disk": Storage(0, 0, directory), "mixed": mixed}


def test_what_comes_ahead_of_its_turn_is_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In host memory, the next batch is copied while one is read. A batch that is written meanwhile
    is read correctly, and each is copied once. Oracle: counts of copies.
    """
    fetched = []
    fetch = _Link.fetch
    monkeypatch.setattr(
        _Link, "fetch", lambda link, cell: fetched.append(cell.buffer[0, 0].item()) or fetch(link, cell)
    )
    batches = Batches(4, CPU, Storage(0), "x")
    for number, hidden in enumerate(numbered(4)):
        batches[number] = hidden
    assert same(list(batches), numbered(4)) and fetched == [0, 1, 2, 3]
    assert same(batches[1], numbered(4)[1])  # 2 is on its way
    batches[2] = torch.full((2, 3), 7.0)
    assert same(batches[2], torch.full((2, 3), 7.0))
    assert same(batches[0], numbered(4)[0]) and same(batches[3], numbered(4)[3])


def test_a_batch_that_was_not_given_is_a_fault() -> None:
    with pytest.raises(ValueError, match="batch 1 is read before it is written"):
        Batches(2, CPU, Storage(), "x")[1]


def test_copies_of_streams_are_apart(tmp_path: Path) -> None:
    """For every place. Oracle: the batches as written, after a copy of the stream has advanced."""
    for place in (Storage(), Storage(0), Storage(0, 0, tmp_path / "new" / "folder")):
        first = Stream(2, CPU, place, "first")
        for number, hidden in enumerate(numbered(2)):
            first.hidden[number] = hidden
        second = first.copy("second")
        third = second.copy("third")
        second.hidden[0] = torch.zeros(1)
        assert same([list(stream.hidden) for stream in (first, third)], 2 * [numbered(2)])
        assert same(list(second.hidden), [torch.zeros(1), numbered(2)[1]])
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [
        f"{n}-0000{i}.safetensors" for n in ("first", "second", "third") for i in (0, 1)
    ]


def test_streams_pass_blocks_alike_wherever_they_lie(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Oracle: the same rows on the device, to the bit; a short last batch included."""
    model = BlockModel(checkpoint, torch.float32, CPU)
    streams = [
        model.embed(token_rows(5, 8), 2, "x", place) for place in storages(tmp_path, 4 * 2 * 8 * 32).values()
    ]
    for index in range(checkpoint.architecture.depth):
        for stream in streams:
            model.advance(model.block(index), index, stream)
        first, *others = (list(stream.hidden) for stream in streams)
        assert all(same(first, other) for other in others)
    assert len(list(tmp_path.rglob("x-*"))) == 3 + 1


def test_a_room_is_given_batch_by_batch() -> None:
    """The first that fit the device, then host memory, then files, or host memory all the same; a
    name's places are given once.
    """
    mixed = Storage(10, 10, Path("files"))
    assert [mixed.place("a", number, 4) for number in range(6)] == [
        "device",
        "device",
        "host",
        "host",
        "disk",
        "disk",
    ]
    assert (mixed.place("b", 0, 2), mixed.place("b", 1, 3), mixed.place("b", 2, 2)) == (
        "device",
        "disk",
        "host",
    )
    assert [mixed.place("a", number, 4) for number in range(6)] == [
        "device",
        "device",
        "host",
        "host",
        "disk",
        "disk",
    ]
    crowded = Storage(4, 4)
    assert [crowded.place("a", number, 4) for number in range(4)] == ["device", "host", "host", "host"]


def test_settings_decide_where_hidden_states_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU all in memory or all in files; on a GPU a quarter of what is free there, or what the
    setting says. Oracle: by hand.
    """
    for name in ("SPARSELINE_ACTIVATION_BYTES", "SPARSELINE_GPU_ACTIVATION_BYTES"):
        monkeypatch.delenv(name, raising=False)
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {gpu: (80_000, 100_000)}[device])
    assert allowed_storage(CPU, tmp_path, 4_000_000_000) == Storage(spare=0)
    assert allowed_storage(CPU, tmp_path, 3_000_000_000) == Storage(spare=1_000_000_000)
    assert allowed_storage(CPU) == Storage(spare=4_000_000_000)
    assert allowed_storage(CPU, tmp_path, 4_000_000_001) == Storage(0, 0, tmp_path)
    assert allowed_storage(CPU, None, 4_000_000_001) == Storage(spare=0)
    assert allowed_storage(gpu, tmp_path, 1) == Storage(20_000, 4_000_000_000, tmp_path)
    monkeypatch.setenv("SPARSELINE_GPU_ACTIVATION_BYTES", "123")
    monkeypatch.setenv("SPARSELINE_ACTIVATION_BYTES", "7")
    assert allowed_storage(gpu, None, 1) == Storage(123, 7, None)
    monkeypatch.setenv("SPARSELINE_GPU_ACTIVATION_BYTES", "4GB")
    with pytest.raises(
        SparselineError, match="SPARSELINE_GPU_ACTIVATION_BYTES=4GB is not a whole number of bytes"
    ):
        allowed_storage(gpu)


# Damaged and unsupported checkpoints: each is refused with a sentence that says where and what to do.


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_weights_are_named(copy_of: Callable[[str], Path], family: str, value: float) -> None:
    path = copy_of(family)
    table = open_checkpoint(path).architecture.layouts[0]
    stored = {m.kind: m for m in table.matrices}["v"].parameter

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if name.endswith(f"1.{stored}"))][3, 5] = value

    rewrite(path, damage)
    checkpoint = open_checkpoint(path)
    checkpoint.block(0)
    with pytest.raises(
        SparselineError,
        match=r"model\.safetensors: weights of .*1\.self_attn\.v_proj\.weight contain NaN or infinity",
    ):
        checkpoint.block(1)


def test_a_bad_embedding_is_named(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("llama")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][7, 7] = float("nan")

    rewrite(path, damage)
    model = BlockModel(open_checkpoint(path), torch.float32, CPU)
    with pytest.raises(SparselineError, match=r"embed_tokens\.weight contain NaN"):
        model.embed(token_rows(1, 4), 1)


@pytest.mark.parametrize("left", [0, 4, 100, -100])
def test_a_truncated_shard_is_named(copy_of: Callable[[str], Path], left: int) -> None:
    path = copy_of("llama")
    file = path / "model.safetensors"
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    with pytest.raises(
        SparselineError, match=r"model\.safetensors is missing or truncated .*fetch the checkpoint again"
    ):
        open_checkpoint(path)


def sharded(directory: Path) -> Path:
    return make_model(directory, "llama", shard_size="20KB")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path / "model")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SparselineError, match=f"{shard.name} is missing or truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', "[]"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    path = sharded(tmp_path / "model")
    (path / INDEX).write_text(text)
    with pytest.raises(SparselineError, match=f"{INDEX} is damaged"):
        open_checkpoint(path)


def test_missing_weights_are_told(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(SparselineError, match=r"holds no model\.safetensors.*convert it"):
        open_checkpoint(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(
        SparselineError, match=r"holds no model\.safetensors and no .*; give a directory with the weights"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(copy_of: Callable[[str], Path], name: str) -> None:
    """Whatever the model needs: a matrix, a norm, a bias, the embeddings, the last norm, the untied head."""
    path = copy_of("llama-bias")
    rewrite(path, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(SparselineError, match=f"has no tensor {name}"):
        open_checkpoint(path)


def test_a_tensor_of_another_shape_is_named(copy_of: Callable[[str], Path]) -> None:
    """A config.json of another size than the weights."""
    path = copy_of("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(SparselineError, match=r"layers\.0\.mlp\.(gate|up|down)_proj\.weight"):
        open_checkpoint(path)


def test_buffers_of_old_checkpoints_do_no_harm(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    """LLaMA checkpoints from before 2023-08 store rotary_emb.inv_freq in every layer: not a
    parameter, neither read nor written.
    """
    path = copy_of("llama")
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(path, lambda tensors: tensors.__setitem__(extra, torch.ones(4)))
    checkpoint = open_checkpoint(path)
    model = BlockModel(checkpoint, torch.float32, CPU)
    rows = token_rows(1, 5)
    stream = model.embed(rows, 1)
    model.advance(model.block(0), 0, stream)
    assert torch.equal(stream.hidden[0], layer_outputs(checkpoint, rows, torch.float32)[1])
    assert checkpoint.block(0).keys() == checkpoint.block(1).keys()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_checkpoints_as_the_hub_has_them(
    copy_of: Callable[[str], Path], model_paths: dict[str, Path], tmp_path: Path, family: str
) -> None:
    """GPT-2 and BLOOM without ``transformer.``, GPT-2 and GPT-NeoX with causal masks and a −inf in
    every layer.

    Oracle: the same weights as transformers writes them. What was no parameter is not counted, and
    the result is without it.
    """
    path, plain = copy_of(family), open_checkpoint(model_paths[family])
    attention = {"gpt2": "attn", "gpt_neox": "attention"}.get(family)

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        for index in range(2 if attention else 0):
            prefix = f"{plain.block_prefix(index)}{attention}"
            tensors[f"{prefix}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
            tensors[f"{prefix}.masked_bias"] = torch.tensor(float("-inf"))
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(path, as_on_the_hub)
    checkpoint = open_checkpoint(path)
    assert checkpoint.prefixes[0] == ("gpt_neox.layers.0." if family == "gpt_neox" else "h.0.")
    assert checkpoint.parameters == plain.parameters
    assert set(checkpoint.files) == {name.removeprefix("transformer.") for name in plain.files}
    rows = token_rows(2, 7)
    model = BlockModel(checkpoint, torch.float32, CPU)
    stream = model.embed(rows, 2)
    model.advance(model.block(0), 0, stream)
    assert torch.equal(stream.hidden[0], layer_outputs(plain, rows, torch.float32)[1])
    write_unchanged(checkpoint, tmp_path / "out")
    assert all_tensors(tmp_path / "out").keys() == set(checkpoint.files)
    with torch.no_grad():
        assert torch.equal(load_full(tmp_path / "out")(rows).logits, load_full(plain.path)(rows).logits)


@pytest.mark.parametrize(
    "missing", ["embed_out.weight", "gpt_neox.embed_in.weight", "gpt_neox.layers.1.attention.dense.bias"]
)
def test_a_missing_tensor_is_named_as_files_name_it(copy_of: Callable[[str], Path], missing: str) -> None:
    """Files of GPT-NeoX call the head ``embed_out``, whatever transformers calls it."""
    path = copy_of("gpt_neox")
    rewrite(path, lambda tensors: tensors.__delitem__(missing))
    with pytest.raises(SparselineError, match=f"has no tensor {missing}"):
        open_checkpoint(path)


def test_quantised_checkpoints_are_refused(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("llama")
    config = json.loads((path / "config.json").read_text())
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    with pytest.raises(SparselineError, match="already quantised; give the original checkpoint"):
        open_checkpoint(path)


def test_integer_tensors_are_refused(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(path, lambda tensors: tensors.__setitem__(name, tensors[name].to(torch.int8)))
    with pytest.raises(SparselineError, match="holds tensors of type I8"):
        open_checkpoint(path)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(("family", "kernel"), [("llama", "sdpa"), ("bloom", "eager")])
def test_the_attention_kernel_is_not_the_config_s(
    copy_of: Callable[[str], Path], family: str, kernel: str, key: str
) -> None:
    """A config written on a machine with flash-attention loads on one without; BLOOM has no sdpa."""
    path = copy_of(family)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: "flash_attention_2"}))
    model = BlockModel(open_checkpoint(path), torch.float32, CPU)
    assert model.base.config._attn_implementation == kernel
    assert load_model(path, "float32", CPU).config._attn_implementation == kernel


@pytest.mark.parametrize("text", [None, "{", "[]", '{"hidden_size": 3}', '{"model_type": "no-such-model"}'])
def test_an_unreadable_config_is_told(copy_of: Callable[[str], Path], text: str | None) -> None:
    path = copy_of("llama")
    if text is None:
        (path / "config.json").unlink()
    else:
        (path / "config.json").write_text(text)
    with pytest.raises(SparselineError, match=r"config\.json"):
        open_checkpoint(path)


def test_locate(model_paths: dict[str, Path], tmp_path: Path) -> None:
    """A hub model is looked for in the cache alone: told with the id and the revision, as is a path
    that is no directory.
    """
    assert locate(model_paths["opt"], None, None) == model_paths["opt"]
    with pytest.raises(SparselineError, match="is not a directory; give the directory"):
        locate(tmp_path / "absent", None, None)
    with pytest.raises(
        SparselineError,
        match=r"model\.id = 'sparseline/no-such-model' \(revision 'abc'\) is not in this machine's hub cache",
    ):
        locate(tmp_path, "sparseline/no-such-model", "abc")
    with pytest.raises(SparselineError, match="is not the name of a model on the hub"):
        locate(tmp_path, "not a valid id!", None)


# Writing


def write_unchanged(source: Checkpoint, directory: Path) -> None:
    writer = ShardWriter(source, directory)
    for block in range(source.architecture.depth):
        writer.write(block, source.block(block))
    writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_checkpoint_equals_its_source(family: str, tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: the source's tensors and its state dict through transformers, bit for bit; peak
    memory is a block, so a shard is one.
    """
    source = open_checkpoint(make_model(tmp_path / "source", family, layers=3, dtype=dtype))
    assert source.dtype == dtype
    write_unchanged(source, tmp_path / "out")
    again, before = all_tensors(tmp_path / "out"), all_tensors(source.path)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) and again[name].dtype == dtype for name in before)
    written, original = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "out", source.path)
    )
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == source.architecture.depth + 1
    assert not list((tmp_path / "out").glob(".*"))


def test_other_files_are_copied_verbatim(tmp_path: Path) -> None:
    """Oracle: the bytes. Config, generation config, tokenizer and chat template; the source's own
    index is replaced.
    """
    source = sharded(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "README.md").write_text("what the source is")  # never to be taken for what comes of it
    write_unchanged(open_checkpoint(source), tmp_path / "out")
    names = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
    }
    assert names <= {path.name for path in source.iterdir()}
    assert not (tmp_path / "out" / "README.md").exists()
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == all_tensors(source).keys()
    for name, file in weight_map.items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("naïve ✓")["input_ids"]) == "naïve ✓"


def test_index_total_is_the_tensors_bytes(model_paths: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: transformers' own meaning of metadata.total_size: bytes of tensors, headers apart."""
    source = open_checkpoint(model_paths["llama"])
    write_unchanged(source, tmp_path / "out")
    total = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(
        tensor.numel() * tensor.element_size() for tensor in all_tensors(source.path).values()
    )


def test_written_bytes_do_not_depend_on_the_source_layout(
    model_paths: dict[str, Path], tmp_path: Path
) -> None:
    """One file or many: the same tensors give the same shards."""
    one = open_checkpoint(model_paths["llama"])
    many_path = tmp_path / "many"
    AutoModelForCausalLM.from_pretrained(one.path).save_pretrained(many_path, max_shard_size="20KB")
    many = open_checkpoint(many_path)
    assert len(set(many.files.values())) > 3
    write_unchanged(one, tmp_path / "a")
    write_unchanged(many, tmp_path / "b")
    for shard in sorted((tmp_path / "a").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()


def test_names_without_the_model_prefix_are_read(model_paths: dict[str, Path], tmp_path: Path) -> None:
    """The hub's OPT checkpoints store ``decoder.layers…``: same blocks, and written under the same names."""
    path = Path(shutil.copytree(model_paths["opt"], tmp_path / "bare"))
    bare = {
        name.removeprefix("model."): tensor for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint, prefixed = open_checkpoint(path), open_checkpoint(model_paths["opt"])
    assert checkpoint.prefixes[0] == "decoder.layers.0."
    assert all(torch.equal(tensor, prefixed.block(1)[name]) for name, tensor in checkpoint.block(1).items())
    streams = [
        BlockModel(c, torch.float32, CPU).embed(token_rows(1, 5), 1).hidden[0] for c in (checkpoint, prefixed)
    ]
    assert torch.equal(*streams)
    write_unchanged(checkpoint, tmp_path / "out")
    assert all_tensors(tmp_path / "out").keys() == bare.keys()


def test_a_finished_shard_survives_and_no_partial_file_stays(
    model_paths: dict[str, Path], tmp_path: Path
) -> None:
    """A block that cannot be written leaves the earlier shard's bytes and nothing under a final name."""
    source = open_checkpoint(model_paths["llama"])
    writer = ShardWriter(source, tmp_path / "out")
    writer.write(0, source.block(0))
    before = writer.shard(0).read_bytes()
    with pytest.raises(Exception):  # noqa: B017 - any failure of the serialiser will do
        writer.write(1, {"x": torch.empty(2, device="meta")})
    assert writer.shard(0).read_bytes() == before
    assert not writer.shard(1).exists()


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    """The tests' own tokenizer: END is 0, one token a byte, everything decodes."""
    tokenizer = make_tokenizer(tmp_path)
    text = "def f(x):\n\treturn 'é✓'"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0


def test_threads_call_a_block_with_tensors_of_their_own(model_paths: dict[str, Path]) -> None:
    """Each puts its tensors into the block while another runs it. Oracle: the same calls one after
    another.
    """
    model = BlockModel(open_checkpoint(model_paths["llama"]), torch.float32, torch.device("cpu"))
    hidden = model.embed(token_rows(4, 12), 4).hidden[0]
    block, tensors = model.block(0), dict(model.checkpoint.block(0))

    def call(number: int) -> torch.Tensor:
        with torch.no_grad():
            return model.call(
                block, 0, hidden, {name: tensor * (1 + number % 7 / 10) for name, tensor in tensors.items()}
            )

    expected = [call(number) for number in range(7)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(700)))
    assert all(torch.equal(one, expected[number % 7]) for number, one in enumerate(found))
