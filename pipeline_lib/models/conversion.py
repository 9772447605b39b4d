"""Conversion of a checkpoint's tensors to a model's parameters, as transformers does it when it loads
a model, and back.

For a mixture of experts, the files hold one matrix per expert, and the model one parameter for all
experts. Names differ, too. All other code uses the tensors of the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.architecture import Coupling, Layout, Matrix, Tie, compact
from pipeline_lib.models.facts import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensor = torch.Tensor


@dataclass(frozen=True)
class Piece:
    """A tensor of the files, or some of its rows, and its position in a parameter.

    ``from_expert`` and ``from_rows`` select from the tensor, ``expert`` and ``rows`` from the
    parameter. None selects everything.
    """

    stored: str
    from_expert: int | None = None
    from_rows: range | None = None
    expert: int | None = None
    rows: range | None = None

    @property
    def whole(self) -> bool:
        """Whether the parameter equals the tensor."""
        return all(part is None for part in (self.from_expert, self.from_rows, self.expert, self.rows))

    def taken(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor of the files, as a view."""
        return _part(tensor, self.from_expert, self.from_rows)

    def given(self, parameter: Tensor) -> Tensor:
        """This piece of a parameter, as a view."""
        return _part(parameter, self.expert, self.rows)


def _part(tensor: Tensor, expert: int | None, rows: range | None) -> Tensor:
    tensor = tensor if expert is None else tensor[expert]
    return tensor if rows is None else tensor[rows.start : rows.stop : rows.step]


Pieces = Mapping[str, tuple[Piece, ...]]  # a parameter's name in transformers -> its pieces


def assembled(
    pieces: Sequence[Piece], tensors: Mapping[str, Tensor], otherwise: Tensor | None = None
) -> Tensor:
    """A parameter, assembled from the tensors of the files; differentiable in them.

    Args:
        otherwise: the whole parameter, from which pieces without a tensor are taken.
    """

    def part(piece: Piece) -> Tensor:
        if otherwise is not None and piece.stored not in tensors:
            return piece.given(otherwise)
        return piece.taken(tensors[piece.stored])

    if len(pieces) == 1 and pieces[0].whole:
        return part(pieces[0])
    slices = []
    for _, group in groupby(pieces, key=lambda piece: piece.expert):
        own = list(group)
        parts = [part(piece) for piece in own]
        if len(parts) > 1:
            rows = [row for piece in own for row in piece.rows or ()]
            joined = torch.cat(parts)
            if rows != sorted(rows):
                joined = joined[torch.tensor(rows, device=joined.device).argsort()]
            parts = [joined]
        slices.append(parts[0])
    return slices[0] if pieces[0].expert is None else torch.stack(slices)


