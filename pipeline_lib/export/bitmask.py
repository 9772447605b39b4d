"""``bitmask``: one bit per weight, and the weights whose bit is 1. docs/artifacts.md specifies it;
``load`` reads it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline_lib.core.artifacts import replacing
from pipeline_lib.core.files import sha256
from pipeline_lib.export import load, manifest, tensorfile
from pipeline_lib.export.bits import words
from pipeline_lib.export.dense import Others
from pipeline_lib.export.encoding import PARTS, Plan, encode
from pipeline_lib.export.groups import Quantisation
from pipeline_lib.export.shards import one_by_one
from pipeline_lib.models.checkpoint import Checkpoint, copy_files


def write(
    out: Path,
    shards: Mapping[str, Mapping[str, Plan]],
    pruned: Checkpoint,
    quantisation: Quantisation,
    others: Others,
    indexed: bool,
) -> None:
    """Write a directory for ``load.load_model`` and ``stages.unpack``. It is read back and compared
    bit by bit before it gets its name.

    Args:
        shards: file name of the dense checkpoint -> plan of each tensor.
        others: as in ``dense.write``, for the dense checkpoint.
        indexed: as in ``dense.write``.
    """
    with replacing(out) as directory:
        directory.mkdir()
        weights = {}
        for dense_name, plans in shards.items():
            name = dense_name.removesuffix(".safetensors") + manifest.SUFFIX
            header = _shard(directory / name, plans, pruned, quantisation)
            weights[name] = {
                "bytes": (directory / name).stat().st_size,
                "dense": dense_name,
                "header_sha256": hashlib.sha256(header).hexdigest(),
            }
        copy_files(others[1], others[0], directory)
        files = {name: sha256(directory / name) for name in others[1]}
        manifest.write(directory, {"weights": weights, "files": files, "indexed": indexed})
        for name, tensor in load.tensors(directory):
            ((_, original),) = pruned.read([name])
            if not torch.equal(words(tensor), words(original)):
                raise RuntimeError(f"{name} cannot be read back bit for bit")


def _shard(path: Path, plans: Mapping[str, Plan], pruned: Checkpoint, quantisation: Quantisation) -> bytes:
    """Write one file, and return its header."""
    blobs = {name + part: blob for name, plan in plans.items() for part, blob in plan.parts.items()}
    tensors = {name: dict(plan.facts) | {"sha256": "0" * 64} for name, plan in plans.items()}
    with tensorfile.writing(path, blobs, _metadata(tensors)) as writer:
        for name, tensor in one_by_one(pruned, list(plans)):
            parts = encode(tensor, plans[name], quantisation.of(name))
            for part, encoded in parts.items():
                writer.write(name + part, encoded)
            tensors[name]["sha256"] = tensorfile.digest(parts[part] for part in PARTS if part in parts)
        return writer.amend(_metadata(tensors))


def _metadata(tensors: dict[str, Any]) -> dict[str, str]:
    described = {"format": manifest.FORMAT, "version": manifest.VERSION, "tensors": tensors}
    return {"sparseline": json.dumps(described, sort_keys=True, separators=(",", ":"))}
