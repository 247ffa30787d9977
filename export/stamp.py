"""Repeat traced blocks: the graph of a short model becomes the graph of the whole one.

A block's nodes are found by data flow: they depend on a parameter of the block. What depends on no block's parameters
is shared (masks, rotary angles). Two traced blocks of the same kind must be equal node by node, constants included;
then every other block of that kind is a copy with its own parameters, and with its own inputs and outputs for a cache.
If they differ, the caller traces the whole model instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .artifact import Blocks
from .graph_names import PAST, PRESENT, cache_name, is_present
from .scopes import scopes_of, set_scopes


@dataclass
class _Block:
    """A traced block.

    Attributes:
        number: in the short model.
        past: the graph's inputs that are its cache, by the last part of their names.
        entry: the value that enters from the block before.
        exit: the value that the next block takes.
    """

    number: int
    past: dict[str, ir.Value]
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    entry: ir.Value | None = None
    exit: ir.Value | None = None


class NotAlikeError(Exception):
    """The traced blocks are not copies of each other; the message says where."""


def stamp(model: ir.Model, blocks: Blocks, traced: Sequence[int]) -> None:
    """Rewrite the graph of the short model into that of the whole model, in place.

    Args:
        model: graph of a model whose blocks are ``traced`` of ``blocks``.
        blocks: the blocks of the whole model.
        traced: numbers of the traced blocks in the whole model, ascending; up to two of each kind.

    Raises:
        NotAlikeError: two traced blocks of one kind differ, or blocks are connected by more than one value. The graph
            is then as it was.
    """
    graph = model.graph
    parts = [_Block(number, _past(graph, number)) for number in range(len(traced))]
    _split(graph, blocks.prefix, parts)
    _connect(parts, graph)
    by_kind: dict[int, list[_Block]] = {}
    for part, source in zip(parts, traced, strict=True):
        by_kind.setdefault(blocks.kinds[source], []).append(part)
    prototypes = {kind: _check_alike(members, blocks.prefix) for kind, members in by_kind.items()}
    first, last = parts[0], parts[-1]
    tail = _after(graph, last.nodes)
    stamped: list[ir.Node] = []
    caches: list[tuple[dict[str, ir.Value], dict[str, ir.Value]]] = []
    stream = first.entry
    for number, kind in enumerate(blocks.kinds):
        copy = _copy(prototypes[kind], number, blocks.prefix, stream, graph)
        stamped += copy.nodes
        caches.append((copy.past, copy.present))
        stream = copy.stream
    _replace(cast(ir.Value, last.exit), cast(ir.Value, stream))
    if tail:
        graph.insert_before(tail[0], stamped)
    else:
        graph.extend(stamped)
    _replace_caches(graph, parts, [past for past, _ in caches], traced)
    results = [value for value in graph.outputs if not is_present(cast(str, value.name))]
    graph.outputs[:] = [*results, *(value for _, present in caches for value in present.values())]
    for part in reversed(parts):
        graph.remove(list(reversed(part.nodes)), safe=True)
    RemoveUnusedNodesPass()(model)


def _past(graph: ir.Graph, number: int) -> dict[str, ir.Value]:
    prefix = f"{PAST}.{number}."
    return {name.removeprefix(prefix): v for v in graph.inputs if (name := v.name or "").startswith(prefix)}


def _split(graph: ir.Graph, prefix: str, parts: list[_Block]) -> None:
    """Nodes by block: those inside the module ``prefix.i`` that depend on some block's parameters."""
    count = len(parts)
    moving = {id(value) for name, value in graph.initializers.items() if name.startswith(f"{prefix}.")}
    for node in graph:
        if not any(id(value) in moving for value in node.inputs):
            continue
        moving.update(id(value) for value in node.outputs)
        number = _block_number(node, prefix)
        if number is not None and number < count:
            parts[number].nodes.append(node)
    if empty := [part.number for part in parts if not part.nodes]:
        raise NotAlikeError(f"no traced node belongs to {prefix}.{empty[0]}")


