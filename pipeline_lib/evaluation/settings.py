"""Section ``evaluate``."""

from typing import Literal

from pydantic import Field

from pipeline_lib.core.params import Params
from pipeline_lib.evaluation.completions import CompletionsParams


class EvaluateParams(Params):
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    batch_rows: int = Field(ge=1)
    completions: CompletionsParams
