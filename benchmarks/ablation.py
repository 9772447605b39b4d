"""What each part of Sparsity Induction brings: ``python -m benchmarks.ablation`` (resumable row by row, validation text, one seed).

Per row: share of mask entries changed against the plain base, mean layer error (E‖ΔW X‖²/E‖W X‖² on the pruned stream) and, where there is
one, what the gate chose; perplexity and the gap closed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.induction import BASES, Bench, Recipe, gap
from benchmarks.records import commit, recorded
from benchmarks.testbed import NAMES, Testbed
from benchmarks.twins import differing
from pipeline_lib.core.artifacts import write_json

RESULTS = Path(__file__).parent / "results" / "ablation.json"
TEXT = "validation"


def start(**scale: Any) -> dict[str, Any]:
    return {"induce": True, "ungated": True, "changes": {"scale": scale}}


def learned(scale: dict[str, Any] | None = None, couplings: tuple[str, ...] = ("norm", "pair", "q_k"), **induce: Any) -> dict[str, Any]:
    """Learning that sets out from the identity, with only what is named."""
    changes = {"scale": {"start": "identity", **(scale or {})}, "induce": induce}
    return {"induce": True, "changes": changes, "couplings": couplings}


def spectral(weight: float, order: str = "spectral") -> dict[str, Any]:
    return {"weight": weight, "order": order}


def channel(*parts: str, **settings: Any) -> dict[str, Any]:
    return {"channel": True, "changes": {"prune": {"reconstruction": {"channel": {"parts": list(parts), **settings}}}}}


ROWS: dict[str, dict[str, Any]] = {
    "base": {},
    "start eq5, ungated": start(start="eq5"),
    "start maximum^0.5, ungated": start(start="maximum", power=0.5),
    "start second_moment, pairs inputs, ungated": start(pairs="inputs"),
    "start second_moment, pairs balance, ungated": start(),
    "the same, gated": {"induce": True, "changes": {"induce": {"factors": False, "importance": False}}},
    "shifts, ungated": start(start="identity", shift="mean"),
    "shifts, gated": learned({"shift": "mean"}, factors=False, importance=False),
    "scales learned": learned(couplings=("norm", "pair"), importance=False, spectral=spectral(0)),
    "Q/K factors learned": learned(couplings=("q_k",), importance=False, spectral=spectral(0)),
    "scales and Q/K with R_2, lambda 1": learned(importance=False, spectral=spectral(1.0)),
    "scales and Q/K with R_F, lambda 1": learned(importance=False, spectral=spectral(1.0, "frobenius")),
    "selection weights learned": learned(factors=False, spectral=spectral(0)),
    "induction (all above, as shipped)": {"induce": True},
    "compensation: norms' weights": channel("norms"),
    "compensation: biases": channel("biases"),
    "compensation: factors": channel("factors"),
    "compensation: factors and biases": channel("factors", "biases"),
    "the same with R_2, lambda 0.01": channel("factors", "biases", spectral=spectral(0.01)),
    "induction and compensation (as shipped)": {"channel": True, "induce": True},
}


def table(base: str, pattern: str) -> str:
    """Markdown, ``llama / opt`` in every cell, in percent. Error removed: of the layers against the plain base, and of the blocks by the fit."""
    found = {(r["testbed"], r["row"]): r for r in recorded(RESULTS) if (r["base"], r["pattern"]) == (base, pattern)}

    def cell(row: str, value: Callable[[dict[str, Any], dict[str, Any]], float | None]) -> str:
        values = [value(found[name, row], found[name, "base"]) if (name, row) in found else None for name in NAMES]
        return " / ".join("–" if v is None else f"{100 * v:.1f}" for v in values) if any(v is not None for v in values) else ""

    lines = [f"| {base}, {pattern} | masks changed | layer error removed | block error removed | gap closed |", "|---" * 5 + "|"]
    for row in ROWS:
        masks = cell(row, lambda r, _: r["mask_changed"])
        layers = cell(row, lambda r, plain: 1 - r["layer_error"] / plain["layer_error"])
        blocks = cell(row, lambda r, _: 1 - r["block_error"]["after"] / r["block_error"]["before"] if r["block_error"] else None)
        lines.append(f"| {row} | {masks} | {layers} | {blocks} | {cell(row, lambda r, _: r['gap_closed'])} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--pattern", default="60%", show_default=True)
@click.option("--testbed", type=click.Choice(NAMES), help="Only this one.")
def main(pattern: str, testbed: str | None) -> None:
    for name in NAMES if testbed is None else (testbed,):
        bench = Bench(Testbed(name))
        for base in BASES:
            plain = None
            for row, settings in ROWS.items():
                key = {"testbed": name, "base": base, "pattern": pattern, "row": row}
                if any(all(record[k] == v for k, v in key.items()) for record in recorded(RESULTS)):
                    continue
                if row == "compensation: biases" and name == "llama":
                    continue  # it has none
                bench.at(0)
                plain = plain or bench.run(Recipe(base, pattern), (TEXT,))
                run, ppl = plain if row == "base" else bench.run(Recipe(base, pattern, **settings), (TEXT,))
                facts = [matrix for block in run.blocks.values() for matrix in block.facts["matrices"].values()]
                record = {**key, "ppl": ppl[TEXT], "gap_closed": gap(plain[1][TEXT], ppl[TEXT], bench.dense[TEXT]), "commit": commit()}
                record["mask_changed"] = differing(plain[0].blocks, run.blocks)
                record["layer_error"] = sum(matrix["layer_error"] for matrix in facts) / len(facts)
                record["chosen"] = "".join(outcome.choice[0] for outcome in run.outcomes)
                fits = [block.facts["channel"] for block in run.blocks.values() if "channel" in block.facts]
                record["block_error"] = (
                    {w: sum(f[f"held_out_{w}"] for f in fits) / len(fits) for w in ("before", "after")} if fits else None
                )
                write_json(RESULTS, [*recorded(RESULTS), record])  # read again: another testbed may run beside this one
                click.echo(f"{name} {base} {row}: {record['gap_closed']:.1%}, masks {record['mask_changed']:.2%} {record['chosen']}")
    for base in BASES:
        click.echo("\n" + table(base, pattern))


if __name__ == "__main__":
    main()
