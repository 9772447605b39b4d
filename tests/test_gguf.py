"""The GGUF export. Oracles: transformers' loading of the file, the gguf package's own reader and
dequantisation, and the tokenizer itself.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT
from pruned import Rounding, card, make_pruned
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, all_tensors, load_full, make_tokenizer, randomise, token_rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from pipeline_lib.core.artifacts import block_file, read_tensors, write_tensors
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import blocks, gguf
from pipeline_lib.export.export import Variant, export
from pipeline_lib.export.groups import Groups
from pipeline_lib.export.vocabulary import vocabulary
from pipeline_lib.models.checkpoint import open_checkpoint
from pipeline_lib.solve.grid import Grid, scheme
from pipeline_lib.solve.settings import QuantizationParams

package = pytest.importorskip("gguf")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# transformers knows only these widths of experts: the file does not carry them
EXPERTS = SIZES | {"num_experts": 4, "num_experts_per_tok": 2}
GEMMA = SIZES | {"head_dim": 16, "tie_word_embeddings": True}
# Name -> model type and what differs from its defaults.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama-tied": ("llama", SIZES | {"tie_word_embeddings": True, "head_dim": 24}),
    "mistral": ("mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES | {"head_dim": 128}),
    "phi3": ("phi3", SIZES | {"vocab_size": 32064}),
    "starcoder2": ("starcoder2", SIZES | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4}),
    "bloom": ("bloom", {"hidden_size": 64, "n_head": 4}),
    "falcon": ("falcon", {"hidden_size": 64, "num_attention_heads": 4}),
    "stablelm": ("stablelm", SIZES),
    "stablelm-parallel": ("stablelm", SIZES | {"use_qkv_bias": True, "use_parallel_residual": True}),
    "nemotron": ("nemotron", SIZES),
    "qwen2_moe": (
        "qwen2_moe",
        EXPERTS | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        EXPERTS | {"head_dim": 16, "moe_intermediate_size": 768, "norm_topk_prob": True},
    ),
    "opt": ("opt", {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64}),
}
WRITTEN = [name for name in CONFIGS if name != "opt"]


def make(directory: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random checkpoint of two blocks with a byte tokenizer."""
    model_type, values = CONFIGS[family]
    common = {"num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    common |= {} if family == "bloom" else {"max_position_embeddings": 1024}
    config = AutoConfig.for_model(model_type, **{**common, **values, **changes})
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 0)
    model.to(dtype).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def exported(
    directory: Path, source: Path, rounding: Rounding | None = None, name: str = "export"
) -> tuple[Path, dict[str, Any]]:
    """The directory of the GGUF file, and what build/sizes would hold."""
    opened = open_checkpoint(source)
    if not (directory / "prune").exists():
        make_pruned(directory / "prune", opened, rounding=rounding)
    found = export(
        opened, Variant("mine", "unstructured", directory / "prune"), directory / name, ["gguf"], card
    )
    return directory / name / "gguf", found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_rows(2, 12)).logits


