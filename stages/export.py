"""Write one variant as files that are as small as it is: dense, bitmask, compressed-tensors; and say how small."""

from functools import partial
from pathlib import Path

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.export.card import Measured, Pruned, card
from pipeline_lib.export.export import Variant, export
from pipeline_lib.export.settings import ExportParams
from pipeline_lib.models.source import MODEL, ModelParams, open_source


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    with runtime.stage(f"export-{variant}", Path(f"build/sizes/{variant}.json")) as tell:
        settings = params.parse(ExportParams, params.merged("export", f"exported.{variant}"), "export")
        source = open_source(params.load(ModelParams, "model"))
        facts = artifacts.read_json(Path(f"build/facts/{variant}.json"))
        pruned = Pruned(variant, artifacts.read_json(MODEL), facts)
        own, dense = (artifacts.read_json(Path(f"build/evaluate/{name}.json"))["perplexity"] for name in (variant, "dense"))
        written = partial(card, pruned, Measured(own, dense))
        pattern = facts["settings"]["selection"]["pattern"]
        left = Variant(variant, pattern, Path(f"build/prune/{variant}"))
        sizes = export(source, left, Path(f"build/export/{variant}"), settings.formats, written)
        artifacts.write_json(Path(f"build/sizes/{variant}.json"), sizes)
        told = ", ".join(f"{name} {one['bits']:.2f} bits per weight" for name, one in sizes["formats"].items())
        tell(f"export {variant}: {told}; in theory {sizes['theoretical_bits']:.2f}")


if __name__ == "__main__":
    main()
