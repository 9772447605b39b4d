"""Checkpoints in FP8 (DeepSeek-V3) or MXFP4 (gpt-oss). transformers' own code converts a tensor and
its scales to one bfloat16 tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

METHODS = ("fp8", "mxfp4")  # supported values of quant_method in quantization_config
FP8_SCALE = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"
# tensor name -> file name, shape, safetensors' name of the dtype
Parts = dict[str, tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Packed:
    """A tensor that is stored as two tensors: values and scales."""

    values: str
    scales: str
    files: tuple[str, str]
    shape: tuple[int, ...]  # of the unpacked tensor

    def unpack(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The tensor in bfloat16."""
        if self.scales.endswith(FP8_SCALE):
            from transformers.integrations.finegrained_fp8 import Fp8Dequantize

            return Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(values, scales)


def packed(parts: Parts) -> dict[str, Packed]:
    """Name of an unpacked tensor -> its values and scales among a checkpoint's tensors. In ``parts``,
    the unpacked tensor replaces the two.
    """
    found: dict[str, Packed] = {}
    for name in list(parts):
        if name.endswith(FP8_SCALE) and (values := name.removesuffix(FP8_SCALE)) in parts:
            found[values] = Packed(values, name, (parts[values][0], parts[name][0]), parts[values][1])
        elif name.endswith(SCALES) and (values := name.removesuffix(SCALES) + BLOCKS) in parts:
            *lead, rows, groups, width = parts[values][1]
            found[name.removesuffix(SCALES)] = Packed(
                values, name, (parts[values][0], parts[name][0]), (*lead, 2 * groups * width, rows)
            )
    for name, pair in found.items():
        for source in (pair.values, pair.scales):
            parts.pop(source, None)
        parts[name] = pair.files[0], pair.shape, "BF16"
    return found


def without_quantisation(config: Mapping[str, object]) -> dict[str, object]:
    """The content of config.json for the unpacked weights."""
    return {name: value for name, value in config.items() if name != "quantization_config"}