def kinds(folder: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in package.GGUFReader(folder / gguf.FILE).tensors}


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transformers_reads_the_pruned_checkpoint_back(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Logits and parameters. Oracle: the checkpoint, loaded as it is."""
    folder, _ = exported(tmp_path, make(tmp_path / "source", family, dtype))
    oracle = load_full(tmp_path / "prune" / "checkpoint", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE, dtype=dtype).eval()
    assert set(kinds(folder).values()) == {"BF16" if dtype == torch.bfloat16 else "F16", "F32"}
    shifted = "gemma" in family or family == "nemotron"  # norms are stored as w + 1
    own = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(
            own[name], parameter, rtol=0, atol=2.0**-22 if shifted and parameter.ndim < 2 else 0
        )
    if not shifted:
        for parameter in model.parameters():  # how a weight lies in memory decides the order of sums
            parameter.data = parameter.data.contiguous()
        assert torch.equal(logits(model), logits(oracle))


def test_float32_is_rounded_once_to_float16(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, make(tmp_path / "source", "llama", torch.float32))
    oracle = load_full(tmp_path / "prune" / "checkpoint")
    for parameter in oracle.parameters():
        parameter.copy_(parameter.half() if parameter.ndim > 1 else parameter)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE).eval()), logits(oracle)
    )


GRIDS = {
    "Q4_0": Rounding(4, 32, True, "gguf"),
    "Q4_1": Rounding(4, 32, False, "gguf"),
    "Q8_0": Rounding(8, 32, True, "gguf"),
}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bloom", "falcon", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("kind", list(GRIDS))
def test_quantised_weights_are_not_rounded_again(tmp_path: Path, family: str, kind: str) -> None:
    """Read in the checkpoint's dtype the file gives its very logits, and zeros are zeros in
    float32. Oracle: the checkpoint.
    """
    folder, found = exported(tmp_path, make(tmp_path / "source", family), GRIDS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(model), logits(load_full(tmp_path / "prune" / "checkpoint", torch.bfloat16)))
    assert {
        found
        for name, found in kinds(folder).items()
        if name.startswith("blk.") and not any(part in name for part in ("norm", "bias", "gate_inp"))
    } == {kind}
    assert found["formats"]["gguf"]["bits"] == {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5}[kind]
    wide = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE, dtype=torch.float32)
    zeros = {name: parameter == 0 for name, parameter in wide.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(zeros[name], parameter == 0)
    assert sum(int(one.sum()) for one in zeros.values()) >= found["weights"] / 2


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([32, 64, 96]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    columns=st.sampled_from([32, 96, 160]),
    spread=st.sampled_from([1e-7, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_blocks_hold_the_grid(
    bits: int, group: int, symmetric: bool, dtype: torch.dtype, columns: int, spread: float, seed: int
) -> None:
    """Every weight is scale·(q − zero point) in float32, exactly. Oracle: the gguf package's
    dequantisation.
    """
    if bits == 8 and not symmetric:
        return  # refused: test_bad_input.py
    how = scheme(
        QuantizationParams(bits=bits, group=group, symmetric=symmetric, scales="gguf", refit=[]), dtype
    )
    assert how is not None
    random = torch.Generator().manual_seed(seed)
    weight = (
        spread * torch.randn(5, columns, generator=random) * (torch.rand(5, columns, generator=random) > 0.5)
    )
    weight = weight.abs() if seed % 2 else weight
    grid = Grid(weight.shape, how, torch.device("cpu"))
    rounded = grid.nearest(weight)
    scale = grid.scale.to(dtype)
    assert torch.equal(scale.float(), grid.scale)  # exact in the checkpoint too
    groups = Groups(
        bits, grid.width, scale, None if symmetric else grid.zero.to(torch.uint8), transposed=False
    )
    kind = blocks.fitting(groups, columns)
    assert kind == ("Q8_0" if bits > 4 else "Q4_0" if symmetric else "Q4_1")
    data = blocks.pack(groups.codes(rounded.to(dtype)), groups, kind)
    assert data.shape == blocks.size((5, columns), kind)
    back = torch.from_numpy(package.dequantize(data.numpy(), package.GGMLQuantizationType[kind]).copy())
    assert torch.equal(back, rounded)
    assert not back[weight == 0].any()


@pytest.mark.parametrize(
    ("groups", "columns"),
    [
        (Groups(4, 32, torch.ones(1, 2), None, False), 40),  # columns that no blocks divide
        (Groups(4, 24, torch.ones(1, 4), None, False), 96),  # a block would have two scales
        (Groups(4, 32, torch.full((1, 1), 1 + 2.0**-12), None, False), 32),  # no float16
        (Groups(8, 32, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), False), 32),  # −255 … 255
    ],
    ids=["columns", "group", "scale", "range"],
)
def test_other_grids_have_no_block(groups: Groups, columns: int) -> None:
    assert blocks.fitting(groups, columns) is None


def test_zero_points_that_no_half_holds_are_kept_in_eight_bits() -> None:
    """3 · 1.0009765625 has twelve significant bits: Q4_1 would round its least weight, and zeros
    would be no zeros.
    """
    groups = Groups(4, 32, torch.full((1, 1), 1 + 2.0**-10), torch.full((1, 1), 3, dtype=torch.uint8), False)
    assert blocks.fitting(groups, 32) == "Q8_0"


def test_a_grid_without_blocks_is_stored_in_sixteen_bits(tmp_path: Path) -> None:
    folder, found = exported(tmp_path, make(tmp_path / "source", "llama"), Rounding(4, 24))
    assert found["formats"]["gguf"]["bits"] == 16 and "BF16" in kinds(folder).values()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(model), logits(load_full(tmp_path / "prune" / "checkpoint", torch.bfloat16)))


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama")
    first, second = (exported(tmp_path, source, GRIDS["Q4_0"], name)[0] for name in ("a", "b"))
    assert (first / gguf.FILE).read_bytes() == (second / gguf.FILE).read_bytes()


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    """Oracle: the package's reader."""
    folder, found = exported(tmp_path, make(tmp_path / "source", "llama"), GRIDS["Q4_1"])
    read = package.GGUFReader(folder / gguf.FILE)
    matrices = [one for one in read.tensors if one.name.startswith("blk.") and len(one.shape) > 1]
    assert found["formats"]["gguf"]["matrix_bytes"] == sum(int(one.n_bytes) for one in matrices)
    assert found["formats"]["gguf"]["file_bytes"] == (folder / gguf.FILE).stat().st_size


def test_experts_are_one_tensor(tmp_path: Path) -> None:
    """In the order of their numbers. Oracle: the checkpoint's tensors, and the reader's
    dequantisation.
    """
    folder, _ = exported(tmp_path, make(tmp_path / "source", "qwen2_moe"), GRIDS["Q8_0"])
    tensors = all_tensors(tmp_path / "prune" / "checkpoint")
    read = {one.name: one for one in package.GGUFReader(folder / gguf.FILE).tensors}
    for part in ("gate", "up", "down"):
        one = read[f"blk.1.ffn_{part}_exps.weight"]
        found = torch.from_numpy(package.dequantize(one.data, one.tensor_type).copy())
        stored = [tensors[f"model.layers.1.mlp.experts.{number}.{part}_proj.weight"] for number in range(4)]
        assert torch.equal(found.bfloat16(), torch.stack(stored))
    assert read["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"  # the router
    assert read["blk.1.ffn_gate_inp_shexp.weight"].shape.tolist() == [64]


def test_grids_that_differ_between_experts_have_a_block(tmp_path: Path) -> None:
    """One expert's zero points fit Q4_1, another's do not: eight bits hold both. Oracle: the logits."""
    source = make(tmp_path / "source", "qwen3_moe")
    folder, _ = exported(tmp_path, source, Rounding(4, 32, False, "gguf"))
    name = "blk.0.ffn_down_exps.weight"
    assert kinds(folder)[name] == "Q4_1"
    label, stored = "mlp.experts.3.down_proj", "model.layers.0.mlp.experts.3.down_proj.weight"
    path = block_file(tmp_path / "prune" / "quantization", 0)
    groups, facts = read_tensors(path)
    # 255/128 has eight significant bits, and 15 times as much twelve, of which float16 holds eleven
    scale, zero = torch.full_like(groups[f"{label}.scale"], 255 / 128), 15
    groups[f"{label}.scale"] = scale
    groups[f"{label}.zero_point"] = torch.full_like(groups[f"{label}.zero_point"], zero)
    write_tensors(path, groups, facts)
    index = json.loads((tmp_path / "prune/checkpoint/model.safetensors.index.json").read_text())
    shard = tmp_path / "prune/checkpoint" / index["weight_map"][stored]
    tensors = load_file(shard)
    steps = torch.randint(0, 16, tensors[stored].shape, generator=torch.Generator().manual_seed(0)) - zero
    kept = tensors[stored] != 0
    tensors[stored] = (scale.repeat_interleave(32, 1) * steps * kept).bfloat16()
    save_file(tensors, shard, {"format": "pt"})
    folder, _ = exported(tmp_path, source, name="again")
    assert kinds(folder)[name] == "Q8_0"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.FILE, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(model), logits(load_full(tmp_path / "prune" / "checkpoint", torch.bfloat16)))


# Metadata


def field(read: Any, name: str) -> Any:
    return read.fields[name].contents()


def test_what_llama_cpp_asks_for_is_there(tmp_path: Path) -> None:
    """Keys by the names of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    folder, _ = exported(tmp_path, make(tmp_path / "source", "llama-tied"), GRIDS["Q4_0"])
    read = package.GGUFReader(folder / gguf.FILE)
    expected = {
        "general.architecture": "llama",
        "general.name": "Sparseline mine",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.context_length": 1024,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: field(read, key) for key in expected} == expected
    assert field(read, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert "output.weight" not in kinds(folder)
    tokens, types = field(read, "tokenizer.ggml.tokens"), field(read, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == VOCABULARY
    assert (tokens[0], types[0], types[1], tokens[-1], types[-1]) == (
        "<|endoftext|>",
        3,
        1,
        f"[PAD{VOCABULARY - 1}]",
        5,
    )


# Tokenizers

TEXT = "def f(x: int = 12345) -> str:\n    return 'ä €'  # it's\n<|endoftext|>x"


def test_the_embedded_tokenizer_comes_back(tmp_path: Path) -> None:
    """Ids of a text, the special token in it included, and the chat template."""
    source = make(tmp_path / "source", "llama", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((ROOT / "data" / "tiny-llama" / name).read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    folder, _ = exported(tmp_path, source)
    found, own = (
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf.FILE),
        AutoTokenizer.from_pretrained(source),
    )
    assert found(TEXT).input_ids == own(TEXT).input_ids
    assert found.chat_template == "{{ messages[0]['content'] }}"


def sentencepiece(directory: Path) -> Path:
    """A SentencePiece BPE model of 400 tokens with byte fallback, as Llama 2 has."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    directory.mkdir()
    (directory / "text").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    how = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    trainer.train(input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), **how)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def test_sentencepiece_comes_back(tmp_path: Path) -> None:
    """Oracle: the ids that transformers gives for tokenizer.model."""
    words = sentencepiece(tmp_path / "words")
    source = make(tmp_path / "source", "llama", vocab_size=416)
    for path in source.glob("tokenizer*"):
        path.unlink()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (source / name).write_bytes((words / name).read_bytes())
    folder, _ = exported(tmp_path, source)
    read = package.GGUFReader(folder / gguf.FILE)
    assert (
        field(read, "tokenizer.ggml.model") == "llama" and field(read, "tokenizer.ggml.add_bos_token") is True
    )
    assert len(field(read, "tokenizer.ggml.tokens")) == len(field(read, "tokenizer.ggml.scores")) == 416
    own = LlamaTokenizer.from_pretrained(source)
    text = "Zeros in an ordinary checkpoint: 12 € of them."
    assert AutoTokenizer.from_pretrained(folder, gguf_file=gguf.FILE)(text).input_ids == own(text).input_ids


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(
                        pre_tokenizers.Regex(QWEN) if hasattr(pre_tokenizers, "Regex") else QWEN, "isolated"
                    )
                ]
            ),
            None,
        ),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_how_text_is_split_has_a_name_or_is_refused(tmp_path: Path, before: Any, name: str | None) -> None:
    words = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = before
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    if name is None:
        with pytest.raises(ValueError, match=r"llama.cpp has no name for how its tokenizer.json splits text"):
            vocabulary(tmp_path, 256)
    else:
        assert vocabulary(tmp_path, 256).split == name


