"""``compressed-tensors``, format pack-quantized, for vLLM and transformers. Zeros take as many bits as
other codes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.export import dense
from pipeline_lib.export.groups import Groups, Quantisation
from pipeline_lib.export.shards import one_by_one
from pipeline_lib.export.tensorfile import Blob
from pipeline_lib.models.checkpoint import Checkpoint, skeleton

BITS = (4, 8)  # bit widths for which readers of the format have kernels
WEIGHT = ".weight"


def parts(name: str, shape: tuple[int, ...], groups: Groups) -> dict[str, Blob]:
    """The tensors that represent one quantised weight."""
    module, (rows, columns) = name.removesuffix(WEIGHT), shape
    count = groups.scale.shape[1]
    found = {
        f"{module}.weight_packed": Blob(torch.int32, (rows, -(-columns * groups.bits // 32))),
        f"{module}.weight_scale": Blob(groups.scale.dtype, (rows, count)),
        f"{module}.weight_shape": Blob(torch.int64, (2,)),
    }
    if groups.zero_point is not None:
        found[f"{module}.weight_zero_point"] = Blob(torch.int32, (-(-rows * groups.bits // 32), count))
    return found


def pack(name: str, weight: torch.Tensor, groups: Groups) -> dict[str, torch.Tensor]:
    """The tensors of ``parts``, packed by the compressed-tensors library, whose codes are signed."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # an optional package

    module, middle = name.removesuffix(WEIGHT), 2 ** (groups.bits - 1)
    signed = (groups.codes(weight).to(torch.int16) - middle).to(torch.int8)
    found = {
        f"{module}.weight_packed": pack_to_int32(signed, groups.bits),
        f"{module}.weight_scale": groups.scale,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }
    if groups.zero_point is not None:
        shifted = (groups.zero_point.to(torch.int16) - middle).to(torch.int8)
        found[f"{module}.weight_zero_point"] = pack_to_int32(shifted, groups.bits, packed_dim=0)
    return found


@dataclass(frozen=True)
class Scheme:
    """The common quantisation of a variant's weights, and the weights without quantisation."""

    bits: int
    group: int | None  # inputs with one scale; None: the whole row
    symmetric: bool
    ignored: tuple[str, ...]  # linears that stay as they are, by transformers' names


def scheme(pruned: Checkpoint, quantisation: Quantisation, variant: str) -> Scheme:
    """The format's description of a variant.

    Raises:
        SparselineError: the format cannot express it, or its package is not installed.
    """

    def refusal(reason: str) -> SparselineError:
        return SparselineError(
            f"{variant} cannot be written as compressed-tensors: {reason}; remove it from"
            f" variants.{variant}.export."
        )

    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise refusal("its package is not installed (pip install compressed-tensors)") from error
    model = skeleton(pruned.config, pruned.dtype, pruned.remote_code)
    ignored, found, ragged = [], set(), ""
    for full, pieces in sorted(pruned.pieces.items()):
        linear = full.endswith(WEIGHT) and isinstance(
            model.get_submodule(full.removesuffix(WEIGHT)), nn.Linear
        )
        name = pieces[0].stored
        groups = quantisation.of(name)
        if groups is None:
            ignored += [full.removesuffix(WEIGHT)] if linear else []
            continue
        if not linear or not pieces[0].whole:
            what = "stored transposed (Conv1D)" if groups.transposed else "not the weight of a linear layer"
            raise refusal(f"{name} is {what}")
        columns = pruned.shapes[name][1]
        found.add((groups.bits, groups.size if groups.size != columns else None, groups.zero_point is None))
        if columns % groups.size:
            ragged = f"the {columns} inputs of {name} are not a multiple of its groups of {groups.size}"
    if not found:
        raise refusal("it is not quantised")
    bits, symmetric = {one[0] for one in found}, {one[2] for one in found}
    groups_of = {one[1] for one in found}
    sizes = groups_of - {None} or {None}  # a row as long as one group fits both
    if len(bits) > 1 or len(symmetric) > 1 or len(sizes) > 1:
        raise refusal("its matrices are quantised in several ways")
    scheme = Scheme(bits.pop(), sizes.pop(), symmetric.pop(), tuple(ignored))
    if scheme.bits not in BITS:
        raise refusal(f"readers of the format take {BITS[0]} or {BITS[1]} bits, not {scheme.bits}")
    if ragged:
        raise refusal(ragged)
    return scheme


def config(chosen: Scheme) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=chosen.bits,
        type="int",
        symmetric=chosen.symmetric,
        strategy="group" if chosen.group else "channel",
        group_size=chosen.group,
    )
    whole = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=list(chosen.ignored),
    )
    described: dict[str, Any] = whole.model_dump(mode="json")
    return described


def layout(
    shards: Mapping[str, Mapping[str, Blob]], quantisation: Quantisation
) -> dict[str, dict[str, Blob]]:
    """File name -> its tensors, from those of the dense checkpoint."""
    found: dict[str, dict[str, Blob]] = {}
    for file_name, blobs in shards.items():
        found[file_name] = {}
        for name, blob in blobs.items():
            groups = quantisation.of(name)
            found[file_name] |= {name: blob} if groups is None else parts(name, blob.shape, groups)
    return found


def write(
    out: Path,
    shards: Mapping[str, Mapping[str, Blob]],
    pruned: Checkpoint,
    quantisation: Quantisation,
    chosen: Scheme,
    indexed: bool,
) -> None:
    """Write a directory for ``from_pretrained`` with compressed-tensors installed. The other files
    are the pruned checkpoint's.

    Args:
        shards: as in ``dense.write``.
        indexed: as in ``dense.write``.
        chosen: the result of ``scheme``.
    """

    def tensors(file_name: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in one_by_one(pruned, list(shards[file_name])):
            groups = quantisation.of(name)
            yield from ({name: tensor} if groups is None else pack(name, tensor, groups)).items()

    others = pruned.path, pruned.others
    dense.write(
        out, layout(shards, quantisation), tensors, others, indexed, {"quantization_config": config(chosen)}
    )
