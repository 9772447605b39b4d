"""``gguf``: one file with weights, tokenizer and metadata, for llama.cpp and tools that use it;
transformers reads it, too.

Nothing is rounded twice: quantised weights keep their codes if a GGUF block type matches their
grid. Before the file gets its name, transformers' own reader reads it, and each tensor is compared
with the checkpoint.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline_lib.core.artifacts import replacing
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import blocks
from pipeline_lib.export.blocks import Kind
from pipeline_lib.export.groups import Groups, Quantisation
from pipeline_lib.export.shards import one_by_one
from pipeline_lib.export.vocabulary import Vocabulary, vocabulary
from pipeline_lib.models.checkpoint import Checkpoint, skeleton
from pipeline_lib.models.conversion import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "model.gguf"
# architectures whose head transformers ties to the embeddings whatever the file holds
TIED = ("bloom", "falcon")
# The file has one tensor for all experts of a block, named by the parameter of transformers; gate
# and up are the halves of one parameter.
EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps")
WIDE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # routers, in float32 as llama.cpp has them
FLAT = "ffn_gate_inp_shexp.weight"  # one row, which is a vector in the file
# llama.cpp's numbers
FILE_TYPES: dict[Kind, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
HALVES: dict[torch.dtype, Kind] = {torch.bfloat16: "BF16"}  # all others: F16
FLOATS = ("epsilon", "freq_base")  # keys of metadata that are float32
SLACK = 2.0**-22  # tolerance for norms that are stored as w + 1
# endings of config keys on which no logit depends; transformers may read other values back
NEUTRAL: tuple[str, ...] = (
    "_token_id",
    "dropout",
    "pdrop",
    "_dropout_prob",
    "initializer_range",
    "use_cache",
    "pretraining_tp",
)
NEUTRAL += (
    "model_type",
    "dtype",
    "architectures",
    "_name_or_path",
    "transformers_version",
    "max_window_layers",
    "router_aux_loss_coef",
    "output_router_logits",
)


def _unmoved(_config: "PreTrainedConfig", _name: str, _rows: int) -> torch.Tensor | None:
    return None


def _rotated(config: "PreTrainedConfig", name: str, rows: int) -> torch.Tensor | None:
    """The rows of Q and K in llama.cpp's order. llama.cpp rotates neighbouring rows, transformers
    the halves of a head.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = next((heads[part] for part in name.split(".") if part in heads), None)
    return None if count is None else torch.arange(rows).reshape(count, 2, -1).transpose(1, 2).flatten()


