"""Sizes of pruned and quantised weights."""

from pipeline_lib.solve.settings import QuantizationParams

# bits of a weight that is not quantised, and of a scale, in checkpoints of 16-bit dtypes
DENSE_BITS = 16


def packed_bits(shape: tuple[int, int], kept: int, how: QuantizationParams) -> int:
    """Bits of one matrix [R, C]: ``bits`` per kept weight, one bit per weight for the mask (unless all
    are kept), and per group a scale (and, if asymmetric, ``bits`` for a zero point).

    Without quantisation a kept weight takes 16 bits.
    """
    rows, columns = shape
    mask = 0 if kept == rows * columns else rows * columns
    if how.bits is None:
        return mask + DENSE_BITS * kept
    groups = rows * (1 if how.group == "row" else -(-columns // how.group))
    return mask + how.bits * kept + groups * (DENSE_BITS + (0 if how.symmetric else how.bits))
