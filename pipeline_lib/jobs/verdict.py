"""The verdict on one variant."""

from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.evaluation.metrics import by_task
from pipeline_lib.evaluation.settings import VerdictParams
from pipeline_lib.evaluation.verdict import Measured, Verdict, judge


def verdict(workspace: Workspace, variant: str, params: VerdictParams) -> Verdict:
    """The verdict, from the results of `evaluate` and `tasks` for the variant and the dense model."""
    own, dense = (_measured(workspace, name) for name in (variant, DENSE))
    return judge(params, own, dense)


def _measured(workspace: Workspace, name: str) -> Measured:
    found = workspace.load(workspace.evaluation(name))
    several = len(workspace.load(workspace.tasks(DENSE))) > 1  # the dense model is measured on every preset
    return Measured(
        found["perplexity"], found["divergence"], by_task(workspace.load(workspace.tasks(name)), several)
    )
