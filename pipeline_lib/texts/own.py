"""Documents that a model writes by itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.sample import Drawing, continued, ends
from pipeline_lib.models.start import Start
from pipeline_lib.texts.texts import GeneratedParams, TextParams

TRIED = 16  # documents per row after which generation gives up


@dataclass(frozen=True)
class Author:
    """The model that writes, and where its start token stands."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    start: Start

    def lead(self, params: TextParams) -> list[int]:
        """The tokens before a document's prompt while it is continued. They are not part of the
        document.
        """
        silent = params.chat_template or self.start.token is None or self.start.place == "none"
        return [] if silent or self.start.token is None else [self.start.token]

    def documents(
        self,
        prompts: Sequence[list[int]],
        params: TextParams,
        how: GeneratedParams,
        advance: Callable[[int], None],
    ) -> list[list[int]]:
        """Write documents until there are enough for the text's rows. Each is a prompt and the
        model's continuation, as tokens.

        Prompts are used in turn. After the last one, the first one is used again, and its new
        number draws other tokens.

        Args:
            advance: called with what each document adds, in the units of ``wanted``.

        Raises:
            SparselineError: the model ends texts before they have as many tokens as needed.
        """
        lead, stops = self.lead(params), ends(self.model, self.tokenizer)
        drawing = Drawing(how.new_tokens, how.temperature, how.seed)
        joined, needed, done = params.packing == "concatenate", wanted(params), 0
        found: list[list[int]] = []
        while done < needed:
            if not joined and len(found) >= TRIED * needed:
                raise SparselineError(
                    f"The model ends its texts early: {done} of {len(found)} documents of the text at"
                    f" {params.path} have {params.length} tokens. Set packing: concatenate, or lower length."
                )
            numbers = range(len(found), len(found) + how.batch_rows)
            batch = [prompts[number % len(prompts)] for number in numbers]
            written = continued(self.model, [lead + prompt for prompt in batch], numbers, drawing, stops)
            for prompt, new in zip(batch, written, strict=True):
                if done >= needed:  # the text does not depend on the size of the batch
                    break
                found.append(prompt + (new[:-1] if new[-1] in stops and not params.chat_template else new))
                added = min(needed - done, len(found[-1]) if joined else int(len(found[-1]) >= params.length))
                done += added
                advance(added)
        return found


def wanted(params: TextParams) -> int:
    """The amount of text to write: tokens if rows are cut from joined documents, otherwise rows
    (one per document).
    """
    return (params.samples or 0) * (params.length if params.packing == "concatenate" else 1)
