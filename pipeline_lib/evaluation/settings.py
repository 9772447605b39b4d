"""Parameters of the evaluation of saved checkpoints."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from pipeline_lib.core import params
from pipeline_lib.core.params import Params
from pipeline_lib.recipe import names


class CompletionsParams(Params):
    """The text whose first samples are completed, and the lengths."""

    text: str  # name in section `texts`
    count: int = Field(ge=0)  # rows
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)


class EvaluateParams(Params):
    """Section ``evaluate``."""

    compute_dtype: Literal["float32", "bfloat16", "float16"]
    batch_rows: int = Field(ge=1)
    reverse_kl: bool
    completions: CompletionsParams


class EvaluatePart(Params):
    """The parameters of ``evaluate``, for every variant and the source model."""

    evaluate: EvaluateParams
    texts: list[str]

    @classmethod
    def read(cls) -> Self:
        """The section of params.yaml.

        Raises:
            SparselineError: the text of the completions is not evaluated.
        """
        found = cls(evaluate=params.load(EvaluateParams, "evaluate"), texts=names.texts_of("evaluate"))
        names.check_evaluated("evaluate.completions.text", found.evaluate.completions.text)
        return found


class TasksParams(Params):
    """Section ``tasks``: how tasks are run."""

    path: Path  # folder of local task definitions (YAML, with the data beside them)
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    batch_rows: int = Field(ge=1)


class Preset(Params):
    """Section ``presets.<name>``: tasks that are measured together."""

    names: list[str]  # local tasks, or lm-eval's own, which need the network or a filled cache
    limit: int | None = Field(ge=2)  # items of each task; a standard error needs two
    # examples before each item; lm-eval keeps 0 for tasks that state it, as the embedded ones do
    shots: int = Field(ge=0)
    seed: int  # choice of the examples
    chat_template: bool  # prompts as chats, in the model's own template
    system: str | None  # text before every prompt; with ``chat_template`` in the role ``system``


class ChooseParams(Params):
    """Section ``choose``."""

    text: str


class VerdictParams(Params):
    """Section ``verdict``: upper limits for the results of a pruned model; None: no limit."""

    perplexity_ratio: float | None = Field(gt=0)  # to the dense model's, on every evaluation text
    kl: float | None = Field(ge=0)  # mean KL(dense ‖ pruned) in nats per token, on every evaluation text
    # below the dense model's, in units of the difference's standard error, on every task
    accuracy_drop: float | None = Field(ge=0)
