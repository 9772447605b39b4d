"""Checkpoints on disk: open one block at a time from (sharded) safetensors, write a pruned one shard by shard."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from pipeline_lib.core import files
from pipeline_lib.core.artifacts import replacing, save_tensors, write_json
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models import attention
from pipeline_lib.models.architecture import Architecture, Matrix
from pipeline_lib.models.families import FAMILIES, architecture
from pipeline_lib.models.files import INDEX, Files, find_files, list_files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCKS, POSITIONS = "num_hidden_layers", "max_position_embeddings"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
MOST_POSITIONS = 2**24
BUFFER = "a buffer that transformers computes"
# What older conversions stored beside the parameters, with its number of dimensions: causal masks, their fill value, rotary tables
BUFFERS = {r"(attn|attention)\.bias": 4, r"(attn|attention)\.masked_bias": 0, r"rotary_emb\.inv_freq": 1}


def locate(path: Path, hub_id: str | None, revision: str | None) -> Path:
    """The local directory of a model: ``path`` itself, or the snapshot of ``hub_id`` that prepare fetched. The hub is not called.

    Raises:
        SparselineError: it is not here.
    """
    if hub_id is None:
        if not path.is_dir():
            raise SparselineError(
                f"model.path = {str(path)!r} is not a directory; give the directory that holds config.json and *.safetensors."
            )
        return path
    try:
        found = try_to_load_from_cache(hub_id, CONFIG, revision=revision)
    except HFValidationError as error:
        raise SparselineError(f"model.id = {hub_id!r} is no name of a model on the hub: {error}") from error
    if not isinstance(found, str):
        raise SparselineError(
            f"model.id = {hub_id!r} (revision {revision!r}) is not in this machine's hub cache; fetch it with `python -m stages.prepare`."
        )
    return Path(found).parent


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose tensors are read lazily; nothing is in memory but their names.

    ``files`` and ``shapes`` hold what the model has as parameters, not the buffers (causal masks, rotary frequencies) that older
    conversions stored beside them: transformers computes those, so that they are neither read, counted nor written. ``left_out``
    names them, with all other files and tensors of the source that are not in the result.
    """

    path: Path
    config: PreTrainedConfig
    architecture: Architecture
    files: Mapping[str, str]  # tensor name -> file name
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str  # what precedes the base model's names ("model.", "transformer.", "gpt_neox." or nothing)
    dtype: torch.dtype
    names: Mapping[str, str]  # transformers' name of every parameter -> tensor name; tied parameters share theirs
    indexed: bool  # the weights have an index
    others: tuple[str, ...]  # config, tokenizer and the like, relative to path: copied verbatim beside new weights
    left_out: Mapping[str, str]  # file or tensor -> why it is in no result

    def block_prefix(self, block: int) -> str:
        return f"{self.prefix}{self.architecture.blocks}.{block}."

    @property
    def parameters(self) -> int:
        """Stored parameters; tied weights count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def matrix_shape(self, block: int, matrix: Matrix) -> tuple[int, int]:
        """[R, C] of a logical matrix, without reading it."""
        rows, columns = matrix.view(torch.empty(self.shapes[self.block_prefix(block) + matrix.parameter], device="meta")).shape
        return rows, columns

    def aliases(self, block: int, matrix: Matrix) -> list[str]:
        """Every name that a pattern may use for a logical matrix: its own first, then its parameter's in files and in transformers."""
        own = self.architecture.matrix_name(block, matrix)
        whole = f"{self.architecture.blocks}.{block}.{matrix.parameter}"
        stored = self.block_prefix(block) + matrix.parameter
        full = next(full for full, name in self.names.items() if name == stored)
        bases = {"": None, self.prefix: None, full.removesuffix(whole): None}
        short = [own, whole.removesuffix(".weight")]
        return list(dict.fromkeys(base + name + end for base in bases for name in short for end in ("", ".weight")))

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors as stored, file by file.

        Raises:
            SparselineError: NaN or infinity among the weights.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file_name, wanted in by_file.items():
            with safe_open(self.path / file_name, framework="pt") as file:
                for name in wanted:
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise SparselineError(
                            f"{self.path / file_name}: weights of {name} hold NaN or infinity; the checkpoint is damaged."
                        )
                    yield name, tensor

    def block(self, block: int) -> dict[str, torch.Tensor]:
        """One block's tensors, named relative to the block, in the stored dtype."""
        prefix = self.block_prefix(block)
        names = [name for name in self.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read(names)}

    def outside_blocks(self) -> list[str]:
        """Names of embeddings, final norm, head: everything that no block holds."""
        prefix = f"{self.prefix}{self.architecture.blocks}."
        return [name for name in self.files if not name.startswith(prefix)]


