"""Checkpoints on disk: read (sharded) safetensors one block at a time, and write a pruned checkpoint
shard by shard.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pipeline_lib.core import files
from pipeline_lib.core.artifacts import replacing, save_tensors, write_json
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models import attention
from pipeline_lib.models.architecture import Architecture, Layout, Matrix
from pipeline_lib.models.conversion import Piece, Pieces, assembled, pieces_of, stored_layout, usual_name
from pipeline_lib.models.dequantize import METHODS, Packed, Parts, packed, without_quantisation
from pipeline_lib.models.discover import discover
from pipeline_lib.models.facts import heads_of, named
from pipeline_lib.models.files import INDEX, Files, find_files, list_files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCKS, POSITIONS = "num_hidden_layers", "max_position_embeddings"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
MOST_POSITIONS = 2**24
BUFFER = "a buffer that transformers computes"
# Buffers that older conversions stored beside the parameters, and their numbers of dimensions: causal
# masks, their fill value, rotary tables
BUFFERS = {r"(attn|attention)\.bias": 4, r"(attn|attention)\.masked_bias": 0, r"rotary_emb\.inv_freq": 1}


def locate(path: Path, hub_id: str | None, revision: str | None) -> Path:
    """The local directory of a model: ``path`` itself, or the snapshot of ``hub_id`` that prepare
    fetched. The network is not used.

    Raises:
        SparselineError: the directory or snapshot is missing.
    """
    if hub_id is None:
        if not path.is_dir():
            raise SparselineError(
                f"model.path = {str(path)!r} is not a directory; give the directory that holds config.json"
                " and *.safetensors."
            )
        return path
    try:
        found = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
    except HFValidationError as error:
        raise SparselineError(
            f"model.id = {hub_id!r} is not the name of a model on the hub: {error}"
        ) from error
    if not isinstance(found, str):
        raise SparselineError(
            f"model.id = {hub_id!r} (revision {revision!r}) is not in this machine's hub cache; fetch it with"
            " `python -m stages.prepare`."
        )
    return Path(found).parent


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose tensors are read lazily; only their names are in memory.

    ``files`` and ``shapes`` contain only the model's parameters. Older conversions also stored
    buffers (causal masks, rotary frequencies). transformers computes these, so they are neither
    read, counted nor written. ``left_out`` names them, and all other files and tensors of the source
    that the result does not contain.
    """

    path: Path
    config: PreTrainedConfig
    architecture: Architecture
    files: Mapping[str, str]  # tensor name -> file name
    shapes: Mapping[str, tuple[int, ...]]
    prefixes: tuple[str, ...]  # prefix of each block's tensor names
    base: str  # prefix of the base model's parameters in transformers' names
    dtype: torch.dtype
    # transformers' name of each parameter -> its pieces in the files; tied parameters share them
    pieces: Pieces
    unread: frozenset[str]  # tensors that process no text (other towers); they are copied unchanged
    buffers: frozenset[str]  # stored tensors that are buffers, not parameters; names relative to the block
    indexed: bool  # whether the weights have an index
    packed: Mapping[str, Packed]  # tensors that are stored in FP8 or MXFP4, with their scales
    remote_code: bool  # whether to run the model's own code, if it has any
    # config, tokenizer and the like, relative to path: copied verbatim beside new weights
    others: tuple[str, ...]
    left_out: Mapping[str, str]  # file or tensor -> why the result does not contain it

    def block_prefix(self, block: int) -> str:
        return self.prefixes[block]

    def place(self, name: str) -> tuple[int, str] | None:
        """The block that a tensor belongs to, and its name relative to the block; None outside the blocks."""
        return _split(self.prefixes, name)

    @cached_property
    def _module_names(self) -> dict[str, str]:
        """Tensor name -> transformers' name of the first parameter that contains it."""
        found: dict[str, str] = {}
        for full, pieces in self.pieces.items():
            for piece in pieces:
                found.setdefault(piece.stored, full)
        return found

    @property
    def vocabulary(self) -> int:
        """Number of tokens with an embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def heads(self) -> int:
        """Number of query heads; 1 if the config has none."""
        found = heads_of(self.config.get_text_config())
        return 1 if found is None else found.q

    @property
    def parameters(self) -> int:
        """Stored parameters; tied weights count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def matrix_shape(self, block: int, matrix: Matrix) -> tuple[int, int]:
        """Shape [R, C] of a logical matrix, without reading it."""
        rows, columns = matrix.view(
            torch.empty(self.shapes[self.block_prefix(block) + matrix.parameter], device="meta")
        ).shape
        return rows, columns

    def aliases(self, block: int, matrix: Matrix) -> list[str]:
        """All names of a logical matrix that patterns can match: its own first, then the names of its
        parameter in the files and in transformers.
        """
        own = self.architecture.matrix_name(block, matrix)
        stored = self.block_prefix(block) + matrix.parameter
        full = self._module_names[stored]
        blocks = f"{self.architecture.blocks}.{block}."
        bases = {"": None, self.prefixes[block].removesuffix(blocks): None, full.partition(blocks)[0]: None}
        short = [own, f"{blocks}{matrix.parameter}".removesuffix(".weight")]
        names = [base + name + end for base in bases for name in short for end in ("", ".weight")]
        return list(
            dict.fromkeys(
                [*names, stored, stored.removesuffix(".weight"), full, full.removesuffix(".weight")]
            )
        )

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors as stored, file by file.

        Raises:
            SparselineError: the weights contain NaN or infinity.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file_name, wanted in by_file.items():
            with safe_open(self.path / file_name, framework="pt") as file:
                for name in wanted:
                    tensor = self._unpacked(name) if name in self.packed else file.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise SparselineError(
                            f"{self.path / file_name}: weights of {name} contain NaN or infinity; the"
                            " checkpoint is damaged."
                        )
                    yield name, tensor

    def _unpacked(self, name: str) -> torch.Tensor:
        """A tensor that is stored as values and scales, unpacked."""
        pair, stored = self.packed[name], []
        for source, file_name in zip((pair.values, pair.scales), pair.files, strict=True):
            with safe_open(self.path / file_name, framework="pt") as file:
                stored.append(file.get_tensor(source))
        return pair.unpack(stored[0], stored[1])

    def block(self, block: int) -> dict[str, torch.Tensor]:
        """One block's tensors, named relative to the block, in the stored dtype."""
        prefix = self.block_prefix(block)
        names = [name for name in self.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read(names)}

    def block_pieces(self, block: int) -> dict[str, tuple[Piece, ...]]:
        """The pieces of a block's parameters; all names are relative to the block."""
        return _relative(
            self.pieces, f"{self.base}{self.architecture.blocks}.{block}.", self.block_prefix(block)
        )

    def uncovered(self) -> dict[str, int]:
        """Tensor name in a block -> number of elements that no logical matrix contains, over all
        blocks. Only parameters of two or more dimensions, without routers, count.
        """
        found: dict[str, int] = {}
        for block, layout in enumerate(self.architecture.layouts):
            covered: dict[str, int] = {}
            for matrix in layout.matrices:
                covered[matrix.parameter] = covered.get(matrix.parameter, 0) + math.prod(
                    self.matrix_shape(block, matrix)
                )
            for name, size in self._block_sizes(block).items():
                if left := size - covered.get(name, 0):
                    found[name] = found.get(name, 0) + left
        return found

    @property
    def coverage(self) -> float:
        """The share of the blocks' elements that logical matrices contain. Only parameters of two or
        more dimensions, without routers, count.
        """
        total = sum(sum(self._block_sizes(block).values()) for block in range(self.architecture.depth))
        return 1 - sum(self.uncovered().values()) / total

    def _block_sizes(self, block: int) -> dict[str, int]:
        """Tensor name -> size, for a block's parameters of two or more dimensions, without routers."""
        prefix, routers = self.block_prefix(block), self.architecture.layouts[block].routers
        names = {
            piece.stored
            for name, own in self.block_pieces(block).items()
            if name not in routers
            for piece in own
        }
        shapes = {name: self.shapes[prefix + name] for name in names - self.buffers}
        return {name: math.prod(shape) for name, shape in sorted(shapes.items()) if len(shape) > 1}

    def outside_blocks(self) -> list[str]:
        """Names of embeddings, final norm, head and other towers: everything outside the blocks."""
        return [name for name in self.files if self.place(name) is None]


