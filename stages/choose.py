"""Choose the candidate with the lowest perplexity on validation text."""

import click

from pipeline_lib.core import runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.choice import choose
from pipeline_lib.jobs import keys
from pipeline_lib.recipe.variants import read_all


@click.command(help=__doc__)
def main() -> None:
    workspace = Workspace()
    with runtime.stage() as tell:
        part = keys.choose(read_all())
        found = {
            name: workspace.load(workspace.evaluation(name))["perplexity"][part.text]
            for name in part.candidates
        }
        chosen = choose(found)
        workspace.save(workspace.choice, {"text": part.text, "chosen": chosen, "perplexity": found})
        listed = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        told = f"{chosen} has the lowest perplexity on {part.text} ({listed})"
        tell(f"choose: {told if chosen else 'nothing to do, because there are no candidates'}")


if __name__ == "__main__":
    main()
