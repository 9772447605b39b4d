"""A recipe's parameters."""

from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline_lib.allocate.settings import AllocationParams
from pipeline_lib.core.params import Conflict, Params
from pipeline_lib.fit.settings import FinetuneParams, FitParams, SpectralParams
from pipeline_lib.masks.settings import SelectionParams
from pipeline_lib.solve.settings import LsqParams, QuantizationParams

Step = Literal["obs", "lsq", "finetune_channels", "finetune"]
STEPS: tuple[Step, ...] = get_args(Step)
FITS: tuple[Step, ...] = ("finetune_channels", "finetune")  # the steps that train a whole block
Format = Literal["dense", "bitmask", "compressed-tensors", "gguf"]


class ReconstructionParams(Params):
    """Section ``prune.reconstruction``: the steps in order, and the parameters of each."""

    steps: list[Step]
    statistics: Literal["per_block", "per_site"]
    dense_target: float = Field(ge=0, le=1)
    reorder: float | None = Field(ge=0, le=1)
    lsq: LsqParams
    finetune_channels: FitParams
    finetune: FinetuneParams

    @property
    def fits(self) -> dict[str, FitParams]:
        """The steps that train a whole block. Each has a gate on the held-out split, which enters no
        statistic of the variant.
        """
        return {name: getattr(self, name) for name in FITS if name in self.steps}

    @property
    def window(self) -> int:
        """Number of consecutive blocks that are pruned together."""
        return self.finetune.window if "finetune" in self.steps else 1

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: list[Step]) -> list[Step]:
        if steps != [step for step in STEPS if step in steps]:
            raise ValueError(
                f"each step at most once, in the order {', '.join(STEPS)}: masks are chosen before the"
                " remaining weights are fitted"
            )
        return steps

    @model_validator(mode="after")
    def _dense_target_is_reachable(self) -> Any:
        if self.dense_target and self.statistics != "per_site":
            reason = (
                "dense_target needs statistics: per_site; otherwise each matrix corrects errors that"
                " earlier matrices have already corrected"
            )
            raise Conflict(reason, "dense_target", "statistics")
        if self.dense_target and not {"obs", "lsq"} & set(self.steps):
            reason = (
                "dense_target needs obs or lsq among the steps; without them no weight changes, so the"
                " target has no effect"
            )
            raise Conflict(reason, "dense_target", "steps")
        return self


class InduceParams(Params):
    """Section ``induce``, overridden by ``variants.<name>.induce``."""

    factors: bool
    importance: bool
    steps: int = Field(ge=1)
    rate: float = Field(gt=0)
    temperature: float = Field(gt=0)
    probes: int = Field(ge=0)
    seed: int
    limit: float = Field(gt=0)
    check_every: int = Field(ge=1)
    patience: int = Field(ge=1)
    spectral: SpectralParams


class Pruning(Params):
    """How a model is pruned, from the section ``prune`` and ``variants.<name>``."""

    batch_rows: int = Field(ge=1)
    training: int = Field(ge=0, multiple_of=4)
    quantization: QuantizationParams
    selection: SelectionParams
    allocation: AllocationParams
    reconstruction: ReconstructionParams

    @field_validator("selection")
    @classmethod
    def _does_something(cls, selection: SelectionParams, info: ValidationInfo) -> SelectionParams:
        quantization = info.data.get("quantization")
        if selection.overall == 0 and quantization is not None and quantization.bits is None:
            raise Conflict(
                "sparsity 0 prunes nothing, so it must be greater than 0 unless quantization.bits is set",
                "sparsity",
            )
        return selection


class Recipe(Pruning):
    """All parameters that determine a pruned model."""

    induce: InduceParams | None  # None: no factors are learned before masks are chosen


class PruneParams(Pruning):
    """Section ``prune``, overridden by ``variants.<name>``, except for its sections ``induce`` and
    ``curves``.
    """

    export: list[Format]
    tasks: list[str]
    candidate: bool