def read_config(path: Path, remote_code: bool = False, dequantize: bool = False) -> PreTrainedConfig:
    """The model directory's config, with transformers' own choice of the attention kernel: sdpa, or
    eager if the model has no sdpa.

    Args:
        remote_code: run the model's own code, if it has any.
        dequantize: read weights in FP8 or MXFP4 as bfloat16.

    Raises:
        SparselineError: transformers cannot read a config without the model's own code.
    """
    if (path / ADAPTER).exists():
        raise SparselineError(
            f"{path} holds an adapter ({ADAPTER}), which is loaded on top of other weights; "
            f"merge it into them (peft's merge_and_unload), and give the merged model without {ADAPTER}."
        )
    list_files(path)  # refuses links to elsewhere, pipes and devices
    if not (path / CONFIG).is_file():
        raise SparselineError(
            f"{path} holds no {CONFIG}; give the directory that holds config.json and *.safetensors."
        )
    if not remote_code and (named := own_code(path)) and named[0] not in CONFIG_MAPPING_NAMES:
        raise SparselineError(
            f"{path / CONFIG} names custom model code ({named[1]}), and transformers has no"
            f" {named[0]!r}; set model.remote_code to true if you trust that code: it can do anything that"
            " you can."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=remote_code)
    except Exception as error:  # transformers checks little, and raises whatever it meets
        raise SparselineError(
            f"{path} holds no {CONFIG} that transformers can read: {_first_line(error)}"
        ) from error
    if getattr(config, "transformers_weights", None):
        raise SparselineError(
            f"{path / CONFIG} names its weights by transformers_weights; remove that key and name them"
            " model.safetensors."
        )
    if dequantize and isinstance(quantised := getattr(config, "quantization_config", None), dict):
        config.quantization_config = quantised | {"dequantize": True}
    config._attn_implementation = None  # ignore the kernel (flash_attention_2, say) of whoever saved it
    return config


