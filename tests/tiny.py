"""Tiny random checkpoints and a byte tokenizer: what every test runs on, small enough for seconds,
random enough to be no special case.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline_lib.models.architecture import Layout, Site
from pipeline_lib.models.checkpoint import Checkpoint, open_checkpoint, skeleton
from pipeline_lib.models.discover import discover
from pipeline_lib.models.stream import BlockModel, Take
from pipeline_lib.stats.moments import SiteStatistics
from pipeline_lib.stats.settings import CalibrateParams
from pipeline_lib.stats.walk import walk

VOCABULARY = 320
# what every test runs on; ALL_FAMILIES: what the table must be right for
FAMILIES = ("llama", "llama-bias", "opt", "opt-post")
END = "<|endoftext|>"


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "dropout": 0.0,
    "pad_token_id": 1,
}
_NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "rotary_pct": 0.5}
_GPT2 = {"n_embd": 32, "n_inner": 48, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}
# Name -> model type and what differs from its defaults; rows of 12 tokens are longer than the
# sliding windows.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA | {"attention_bias": False, "mlp_bias": False}),
    "llama-bias": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "opt": ("opt", _OPT),
    "opt-post": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 5}),
    "qwen2": ("qwen2", _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 12, "attention_bias": True}),
    "gemma": ("gemma", _LLAMA | {"head_dim": 12, "tie_word_embeddings": True}),
    "phi3": ("phi3", _LLAMA | {"partial_rotary_factor": 0.5, "pad_token_id": None}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-serial": (
        "gpt_neox",
        _NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu"},
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-relu": ("gpt2", _GPT2 | {"activation_function": "relu"}),
    "granite": ("granite", _LLAMA | _MULTIPLIERS),
    "starcoder2": ("starcoder2", _LLAMA | {"sliding_window": 5}),
    "starcoder2-relu": (
        "starcoder2",
        _LLAMA | {"use_bias": False, "hidden_act": "relu", "tie_word_embeddings": True},
    ),
}
ALL_FAMILIES = tuple(_CONFIGS)


def make_config(family: str, layers: int = 2, **overrides: Any) -> PreTrainedConfig:
    """A tiny config of one of ``ALL_FAMILIES``; ``opt-post`` is OPT-350M's kind (post-norm, projections)."""
    model_type, values = _CONFIGS[family]
    common = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **{**common, **values, **overrides})


def discovered(config: PreTrainedConfig) -> Layout:
    """The first block's layout, in the names of its modules."""
    return discover(skeleton(config, torch.float32).eval()).layouts[0]


def noting(into: dict[str, torch.Tensor]) -> Take:
    """For ``tapped``: keep each site's inputs [tokens, d]."""

    def take(site: Site, x: torch.Tensor, _weights: torch.Tensor | None) -> None:
        into[site.name] = x.reshape(-1, x.shape[-1])

    return take


def module_of(site: Site) -> str:
    """The module that gets a site's inputs."""
    return site.parameter.rpartition(".")[0]


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random: norm weights in [0.5, 1.5], biases far from 0, matrices of unit gain,
    so that no factor could hide.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 2:
                gain = (
                    1.0
                    if any(part in name for part in ("embed", "wte", "wpe"))
                    else parameter.shape[1] ** -0.5
                )
                parameter.copy_(noise * gain)
            elif name.endswith("weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=random) + 0.5)
            else:
                parameter.copy_(0.3 * noise)


def make_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: END is 0, the 256 bytes follow; saved into ``directory``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{byte: number for number, byte in enumerate(alphabet, 1)}}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(END, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(directory)
    return tokenizer


def make_model(
    directory: Path,
    family: str,
    layers: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """A random checkpoint of ``family`` saved into ``directory`` (returned), its tokenizer beside it."""
    model = AutoModelForCausalLM.from_config(make_config(family, layers, **overrides))
    randomise(model, seed)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    if tokenizer:
        make_tokenizer(directory)
    return directory


def load_full(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model as transformers loads it: the oracle of everything that runs block by block."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval().requires_grad_(False)


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint, by its stored name."""
    checkpoint = open_checkpoint(path)
    return dict(checkpoint.read(list(checkpoint.files)))


def load_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, block: int, tensors: dict[str, torch.Tensor]
) -> None:
    """Put one block's tensors (named relative to the block) into a whole model, in the model's dtype."""
    module = model.base_model.get_submodule(f"{checkpoint.architecture.blocks}.{block}")
    module.load_state_dict({name: tensor.to(model.dtype) for name, tensor in tensors.items()})


def token_rows(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def block_statistics(
    checkpoint: Checkpoint, fit: int = 16, held_out: int = 8
) -> list[dict[str, SiteStatistics]]:
    """Per block, the statistics of so many random rows of 12 tokens in the dense stream, with
    fitting and held-out Grams.
    """
    model = BlockModel(checkpoint, torch.float32, torch.device("cpu"))
    params = CalibrateParams(batch_rows=8, median_tokens=1000)
    rows = token_rows(fit, 12, seed=1), token_rows(held_out, 12, seed=2)
    return [sites for _, sites in walk(model, *rows, params, grams=True)]


def random_factors(sizes: dict[str, int], seed: int, decades: float = 3.0) -> dict[str, torch.Tensor]:
    """Positive factors in float64, log-uniform over so many orders of magnitude around 1."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: 10 ** (decades * (torch.rand(size, generator=random, dtype=torch.float64) - 0.5))
        for name, size in sorted(sizes.items())
    }


def power_of_two_factors(sizes: dict[str, int], seed: int, largest: int = 6) -> dict[str, torch.Tensor]:
    """2^k with k uniform in −largest … largest: the factors that fold without any rounding."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: 2.0 ** torch.randint(-largest, largest + 1, (size,), generator=random)
        for name, size in sorted(sizes.items())
    }


def curved_gram(
    size: int, seed: int, tokens: int = 200, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations X [tokens, d] of unequal channel sizes, and their second moment G [d,
    d] (float32).
    """
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=random) / size**0.5 + torch.eye(size)
    x = (torch.randn(tokens, size, generator=random) @ mix) * (
        spread * torch.randn(size, generator=random)
    ).exp() + 0.3
    return x, x.T @ x / tokens
