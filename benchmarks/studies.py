"""The studies: ``python -m benchmarks.studies run|table|verify STUDY``.

``run sparsity --only testbed=llama --only seed=0`` computes the missing cells. ``verify sparsity
--cell "llama,unstructured,0.5,predicted,obs,0"`` computes one recorded cell again and compares;
without ``--cell``, it takes random ones.
"""

import math
import statistics as stats
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from benchmarks.harness import EIGHT_EPOCHS, PATTERNS, TEXTS, UNIFORM, Cell, Record, Study, pruned, selection
from benchmarks.lab import Changes, Lab, Run
from benchmarks.rivals import STUDIES as RIVALS
from benchmarks.testbed import NAMES
from pipeline_lib.core.params import merge
from pipeline_lib.recipe.settings import Recipe
from pipeline_lib.solve.size import DENSE_BITS, packed_bits

# Sparsity Induction: every base and pattern without induction, and with it (start, learning, gate)
# and channel compensation.
BASES: dict[str, Changes] = {
    "magnitude": {"selection": {"score": "magnitude", "group": "matrix"}, "reconstruction": {"steps": []}},
    "wanda": {"selection": {"score": "wanda", "group": "row"}, "reconstruction": {"steps": []}},
    "sparsegpt": {"selection": {"score": "obs", "group": "block"}, "reconstruction": {"steps": ["obs"]}},
}


def induction() -> Iterator[Cell]:
    for seed in range(3):
        for pattern in PATTERNS if seed == 0 else (name for name in PATTERNS if name != "4:8"):
            for base, changes in BASES.items():
                without = merge(selection(pattern), changes)
                induced = merge(
                    without,
                    {
                        "induce": {},
                        "reconstruction": {
                            "steps": [*changes["reconstruction"]["steps"], "finetune_channels"]
                        },
                    },
                )
                for testbed in NAMES:
                    key = {"testbed": testbed, "base": base, "pattern": pattern, "seed": seed}
                    yield Cell(key, {"without": without, "with": induced})


# Allocations and scores: the OBS sweep in column blocks. Combinations are chosen on validation
# text; the other texts are only reported.
ALLOCATIONS: dict[str, Changes] = {
    "uniform": {"method": "uniform"},
    "layer": {"method": "layer", "alpha": 0.15},
    "weight": {"method": "weight", "alpha": 0.15},
    "predicted": {"method": "predicted", "weighting": "kronecker", "temper": 0.75, "alpha": 0.2},
}
OTHERS: dict[str, Changes] = {  # one seed
    **{
        f"{method}-{alpha:g}": {"method": method, "alpha": alpha}
        for method in ("layer", "weight")
        for alpha in (0.1, 0.2)
    },
    **{
        f"predicted-{weighting}-{temper:g}-1": {
            "method": "predicted",
            "weighting": weighting,
            "temper": temper,
            "alpha": 1,
        }
        for weighting, temper in (("trace", 1), ("kronecker", 1), ("kronecker", 0.75))
    },
    "owl": {"method": "owl", "alpha": 0.08},  # its authors' lambda
    "dlp": {"method": "dlp", "alpha": 0.15},  # its authors' alpha
    "depth": {"method": "depth", "alpha": 0.15},
}
FREE = ("predicted-kronecker-1-1", "predicted-kronecker-0.75-1")  # N:M has no other density within 0.2 of 2:4
SPARSITIES = (0.5, 0.6, 0.7, 0.8)


def sparsity() -> Iterator[Cell]:
    def cell(testbed: str, pattern: str, share: float, allocation: str, score: str, seed: int) -> Cell:
        key = {
            "testbed": testbed,
            "pattern": pattern,
            "sparsity": share,
            "allocation": allocation,
            "score": score,
            "seed": seed,
        }
        chosen = {"score": score, "group": "block", "sparsity": share, "pattern": pattern}
        method = (ALLOCATIONS | OTHERS)[allocation]
        return Cell(
            key, {"ppl": {"selection": chosen, "allocation": method, "reconstruction": {"steps": ["obs"]}}}
        )

    for seed in range(3):
        for share in SPARSITIES:
            for testbed in NAMES:
                for score in ("obs", "isc"):
                    yield from (
                        cell(testbed, "unstructured", share, allocation, score, seed)
                        for allocation in ALLOCATIONS
                    )
    for testbed in NAMES:
        for share in SPARSITIES:
            yield from (cell(testbed, "unstructured", share, allocation, "obs", 0) for allocation in OTHERS)
            yield from (
                cell(testbed, "unstructured", share, allocation, "obd", 0) for allocation in ALLOCATIONS
            )
        for pattern in ("2:4", "4:8"):
            for score in ("obs", "isc", "obd"):
                yield from (
                    cell(testbed, pattern, 0.5, allocation, score, 0)
                    for allocation in ("uniform", "weight", *FREE)
                )


