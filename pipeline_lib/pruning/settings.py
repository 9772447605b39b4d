"""Parameters of the choice of a mask, shared by induction (mask in the loop) and pruning."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline_lib.core.params import Conflict, Params
from pipeline_lib.pruning.patterns import Group, Pattern
from pipeline_lib.pruning.scores import Score
from pipeline_lib.reconstruction.obs import DampingOf


def _valid_pattern(text: str) -> str:
    Pattern.parse(text)
    return text


class SelectionParams(Params):
    """Section ``prune.selection``, with ``variants.<name>.selection`` laid over it."""

    sparsity: float = Field(ge=0, lt=1)
    pattern: Annotated[str, AfterValidator(_valid_pattern)]
    score: Score
    group: Group
    block: int = Field(ge=1)
    damping: float = Field(gt=0, le=1)
    damping_of: DampingOf

    @property
    def shape(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @model_validator(mode="after")
    def _agree(self) -> Any:
        pattern = Pattern.parse(self.pattern)
        if pattern.m and abs(self.sparsity - (1 - pattern.n / pattern.m)) > 1e-9:
            wanted = 1 - pattern.n / pattern.m
            reason = f"pattern {self.pattern} keeps {pattern.n} of {pattern.m}, so sparsity must be {wanted:g}, not {self.sparsity:g}"
            raise Conflict(reason, "pattern", "sparsity")
        return self


Step = Literal["obs", "lsq", "channel", "block"]
STEPS: tuple[Step, ...] = get_args(Step)


class StepsParams(Params):
    """What of ``prune.reconstruction`` says which steps there are."""

    steps: list[Step]

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: list[Step]) -> list[Step]:
        if steps != [step for step in STEPS if step in steps]:
            raise ValueError(f"each step once, in the order {', '.join(STEPS)}: masks come before what fits the weights that are left")
        return steps


class LsqParams(Params):
    """Section ``prune.reconstruction.lsq``."""

    iterations: int = Field(ge=1)
    tolerance: float = Field(gt=0, lt=1)
    mask_iterations: int = Field(ge=0)
    mask_penalty: float = Field(gt=0)


class LayerwiseParams(StepsParams):
    """What of ``prune.reconstruction`` concerns one matrix at a time."""

    collect: Literal["block", "site"]
    towards_dense: float = Field(ge=0, le=1)
    reorder: float | None = Field(ge=0, le=1)
    lsq: LsqParams

    @model_validator(mode="after")
    def _aims_site_by_site(self) -> Any:
        if self.towards_dense and self.collect != "site":
            reason = "towards_dense needs collect: site; otherwise each matrix corrects errors that earlier matrices have already corrected"
            raise Conflict(reason, "towards_dense", "collect")
        if self.towards_dense and not {"obs", "lsq"} & set(self.steps):
            reason = (
                "towards_dense needs obs or lsq among the steps; without them no weight changes, and nothing can aim at the dense outputs"
            )
            raise Conflict(reason, "towards_dense", "steps")
        return self
