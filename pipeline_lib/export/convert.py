"""Convert pytorch_model.bin to safetensors, shard by shard. torch reads tensors only
(``weights_only``) and runs no code of a pickle.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.files import check_inside, text
from pipeline_lib.export import dense, tensorfile
from pipeline_lib.export.tensorfile import Blob, blob
from pipeline_lib.models.checkpoint import BUFFER, is_buffer, read_config
from pipeline_lib.models.files import CARD, INDEX, WEIGHTS, list_files

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


def convert(source: Path, out: Path) -> dict[str, str]:
    """Write the weights of ``source`` as safetensors into ``out``, beside its other files. Returns
    what was left out, and why.

    One shard is in memory at a time (mapped, if its format allows). Tensors that share memory
    become one tensor if config.json ties the head to the embedding, otherwise one copy each.
    Buffers that transformers computes are left out.

    Raises:
        SparselineError: there are no such weights, or safetensors already; a file is damaged or
            contains more than tensors; ``out`` is in use.
    """
    dense.check_unused(out)
    if not source.is_dir():
        raise SparselineError(
            f"{source} is not a directory; give the one that holds config.json and {PICKLED}."
        )
    names, left_out = list_files(source)
    # the model card still describes the same model
    if card := next((name for name in left_out if name.lower() == CARD), None):
        names.append(card)
        del left_out[card]
    if stored := [name for name in names if name.endswith(".safetensors")]:
        raise SparselineError(f"{source} holds safetensors already ({stored[0]}); give it as model.path.")
    tied = bool(getattr(read_config(source), "tie_word_embeddings", False))
    files = _files(source)
    targets = {_target(name, len(files)): source / name for name in files}
    left_out = {name: reason for name, reason in left_out.items() if name not in (*files, PICKLED_INDEX)}
    shards: dict[str, dict[str, Blob]] = {}
    held: dict[str, str] = {}  # tensor -> file
    for target, path in targets.items():
        kept = {}
        for name, tensor in _tensors(path, tied):
            if is_buffer(name, tuple(tensor.shape)):
                left_out[name] = BUFFER
                continue
            if tensor.dtype not in tensorfile.NAMES:
                raise SparselineError(
                    f"{path}: {name} is of type {tensor.dtype}; give an unquantised floating-point"
                    " checkpoint."
                )
            if name in held:
                raise SparselineError(
                    f"{held[name]} and {path} both hold {name}; fetch the checkpoint again."
                )
            held[name] = str(path)
            kept[name] = blob(tensor)
        shards[target] = kept

    def tensors(target: str) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in _tensors(targets[target], tied) if name in shards[target])

    dense.write(
        out, shards, tensors, (source, [name for name in names if name != INDEX]), indexed=len(files) > 1
    )
    return left_out


def _files(source: Path) -> list[str]:
    """The pickled files, in order: one, or those that the index names."""
    if (source / PICKLED).is_file():
        check_inside(source, source / PICKLED)
        return [PICKLED]
    path = source / PICKLED_INDEX
    if not path.is_file():
        raise SparselineError(
            f"{source} holds no {PICKLED} and no {PICKLED_INDEX}; give a directory with one of them."
        )
    try:
        names = sorted(set(json.loads(text(path))["weight_map"].values()))
        safe = all(PurePosixPath(name).name == name and name.endswith(".bin") for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SparselineError(f"{path} is damaged ({error}); fetch the checkpoint again.") from error
    if not names or not safe:
        raise SparselineError(
            f"{path} does not name .bin files of its own directory; fetch the checkpoint again."
        )
    for name in names:
        check_inside(source, source / name)
    return names


def _target(name: str, count: int) -> str:
    if count == 1:
        return WEIGHTS
    return "model" + name.removeprefix("pytorch_model").removesuffix(".bin") + ".safetensors"


def _tensors(path: Path, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensors, sorted by name. Of a tied head and embedding that share their memory, only
    the embedding is given.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about odd pickles are for their authors
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnpicklingError):  # torch's message advises to run the file's code
            reason = "it is damaged, or contains code, which is never run"
        raise SparselineError(
            f"{path} cannot be read as weights alone ({reason}); fetch the checkpoint again, or another one."
        ) from error
    if isinstance(found, Mapping) and any(
        isinstance(v, torch.Tensor) and v.layout != torch.strided for v in found.values()
    ):
        raise SparselineError(f"{path} holds sparse tensors; give a dense checkpoint.")
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.items()
    ):
        raise SparselineError(
            f"{path} is not a mapping of names to tensors; give a model's weights, not a training state."
        )
    size = path.stat().st_size
    if large := next((name for name, tensor in found.items() if tensor.nbytes > size), None):
        raise SparselineError(
            f"{path}: {large} has more bytes than the file; fetch the checkpoint again, or another one."
        )
    first: dict[tuple[object, ...], str] = {}
    heads = {name for name in found if name in ("lm_head.weight", "embed_out.weight")}
    for name in sorted(found, key=lambda name: (name in heads, name)):
        tensor = found[name].detach()
        memory = (
            (tensor.data_ptr(), tensor.dtype, *tensor.shape, *tensor.stride())
            if math.prod(tensor.shape)
            else (name,)
        )
        if tied and name in heads and memory in first:
            continue
        first.setdefault(memory, name)
        yield name, tensor
