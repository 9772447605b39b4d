"""Measure one saved checkpoint: perplexity per text, sample completions. ``dense`` is the source itself."""

from functools import partial
from pathlib import Path

import click

from pipeline_lib.core import artifacts, params, runtime
from pipeline_lib.core.errors import SparselineError
from pipeline_lib.core.progress import track
from pipeline_lib.evaluation.completions import complete
from pipeline_lib.evaluation.perplexity import perplexity
from pipeline_lib.evaluation.settings import EvaluateParams
from pipeline_lib.evaluation.subject import open_subject

TEXTS = Path("build/texts/evaluate")


@click.command(help=__doc__)
@click.argument("variant")
def main(variant: str) -> None:
    with runtime.stage(f"evaluate-{variant}", Path(f"build/evaluate/{variant}.json")) as tell:
        settings = params.load(EvaluateParams, "evaluate")
        model, tokenizer = open_subject(variant, settings.compute_dtype)
        texts = {path.stem: artifacts.read_tensors(path)[0]["rows"] for path in sorted(TEXTS.glob("*.safetensors"))}
        if settings.completions.text not in texts:
            raise SparselineError(
                f"params.yaml: evaluate.completions.text = {settings.completions.text!r} is no text with use: evaluate; "
                f"of texts, these are: {', '.join(texts) or 'none'}."
            )
        perplexities = {}
        for name, rows in texts.items():
            watched = partial(track, what=f"evaluate {variant}, {name}", units="batches")
            perplexities[name] = perplexity(model, rows, settings.batch_rows, watched)
        watched = partial(track, what=f"evaluate {variant}, completions", units="tokens")
        completions = complete(model, tokenizer, texts[settings.completions.text], settings.completions, watched)
        artifacts.write_json(Path(f"build/evaluate/{variant}.json"), {"perplexity": perplexities})
        artifacts.write_json(Path(f"build/completions/{variant}.json"), completions)
        tell(f"evaluate {variant}: {', '.join(f'perplexity {name} {value:.3f}' for name, value in perplexities.items())}")


if __name__ == "__main__":
    main()