def _block_number(node: ir.Node, prefix: str) -> int | None:
    for scope in scopes_of(node):
        if scope.startswith(f"{prefix}."):
            number = scope[len(prefix) + 1 :].split(".")[0]
            return int(number) if number.isdigit() else None
    return None


def _connect(parts: list[_Block], graph: ir.Graph) -> None:
    """Find the one value that leaves each block; it is the one that enters the next."""
    owner = {id(node): part for part in parts for node in part.nodes}
    for part in parts:
        leaving: list[ir.Value] = []
        for value in (value for node in part.nodes for value in node.outputs):
            users = [owner.get(id(user)) for user, _ in value.uses()]
            if any(user is not part for user in users) or (
                value in graph.outputs and not is_present(cast(str, value.name))
            ):
                leaving.append(value)
            if any(user is not None and user.number not in (part.number, part.number + 1) for user in users):
                raise NotAlikeError(f"{value.name} of block {part.number} is used further on than in the next block")
        if len(leaving) != 1:
            raise NotAlikeError(f"{len(leaving)} values leave block {part.number}, expected one")
        part.exit = leaving[0]
    for before, part in pairwise(parts):
        part.entry = before.exit


def _check_alike(members: list[_Block], prefix: str) -> _Block:
    """Compare all traced blocks of a kind with the last one; returns it, and sets the entry of a first block."""
    prototype = members[-1]
    for member in members[:-1]:
        entry = _compare(member, prototype, prefix)
        if member.entry is None:
            member.entry = entry
        elif member.entry is not entry:
            raise NotAlikeError(f"block {member.number} takes {entry.name} where the others take the residual stream")
    return prototype


def _compare(first: _Block, second: _Block, prefix: str) -> ir.Value:
    """Raise unless two blocks are equal; returns what enters ``first`` where the residual stream enters ``second``."""
    where = f"in block {first.number} than in block {second.number}"
    if len(first.nodes) != len(second.nodes):
        raise NotAlikeError(
            f"blocks {first.number} and {second.number} have {len(first.nodes)} and {len(second.nodes)} nodes"
        )
    prefixes = (f"{prefix}.{first.number}.", f"{prefix}.{second.number}.")
    same = {id(value): second.past.get(part) for part, value in first.past.items()}
    entry: ir.Value | None = None
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if (a.domain, a.op_type, len(a.outputs)) != (b.domain, b.op_type, len(b.outputs)):
            raise NotAlikeError(
                f"{a.op_type} of block {first.number} stands where {b.op_type} does in block {second.number}"
            )
        if _attributes(a) != _attributes(b):
            raise NotAlikeError(f"{a.op_type} has other attributes {where}")
        if [x is None for x in a.inputs] != [y is None for y in b.inputs]:
            raise NotAlikeError(f"{a.op_type} has other inputs {where}")
        for x, y in zip(a.inputs, b.inputs, strict=True):
            if x is None or y is None:
                continue
            if y is second.entry:
                if entry not in (None, x):
                    raise NotAlikeError(f"two values enter block {first.number} where one enters block {second.number}")
                entry = x
            elif not _same_value(x, y, same, prefixes):
                raise NotAlikeError(
                    f"{a.op_type} takes {x.name} in block {first.number} and {y.name} in block {second.number}"
                )
        same.update({id(x): y for x, y in zip(a.outputs, b.outputs, strict=True)})
    if entry is None or same.get(id(first.exit)) is not second.exit:
        raise NotAlikeError(f"blocks {first.number} and {second.number} are connected differently")
    return entry


def _same_value(x: ir.Value, y: ir.Value, same: dict[int, ir.Value | None], prefixes: tuple[str, str]) -> bool:
    """Whether x is in its block what y is in the other: made by twins, shared, equal constants, or twin parameters."""
    if id(x) in same:
        return same[id(x)] is y
    name, other = x.name or "", y.name or ""
    if x is y:  # a parameter of one of the two is its own there, and a foreign one in the other
        return x.const_value is not None or not name.startswith(prefixes)
    if not (x.is_initializer() and y.is_initializer()):
        return False
    a, b = x.const_value, y.const_value
    if a is not None and b is not None:
        return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy())
    twins = name.startswith(prefixes[0]) and other == prefixes[1] + name.removeprefix(prefixes[0])
    return twins and a is b is None and x.shape == y.shape


