"""Both papers' tables for one of their models: ``python -m benchmarks.papers MODEL --out DIRECTORY``.

MODEL is a name on the hub (facebook/opt-125m, meta-llama/Llama-2-7b-hf, ...) or a directory. The
command creates a project in DIRECTORY, runs it, and prints the tables. All variants are in its
params.yaml; the same command resumes.

Both papers calibrate on 128 samples of 2,048 tokens of C4's first shard and measure perplexity on
WikiText-2. The first table is that of 2602.21652: Magnitude, Wanda and SparseGPT at 50% and 2:4,
each without and with Sparsity Induction, and the mean accuracy of six tasks. The second is that of
2310.09499: uniform and mixed sparsity with both scores, higher sparsities, 4-bit weights, and the
mean of four tasks. Its third text, PTB, is left out: on the hub it is a script, which the library
`datasets` no longer runs.

``--trial`` takes the embedded texts and tasks instead, with short samples: it needs no hub.
"""

import io
import statistics as stats
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from benchmarks.harness import selection
from benchmarks.real import INDUCED, INDUCTION
from benchmarks.studies import BASES
from pipeline_lib.command import layout, project
from pipeline_lib.command.choices import EMBEDDED, Choices, chosen
from pipeline_lib.core import runtime
from pipeline_lib.core.params import merge
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.metrics import ordered

C4_ROWS = 256  # samples of the first validation file, as SparseGPT and Wanda measure C4
SWEEP = {"reconstruction": {"steps": ["obs"]}}
ISC = {"selection": {"score": "isc"}}
MIXED = {"allocation": {"method": "weight"}}
FOUR_BITS = {"quantization": {"bits": 4, "group": 128}}
PAPER = merge(ISC, MIXED)


def first() -> dict[str, Any]:
    """The variants of 2602.21652, each beside its base."""
    return {
        f"{base}{short}-{share}": merge(
            merge(selection(pattern), INDUCTION[f"{base}{more}"].changes), {"tasks": ["induction"]}
        )
        for pattern, share in (("50%", "50"), ("2:4", "2of4"))
        for base in BASES
        for more, short in (("", ""), (INDUCED, "-induced"))
    }


def second() -> dict[str, Any]:
    """The variants of 2310.09499, without uniform OBS at 50%: that is the first paper's SparseGPT."""
    told: dict[str, Mapping[str, Any]] = {
        "uniform-isc-50": merge(selection("50%"), ISC),
        "mixed-obs-50": merge(selection("50%"), MIXED),
        "mixed-isc-50": merge(selection("50%"), PAPER),
    }
    for pattern in ("60%", "70%", "80%"):
        told[f"uniform-obs-{pattern[:2]}"] = selection(pattern)
        told[f"mixed-isc-{pattern[:2]}"] = merge(selection(pattern), PAPER)
    told |= {
        "gptq-4": {"selection": {"sparsity": 0}, **FOUR_BITS},
        "gptq-3": {"selection": {"sparsity": 0}, "quantization": {"bits": 3, "group": 128}},
        "uniform-obs-50-gptq-4": merge(selection("50%"), FOUR_BITS),
        "mixed-isc-50-gptq-4": merge(merge(selection("50%"), PAPER), FOUR_BITS),
    }
    return {name: merge(SWEEP, changes) | {"tasks": ["sensitivity"]} for name, changes in told.items()}


def params(shipped: Mapping[str, Any], trial: bool) -> dict[str, Any]:
    """The parameters of the project, from those of `sparseline prune`."""
    calibration, validation, test = (shipped["texts"][name] for name in ("calibration", "validation", "test"))
    size = {} if trial else {"length": 2048}
    texts = {"calibration": calibration | size | {"rows": 128, "training": 0}}
    if trial:
        texts |= {"c4": validation, "wikitext2": test}
    else:
        texts |= {
            "c4": test | size | {"name": "c4", "rows": C4_ROWS},
            "wikitext2": test | size | {"rows": None},
        }
    variants = first() | second()
    variants["sparsegpt-50"]["tasks"].append("sensitivity")
    if trial:
        variants |= {name: how | {"tasks": [EMBEDDED]} for name, how in variants.items()}
    own = {
        "evaluate": {"completions": {"text": "c4", "prompt_tokens": 64, "count": 1}},
        "choose": {"text": "c4"},
        "report": {"baseline": "sparsegpt-50", "title": "Both papers' tables"},
    }
    return merge(dict(shipped), own) | {"texts": texts, "variants": variants}


def tables(workspace: Workspace, trial: bool) -> str:
    """Both tables in Markdown."""
    heads = (*(("test", "validation") if trial else ("WikiText-2", "C4")), "tasks")
    names = {
        "2602.21652": ("induction", first()),
        "2310.09499": ("sensitivity", {"sparsegpt-50": {}} | second()),
    }
    lines = []
    for paper, (preset, variants) in names.items():
        lines += [f"| {paper} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        lines += [_row(workspace, name, EMBEDDED if trial else preset) for name in (DENSE, *variants)]
        lines.append("")
    return "\n".join(lines)


def _row(workspace: Workspace, name: str, preset: str) -> str:
    """Perplexities, and the mean accuracy of a preset's tasks in percent."""
    found = workspace.load(workspace.evaluation(name))["perplexity"]
    accuracies = [
        100 * told["metrics"][ordered(told["metrics"])[0]]["value"]
        for told in workspace.load(workspace.tasks(name))[preset].values()
    ]
    cells = [*(found[text] for text in ("wikitext2", "c4")), stats.fmean(accuracies)]
    return f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


@click.command(help=__doc__)
@click.argument("model")
@click.option("--out", "directory", type=click.Path(path_type=Path), required=True, help="Of the project.")
@click.option("--revision", help="Commit of a model from the hub. Default: the newest one.")
@click.option("--trial", is_flag=True, help="The embedded texts and tasks.")
def main(model: str, directory: Path, revision: str | None, trial: bool) -> None:
    with runtime.told():
        asked = Choices(model, revision, "best", None, None, None if trial else "c4-train")
        wanted = chosen(layout.shipped(), asked)
        yaml, text = YAML(typ="safe"), io.StringIO()
        yaml.dump(params(yaml.load(wanted[layout.PARAMS].decode()), trial), text)
        layout.lay_out(directory, wanted | {layout.PARAMS: text.getvalue().encode()})
        project.settle(directory)
        if code := project.run(directory):
            raise click.exceptions.Exit(code)
    click.echo(f"\n{tables(Workspace(directory), trial)}")


if __name__ == "__main__":
    main()
