"""The report's first screen: which variant to take, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline_lib.export import wording
from pipeline_lib.reporting import table
from pipeline_lib.reporting.table import Column, Results, Variant

TIMES = 1.5  # from this ratio on, perplexities are compared as "2.1 times", not "110% above"


@dataclass(frozen=True)
class Size:
    """Bytes of all weights of a model in the smallest format."""

    bytes: int
    format: str
    measured: bool  # else computed, since the variant is not exported in that format

    def __str__(self) -> str:
        return ("" if self.measured else "≈ ") + wording.size(self.bytes)


def recommended(results: Results) -> Variant | None:
    """The variant that the stage ``choose`` selected. Without candidates, it is the one with the
    lowest perplexity on the text of ``choose`` (or on the main text).
    """
    named = next((one for one in results.pruned if one.name == results.choice["chosen"]), None)
    wanted, texts = results.choice["text"], results.text_names
    text = wanted if wanted in texts else results.main_text
    if named or text is None or not results.pruned:
        return named
    return min(results.pruned, key=lambda variant: variant.perplexity[text])


def size(results: Results, variant: Variant) -> Size | None:
    """The smallest exported file, or the computed size of a bitmask file if that is smaller.

    None if the size of the dense model is unknown.
    """
    dense = results.dense.sizes.get("formats", {}).get("dense")
    if dense is None:
        return None
    formats = variant.sizes.get("formats", {})
    found = [Size(one["file_bytes"], name, True) for name, one in formats.items()]
    if variant.facts and "bitmask" not in formats:
        saved = variant.facts["prunable"] * (dense["bits"] - _bits(variant, dense["bits"])) / 8
        found.append(Size(round(dense["file_bytes"] - saved), "bitmask", False))
    return min(found, key=lambda one: one.bytes, default=None)


def _bits(variant: Variant, stored: float) -> float:
    """Bits per prunable weight: one for the mask and ``stored`` for each weight that is not zero."""
    if variant.facts["quantization"]:
        return float(variant.facts["quantization"]["bits_per_weight"])
    return min(stored, 1 + stored * (1 - (variant.zeros or 0.0)))


def headline(results: Results) -> str:
    """One sentence: the variant to take, its quality, and its size."""
    taken, text = recommended(results), results.main_text
    if taken is None or text is None:
        return "There is no pruned variant to recommend." if not results.pruned else "No text was evaluated."
    own, dense = taken.perplexity[text], results.dense.perplexity[text]
    said = (
        f"Take `{taken.name}`: its perplexity on `{text}` is {wording.perplexity(own)},"
        f" {_against(own, dense)} {wording.perplexity(dense)}"
    )
    small, whole = size(results, taken), size(results, results.dense)
    if small is None or whole is None:
        return f"{said}."
    takes = "take" if small.measured else "would take"
    return (
        f"{said}, and its weights {takes} {wording.size(small.bytes)} (`{small.format}`) instead of"
        f" {wording.size(whole.bytes)}."
    )


def _against(own: float, dense: float) -> str:
    if wording.perplexity(own) == wording.perplexity(dense):
        return "the same as the dense model's"
    ratio = own / dense
    if ratio >= TIMES:
        return f"{ratio:.1f} times the dense model's"
    return f"{abs(100 * (ratio - 1)):.1f}% {'above' if ratio > 1 else 'below'} the dense model's"


def details(results: Results) -> str:
    """What was pruned, and why this variant is recommended."""
    model, count = results.model, len(results.pruned)
    variants = {0: "no pruned variant", 1: "1 pruned variant"}.get(count, f"{count} pruned variants")
    said = [
        f"Model: `{model.get('id') or model['path']}` ({model['family']}, {model['parameters']:,} parameters,"
        f" {model['dtype']}); {variants}."
    ]
    taken, choice = recommended(results), results.choice
    if taken is None:
        return said[0]
    if taken.name == choice["chosen"]:
        candidates = table.quoted(one.name for one in results.pruned if one.name in choice["perplexity"])
        several = len(choice["perplexity"]) > 1
        said.append(
            f"Of the candidates {candidates}, it has the lowest perplexity on `{choice['text']}`."
            if several
            else "It is the only candidate."
        )
        text = choice["text"] if choice["text"] in results.text_names else results.main_text
        better = [
            one.name
            for one in results.pruned
            if text and one.name not in choice["perplexity"] and one.perplexity[text] < taken.perplexity[text]
        ]
        if better:
            said.append(f"Lower, but not a candidate: {table.quoted(better)}.")
    else:
        said.append("No variant is a candidate; this one has the lowest perplexity.")
    verdict = table.verdicts(results)[taken.name]
    if verdict.findings:
        said.append(f"Verdict: {verdict.word}.")
    return " ".join(said)


def columns(results: Results, spent: Sequence[Column] = ()) -> list[Column]:
    """One row per model: size, quality on the main text and, where known, what it cost."""
    variants, text, taken = results.variants, results.main_text, recommended(results)
    names = [variant.name for variant in variants]
    row = frozenset() if taken is None else frozenset({names.index(taken.name)})
    found = [
        Column("", "variant", tuple(names), row, numeric=False),
        Column("", "pruned", tuple(f"{100 * variant.sparsity:.3g}%" for variant in variants)),
    ]
    sizes = [size(results, variant) for variant in variants]
    if all(sizes):
        found.append(Column("", "size", tuple(map(str, sizes))))
    if text is not None:
        dense = results.dense.perplexity[text]
        own = [variant.perplexity[text] for variant in variants]
        found.append(table.ranked("", "perplexity", own, wording.perplexity, min))
        rise = [f"{100 * (one / dense - 1):+.1f}%" for one in own[1:]]
        found.append(Column("", "vs dense", (table.ABSENT, *rise)))
        gaps = [table.gap_closed(results, variant, text) for variant in variants]
        if any(gap is not None for gap in gaps):
            found.append(table.gap_column("", results, gaps))
    known = any(cell != table.ABSENT for column in spent for cell in column.cells)
    return found + [Column("", one.head, one.cells, one.best) for one in spent if known]


def spent(results: Results, columns: Sequence[Column]) -> str:
    """A sentence on what the recommended variant cost on this machine; empty if that is unknown."""
    taken = recommended(results)
    if taken is None:
        return ""
    row = [variant.name for variant in results.variants].index(taken.name)
    cost = {column.head: column.cells[row] for column in columns}
    if table.ABSENT in (cost["seconds"], cost["peak GB"]):
        return ""
    return f"Pruning took {cost['seconds']} seconds and {cost['peak GB']} GB of memory on this machine."