def own_code(path: Path) -> tuple[str, str] | None:
    """The model type and the module of a config with custom code (``auto_map``), or None."""
    try:
        value = json.loads(files.text(path / CONFIG))
        named = value.get("auto_map")
        return (str(value.get("model_type")), str(next(iter(named.values())))) if named else None
    except (OSError, ValueError, AttributeError, RecursionError, StopIteration):
        return None  # transformers reports the damage


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2]) if lines else type(error).__name__


def open_checkpoint(
    path: Path, architecture: Architecture | None = None, remote_code: bool = False, dequantize: bool = False
) -> Checkpoint:
    """Open a Hugging Face model directory of safetensors.

    Args:
        architecture: the known architecture; None: discover it.
        remote_code: run the model's own code, if it has any.
        dequantize: read weights in FP8 or MXFP4 as bfloat16.

    Raises:
        SparselineError: the config is missing or unsupported, or the head is not a language model's.
            There are no weights or two sets of them; a shard is missing or truncated. A tensor is
            missing, has another shape, or has no place in the model. The model cannot be pruned.
    """
    config = read_config(path, remote_code)
    _refuse(path, config, dequantize)
    found = find_files(path)
    parts, extra = _stored(path, found)
    pairs = {}
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
        pairs = packed(parts)
    check_sizes(path, config, [shape for _, shape, _ in parts.values()])
    if (path / GENERATION).exists():
        generation(path)  # refuses a file that would stop the model from loading
    with _describing(path):
        model = skeleton(config, torch.float32, remote_code)
    _check_head(path, config, model)
    shapes = {name: shape for name, (_, shape, _) in parts.items()}
    pieces = _placed(path, model, parts, pieces_of(model, shapes))
    placed = {piece.stored for own in pieces.values() for piece in own}
    buffers = {name for name, shape in shapes.items() if name not in placed and is_buffer(name, shape)}
    unread = {name for name in shapes.keys() - placed - buffers if _of_another_tower(model, name)}
    if homeless := sorted(shapes.keys() - placed - buffers - unread):
        more = f" and {len(homeless) - 1} more" if len(homeless) > 1 else ""
        raise SparselineError(
            f"{path} holds {homeless[0]}{more}, for which {type(model).__name__} has no place under its"
            " config.json; pruning would lose it: give a checkpoint of the language model alone"
            " (adapters merged, other heads removed)."
        )
    entry = architecture or _discovered(path, config, model, pieces, shapes)
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    prefixes = tuple(_prefix(pieces, f"{base}{entry.blocks}.{block}.") for block in range(entry.depth))
    block, matrix = next(entry.places())
    met = {full for full in pieces if _meets(entry, full, base)}
    unread |= {piece.stored for full in pieces.keys() - met for piece in pieces[full]} - {
        piece.stored for full in met for piece in pieces[full]
    }
    return Checkpoint(
        path=path,
        config=config,
        architecture=entry,
        files={name: parts[name][0] for name in shapes if name not in buffers},
        shapes={name: shape for name, shape in shapes.items() if name not in buffers},
        prefixes=prefixes,
        base=base,
        dtype=DTYPES[parts[prefixes[block] + matrix.parameter][2]],
        pieces=pieces,
        unread=frozenset(unread),
        buffers=frozenset(
            place[1]
            for full, _ in model.named_buffers()
            for piece in pieces.get(full, ())
            if (place := _split(prefixes, piece.stored)) is not None
        ),
        indexed=found.index is not None,
        packed=pairs,
        remote_code=remote_code,
        others=found.others,
        left_out={**found.left_out, **dict.fromkeys(sorted(buffers), BUFFER), **extra},
    )