def read_config(path: Path) -> PreTrainedConfig:
    """The model directory's config, the choice of attention kernel left to transformers: sdpa, or eager where the model has no sdpa.

    Raises:
        SparselineError: there is none that transformers can read without code of the model's own.
    """
    if (path / ADAPTER).exists():
        raise SparselineError(
            f"{path} holds an adapter ({ADAPTER}), which is loaded on top of other weights; "
            f"merge it into them (peft's merge_and_unload), and give the merged model without {ADAPTER}."
        )
    list_files(path)  # refuses links to elsewhere, pipes and devices
    if not (path / CONFIG).is_file():
        raise SparselineError(f"{path} holds no {CONFIG}; give the directory that holds config.json and *.safetensors.")
    if (remote := remote_code(path)) and remote[0] not in FAMILIES:
        raise SparselineError(
            f"{path / CONFIG} asks for code of the model's own ({remote[1]}), which is never run; "
            f"supported without it: {', '.join(sorted(FAMILIES))}."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers checks little, and raises whatever it meets
        raise SparselineError(f"{path} holds no {CONFIG} that transformers can read: {_first_line(error)}") from error
    if getattr(config, "transformers_weights", None):
        raise SparselineError(
            f"{path / CONFIG} names its weights by transformers_weights; remove that key and name them model.safetensors."
        )
    config._attn_implementation = None  # not what the machine had that wrote it, as flash_attention_2
    return config


def remote_code(path: Path) -> tuple[str, str] | None:
    """The model type and the module of a config that names code of the model's own (``auto_map``), or None."""
    try:
        value = json.loads(files.text(path / CONFIG))
        named = value.get("auto_map")
        return (str(value.get("model_type")), str(next(iter(named.values())))) if named else None
    except (OSError, ValueError, AttributeError, RecursionError, StopIteration):
        return None  # told by transformers


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2]) if lines else type(error).__name__


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face model directory of safetensors.

    Raises:
        SparselineError: no or an unsupported config, another head than a language model's, no weights or two sets of them, a missing
            or truncated shard, a tensor missing, of another shape, or without a place in the model.
    """
    config = read_config(path)
    with _describing(path):
        entry = architecture(config)
    found = find_files(path)
    parts, extra = _stored(path, found)
    check_sizes(path, config, [shape for _, shape, _ in parts.values()])
    if (path / GENERATION).exists():
        generation(path)  # whoever loads the model reads it
    with _describing(path):
        model = skeleton(config, torch.float32)
    _check_head(path, config, model)
    base = f"{model.base_model_prefix}."
    prefix = base if any(name.startswith(f"{base}{entry.blocks}.") for name in parts) else ""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def stored_name(full: str) -> str:
        name = full if prefix else full.removeprefix(base)
        return entry.stored_head if name not in parts and name == "lm_head.weight" else name

    either = tied | {source: target for target, source in tied.items()}  # a tie goes both ways: files may hold either tensor
    files, shapes, names = {}, {}, {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        name = stored_name(full)
        if name not in parts and full in either:
            name = stored_name(either[full])
        if name not in parts:
            raise SparselineError(_missing(path, name, config, model))
        files[name], shapes[name], stored = parts[name]
        names[full] = name
        if stored not in DTYPES:
            raise SparselineError(f"{path} holds tensors of type {stored} ({name}); give an unquantised floating-point checkpoint.")
        if shapes[name] != tuple(parameter.shape):
            wanted = f"{list(parameter.shape)}, not {list(shapes[name])}"
            raise SparselineError(f"{path}: config.json calls for {name} of shape {wanted}; fetch the checkpoint again.")
    buffers = {name for name, (_, shape, _) in parts.items() if name not in files and is_buffer(name, shape)}
    if homeless := sorted(parts.keys() - files.keys() - buffers):
        more = f" and {len(homeless) - 1} more" if len(homeless) > 1 else ""
        raise SparselineError(
            f"{path} holds {homeless[0]}{more}, for which {type(model).__name__} has no place under its config.json; "
            "pruning would lose it: give a checkpoint of the language model alone (adapters merged, other heads removed)."
        )
    block, matrix = next(entry.places())
    first = f"{prefix}{entry.blocks}.{block}.{matrix.parameter}"
    left_out = {**found.left_out, **dict.fromkeys(sorted(buffers), BUFFER), **extra}
    return Checkpoint(
        path, config, entry, files, shapes, prefix, DTYPES[parts[first][2]], names, found.index is not None, found.others, left_out
    )


@contextmanager
def _describing(path: Path) -> Iterator[None]:
    """A negative width, no heads: what transformers' own code makes of numbers that make no model is told in a sentence."""
    try:
        yield
    except SparselineError:
        raise
    except Exception as error:
        raise SparselineError(f"{path / CONFIG} describes no model ({_first_line(error)}); fetch it again.") from error