def disassembled(pieces: Pieces, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the files, from parameters. Unconverted tensors share the parameters' memory."""
    by_tensor: dict[str, list[tuple[Piece, Tensor]]] = {}
    for name, own in pieces.items():
        for piece in own if name in parameters else ():
            by_tensor.setdefault(piece.stored, []).append((piece, piece.given(parameters[name])))
    found = {}
    for stored, parts in by_tensor.items():
        whole = [part for piece, part in parts if piece.from_expert is None and piece.from_rows is None]
        if whole:
            found[stored] = whole[0]
            continue
        slices = []
        for _, group in groupby(parts, key=lambda part: part[0].from_expert):
            ordered = sorted(group, key=lambda part: (part[0].from_rows or range(1)).start)
            slices.append(torch.cat([part for _, part in ordered]))
        found[stored] = slices[0] if parts[0][0].from_expert is None else torch.stack(slices)
    return found


def pieces_of(
    model: "PreTrainedModel", shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Piece, ...]]:
    """transformers' name of each parameter or buffer -> its pieces in the files.

    Args:
        shapes: shapes of the files' tensors.

    Raises:
        SparselineError: transformers converts a tensor in an unsupported way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    places = model.state_dict()
    found: dict[str, tuple[Piece, ...]] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if target not in places and name in places:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, places)
        if pattern is None:
            found[target] = (Piece(name),)
        else:
            groups.setdefault(target, (by_pattern[pattern], []))[1].append((name, pattern))
    for target, (converter, names) in groups.items():
        found |= _converted(
            model, target, converter, [(name, pattern, shapes[name]) for name, pattern in names]
        )
    return found


def _converted(
    model: "PreTrainedModel", target: str, converter: Any, sources: Sequence[tuple[str, str, tuple[int, ...]]]
) -> dict[str, tuple[Piece, ...]]:
    """The parameters that a conversion creates, and their pieces. To trace the rows, transformers'
    own code converts row numbers instead of weights.
    """
    mapping = deepcopy(converter)
    known: list[tuple[str, int | None, int]] = []
    for name, pattern, shape in sources:
        *before, _ = shape if len(shape) > 1 else (*shape, 1)
        rows = torch.arange(len(known), len(known) + int(torch.tensor(before).prod())).reshape(*before, 1)
        known += [(name, *place) for place in _places(before)]
        mapping.add_tensor(target, name, pattern, rows)
    result = {}
    try:
        made = mapping.convert(target, model=model, config=model.config)
        for full, numbers in made.items():
            numbers = numbers[0] if isinstance(numbers, list) else numbers
            wanted = tuple(model.get_parameter(full).shape)
            if tuple(numbers.shape) != (*wanted[:-1], 1) or len(wanted) not in (2, 3):
                raise ValueError(full)
            numbers = numbers[..., 0]
            slices = [(None, numbers)] if numbers.ndim == 1 else list(enumerate(numbers))
            result[full] = tuple(
                piece
                for expert, own in slices
                for piece in _runs(expert, [known[row] for row in own.tolist()])
            )
    except SparselineError:
        raise
    except Exception as error:  # the operation works on columns, or needs the values
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise SparselineError(
            f"transformers makes {target} of {sources[0][0]} by {operations}, which is not supported; report"
            " it as a missing conversion."
        ) from error
    return result


def _places(shape: Sequence[int]) -> list[tuple[int | None, int]]:
    """Expert (None if there is only one matrix) and row number of every row of a tensor."""
    if len(shape) == 1:
        return [(None, row) for row in range(shape[0])]
    return [(expert, row) for expert in range(shape[0]) for row in range(shape[1])]


def _runs(expert: int | None, sources: Sequence[tuple[str, int | None, int]]) -> Iterator[Piece]:
    """Pieces of a parameter (or of one expert's slice), from the source of each of its rows."""
    by_tensor: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    for row, (name, from_expert, from_row) in enumerate(sources):
        by_tensor.setdefault((name, from_expert), []).append((row, from_row))
    for (name, from_expert), pairs in by_tensor.items():
        for own in _regular(pairs):
            yield Piece(name, from_expert, own[1], expert, own[0])


def _regular(pairs: Sequence[tuple[int, int]]) -> list[tuple[range, range]]:
    """``pairs`` as up to four interleaved runs: for each, a range of rows and a range of source rows."""
    for step in range(1, 5):
        found = [
            [_range(side) for side in zip(*pairs[first::step], strict=True)]
            for first in range(step)
            if pairs[first::step]
        ]
        if all(one is not None and other is not None for one, other in found):
            return [(one, other) for one, other in found if one is not None and other is not None]
    raise ValueError("rows in no regular order")


def _range(numbers: Sequence[int]) -> range | None:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    found = range(numbers[0], numbers[-1] + 1, max(step, 1))
    return found if list(found) == list(numbers) else None


# Layouts in the files' names


def stored_layout(layout: Layout, pieces: Pieces, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """A layout whose matrices and ties refer to the tensors of the files.

    Args:
        layout: the layout with the names of a block's modules.
        pieces: the pieces of the block's parameters; all names are relative to the block.
        shapes: shapes of the files' tensors, by their names relative to the block.
    """
    matrices = [own for matrix in layout.matrices for own in _matrices(matrix, pieces, shapes)]
    couplings = [
        Coupling(one.name, one.size, tuple(own for tie in one.ties for own in _ties(tie, pieces, shapes)))
        for one in layout.couplings
    ]
    return replace(layout, matrices=tuple(matrices), couplings=tuple(couplings))


def _of(pieces: Pieces, parameter: str, expert: int | None) -> list[Piece]:
    return [piece for piece in pieces[parameter] if piece.whole or piece.expert == expert]


def _all_rows(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a piece consists of all rows of its tensor, in order."""
    return piece.from_rows is None or piece.from_rows == range(shapes[piece.stored][-2])


def _matrices(matrix: Matrix, pieces: Pieces, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Matrix]:
    own = _of(pieces, matrix.parameter, matrix.expert)
    bias = None if matrix.bias is None else pieces[matrix.bias][0].stored
    for piece in own:
        if piece.whole:
            yield replace(matrix, parameter=piece.stored, bias=bias)
            continue
        whole = _all_rows(piece, shapes)
        if matrix.rows is not None and (piece.rows is None or piece.rows.start not in range(*matrix.rows)):
            continue
        rows = None if whole or piece.from_rows is None else (piece.from_rows.start, piece.from_rows.stop)
        kind = matrix.kind if len(own) == 1 or matrix.rows is not None else kind_of(piece.stored)
        yield replace(
            matrix, kind=kind, parameter=piece.stored, bias=bias, rows=rows, expert=piece.from_expert
        )


def _ties(tie: Tie, pieces: Pieces, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tie]:
    for piece in _of(pieces, tie.parameter, tie.expert):
        if piece.whole:
            yield replace(tie, parameter=piece.stored)
            continue
        stored = replace(tie, parameter=piece.stored, expert=piece.from_expert)
        if tie.axis != 0 or piece.rows is None:
            yield stored
            continue
        taken = [
            (i, row) for i, row in enumerate(tie.positions or range(len(tie.index))) if row in piece.rows
        ]
        if taken:
            source = piece.from_rows or range(len(piece.rows))
            positions = tuple(source[piece.rows.index(row)] for _, row in taken)
            everything = _all_rows(piece, shapes) and positions == tuple(range(shapes[piece.stored][-2]))
            yield replace(
                stored,
                index=compact([tie.index[i] for i, _ in taken]),
                positions=None if everything else positions,
            )


def place(matrix: Matrix, pieces: Pieces) -> tuple[str, int | None, range | None]:
    """The position of a matrix in the parameters of a block: the parameter, the expert, and its rows
    (None: all).

    Args:
        matrix: a matrix of ``stored_layout``'s result.
        pieces: as in ``stored_layout``.
    """
    for parameter, own in pieces.items():
        for piece in own:
            if piece.stored != matrix.parameter:
                continue
            if piece.whole:
                return parameter, matrix.expert, None if matrix.rows is None else range(*matrix.rows)
            if piece.from_expert == matrix.expert and (
                matrix.rows is None or piece.from_rows == range(*matrix.rows)
            ):
                return parameter, piece.expert, piece.rows
    raise ValueError(f"{matrix.parameter} is no part of the block")


def usual_name(model: "PreTrainedModel", full: str) -> str:
    """The usual name of a parameter in files. For a parameter from several tensors, the first pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    own = [
        one
        for one in get_model_conversion_mapping(model, add_legacy=False)[::-1]
        if not isinstance(one, PrefixChange)
    ]
    back = [one.reverse_transform() for one in own]
    renamings = [one for one in back if isinstance(one, WeightRenaming)]
    converters = [one for one in back if isinstance(one, WeightConverter)]
    return str(rename_source_key(full, renamings, converters, reverse=True)[0])
