"""Discover a model's blocks, and their matrices, sites and couplings, from the module tree and forward
passes without weights (``hollow``).

A *source* has channels that can be scaled: the rows of a product's weight, or a norm's weight. It
makes a coupling if scaling it scales the inputs of later products, channel by channel, and changes
nothing else. Shape letters: ``R`` outputs, ``C`` inputs of a matrix, ``d`` channels of a site, ``n``
channels of a source.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline_lib.core.errors import SparselineError
from pipeline_lib.models.architecture import Coupling, Layout, Matrix, Site, Tie, compact
from pipeline_lib.models.facts import Heads, Partition, heads_of, kind_of, partitions, rotations
from pipeline_lib.models.hollow import Changes, Hollow
from pipeline_lib.models.products import Part, Product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensor = torch.Tensor
TOKENS = 32  # per forward pass: enough that no channel after a ReLU is zero for all tokens
BASE = 8  # factors 2 … 2^8 identify channels, one octal digit of the channel number at a time


@dataclass(frozen=True)
class Found:
    """The discovered structure of a model. Layouts use the names of the block's modules, relative to
    the block.
    """

    blocks: str  # path of the module list inside the base model
    width: int
    layouts: tuple[Layout, ...]
    outside: frozenset[str]  # parameters of the base model that the run used outside the blocks
    returns: int  # length of the tuple that a block returns; 0: it returns a tensor


def discover(model: "PreTrainedModel") -> Found:
    """Run a model without weights, and discover its structure.

    Raises:
        SparselineError: the model has no blocks that can be pruned one after the other; the message
            gives the reason.
    """
    base = model.base_model
    hollow = Hollow(dict(base.named_parameters()))
    path, calls = _blocks(model, hollow)
    heads = heads_of(model.config.get_text_config())
    kinds: dict[Any, Layout] = {}
    layouts = []
    for index, block in enumerate(base.get_submodule(path)):
        own = _Block(block, calls[index], heads)
        if own.signature not in kinds:
            kinds[own.signature] = own.layout()
        layouts.append(kinds[own.signature])
    if not any(layout.matrices for layout in layouts):
        raise SparselineError(
            f"no linear layer in the blocks of {type(model).__name__} processes text; there is nothing"
            " to prune."
        )
    outside = frozenset(name for name in hollow.touched if not name.startswith(f"{path}."))
    return Found(path, calls[0].args[0].shape[-1], tuple(layouts), outside, calls[0].returns)


@dataclass(frozen=True)
class Call:
    """The arguments of a block, and its result: hidden states [B, T, D] first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None = None
    returns: int = 0  # length of the returned tuple; 0: a tensor


def _blocks(model: "PreTrainedModel", hollow: Hollow) -> tuple[str, list[Call]]:
    """The path of the list of blocks, and the call of each block.

    The module lists are tried by decreasing number of weights. The first one whose modules all run
    exactly once, with hidden states as input, is the list of blocks.
    """
    lists = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    every = {block for blocks in lists.values() for block in blocks}
    others, calls = (_calls(model, hollow, every, first) for first in (TOKENS + 1, 1))

    def weights(name: str) -> int:
        return sum(parameter.numel() for parameter in lists[name].parameters() if parameter.ndim > 1)

    whole = sum(parameter.numel() for parameter in model.base_model.parameters() if parameter.ndim > 1)
    kind = type(model).__name__
    for name in sorted(lists, key=weights, reverse=True):
        found = [calls.get(block, []) for block in lists[name]]
        if all(
            len(each) == 1
            and each[0].args
            and isinstance(each[0].args[0], Tensor)
            and each[0].args[0].ndim == 3
            for each in found
        ):
            own = [each[0] for each in found]
            if own[0].args[0].shape[:2] != (1, TOKENS):
                raise SparselineError(
                    f"the blocks of {kind} ({name}) do not have one hidden state per token; such a model"
                    " cannot be pruned."
                )
            inside = frozenset(part for part in hollow.parts if part.parameter.startswith(f"{name}."))
            moved = _calls(model, hollow, every, 1, Changes(one=inside))
            for changed in (others, moved):  # other tokens, and other outputs inside the blocks
                _refuse_other_ways(kind, own, [changed[block][0] for block in lists[name]])
            return name, own
        if any(found) and weights(name) > whole / 2:
            raise SparselineError(
                f"the blocks of {kind} ({name}) do not run once each, one after the other; such a model"
                " cannot be pruned."
            )
    raise SparselineError(
        f"{kind} has no list of blocks that run one after the other; such a model cannot be pruned."
    )