def _split(prefixes: tuple[str, ...], name: str) -> tuple[int, str] | None:
    """See ``Checkpoint.place``."""
    numbers = _numbers(prefixes)
    for end in (end for end, letter in enumerate(name, 1) if letter == "."):
        if (block := numbers.get(name[:end])) is not None:
            return block, name[end:]
    return None


@lru_cache(maxsize=8)
def _numbers(prefixes: tuple[str, ...]) -> dict[str, int]:
    return {prefix: block for block, prefix in enumerate(prefixes)}


def _meets(entry: Architecture, full: str, base: str) -> bool:
    """Whether a parameter processes text: it belongs to the head, to a block, or to the modules that
    run before or after the blocks.
    """
    name = full.removeprefix(base)
    return not full.startswith(base) or name in entry.outside or name.startswith(f"{entry.blocks}.")


def _refuse(path: Path, config: PreTrainedConfig, dequantize: bool) -> None:
    if config.is_encoder_decoder:
        raise SparselineError(
            f"{path / CONFIG} describes an encoder-decoder ({config.model_type}); only decoders can be"
            " pruned."
        )
    if (quantised := getattr(config, "quantization_config", None)) is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method not in METHODS:
        raise SparselineError(
            "The model is already quantised; give the original checkpoint, since pruning needs its"
            " full-precision weights."
        )
    if not dequantize:
        raise SparselineError(
            f"{path} is stored in {method}; set model.dequantize to true to read it as bfloat16."
        )