def _unmixed(config: "PreTrainedConfig", name: str, rows: int) -> torch.Tensor | None:
    """The rows of Q, K and V in llama.cpp's order, one matrix after the other. BLOOM stores them
    head by head.
    """
    return (
        torch.arange(rows).reshape(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()
        if ".attn_qkv." in name
        else None
    )


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores the models of an architecture."""

    name: str  # general.architecture
    # order of a tensor's rows
    order: Callable[["PreTrainedConfig", str, int], torch.Tensor | None] = _unmoved
    shifted: bool = False  # norms are stored as w + 1
    transposed: tuple[str, ...] = ()  # matrices that transformers stores [C, R]
    reads: str | None = None  # transformers' name of the architecture, if it differs
    model_type: str | None = None  # of the config that transformers reads, if it differs from that name
    # metadata for llama.cpp alone, by attributes of the config
    also: Mapping[str, str] = field(default_factory=dict)
    inferred: tuple[str, ...] = ()  # attributes that transformers infers from the tensors


EXPERT_LENGTH = {"expert_feed_forward_length": "moe_intermediate_size"}
FAMILIES = {
    "llama": Family("llama", _rotated),
    "mistral": Family("llama", _rotated),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "starcoder2": Family("starcoder2"),
    "gemma2": Family("gemma2", shifted=True),
    "gemma3_text": Family("gemma3", shifted=True, model_type="gemma3_text"),
    "gpt2": Family(
        "gpt2", transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    ),
    "bloom": Family("bloom", _unmixed),
    "falcon": Family("falcon", also={"attention.layer_norm_epsilon": "layer_norm_epsilon"}),
    "stablelm": Family(
        "stablelm",
        also={"use_parallel_residual": "use_parallel_residual"},
        inferred=("use_qkv_bias", "use_parallel_residual"),
    ),
    "nemotron": Family("nemotron", shifted=True, also={"attention.layer_norm_epsilon": "norm_eps"}),
    "qwen2_moe": Family(
        "qwen2moe",
        reads="qwen2_moe",
        also=EXPERT_LENGTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3_moe": Family("qwen3moe", reads="qwen3_moe", also=EXPERT_LENGTH),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file."""

    stored: tuple[str, ...]  # in the checkpoint: one, or one for each expert
    name: str  # in the file
    kind: Kind
    shape: tuple[int, ...]  # in the file, outputs first; experts before them


@dataclass(frozen=True)
class Scheme:
    """The content of a variant's file."""

    family: Family
    metadata: Mapping[str, Any]  # of the architecture, without its name as a prefix
    read: "PreTrainedConfig"  # the config that transformers reads from it
    vocabulary: Vocabulary
    tensors: tuple[Tensor, ...]

    def bytes(self, stored: Iterable[str]) -> int:
        """Size of the checkpoint's tensors in the file."""
        sizes = {
            name: torch.Size(blocks.size(one.shape, one.kind)).numel() // len(one.stored)
            for one in self.tensors
            for name in one.stored
        }
        return sum(sizes[name] for name in stored)

    @property
    def main(self) -> Kind:
        """The type of most weights in blocks; without blocks, of most weights."""
        counted: Counter[Kind] = Counter()
        for one in self.tensors:
            counted[one.kind] += torch.Size(one.shape).numel()
        quantised = {kind: count for kind, count in counted.items() if blocks.BYTES[kind][0] > 1}
        return Counter(quantised or counted).most_common(1)[0][0]


def scheme(pruned: Checkpoint, quantisation: Quantisation, variant: str) -> Scheme:
    """The content of the file for a variant.

    Raises:
        SparselineError: transformers could not read the model back, GGUF cannot express it, or its
            package is not installed.
    """

    def refusal(reason: str) -> SparselineError:
        return SparselineError(
            f"{variant} cannot be written as gguf: {reason}; remove it from variants.{variant}.export."
        )

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise refusal("its package is not installed (pip install gguf)") from error
    config = pruned.config
    if (family := FAMILIES.get(config.model_type)) is None:
        raise refusal(f"{config.model_type} is not a supported architecture ({', '.join(FAMILIES)})")
    try:
        words = vocabulary(pruned.path, pruned.vocabulary)
    except ValueError as error:
        raise refusal(str(error)) from error
    metadata, read = _described(family, config)
    if lost := _lost(config.to_dict(), read.to_dict()):
        raise refusal(f"GGUF's metadata does not carry {lost}")
    try:
        names = _names(pruned, _reading(family, read)[0])
    except Exception as error:  # transformers checks little, so this may be any error
        raise refusal(
            f"transformers cannot build a model from its metadata ({' '.join(str(error).split())})"
        ) from error
    if family.name in TIED and not config.tie_word_embeddings:
        raise refusal(
            f"transformers would tie its head to its embeddings, as it does for every {family.name} model"
        )
    if homeless := sorted(pruned.files.keys() - {stored for own in names.values() for stored in own}):
        raise refusal(f"GGUF has no name for {homeless[0]}")
    tensors = []
    for name, own in names.items():
        shape = pruned.shapes[own[0]]
        shape = (
            shape[::-1] if name.endswith(family.transposed) else shape[1:] if name.endswith(FLAT) else shape
        )
        found = [quantisation.of(stored) for stored in own]
        kind = _common([blocks.fitting(groups, shape[-1]) for groups in found if groups is not None])
        if None in found or kind is None:
            if any(groups is not None for groups in found) and pruned.dtype.itemsize > 2:
                raise refusal(
                    f"no block of GGUF holds the grid of {own[0]}, and F16 would round it again (set"
                    " quantization.scales to gguf)"
                )
            wide = len(shape) < 2 or name.endswith(WIDE)
            kind = "F32" if wide else HALVES.get(pruned.dtype, "F16")
        tensors.append(Tensor(own, name, kind, (len(own), *shape) if EXPERTS.match(name) else shape))
    return Scheme(family, metadata, read, words, tuple(tensors))


def _common(kinds: Sequence[Kind | None]) -> Kind | None:
    """The kind that holds everything that these kinds hold, or None. Q8_0 holds what is in Q4_1."""
    found = set(kinds)
    if len(found) < 2:
        return next(iter(found), None)
    return None if None in found else "Q8_0"


def _described(family: Family, config: "PreTrainedConfig") -> tuple[dict[str, Any], "PreTrainedConfig"]:
    """The metadata of an architecture by transformers' table, and the config that transformers
    reads from them.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    rotation = getattr(config, "rope_parameters", None) or {}
    rotation = rotation.get("full_attention", rotation)  # Gemma 3 has two
    known = {"rope_theta": rotation.get("rope_theta"), "n_ctx": getattr(config, "n_positions", None)}
    known["num_key_value_heads"] = 1 if getattr(config, "multi_query", False) else None
    known["feed_forward_length"] = getattr(config, "n_inner", None) or 4 * config.hidden_size  # GPT-2
    metadata: dict[str, Any] = {}
    reads = family.reads or family.name
    values: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(reads, {}))
    values |= {attribute: getattr(config, attribute) for attribute in family.inferred}
    for key, attribute in GGUF_CONFIG_MAPPING[reads].items():
        value = None if attribute is None else getattr(config, attribute, None)
        value = known.get(attribute) if value is None else value
        if value is not None:
            metadata[key] = value = float(np.float32(value)) if key.endswith(FLOATS) else value
            values[attribute] = value
    # Further keys that llama.cpp needs; transformers ignores them.
    metadata.setdefault(
        "context_length",
        getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", 2048),
    )
    metadata.setdefault(
        "feed_forward_length", getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    )
    metadata |= {key: getattr(config, attribute) for key, attribute in family.also.items()}
    size = getattr(config, "head_dim", None)
    if size:
        metadata |= {"attention.key_length": size, "attention.value_length": size}
    if (share := rotation.get("partial_rotary_factor")) is not None:
        width = size or config.hidden_size // config.num_attention_heads
        metadata["rope.dimension_count"] = int(share * width)
    if known["rope_theta"] is not None:
        metadata.setdefault("rope.freq_base", float(known["rope_theta"]))
    values.setdefault("vocab_size", config.vocab_size)
    return metadata, AutoConfig.for_model(
        family.model_type or reads, **values, tie_word_embeddings=bool(config.tie_word_embeddings)
    )


def _lost(config: Mapping[str, Any], read: Mapping[str, Any]) -> str | None:
    """The first key of a config whose value is not read back, with both values."""
    for key, value in sorted(config.items()):
        if not key.endswith(NEUTRAL) and not _same(value, read.get(key)):
            return f"{key} = {value!r} of its config.json (it would be read as {read.get(key)!r})"
    return None


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, float) and isinstance(other, int | float):
        return abs(value - other) <= 1e-6 * abs(value)  # metadata are float32
    return bool(value == other)


def _reading(family: Family, read: "PreTrainedConfig") -> tuple[dict[str, str], Any]:
    """transformers' map from names in the file to its own names, and its processor for the file's
    tensors.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(family.name, TensorProcessor)(config=read.to_dict())
    return get_gguf_hf_weights_map(skeleton(read, torch.float32), processor), processor


def _names(pruned: Checkpoint, file_names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Name in the file -> tensors of the checkpoint; a head that is tied to the embedding is not
    written.
    """
    found: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for name, full in sorted(file_names.items(), key=lambda pair: (pair[0] == "output.weight", pair[0])):
        pieces = pruned.pieces.get(full, ())
        if part := EXPERTS.fullmatch(name.removesuffix(".weight")):
            own = _experts(pruned, pieces, part[1])
            name = f"{part[0]}.weight"
        else:
            own = tuple(piece.stored for piece in pieces if piece.whole)
        if own and not seen & {*own}:
            found[name] = own
            seen |= {*own}
    return found


def _experts(pruned: Checkpoint, pieces: Sequence[Piece], part: str) -> tuple[str, ...]:
    """The tensors, one per expert, of ``gate`` or ``up`` (the halves of one parameter) or ``down``.
    Empty if the checkpoint has no separate tensors for these.
    """
    found = []
    for piece in pieces:
        if piece.expert is None or piece.rows is None or piece.from_rows is None:
            return ()
        if part == "down" or (part == "gate") == (piece.rows.start == 0):
            if piece.from_expert is not None or len(piece.from_rows) < pruned.shapes[piece.stored][0]:
                return ()
            found.append(piece.stored)
    return tuple(found)


def write(out: Path, pruned: Checkpoint, quantisation: Quantisation, chosen: Scheme, title: str) -> None:
    """Write a directory with one file, which is read back and compared before it gets its name. One
    tensor is in memory at a time.

    Args:
        chosen: the result of ``scheme``.
        title: general.name.

    Raises:
        SparselineError: a weight exceeds the range of float16.
    """
    with replacing(out) as directory:
        directory.mkdir()
        _write(directory / FILE, pruned, quantisation, chosen, title)
        _check(directory / FILE, pruned, chosen)


def _write(path: Path, pruned: Checkpoint, quantisation: Quantisation, chosen: Scheme, title: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, chosen.family.name)
    writer.add_type("model")
    writer.add_name(f"Sparseline {title}")  # transformers looks for a family's name in it
    writer.add_file_type(FILE_TYPES[chosen.main])
    writer.add_quantization_version(2)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in chosen.metadata.items():
        kinds[type(value)](f"{chosen.family.name}.{key}", value)
    chosen.vocabulary.add_to(writer)
    for one in chosen.tensors:
        shape = blocks.size(one.shape, one.kind)
        count = torch.Size(shape).numel()
        writer.add_tensor_info(
            one.name, shape, np.dtype(np.uint8), count, raw_dtype=GGMLQuantizationType[one.kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for one in chosen.tensors:
            parts = [
                _bytes(one, part, quantisation.of(part[0]), chosen.family, pruned.config)
                for part in one_by_one(pruned, list(one.stored))
            ]
            writer.write_tensor_data(torch.cat(parts).numpy())
    finally:
        writer.close()


def _bytes(
    one: Tensor,
    part: tuple[str, torch.Tensor],
    groups: Groups | None,
    family: Family,
    config: "PreTrainedConfig",
) -> torch.Tensor:
    """The bytes (uint8) of a tensor in the file, from its name and value in the checkpoint."""
    stored, tensor = part
    if groups is not None and blocks.BYTES[one.kind][0] > 1:
        found = blocks.pack(groups.codes(tensor), groups, one.kind)
    else:
        if one.name.endswith(family.transposed):
            tensor = tensor.T
        if family.shifted and one.name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        try:
            found = blocks.plain(tensor, one.kind)
        except ValueError as error:
            raise SparselineError(
                f"{stored}: {error}; convert the model to bfloat16, or export another format."
            ) from error
    order = family.order(config, one.name, one.shape[0])
    if order is not None:
        found = (found.reshape(one.shape[0], -1)[order]).reshape(found.shape)
    return found.flatten()


def _check(path: Path, pruned: Checkpoint, chosen: Scheme) -> None:
    """Check that transformers reads back what the checkpoint holds: the config, and every tensor in
    its dtype or in the file's 16-bit dtype.

    Norms that are stored as w + 1 agree within ``SLACK``.
    """
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if lost := _lost(chosen.read.to_dict(), read.to_dict()):
        raise RuntimeError(f"transformers reads another config: {lost}")
    names, processor = _reading(chosen.family, read)
    found = {one.name: one for one in GGUFReader(path).tensors}
    for one in chosen.tensors:
        data = found[one.name]
        taken: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        given = {"name": one.name, "tensor_key_mapping": names, "parsed_parameters": taken}
        result = processor.process(weights=dequantize(data.data, data.tensor_type), **given)
        tensor = (
            next(iter(taken["tensors"].values()), None)
            if result.name is None
            else torch.from_numpy(np.array(result.weights))
        )
        if tensor is not None and (part := EXPERTS.match(one.name)) and part[1] != "down":
            tensor = tensor.chunk(2, 1)[part[1] == "up"]  # the other half is another tensor of the file
        for number, (stored, original) in enumerate(one_by_one(pruned, list(one.stored))):
            expected = original.to(blocks.DTYPES.get(one.kind, original.dtype))
            slack = SLACK if chosen.family.shifted and original.ndim < 2 else 0
            own = tensor if tensor is None or not EXPERTS.match(one.name) else tensor[number]
            if own is None or not torch.allclose(own.to(expected.dtype), expected, rtol=0, atol=slack):
                raise RuntimeError(f"{one.name} cannot be read back as {stored}")
