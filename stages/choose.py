"""Model-level gate: name the candidate that validation text prefers, so that a mixed allocation can fall back to a uniform one."""

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.evaluation.choice import choose
from pipeline_lib.evaluation.settings import ChooseParams
from pipeline_lib.recipe.variants import read_all


@click.command(help=__doc__)
def main() -> None:
    workspace = Workspace()
    with runtime.stage() as tell:
        text = params.load(ChooseParams, "choose").text
        candidates = [name for name, variant in read_all().items() if variant.candidate]
        perplexities = {name: artifacts.read_json(workspace.evaluation(name))["perplexity"] for name in candidates}
        chosen = choose(text, perplexities)
        found = {name: perplexities[name][text] for name in candidates}
        artifacts.write_json(workspace.choice, {"text": text, "chosen": chosen, "perplexity": found})
        listed = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        tell(f"choose: {chosen} on {text} ({listed})" if chosen else "choose: no candidates")


if __name__ == "__main__":
    main()