# Refusals


def broken(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").write_text(json.dumps(raw | changes), encoding="utf-8")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another architecture": (
        "opt",
        {},
        r"opt is not a supported architecture \(llama, .*qwen3_moe\)",
    ),
    "biases": (
        "llama",
        {"attention_bias": True},
        r"GGUF's metadata does not carry attention_bias = True of its config.json \(.*False\)",
    ),
    "stretched rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        r"does not carry rope_parameters = .*'linear'",
    ),
    "a window": ("mistral", {"sliding_window": 5}, "does not carry sliding_window = 5"),
    "a model that transformers cannot make": (
        "phi3",
        {"vocab_size": VOCABULARY, "pad_token_id": None},
        r"transformers cannot build a model from its metadata \(Padding_idx",
    ),
    "width of experts": (
        "qwen3_moe",
        {"moe_intermediate_size": 96},
        r"does not carry moe_intermediate_size = 96 of its config.json \(it would be read as 768\)",
    ),
    "weights of the best experts that are not scaled": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        "does not carry norm_topk_prob = False",
    ),
    "Falcon's later architecture": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        "does not carry new_decoder_architecture = True",
    ),
    "width of heads": ("qwen3", {"head_dim": 16}, "does not carry head_dim = 16"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_would_not_be_read_back_is_refused(tmp_path: Path, name: str) -> None:
    """One sentence with the key to change, before anything is written."""
    family, changes, reason = REFUSED[name]
    with pytest.raises(
        SparselineError,
        match=rf"^mine cannot be written as gguf: .*{reason}.*; remove it from variants.mine.export",
    ):
        exported(tmp_path, make(tmp_path / "source", family, **changes))
    assert not (tmp_path / "export").exists()


def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama")
    broken(source, normalizer=json.loads(normalizers.Lowercase().__getstate__()))
    with pytest.raises(
        SparselineError, match=r"^mine cannot be written as gguf: llama.cpp has no name for .*; remove it"
    ):
        exported(tmp_path, source)


def test_scales_that_would_be_rounded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SparselineError, match=r"no block of GGUF holds the grid of \S+, .*set quantization.scales to gguf"
    ):
        exported(tmp_path, make(tmp_path / "source", "llama", torch.float32), Rounding(4, 32))


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama", torch.float32)
    model = load_full(source)
    model.model.embed_tokens.weight[0, 0] = 1e6
    model.save_pretrained(source)
    with pytest.raises(
        SparselineError, match=r"^model.embed_tokens.weight: weights are beyond the range of F16; convert"
    ):
        exported(tmp_path, source)
    assert not (tmp_path / "export").exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source", "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SparselineError, match=r"its package is not installed \(pip install gguf\)"):
        exported(tmp_path, source)
