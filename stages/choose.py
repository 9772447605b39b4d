"""Model-level gate: name the candidate that validation text prefers, so that a mixed allocation can
fall back to a uniform one.
"""

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
        tell(f"choose: {chosen} on {part.text} ({listed})" if chosen else "choose: no candidates")


if __name__ == "__main__":
    main()