def select(records: list[Record]) -> None:
    """Mark, per testbed, pattern and sparsity, the combination with the least mean log perplexity
    on validation text, among those with most seeds.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = {}
    for r in records:
        r["selected"] = False
        combined = groups.setdefault((r["testbed"], r["pattern"], r["sparsity"]), {})
        combined.setdefault((r["allocation"], r["score"]), []).append(r)
    for combined in groups.values():
        most = max(map(len, combined.values()))

        def mean(key: tuple[Any, ...], combined: dict[tuple[Any, ...], list[Record]] = combined) -> float:
            return stats.mean(math.log(r["ppl"]) for r in combined[key] if r["text"] == "validation")

        for r in combined[min((key for key, found in combined.items() if len(found) == most), key=mean)]:
            r["selected"] = True


# Reconstruction: uniform 60%, SparseGPT's mask, then the remaining weights are reconstructed.
DENSE = {"statistics": "per_site", "dense_target": 1.0}
METHODS: dict[str, Changes] = {  # three seeds; changes to prune.reconstruction
    "sparsegpt": {},
    "asymmetric": {"steps": ["obs"], **DENSE},
    "lsq": {"steps": ["obs", "lsq"], **DENSE},
    "block": {"steps": ["obs", "finetune"]},
}
ONCE: dict[str, Changes] = {  # one seed
    "obs, site by site": {"steps": ["obs"], "statistics": "per_site"},
    "obs, reordered (ROSE)": {"steps": ["obs"], "reorder": 0.5},
    "obs, reordered always": {"steps": ["obs"], "reorder": 0.0},
    "lsq, pruned stream": {"steps": ["obs", "lsq"]},
    "lsq, pruned stream, ADMM mask": {"steps": ["obs", "lsq"], "lsq": {"mask_iterations": 45}},
    "lsq, half way": {"steps": ["obs", "lsq"], "statistics": "per_site", "dense_target": 0.5},
    "lsq, ADMM mask": {"steps": ["obs", "lsq"], **DENSE, "lsq": {"mask_iterations": 45}},
    "channel": {"steps": ["obs", "finetune_channels"]},
    "lsq, then channel": {"steps": ["obs", "lsq", "finetune_channels"], **DENSE},
    "lsq, then block": {"steps": ["obs", "lsq", "finetune"], **DENSE},
    "block, weights only": {"steps": ["obs", "finetune"], "finetune": {"parts": ["weights"]}},
    "block, with factors": {
        "steps": ["obs", "finetune"],
        "finetune": {"parts": ["weights", "biases", "norms", "factors"]},
    },
    "block, float32": {"steps": ["obs", "finetune"], "finetune": {"compute_dtype": "float32"}},
    "block, windows of 2": {"steps": ["obs", "finetune"], "finetune": {"window": 2}},
    "block, masks refreshed": {"steps": ["obs", "finetune"], "finetune": {"refresh_epochs": 2}},
    "block, 16 epochs": {"steps": ["obs", "finetune"], "finetune": {"epochs": 16}},
}


def reconstruction() -> Iterator[Cell]:
    def cell(testbed: str, method: str, seed: int) -> Cell:
        key = {"testbed": testbed, "pattern": "60%", "method": method, "seed": seed}
        changes = selection("60%", {"score": "obs", "group": "block"})
        return Cell(key, {"ppl": {**changes, **UNIFORM, "reconstruction": (METHODS | ONCE)[method]}})

    for seed in range(3):
        for testbed in NAMES:
            yield from (cell(testbed, method, seed) for method in METHODS)
    for testbed in NAMES:
        yield from (cell(testbed, method, 0) for method in ONCE)


# Quantisation: round to nearest, GPTQ, SparseGPT with GPTQ in its sweep, and the preset `best`, all
# on the same grid.
SWEEP: Changes = {
    "selection": {"score": "obs", "group": "block"},
    **UNIFORM,
    "reconstruction": {"steps": ["obs"]},
}
NEAREST = merge(SWEEP, {"reconstruction": {"steps": []}})
SYMMETRIC: Changes = {"quantization": {"symmetric": True}}
GRIDS: dict[tuple[str, int, str], Changes] = {  # method, bits, pruned; `ours` is the preset
    ("dense", 16, "none"): {},
    ("rtn", 4, "none"): NEAREST,
    ("gptq", 4, "none"): SWEEP,
    ("gptq", 3, "none"): SWEEP,
    ("sparsegpt", 4, "50%"): SWEEP,
    ("ours", 4, "50%"): {},
    ("sparsegpt", 4, "2:4"): SWEEP,
    ("ours", 4, "2:4"): UNIFORM,
    ("rtn, symmetric", 4, "none"): merge(NEAREST, SYMMETRIC),  # alternatives that were not chosen
    ("gptq, symmetric", 4, "none"): merge(SWEEP, SYMMETRIC),
    ("ours, no refit", 4, "50%"): {"quantization": {"refit": []}},
}


def quantization() -> Iterator[Cell]:
    for seed in range(3):
        for testbed in NAMES:
            for (method, bits, pattern), changes in GRIDS.items():
                key = {"testbed": testbed, "method": method, "bits": bits, "pattern": pattern, "seed": seed}
                grid = merge({"quantization": {"bits": bits, "group": 128, "symmetric": False}}, changes)
                share = {"selection": {"sparsity": 0.0}} if pattern == "none" else selection(pattern)
                ours = method.startswith("ours")
                whole = merge(merge(EIGHT_EPOCHS if ours else {}, grid), share)
                arms = {"ppl": None if method == "dense" else whole}
                yield Cell(key, arms, variant="best" if ours else None)


def size(lab: Lab, asked: Recipe | None, run: Run | None) -> Record:
    """Bytes of the prunable matrices: packed codes, scales and zero points, masks where something
    is pruned; and the rounding error.
    """
    entry = lab.bed.checkpoint.architecture
    shapes = {place: lab.bed.checkpoint.matrix_shape(*place) for place in entry.places()}
    sizes = [math.prod(shape) for shape in shapes.values()]
    bits, facts = DENSE_BITS * sum(sizes), {}
    if asked and run:
        found = {(index, m): run.blocks[index].facts["matrices"][m.label] for index, m in shapes}
        bits = sum(
            packed_bits(shape, found[place]["kept"], asked.quantization) for place, shape in shapes.items()
        )
        facts = {"rounding_error": stats.fmean([one["rounding_error"] for one in found.values()], sizes)}
    return facts | {"bytes": -(-bits // 8), "bits_per_weight": bits / sum(sizes)}


def sparsegpt(record: Record) -> Record:
    """The baseline of gaps."""
    return {"method": "sparsegpt"}


STUDIES = {
    study.name: study
    for study in (
        Study(
            "induction",
            induction,
            partial(pruned, texts=("test", "wikitext2")),
            columns=("testbed", "pattern"),
            base_value="without",
            values=("dense", "without", "with"),
            texts=("test", "wikitext2"),
        ),
        Study(
            "sparsity",
            sparsity,
            partial(pruned, texts=TEXTS),
            columns=("testbed", "pattern", "sparsity"),
            base=lambda record: {"allocation": "uniform", "score": "obs"},
            finish=select,
        ),
        Study(
            "reconstruction",
            reconstruction,
            partial(pruned, texts=TEXTS),
            base=sparsegpt,
            beside=("wall_s", "s"),
        ),
        Study(
            "quantization",
            quantization,
            partial(pruned, texts=TEXTS, facts=size),
            base=sparsegpt,
            beside=("bits_per_weight", "bits"),
        ),
        *RIVALS.values(),
    )
}


def show(study: Study, records: list[Record]) -> None:
    click.echo("\n\n".join([*(study.table(records, text) for text in study.texts), *study.more(records)]))


@click.group(help=__doc__)
def main() -> None:
    pass


asked = click.argument(
    "study", type=click.Choice(list(STUDIES)), callback=lambda context, parameter, name: STUDIES[name]
)


@main.command()
@asked
@click.option("--only", multiple=True, metavar="FIELD=VALUE", help="Only cells with this value of the key.")
@click.option("--missing", is_flag=True, help="Only cells that the record lacks.")
def run(study: Study, only: tuple[str, ...], missing: bool) -> None:
    """Compute every cell that has no file yet, and print the tables."""
    wanted = {name: value for name, _, value in (one.partition("=") for one in only)}
    fields = next(iter(study.every.values())).key
    if unknown := wanted.keys() - fields.keys():
        raise click.ClickException(
            f"{study.name} has no field {sorted(unknown)[0]!r}; fields: {', '.join(fields)}."
        )
    show(study, study.run(wanted, missing))


@main.command()
@asked
def table(study: Study) -> None:
    """Print the tables of the record."""
    show(study, study.recorded())


@main.command()
@asked
@click.option(
    "--cell", "names", multiple=True, help="A cell to verify: the fields of its key, separated by commas."
)
@click.option("--count", default=3, show_default=True, help="Number of random cells if none is named.")
@click.option("--seed", type=int, help="Seed of the random choice.")
def verify(study: Study, names: tuple[str, ...], count: int, seed: int | None) -> None:
    """Compute recorded cells anew and compare: perplexities must agree within 1%."""
    study.verify(names, count, seed)


if __name__ == "__main__":
    main()
