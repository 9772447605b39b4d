"""Bytes of the exported files beside quality, as columns and sentences."""

from pipeline_lib.export import wording
from pipeline_lib.reporting import table
from pipeline_lib.reporting.table import ABSENT, Column, Results, Variant

MATRICES, FILES = "pruned matrices", "all weights"  # groups of columns
PACKED = "compressed-tensors"


def exported(results: Results) -> list[Variant]:
    """The pruned variants that have an export stage."""
    return [variant for variant in results.pruned if variant.sizes]


def smallest(variant: Variant) -> str:
    """Name of the format that takes the fewest bits per weight."""
    return min(variant.sizes["formats"], key=lambda name: variant.sizes["formats"][name]["bits"])


def columns(results: Results) -> list[Column]:
    """A row for the dense model, then one per variant and format."""
    source = results.dense.sizes["formats"]["dense"]
    rows = [(v, name, found) for v in (results.dense, *exported(results)) for name, found in v.sizes["formats"].items()]
    text = results.main_text
    shown = [
        Column("", "variant", tuple(variant.name for variant, _, _ in rows), numeric=False),
        Column("", "format", tuple(name for _, name, _ in rows), numeric=False),
    ]
    for group, key in ((MATRICES, "matrix_bytes"), (FILES, "file_bytes")):
        shown.append(Column(group, "bytes", tuple(wording.size(found[key]) for _, _, found in rows)))
        shown.append(Column(group, "of dense", tuple(f"{found[key] / source[key]:.3f}" for _, _, found in rows)))
    shown.append(Column("bits per weight", "stored", tuple(f"{found['bits']:.3f}" for _, _, found in rows)))
    shown.append(Column("bits per weight", "theory", tuple(f"{variant.sizes['theoretical_bits']:.3f}" for variant, _, _ in rows)))
    if text is not None:
        cells = tuple(wording.perplexity(v.perplexity[text]) if text in v.perplexity else ABSENT for v, _, _ in rows)
        shown.append(Column(table.PERPLEXITY + text, "ppl", cells))
    return shown


def explanation(results: Results) -> str:
    """How to read the columns, and what the formats do not do."""
    said = (
        "Pruned matrices: all that a format stores for the parameters that hold them, masks and scales included. All weights: the whole safetensors files, with embeddings, head "
        "and headers. Theory is H(p) + (1 − p)·b bits per weight, p the share of zeros in each of these parameters (the dense row takes none for zero) and b the bits of a stored weight: a lossless code "
        "of independent zeros gets no shorter; scales come on top. Perplexity is the variant's, the same in every format; rows of equal bits compare "
        "quality at equal bytes. `dense` stores zeros like any weight, so that pruning makes it no smaller."
    )
    if any(PACKED in variant.sizes["formats"] for variant in exported(results)):
        said += f" So does `{PACKED}`: it is no smaller than the same quantisation without pruning."
    if left := [variant.name for variant in results.pruned if not variant.sizes]:
        said += f" Not exported, so not weighed: {', '.join(f'`{name}`' for name in left)}."
    return said
