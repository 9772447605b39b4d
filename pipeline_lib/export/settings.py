"""Parameters of the export of a variant."""

from pipeline_lib.core.params import Params
from pipeline_lib.evaluation.settings import VerdictParams
from pipeline_lib.recipe.settings import Format


class ExportParams(Params):
    """The variant's ``export``, and section ``verdict``."""

    formats: list[Format]
    verdict: VerdictParams  # for the model card