def _attributes(node: ir.Node) -> dict[str, Any]:
    def plain(attribute: ir.Attr) -> Any:
        return attribute.as_tensor().tobytes() if attribute.type == ir.AttributeType.TENSOR else attribute.value

    return {name: plain(attribute) for name, attribute in node.attributes.items()}


def _after(graph: ir.Graph, nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Nodes that depend on these, in order."""
    reached = {id(value) for node in nodes for value in node.outputs}
    own = {id(node) for node in nodes}
    result: list[ir.Node] = []
    for node in graph:
        if id(node) not in own and any(id(value) in reached for value in node.inputs):
            reached.update(id(value) for value in node.outputs)
            result.append(node)
    return result


@dataclass(frozen=True)
class _Copy:
    """A block of the whole model: its nodes, its cache by part, and the value that leaves it."""

    nodes: list[ir.Node]
    past: dict[str, ir.Value]
    present: dict[str, ir.Value]
    stream: ir.Value


def _copy(block: _Block, number: int, prefix: str, stream: ir.Value | None, graph: ir.Graph) -> _Copy:
    """A copy of ``block`` as block ``number``, fed by ``stream``.

    A first block that is the only one of its kind has no known entry, and needs none: it stays where it is.
    """
    old, new = f"{prefix}.{block.number}", f"{prefix}.{number}"
    past = {part: _renamed(value, cache_name(PAST, number, part)) for part, value in block.past.items()}
    present: dict[str, ir.Value] = {}
    mapping = {id(value): past[part] for part, value in block.past.items()}
    if block.entry is not None and stream is not None:
        mapping[id(block.entry)] = stream
    copies: list[ir.Node] = []

    def input_of(value: ir.Value | None) -> ir.Value | None:
        if value is None or id(value) in mapping:
            return None if value is None else mapping[id(value)]
        name = value.name or ""
        if not (value.is_initializer() and value.const_value is None and name.startswith(f"{old}.")):
            return value
        renamed = new + name.removeprefix(old)
        if renamed not in graph.initializers:
            graph.initializers.add(_renamed(value, renamed))
        return graph.initializers[renamed]

    def output_of(value: ir.Value) -> ir.Value:
        if not (value.is_graph_output() and is_present(cast(str, value.name))):
            return _renamed(value, f"{new}/{value.name}")
        part = cast(str, value.name).rpartition(".")[2]
        present[part] = _renamed(value, cache_name(PRESENT, number, part))
        return present[part]

    for node in block.nodes:
        outputs = [output_of(value) for value in node.outputs]
        inputs = [input_of(value) for value in node.inputs]
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, version=node.version)
        inside = [scope == old or scope.startswith(f"{old}.") for scope in scopes_of(node)]
        scopes = zip(scopes_of(node), inside, strict=True)
        set_scopes(copy, [new + scope.removeprefix(old) if moved else scope for scope, moved in scopes])
        mapping.update({id(value): output for value, output in zip(node.outputs, outputs, strict=True)})
        copies.append(copy)
    ordered = {part: present[part] for part in past if part in present}
    return _Copy(copies, past, ordered, mapping[id(block.exit)])


def _renamed(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _replace_caches(
    graph: ir.Graph, parts: Sequence[_Block], past: Sequence[dict[str, ir.Value]], traced: Sequence[int]
) -> None:
    """The caches of the whole model as inputs; what blocks share and computed from a traced block's uses them."""
    for part, source in zip(parts, traced, strict=True):
        for name, value in part.past.items():
            value.replace_all_uses_with(past[source][name])
            graph.inputs.remove(value)
    graph.inputs.extend(value for values in past for value in values.values())


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` take the place of ``old`` everywhere, as a graph output with its name."""
    output_name = old.name if old.is_graph_output() else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if output_name is not None:
        old.name, new.name = None, output_name