def _placed(
    path: Path, model: "PreTrainedModel", parts: Parts, pieces: Pieces
) -> dict[str, tuple[Piece, ...]]:
    """transformers' name of each parameter (and stored buffer) -> its pieces. Ties are resolved;
    shapes and types are checked.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    # a tie goes both ways: files may hold either tensor
    either = tied | {source: target for target, source in tied.items()}
    required = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for full, tensor in {**required, **model.state_dict(keep_vars=True)}.items():
        own = pieces.get(full) or pieces.get(either.get(full, ""))
        if own is None and full not in required:
            continue  # a buffer that transformers computes
        if own is None:
            raise SparselineError(_missing(path, full, model, parts))
        found[full] = own
        for piece in own:
            if (stored := parts[piece.stored][2]) not in DTYPES and full in required:
                raise SparselineError(
                    f"{path} holds tensors of type {stored} ({piece.stored}); give an unquantised"
                    " floating-point checkpoint."
                )
        shape = tuple(
            assembled(
                own, {piece.stored: torch.empty(parts[piece.stored][1], device="meta") for piece in own}
            ).shape
        )
        if shape != tuple(tensor.shape):
            wanted = f"{list(tensor.shape)}, not {list(shape)}"
            raise SparselineError(
                f"{path}: config.json requires {own[0].stored} of shape {wanted}; fetch the checkpoint again."
            )
    return dict(sorted(found.items()))


def _of_another_tower(model: "PreTrainedModel", name: str) -> bool:
    """Whether transformers ignores a tensor when it loads only the language model of a composite model."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _prefix(pieces: Pieces, inside: str) -> str:
    """The prefix, up to the block's number, that the files' names of a block's tensors share."""
    stored = [piece.stored for full, own in pieces.items() if full.startswith(inside) for piece in own]
    number = inside.rstrip(".").rpartition(".")[2]
    found = stored[0][: stored[0].find(f".{number}.") + len(number) + 2]
    if f".{number}." not in found or not all(name.startswith(found) for name in stored):
        raise SparselineError(
            f"the files' names of {inside.rstrip('.')} ({stored[0]}, …) have no block's number in common."
        )
    return found


def _relative(pieces: Pieces, inside: str, prefix: str) -> dict[str, tuple[Piece, ...]]:
    return {
        full.removeprefix(inside): tuple(
            replace(piece, stored=piece.stored.removeprefix(prefix)) for piece in own
        )
        for full, own in pieces.items()
        if full.startswith(inside)
    }


def _discovered(
    path: Path,
    config: PreTrainedConfig,
    model: "PreTrainedModel",
    pieces: Pieces,
    shapes: Mapping[str, tuple[int, ...]],
) -> Architecture:
    """The model's architecture, in the files' names. It depends only on the config and on the names
    and shapes of the tensors, so it is cached by these.
    """
    key = config.to_json_string(), tuple(sorted(shapes.items()))
    if key not in _KNOWN:
        try:
            found = discover(model)
        except SparselineError as error:
            raise SparselineError(f"{path}: {error}") from error
        except Exception as error:  # raised by transformers' own code
            raise SparselineError(
                f"{path}: {type(model).__name__} cannot process text in transformers"
                f" ({_first_line(error)}); it cannot be pruned."
            ) from error
        base = f"{model.base_model_prefix}." if model.base_model is not model else ""
        made: dict[tuple[Layout, tuple[tuple[str, tuple[Piece, ...]], ...]], Layout] = {}
        layouts = []
        for block, layout in enumerate(found.layouts):
            inside = f"{base}{found.blocks}.{block}."
            prefix = _prefix(pieces, inside)
            own = _relative(pieces, inside, prefix)
            same = layout, tuple(own.items())
            if same not in made:
                sizes = {
                    name.removeprefix(prefix): shape
                    for name, shape in shapes.items()
                    if name.startswith(prefix)
                }
                made[same] = stored_layout(layout, own, sizes)
            layouts.append(made[same])
        _KNOWN[key] = Architecture(
            config.model_type, found.blocks, found.width, tuple(layouts), found.outside, found.returns
        )
        while len(_KNOWN) > MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
    return _KNOWN[key]