def check_sizes(path: Path, config: PreTrainedConfig, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse a config that calls for far more than the weights hold, before a model is made of it.

    Raises:
        SparselineError: a number is none, or too large.
    """
    with _describing(path):
        described = config.get_text_config()
        values = {name: getattr(described, name, None) for name in (BLOCKS, *SIZES, POSITIONS)}
    largest = max((size for shape in shapes for size in shape), default=0)
    most = {BLOCKS: len(shapes), POSITIONS: MOST_POSITIONS} | dict.fromkeys(SIZES, largest)
    for name, value in values.items():
        if value is not None and (type(value) is not int or not 0 < value <= most[name]):
            raise SparselineError(f"{path / CONFIG}: {name} = {value!r} does not fit the weights beside it; fetch the checkpoint again.")


def generation(path: Path) -> "GenerationConfig":
    """How the model of a directory generates.

    Raises:
        SparselineError: the file cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # transformers checks little, and raises whatever it meets
        raise SparselineError(f"{path / GENERATION} cannot be read ({_first_line(error)}); fetch it again, or take it away.") from error


def _architectures(config: PreTrainedConfig) -> list[str]:
    named = config.architectures or []
    return [str(name) for name in (named if isinstance(named, list | tuple) else [named])]


def _check_head(path: Path, config: PreTrainedConfig, model: "PreTrainedModel") -> None:
    """Refuse other heads by name: their weights would be lost, or left without the code that uses them."""
    for name in _architectures(config):
        if not name.lower().endswith(("forcausallm", "lmheadmodel")) and name != type(model.base_model).__name__:
            raise SparselineError(
                f"{path / CONFIG} describes a {name}; only language models can be pruned ({type(model).__name__} here), "
                "since any other head would be lost."
            )


Parts = dict[str, tuple[str, tuple[int, ...], str]]  # tensor name -> file name, shape, safetensors' name of the dtype


def _stored(path: Path, found: Files) -> tuple[Parts, dict[str, str]]:
    """Every tensor of the files, and the files' metadata that is not written again."""
    parts: Parts = {}
    extra: dict[str, str] = {}
    for file_name in found.weights:
        try:
            with safe_open(path / file_name, framework="pt") as file:
                keys = sorted((file.metadata() or {}).keys() - {"format"})
                extra |= {f"{file_name}: {key}": "metadata, which transformers does not read" for key in keys}
                for name in file.keys():
                    if name in parts:
                        raise SparselineError(f"{path}: {parts[name][0]} and {file_name} both hold {name}; fetch the checkpoint again.")
                    part = file.get_slice(name)
                    parts[name] = file_name, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise SparselineError(f"{path / file_name} is missing or truncated ({error}); fetch the checkpoint again.") from error
    for name, file_name in (found.index or {}).items():
        if name not in parts and not is_buffer(name, None):
            raise SparselineError(f"{path / INDEX} names {name} in {file_name}, which does not hold it; fetch the checkpoint again.")
    return parts, extra


def _missing(path: Path, name: str, config: PreTrainedConfig, model: "PreTrainedModel") -> str:
    base, whole = type(model.base_model).__name__, type(model).__name__
    if base in _architectures(config) and name in ("lm_head.weight", "embed_out.weight"):
        return f"{path} is a {base}, saved without the head of a language model ({name}); save the model as {whole}."
    return f"{path} has no tensor {name}, which its config.json calls for; fetch the checkpoint again."


def is_buffer(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether a tensor is one of those that transformers computes itself; without a shape, by its name alone."""
    return any(
        re.search(rf"(^|\.){pattern}$", name) is not None and (shape is None or len(shape) == dimensions)
        for pattern, dimensions in BUFFERS.items()
    )


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> "PreTrainedModel":
    """The model without its weights: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights  # imported here, like the modelling code below: seconds that not every stage needs
    from transformers import AutoModelForCausalLM

    attention.register()
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)  # without the word it asks


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy files by their names relative to ``source``; of links, what they lead to."""
    for name in names:
        with replacing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


class ShardWriter:
    """Writes a checkpoint as one shard per block plus one for the rest, each atomically, so that finished blocks survive a kill.

    Peak memory is one block's tensors; the source's config, tokenizer and chat template are copied verbatim.
    """

    def __init__(self, source: Checkpoint, directory: Path) -> None:
        self.source = source
        self.directory = directory
        self.shards = source.architecture.depth + 1
        directory.mkdir(parents=True, exist_ok=True)

    def shard(self, block: int) -> Path:
        """Path of a block's shard; block = depth is the shard of everything else."""
        return self.directory / f"model-{block + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(self, block: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """One finished block, named relative to the block, in the source's dtype."""
        prefix = self.source.block_prefix(block)
        self._save(self.shard(block), {prefix + name: tensor for name, tensor in tensors.items()})

    def read(self, block: int) -> dict[str, torch.Tensor]:
        """A block that was written, named relative to the block."""
        prefix = self.source.block_prefix(block)
        with safe_open(self.shard(block), framework="pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}

    def finish(self) -> None:
        """The remaining tensors, the index, and the source's other files."""
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

    @staticmethod
    def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        with replacing(path) as temporary:
            save_tensors(temporary, ordered, {"format": "pt"})
