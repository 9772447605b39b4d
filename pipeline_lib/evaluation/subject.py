"""The model that is evaluated: the source itself (``dense``), or a variant's saved checkpoint."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core import runtime
from pipeline_lib.core.workspace import DENSE, Workspace
from pipeline_lib.models.settings import ModelParams
from pipeline_lib.models.source import open_source
from pipeline_lib.models.tokenizer import load_tokenizer
from pipeline_lib.models.whole import load_model


def open_subject(
    workspace: Workspace, source: ModelParams, name: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the device of the settings, and its tokenizer."""
    device = runtime.compute()
    directory = open_source(workspace, source).path if name == DENSE else workspace.checkpoint(name)
    model = load_model(directory, dtype, device, source.remote_code, source.dequantize)
    return model, load_tokenizer(directory, model.config.get_text_config().vocab_size, source.remote_code)
