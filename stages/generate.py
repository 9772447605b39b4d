"""Let the source model write a text of kind generated. Other texts need nothing."""

import click

from pipeline_lib.core import params, runtime
from pipeline_lib.core.workspace import Workspace
from pipeline_lib.models.settings import ModelParams


@click.command(help=__doc__)
@click.argument("name")
def main(name: str) -> None:
    workspace = Workspace()
    with runtime.stage(f"generate-{name}", workspace.generated(name)) as tell:
        params.check_name("text", name)
        written = params.section(f"texts.{name}")
        if isinstance(written, dict) and written.get("kind") != "generated":
            workspace.save(workspace.generated(name), {})
            tell(f"generate {name}: nothing to do, because the model does not write this text")
            return
        from pipeline_lib.jobs.generate import generate
        from pipeline_lib.texts.texts import TextParams

        text = params.load(TextParams, f"texts.{name}")
        assert text.generated is not None  # validated
        tell(
            f"generate {name}:"
            f" {generate(workspace, params.load(ModelParams, 'model'), name, text, text.generated)}"
        )


if __name__ == "__main__":
    main()
