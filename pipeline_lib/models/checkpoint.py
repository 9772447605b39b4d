"""Checkpoints on disk: open one block at a time from (sharded) safetensors, write a pruned one shard by shard."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from pipeline_lib.core.artifacts import replacing, save_tensors, write_json
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models import attention
from pipeline_lib.models.architecture import Architecture, Matrix
from pipeline_lib.models.families import architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def locate(path: Path, hub_id: str | None, revision: str | None) -> Path:
    """The local directory of a model: ``path`` itself, or the hub's snapshot of ``hub_id`` at ``revision``.

    Raises:
        SparselineError: neither can be reached.
    """
    if hub_id is None:
        if not path.is_dir():
            raise SparselineError(
                f"model.path = {str(path)!r} is not a directory; give the directory that holds config.json and *.safetensors."
            )
        return path
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SparselineError(f"model.id = {hub_id!r} (revision {revision!r}) cannot be fetched from the hub: {reason}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose tensors are read lazily; nothing is in memory but their names.

    ``files`` and ``shapes`` hold what the model has as parameters, not the buffers (causal masks, rotary frequencies) that older
    conversions stored beside them: transformers computes those, so that they are neither read, counted nor written.
    """

    path: Path
    config: PreTrainedConfig
    architecture: Architecture
    files: Mapping[str, str]  # tensor name -> file name
    shapes: Mapping[str, tuple[int, ...]]
    prefix: str  # what precedes the base model's names ("model.", "transformer.", "gpt_neox." or nothing)
    dtype: torch.dtype
    names: Mapping[str, str]  # transformers' name of every parameter -> tensor name; tied parameters share theirs

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
        SparselineError: there is none that transformers can read.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = None  # not what the machine had that wrote it, as flash_attention_2
        return config
    except (OSError, ValueError, KeyError) as error:
        raise SparselineError(f"{path} holds no config.json that transformers can read: {str(error).splitlines()[0]}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face model directory of safetensors.

    Raises:
        SparselineError: no or an unsupported config, no weights, a missing or truncated shard, a tensor missing or of another shape.
    """
    config = read_config(path)
    entry = architecture(config)
    model = skeleton(config, torch.float32)
    base = f"{model.base_model_prefix}."
    parts: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for file_name in _weight_files(path):
        try:
            with safe_open(path / file_name, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    parts[name] = file_name, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise SparselineError(f"{path / file_name} is missing or truncated ({error}); fetch the checkpoint again.") from error
    prefix = base if any(name.startswith(f"{base}{entry.blocks}.") for name in parts) else ""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    files, shapes, names = {}, {}, {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        name = full if prefix else full.removeprefix(base)
        if name not in parts and name == "lm_head.weight":
            name = entry.stored_head
        if name not in parts:
            if full in tied:
                continue
            raise SparselineError(f"{path} has no tensor {name}, which its config.json calls for; fetch the checkpoint again.")
        files[name], shapes[name], stored = parts[name]
        names[full] = name
        if stored not in DTYPES:
            raise SparselineError(f"{path} holds tensors of type {stored} ({name}); give an unquantised floating-point checkpoint.")
        if shapes[name] != tuple(parameter.shape):
            wanted = f"{list(parameter.shape)}, not {list(shapes[name])}"
            raise SparselineError(f"{path}: config.json calls for {name} of shape {wanted}; fetch the checkpoint again.")
    first = f"{prefix}{entry.blocks}.0.{entry.matrices[0].parameter}"
    names |= {full: names[source] for full, source in tied.items() if full not in names}
    return Checkpoint(path, config, entry, files, shapes, prefix, DTYPES[parts[first][2]], names)


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> "PreTrainedModel":
    """The model without its weights: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights  # imported here, like the modelling code below: seconds that not every stage needs
    from transformers import AutoModelForCausalLM

    attention.register()
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def other_files(path: Path) -> list[Path]:
    """Config, tokenizer and chat template of a model directory: all that is copied verbatim beside new weights."""
    return [found for pattern in FILES[1:] for found in sorted(path.glob(pattern)) if found.name != INDEX]


def _weight_files(path: Path) -> list[str]:
    if (path / INDEX).exists():
        try:
            return sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise SparselineError(f"{path / INDEX} is damaged ({error}); fetch the checkpoint again.") from error
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    older = " (pytorch_model.bin cannot be read safely: convert it with save_pretrained)" if list(path.glob("*.bin")) else ""
    raise SparselineError(f"{path} holds no model.safetensors and no {INDEX}{older}; give a directory with the weights.")


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
        for path in other_files(self.source.path):
            with replacing(self.directory / path.name) as temporary:
                shutil.copyfile(path, temporary)

    @staticmethod
    def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        with replacing(path) as temporary:
            save_tensors(temporary, ordered, {"format": "pt"})
