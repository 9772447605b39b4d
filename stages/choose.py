"""Model-level gate: name the candidate that validation text prefers, so that a mixed allocation can fall back to a uniform one."""

from pathlib import Path

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.evaluation.choice import ChooseParams, check, choose


@click.command(help=__doc__)
def main() -> None:
    with runtime.stage() as tell:
        settings = params.load(ChooseParams, "choose")
        check(settings, list(params.section("variants") or {}))
        perplexities = {name: artifacts.read_json(Path(f"build/evaluate/{name}.json"))["perplexity"] for name in settings.candidates}
        chosen = choose(settings, perplexities)
        found = {name: perplexities[name][settings.text] for name in settings.candidates}
        artifacts.write_json(Path("build/choice.json"), {"text": settings.text, "chosen": chosen, "perplexity": found})
        listed = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        tell(f"choose: {chosen} on {settings.text} ({listed})" if chosen else "choose: no candidates")


if __name__ == "__main__":
    main()