def _calls(
    model: "PreTrainedModel",
    hollow: Hollow,
    blocks: Iterable[nn.Module],
    first: int,
    changes: Changes | None = None,
) -> dict[nn.Module, list[Call]]:
    """The calls of each module in one forward pass over consecutive token ids from ``first`` on."""
    calls: dict[nn.Module, list[Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, []).append(
            Call(tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args), dict(kwargs))
        )

    def end(module: nn.Module, _args: Any, output: Any) -> None:
        parts = len(output) if isinstance(output, tuple | list) else 0
        hidden = output[0] if parts else output
        calls[module][-1] = replace(
            calls[module][-1], output=hidden.clone() if isinstance(hidden, Tensor) else None, returns=parts
        )

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(end) for block in blocks]
    try:
        ids = (torch.arange(TOKENS)[None] + first) % model.config.get_text_config().vocab_size
        with torch.no_grad(), hollow:
            hollow.begin(changes, keep=False)
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _refuse_other_ways(kind: str, calls: Sequence[Call], others: Sequence[Call]) -> None:
    """Refuse a model whose blocks cannot run one by one: a block must read the output of the block
    before it, and its other arguments must not depend on the text.
    """
    for number, (call, other) in enumerate(zip(calls, others, strict=True)):
        if not _same((call.args[1:], call.kwargs), (other.args[1:], other.kwargs)):
            raise SparselineError(
                f"block {number} of {kind} reads more than the output of the block before it; it cannot"
                " be pruned."
            )
        if number and not _same(call.args[0], calls[number - 1].output):
            raise SparselineError(
                f"block {number} of {kind} does not read the output of the block before it; such a model"
                " cannot be pruned."
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


@dataclass(frozen=True)
class _Source:
    """Channels [n] that can be scaled: some rows of a part's outputs, or a norm's vectors."""

    size: int
    part: Part | None = None
    positions: tuple[int, ...] | None = None  # rows of the part's outputs; None: all, in order
    vectors: tuple[str, ...] = ()
    offset: float = 0.0

    def changes(self, factor: Tensor, outputs: int = 0) -> Changes:
        if self.part is None:
            return Changes(vectors=dict.fromkeys(self.vectors, (factor, self.offset)))
        rows = (
            factor
            if self.positions is None
            else torch.ones(outputs).index_copy(0, torch.tensor(self.positions), factor)
        )
        return Changes(rows={self.part: rows})


class _Run:
    """The products of one forward pass of a block, with their inputs, and the block's output."""

    def __init__(self, seen: Sequence[Product], output: Any) -> None:
        self.seen, self.output = seen, output

    @property
    def parts(self) -> list[Part]:
        return [product.part for product in self.seen]


class _Block:
    """One block, which runs repeatedly with different changes."""

    def __init__(self, block: nn.Module, call: Call, heads: Heads | None) -> None:
        self.block, self.call, self.heads = block, call, heads
        self.hollow = Hollow(dict(block.named_parameters()))
        self.run = self._again(Changes())
        self.outputs = {product.part: product.size for product in self.run.seen}
        self.biases = {product.part: product.bias for product in self.run.seen}

    @torch.no_grad()
    def _again(self, changes: Changes, hidden: Tensor | None = None) -> _Run:
        self.hollow.begin(changes)
        with self.hollow:
            output = self.block(
                (self.call.args[0] if hidden is None else hidden).clone(),
                *self.call.args[1:],
                **self.call.kwargs,
            )
        return _Run(self.hollow.seen or [], output[0] if isinstance(output, tuple | list) else output)

    @property
    def signature(self) -> Any:
        """A hashable description of the block. Blocks with equal signatures have equal layouts."""
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in self.block.named_parameters())
        modules = tuple(type(module).__name__ for module in self.block.modules())
        return (
            shapes,
            modules,
            tuple((part, number) for part, number in zip(self.run.parts, self._site_numbers, strict=True)),
        )

    @cached_property
    def _site_numbers(self) -> list[int]:
        """For each product, the number of the first product with the same inputs."""
        first: dict[Any, int] = {}
        keys = [
            (
                p.inputs.untyped_storage()._cdata,
                p.inputs.storage_offset(),
                p.inputs.numel(),
                p.inputs.shape[-1],
            )
            for p in self.run.seen
        ]
        return [first.setdefault(key, number) for number, key in enumerate(keys)]

    @cached_property
    def sites(self) -> dict[int, list[Part]]:
        """Number of the first product -> the parts that share its inputs. A part that occurs in several
        products belongs to the first one's site.

        Matrices whose rows get different inputs (DBRX's experts) are left out.
        """
        found: dict[int, list[Part]] = {}
        taken: set[Part] = set()
        numbers: dict[tuple[str, int | None], set[int]] = {}
        for part, number in zip(self.run.parts, self._site_numbers, strict=True):
            if part.rows is not None:
                numbers.setdefault((part.parameter, part.expert), set()).add(number)
        for part, number in zip(self.run.parts, self._site_numbers, strict=True):
            if part not in taken and len(numbers.get((part.parameter, part.expert), ())) < 2:
                taken.add(part)
                found.setdefault(number, []).append(part)
        return found

    @cached_property
    def on_stream(self) -> set[int]:
        """The sites whose inputs depend on the block's input without a product in between."""
        hidden = self.call.args[0]
        run = self._again(
            Changes(), hidden + torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        )
        pairs = enumerate(zip(self.run.seen, run.seen, strict=True))
        return {
            number
            for number, (a, b) in pairs
            if number == self._site_numbers[number] and not torch.equal(a.inputs, b.inputs)
        }

    # Responses

    def response(self, source: _Source) -> dict[int, tuple[int, ...]] | None:
        """Site -> for each of its channels, the source's channel that scales it. None if scaling the
        source changes anything else, or nothing.
        """
        digits = next(count for count in range(1, 12) if BASE**count >= source.size)
        codes: dict[int, Tensor] = {}
        for digit in range(digits):
            exponents = torch.arange(source.size) // BASE**digit % BASE
            found = self._scaled(source, torch.exp2(1.0 + exponents))
            if not found or (codes and found.keys() != codes.keys()):
                return None
            for number, powers in found.items():
                if int(powers.min()) < 1 or int(powers.max()) > BASE:
                    return None
                codes[number] = codes.get(number, 0) + (powers - 1) * BASE**digit
        maps = {number: tuple(code.tolist()) for number, code in codes.items()}
        return maps if all(max(channels) < source.size for channels in maps.values()) else None

    def _scaled(self, source: _Source, factor: Tensor) -> dict[int, Tensor] | None:
        """Site -> the powers of two [d] that scale its channels, as exponents, for sites that change.
        None if the factor has any other effect.
        """
        run = self._again(source.changes(factor, self.outputs.get(source.part, 0) if source.part else 0))
        if run.parts != self.run.parts or not torch.equal(run.output, self.run.output):
            return None
        found: dict[int, Tensor] = {}
        for number, (before, after) in enumerate(zip(self.run.seen, run.seen, strict=True)):
            site = self._site_numbers[number]
            if number != site or torch.equal(before.inputs, after.inputs):
                continue
            old, new = (x.reshape(-1, x.shape[-1]) for x in (before.inputs, after.inputs))
            if not len(old):
                return None
            largest = old.abs().argmax(0, keepdim=True)
            ratio = new.gather(0, largest) / old.gather(0, largest)
            powers = ratio.abs().log2().round().nan_to_num(0, 0, 0).clamp(-64, 64)
            if not torch.equal(old * powers.exp2(), new):
                return None
            found[site] = powers[0].long()
        return found

    def unchanged(self, changes: Changes) -> bool:
        """Whether the changes leave all inputs of products and the block's output as they are."""
        run = self._again(changes)
        same = run.parts == self.run.parts and torch.equal(run.output, self.run.output)
        return same and all(
            torch.equal(a.inputs, b.inputs) for a, b in zip(self.run.seen, run.seen, strict=True)
        )

    def influenced(self, parts: Sequence[Part]) -> dict[int, bool]:
        """Site -> whether other tokens change too, for the sites that change if the parts' outputs
        change for one token.
        """
        run = self._again(Changes(one=frozenset(parts)))
        if run.parts != self.run.parts:  # other experts were chosen
            return {}
        found = {}
        for number, (before, after) in enumerate(zip(self.run.seen, run.seen, strict=True)):
            if number == self._site_numbers[number] and before.inputs.shape == after.inputs.shape:
                different = (before.inputs != after.inputs).reshape(-1, before.inputs.shape[-1]).any(1)
                if count := int(different.count_nonzero()):
                    found[number] = count > 1 or not different[len(different) // 2]
        return found

    # Layout

    def layout(self) -> Layout:
        """Matrices, sites and couplings."""
        return _Assembly(self).layout()


@dataclass(frozen=True)
class _Experts:
    """The experts of one layer. One of them is examined, and represents all others."""

    count: int
    of: Callable[[Part, int], Part]  # the examined expert's part, another expert's number -> its part
    seen: int  # number of the examined expert


@dataclass
class _Scaled:
    """A source and what it scales: site -> for each of the site's channels, the source's channel."""

    source: _Source
    maps: dict[int, tuple[int, ...]]


class _Assembly:
    """Builds a layout from the runs of a block."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.experts = self._experts()
        self.routers = self._routers()
        self.sites = {
            number: own
            for number, parts in block.sites.items()
            if (own := [p for p in parts if self._looked_at(p)])
        }
        self.parts = [part for parts in self.sites.values() for part in parts if part not in self.routers]
        self.partitions: dict[Part, Partition] = {}
        self.scaled = self._couplings()
        self.after = {
            number: self.block.influenced([p for p in parts if p not in self.routers])
            for number, parts in self.sites.items()
        }
        self.names = self._names()

    # Experts

    def _experts(self) -> dict[str, _Experts]:
        """Path -> the experts that it holds. The path leads to a parameter of three dimensions, or to a
        list of modules of equal shapes, as many as some product (the router) has outputs.
        """
        found: dict[str, _Experts] = {}
        parts, outputs = list(self.block.outputs), set(self.block.outputs.values())
        most: dict[str, dict[int, int]] = {}
        for product in self.block.run.seen:
            for path, number in _members(product.part):
                tokens = most.setdefault(path, {})
                tokens[number] = tokens.get(number, 0) + product.inputs.numel() // product.inputs.shape[-1]
        parameters = dict(self.block.block.named_parameters())
        for path, tokens in most.items():
            seen = max(tokens, key=lambda number: tokens[number])
            if path in parameters:
                found[path] = _Experts(
                    len(parameters[path]), lambda part, number: replace(part, expert=number), seen
                )
            elif (count := len(list(self.block.block.get_submodule(path).children()))) in outputs - {
                1
            } and self._alike(path):
                head = f"{path}.{seen}."
                if any(part.parameter.startswith(head) for part in parts):
                    found[path] = _Experts(count, _renamed(path, seen), seen)
        return found

    def _alike(self, path: str) -> bool:
        modules = self.block.block.get_submodule(path).children()
        shapes = [[tuple(parameter.shape) for parameter in module.parameters()] for module in modules]
        return all(each == shapes[0] for each in shapes)

    def _home(self, part: Part) -> str | None:
        """The path (in ``experts``) of the experts that a part belongs to, or None."""
        return next((path for path, _ in _members(part) if path in self.experts), None)

    def _looked_at(self, part: Part) -> bool:
        home = self._home(part)
        return home is None or any(
            (path, number) == (home, self.experts[home].seen) for path, number in _members(part)
        )

    def _routers(self) -> set[Part]:
        """The parts that choose and weigh experts, which are never pruned. They have one output per
        expert, or a single output, and affect no inputs of products outside the experts.
        """
        counts = {experts.count for experts in self.experts.values()} | {1}
        homes = {number: self._home(parts[0]) for number, parts in self.block.sites.items()}
        return {
            part
            for part, outputs in self.block.outputs.items()
            if outputs in counts
            and self._home(part) is None
            and all(homes.get(number, "") for number in self.block.influenced([part]))
        }

    # Couplings

    def _couplings(self) -> list[_Scaled]:
        found = [one for source in self._norms() if (one := self._scaled(source)) is not None]
        pairs: list[_Scaled] = []
        for part in self.parts:
            one = self._scaled(_Source(self.block.outputs[part], part))
            pairs += [one] if one is not None else self._fused(part)
        return self._one_each(found + pairs)

    def _scaled(self, source: _Source) -> _Scaled | None:
        maps = self.block.response(source)
        return None if maps is None else _Scaled(source, maps)

    def _norms(self) -> Iterator[_Source]:
        """Sources from modules that hold only vectors of one length. A single vector w is also tried as
        1 + w.
        """
        for name, module in self.block.block.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own and not list(module.children()) and all(p.ndim == 1 and len(p) > 1 for p in own.values()):
                sizes = {len(parameter) for parameter in own.values()}
                if len(sizes) == 1:
                    vectors = tuple(f"{name}.{each}" for each in own)
                    for offset in (0.0, 1.0) if len(own) == 1 else (0.0,):
                        yield _Source(sizes.copy().pop(), vectors=vectors, offset=offset)

    def _fused(self, part: Part) -> list[_Scaled]:
        """Couplings of subsets of a part's rows, from the first possible partition that yields any."""
        for partition in partitions(self.block.outputs[part], self.block.heads):
            tried = [self._scaled(_Source(len(rows), part, rows)) for rows in partition.rows]
            if found := [one for one in tried if one is not None]:
                self.partitions[part] = partition
                return found
        return []

    def _one_each(self, scaled: Sequence[_Scaled]) -> list[_Scaled]:
        """A selection of couplings, with at most one per site. Of several, one that also holds for
        negative factors is preferred, else the first is taken.
        """
        kept = [
            one
            for one in scaled
            if len(scaled) == 1
            or self._linear(one)
            or not any(
                other is not one and other.maps.keys() & one.maps.keys() and self._linear(other)
                for other in scaled
            )
        ]
        taken: set[int] = set()
        found = []
        for one in kept:
            if not taken & one.maps.keys():
                taken |= one.maps.keys()
                found.append(one)
        return found

    def _linear(self, scaled: _Scaled) -> bool:
        source = scaled.source
        outputs = self.block.outputs.get(source.part, 0) if source.part else 0
        run = self.block._again(source.changes(-torch.ones(source.size), outputs))
        return all(
            run.parts == self.block.run.parts
            and torch.equal(-self.block.run.seen[number].inputs, run.seen[number].inputs)
            for number in scaled.maps
        )

    def _queries_and_keys(self) -> Iterator[tuple[_Source, _Source, Any]]:
        """Rows of Q, rows of K and their rotation, for each pair whose factors cancel in attention."""
        for part, partition in self.partitions.items():
            if set(partition.kinds) >= {"q", "k"}:
                q, k = (
                    _Source(len(rows), part, rows)
                    for rows in (partition.rows[partition.kinds.index(kind)] for kind in "qk")
                )
                if rotation := self._rotation(q, k):
                    yield q, k, rotation
        sources = {one.source.part for one in self.scaled}
        for parts in self.sites.values():
            free = [
                p
                for p in parts
                if p in set(self.parts) - sources - self.partitions.keys() and self._mixing(p)
            ]
            for one, other in combinations([_Source(self.block.outputs[part], part) for part in free], 2):
                if rotation := self._rotation(one, other):
                    yield one, other, rotation

    def _mixing(self, part: Part) -> bool:
        return any(self._mixed(site) for site in self.block.influenced([part]))

    def _rotation(self, q: _Source, k: _Source) -> Any:
        random = torch.Generator().manual_seed(0)
        for rotation in rotations(q.size, k.size, self.block.heads):
            factor = torch.exp2(torch.randint(1, 5, (rotation.size,), generator=random).float())
            rows: dict[Part, Tensor] = {}
            for source, index, power in ((k, rotation.keys, 1), (q, rotation.queries, -1)):
                assert source.part is not None
                own = source.changes(factor[list(index)] ** power, self.block.outputs[source.part]).rows[
                    source.part
                ]
                rows[source.part] = rows.get(source.part, torch.ones(())) * own
            if self.block.unchanged(Changes(rows=rows)):
                return rotation
        return None

    # Names

    def _names(self) -> dict[int, str]:
        """Site -> its name: by its role before or inside attention and MLP, else by the module that
        reads it.
        """
        names: dict[int, str] = {}
        for number, parts in self.sites.items():
            home = self._home(parts[0])
            name = self._role(number)
            if home is not None:
                part = "inner" if name == "mlp_inner" else "input"
                name = f"{self._prefix(home)}expert_{self.experts[home].seen}_{part}"
            elif not name or name in names.values():
                name = f"{parts[0].parameter.removesuffix('.weight')}_input"
            names[number] = name
        return names

    def _prefix(self, home: str) -> str:
        """A prefix for the names of experts, if a block has several layers of experts."""
        layers = list(dict.fromkeys(path.rpartition(".")[0] for path in self.experts))
        layer = home.rpartition(".")[0]
        return "" if layer == layers[0] else f"{layer}."

    def _role(self, number: int) -> str:
        """The role of a site in attention or MLP; empty if none fits."""
        if number not in self.block.on_stream:
            if self._inside(number):
                return ""
            return "attention_output" if self._mixed(number) else "mlp_inner"
        ends = [end for end in self._reached(number) if not self._inside(end)]
        mixes, stays = any(map(self._mixed, ends)), not all(map(self._mixed, ends))
        return (
            "block_input" if mixes and stays else "attention_input" if mixes else "mlp_input" if stays else ""
        )

    def _inside(self, number: int) -> list[int]:
        """The sites off the residual stream that directly depend on a site's products."""
        return [
            site for site in self.after[number] if site not in self.block.on_stream and site in self.after
        ]

    def _reached(self, number: int) -> set[int]:
        """The sites off the residual stream that depend on a site's products, directly or indirectly."""
        reached: set[int] = set()
        ahead = [number]
        while ahead:
            new = set(self._inside(ahead.pop())) - reached
            reached |= new
            ahead += new
        return reached

    def _mixed(self, site: int) -> bool:
        """Whether a token's inputs at this site depend on other tokens."""
        return any(after.get(site, False) for after in self.after.values())

    # Layout

    def layout(self) -> Layout:
        """The block's layout. What was found for the examined expert is repeated for all experts."""
        couplings = self._named()
        of_site = {site: (name, maps[site]) for name, _, maps in couplings for site in maps}
        sites, matrices = [], []
        for number, parts in self.sites.items():
            own = [part for part in parts if part not in self.routers]
            if not own:
                continue
            channels = self.block.run.seen[number].inputs.shape[-1]
            coupling, index = of_site.get(number, (None, range(channels)))
            site = Site(
                self.names[number],
                own[0].parameter,
                own[0].expert,
                coupling,
                compact(index),
                self._pool(number),
            )
            sites.append(site)
            matrices += [matrix for part in own for matrix in self._matrices(part, site.name)]
        routers = frozenset(part.parameter for part in self.routers)
        return self._for_every_expert(
            Layout(tuple(matrices), tuple(sites), tuple(one for _, one, _ in couplings), routers)
        )

    def _pool(self, number: int) -> str | None:
        home = self._home(self.sites[number][0])
        return (
            None
            if home is None
            else self.names[number].replace(f"expert_{self.experts[home].seen}_", "expert_")
        )

    def _matrices(self, part: Part, site: str) -> Iterator[Matrix]:
        bias = self.block.biases[part]
        partition = self.partitions.get(part)
        if partition is not None and partition.contiguous and part.rows is None:
            for kind, rows in zip(partition.kinds, partition.rows, strict=True):
                yield Matrix(
                    kind, part.parameter, site, bias, (rows[0], rows[-1] + 1), part.transposed, part.expert
                )
        else:
            yield Matrix(
                self._kind(part, site), part.parameter, site, bias, part.rows, part.transposed, part.expert
            )

    def _kind(self, part: Part, site: str) -> str:
        partition = self.partitions.get(part)
        if partition is not None:
            return "qkv" if "v" in partition.kinds and "q" in partition.kinds else kind_of(part.parameter)
        if site == "attention_output":
            return "o"
        if site.endswith("inner"):
            return "down" if self._feeding(site) > 1 else "fc2"
        for one in self.scaled:
            if one.source.part == part and (names := {self.names[number] for number in one.maps}):
                if names == {"attention_output"}:
                    return "v"
                if any(name.endswith("inner") for name in names):
                    return "up" if self._feeding(names.pop()) > 1 else "fc1"
        into = self._into(part)
        if any(name.endswith("inner") for name in into):
            return "gate" if self._feeding(next(iter(into))) > 1 else "fc1"
        return kind_of(part.parameter)

    def _into(self, part: Part) -> set[str]:
        return {self.names[number] for number in self.block.influenced([part]) if number in self.names}

    def _feeding(self, site: str) -> int:
        """Number of matrices that a site's inputs depend on; a fused projection counts as two."""
        number = next(number for number, name in self.names.items() if name == site)
        return sum(
            2 if part in self.partitions else 1
            for part in self.parts
            if number in self.block.influenced([part])
        )

    def _named(self) -> list[tuple[str, Coupling, dict[int, tuple[int, ...]]]]:
        """Name, coupling and maps, in the order of the sites that they scale; ``q_k`` follows ``v_o``."""
        found: list[tuple[str, Coupling, dict[int, tuple[int, ...]]]] = []
        names: set[str] = set()

        def add(name: str, size: int, ties: Sequence[Tie], maps: dict[int, tuple[int, ...]]) -> None:
            while name in names:
                name += "'"
            names.add(name)
            found.append((name, Coupling(name, size, tuple(dict.fromkeys(ties))), maps))

        for number in self.sites:
            for one in self.scaled:
                if next((site for site in self.sites if site in one.maps), None) != number:
                    continue
                source, site = one.source, self.names[number]
                ties = [*self._outputs(source, range(source.size), 1)]
                ties += [
                    Tie(
                        part.parameter,
                        int(not part.transposed),
                        compact(one.maps[reached]),
                        -1,
                        expert=part.expert,
                    )
                    for reached in self.sites
                    if reached in one.maps
                    for part in self.sites[reached]
                ]
                add(self._coupling(source, site), source.size, ties, one.maps)
        for q, k, rotation in self._queries_and_keys():
            ties = [*self._outputs(k, rotation.keys, 1), *self._outputs(q, rotation.queries, -1)]
            add("q_k", rotation.size, ties, {})
            behind = next(
                (place for place, (name, _, _) in enumerate(found) if name == "v_o"), len(found) - 2
            )
            found.insert(behind + 1, found.pop())
        return found

    def _coupling(self, source: _Source, site: str) -> str:
        if source.part is None:
            return site.removesuffix("_input") + "_norm"
        if site == "attention_output":
            return "v_o"
        if site.endswith("inner"):
            return site.removesuffix("mlp_inner").removesuffix("inner") + (
                "up_down" if self._feeding(site) > 1 else "fc1_fc2"
            )
        return site.removesuffix("_input") + "_inputs"

    def _outputs(self, source: _Source, index: Sequence[int], power: int) -> Iterator[Tie]:
        part = source.part
        if part is None:
            for name in source.vectors:
                yield Tie(name, 0, compact(index), power, source.offset)
            return
        positions = source.positions
        if part.rows is not None:
            positions = tuple(part.rows[0] + row for row in positions or range(source.size))
        yield Tie(
            part.parameter,
            int(part.transposed),
            compact(index),
            power,
            positions=positions,
            expert=part.expert,
        )
        if (bias := self.block.biases[part]) is not None:
            yield Tie(bias, 0, compact(index), power, positions=positions, expert=part.expert)

    # Every expert

    def _for_every_expert(self, layout: Layout) -> Layout:
        """The layout with the sites and matrices of all experts. A coupling inside the examined expert
        is repeated for each; one with ties outside (a norm's) gets the ties of all experts.
        """
        sites, matrices, couplings = [], [], []
        for site in layout.sites:
            home = self._home(Part(site.parameter, site.expert))
            own = layout.consumers(site.name)
            for number in [None] if home is None else range(self.experts[home].count):
                sites.append(self._moved_site(site, home, number))
                matrices += [self._moved(matrix, home, number) for matrix in own]
        for coupling in layout.couplings:
            homes = [self._home(Part(tie.parameter, tie.expert)) for tie in coupling.ties]
            if None not in homes:
                for number in range(self.experts[str(homes[0])].count):
                    ties = tuple(
                        self._moved(tie, home, number) for tie, home in zip(coupling.ties, homes, strict=True)
                    )
                    couplings.append(
                        Coupling(self._renumbered(coupling.name, homes[0], number), coupling.size, ties)
                    )
            else:
                spread = []
                for tie, home in zip(coupling.ties, homes, strict=True):
                    spread += (
                        [tie]
                        if home is None
                        else [self._moved(tie, home, number) for number in range(self.experts[home].count)]
                    )
                couplings.append(replace(coupling, ties=tuple(spread)))
        return replace(layout, matrices=tuple(matrices), sites=tuple(sites), couplings=tuple(couplings))

    def _moved(self, thing: Any, home: str | None, number: int | None) -> Any:
        """The corresponding matrix or tie of expert ``number``."""
        if home is None or number is None:
            return thing
        part = self.experts[home].of(Part(thing.parameter, thing.expert), number)
        changed = {"parameter": part.parameter, "expert": part.expert}
        if isinstance(thing, Matrix):
            changed["site"] = self._renumbered(thing.site, home, number)
            changed["bias"] = (
                None
                if thing.bias is None
                else self.experts[home].of(Part(thing.bias, thing.expert), number).parameter
            )
        return replace(thing, **changed)

    def _moved_site(self, site: Site, home: str | None, number: int | None) -> Site:
        if home is None or number is None:
            return site
        part = self.experts[home].of(Part(site.parameter, site.expert), number)
        coupling = site.coupling
        if coupling is not None and f"expert_{self.experts[home].seen}_" in coupling:
            coupling = self._renumbered(coupling, home, number)
        return replace(
            site,
            name=self._renumbered(site.name, home, number),
            parameter=part.parameter,
            expert=part.expert,
            coupling=coupling,
        )

    def _renumbered(self, name: str, home: str | None, number: int) -> str:
        return name.replace(f"expert_{self.experts[str(home)].seen}_", f"expert_{number}_")


def _members(part: Part) -> Iterator[tuple[str, int]]:
    """Path and number for every collection that a part is in: a 3-D parameter, or a list of modules."""
    if part.expert is not None:
        yield part.parameter, part.expert
    names = part.parameter.split(".")
    for place, name in enumerate(names):
        if name.isdecimal():
            yield ".".join(names[:place]), int(name)


def _renamed(path: str, seen: int) -> Callable[[Part, int], Part]:
    """A function that maps parts of the module list's expert ``seen`` to those of another expert."""

    def place(part: Part, number: int) -> Part:
        return replace(part, parameter=f"{path}.{number}." + part.parameter.removeprefix(f"{path}.{seen}."))

    return place