_KNOWN: dict[Any, Architecture] = {}  # architectures of the models that this process has opened
MOST_KNOWN = 32


@contextmanager
def _describing(path: Path) -> Iterator[None]:
    """While open, turn errors of transformers into a ``SparselineError`` that names config.json.
    Impossible values, such as a negative width, make transformers fail in many ways.
    """
    try:
        yield
    except SparselineError:
        raise
    except Exception as error:
        raise SparselineError(
            f"{path / CONFIG} describes no model ({_first_line(error)}); fetch it again."
        ) from error


def check_sizes(path: Path, config: PreTrainedConfig, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse a config that requires far more than the weights contain, before a model is created from
    it.

    Raises:
        SparselineError: a value is not a number, or too large.
    """
    with _describing(path):
        described = config.get_text_config()
        values = {name: named(described, name) for name in (BLOCKS, *SIZES, POSITIONS)}
    largest = max((size for shape in shapes for size in shape), default=0)
    most = {BLOCKS: len(shapes), POSITIONS: MOST_POSITIONS} | dict.fromkeys(SIZES, largest)
    for name, value in values.items():
        if name == POSITIONS and value == -1:
            continue  # XLNet has no limit
        if value is not None and (type(value) is not int or not 0 < value <= most[name]):
            raise SparselineError(
                f"{path / CONFIG}: {name} = {value!r} does not match the weights beside it; fetch the"
                " checkpoint again."
            )


def generation(path: Path) -> "GenerationConfig":
    """The generation config of a model directory.

    Raises:
        SparselineError: the file cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # transformers checks little, and raises whatever it meets
        raise SparselineError(
            f"{path / GENERATION} cannot be read ({_first_line(error)}); fetch it again, or remove it."
        ) from error


def _architectures(config: PreTrainedConfig) -> list[str]:
    named = config.architectures or []
    return [str(name) for name in (named if isinstance(named, list | tuple) else [named])]


def _check_head(path: Path, config: PreTrainedConfig, model: "PreTrainedModel") -> None:
    """Refuse other heads by class name: their weights would be lost, or kept without the code for them."""
    for name in _architectures(config):
        if not name.lower().endswith(("forcausallm", "lmheadmodel")) and name not in _names_of(model):
            raise SparselineError(
                f"{path / CONFIG} describes a {name}; only language models can be pruned"
                f" ({type(model).__name__} here), since any other head would be lost."
            )


def _names_of(model: "PreTrainedModel") -> set[str]:
    """Names that a config may give the model: its class, its base model, or the composite model that
    contains this language model.
    """
    names = {type(model).__name__, type(model.base_model).__name__}
    if model.config.get_text_config() is not model.config or model._keys_to_ignore_on_load_unexpected:
        names.add(type(model).__name__.replace("ForCausalLM", "ForConditionalGeneration"))
    return names


def _stored(path: Path, found: Files) -> tuple[Parts, dict[str, str]]:
    """All tensors of the files, and the metadata that the result will not contain."""
    parts: Parts = {}
    extra: dict[str, str] = {}
    for file_name in found.weights:
        try:
            with safe_open(path / file_name, framework="pt") as file:
                keys = sorted((file.metadata() or {}).keys() - {"format"})
                extra |= {f"{file_name}: {key}": "metadata, which transformers does not read" for key in keys}
                for name in file.keys():
                    if name in parts:
                        raise SparselineError(
                            f"{path}: {parts[name][0]} and {file_name} both hold {name}; fetch the checkpoint"
                            " again."
                        )
                    part = file.get_slice(name)
                    parts[name] = file_name, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise SparselineError(
                f"{path / file_name} is missing or truncated ({error}); fetch the checkpoint again."
            ) from error
    for name, file_name in (found.index or {}).items():
        if name not in parts and not is_buffer(name, None):
            raise SparselineError(
                f"{path / INDEX} names {name} in {file_name}, which does not hold it; fetch the checkpoint"
                " again."
            )
    return parts, extra


def _missing(path: Path, name: str, model: "PreTrainedModel", parts: Parts) -> str:
    base, whole = type(model.base_model).__name__, type(model).__name__
    head = model.get_output_embeddings()
    is_head = head is not None and model.get_submodule(name.rpartition(".")[0]) is head
    name = usual_name(model, name)
    if not any(part.startswith(f"{model.base_model_prefix}.") for part in parts):
        name = name.removeprefix(f"{model.base_model_prefix}.")
    if base in _architectures(model.config) and is_head:
        return (
            f"{path} is a {base}, saved without the head of a language model ({name}); save the model as"
            f" {whole}."
        )
    return f"{path} has no tensor {name}, which its config.json requires; fetch the checkpoint again."


def is_buffer(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether transformers computes this tensor itself. Without a shape, only the name decides."""
    return any(
        re.search(rf"(^|\.){pattern}$", name) is not None and (shape is None or len(shape) == dimensions)
        for pattern, dimensions in BUFFERS.items()
    )


def skeleton(config: PreTrainedConfig, dtype: torch.dtype, remote_code: bool = False) -> "PreTrainedModel":
    """The model without its weights: parameters on the meta device, buffers real."""
    # imported here, like the modelling code below: it takes seconds, and not every stage needs it
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    attention.register()
    with init_empty_weights(include_buffers=False):
        # without this argument, transformers asks the user
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote_code)
    for module in model.modules():  # fused kernels for experts hide their products
        own: Any = getattr(module, "config", None)
        if hasattr(own, "_experts_implementation"):
            own._experts_implementation = "eager"
    return model


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy the named files from ``source`` to ``target``; links are replaced by the files they point to."""
    for name in names:
        with replacing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


class ShardWriter:
    """Writes a checkpoint as one shard per block plus one for the rest, each atomically, so that
    finished blocks survive a kill.

    Peak memory is one block's tensors; the source's config, tokenizer and chat template are copied
    verbatim.
    """

    def __init__(self, source: Checkpoint, directory: Path) -> None:
        self.source = source
        self.directory = directory
        self.shards = source.architecture.depth + 1
        directory.mkdir(parents=True, exist_ok=True)

    def shard(self, block: int) -> Path:
        """Path of a block's shard; block = depth is the shard of the rest."""
        return self.directory / f"model-{block + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(self, block: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one finished block, with names relative to the block, in the source's dtype."""
        prefix = self.source.block_prefix(block)
        self._save(self.shard(block), {prefix + name: tensor for name, tensor in tensors.items()})

    def read(self, block: int) -> dict[str, torch.Tensor]:
        """Read a written block, with names relative to the block."""
        prefix = self.source.block_prefix(block)
        with safe_open(self.shard(block), framework="pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}

    def finish(self) -> None:
        """Write the remaining tensors and the index, and copy the source's other files."""
        rest = self.source.outside_blocks()
        self._save(self.shard(self.shards - 1), dict(self.source.read(rest)))
        weight_map, total = {}, 0
        for block in range(self.shards):
            with safe_open(self.shard(block), framework="pt") as file:
                for name in file.keys():
                    weight_map[name] = self.shard(block).name
                    part = file.get_slice(name)
                    total += math.prod(part.get_shape()) * DTYPES[part.get_dtype()].itemsize
        write_json(self.directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_files(self.source.others, self.source.path, self.directory)
        if self.source.packed:
            config = json.loads(files.text(self.source.path / CONFIG))
            write_json(self.directory / CONFIG, without_quantisation(config))

    @staticmethod
    def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        with replacing(path) as temporary:
            save_tensors(temporary, ordered, {"format": "pt"})
