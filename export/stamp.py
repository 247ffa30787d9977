"""Repeat traced blocks: the graph of a short model becomes the graph of the whole one.

A block's nodes are found by data flow: they depend on a parameter of the block. What depends on no block's parameters
is shared (masks, rotary angles). Two traced blocks of the same kind must be equal node by node, constants included;
then every other block of that kind is a copy with its own parameters. If they differ, the caller traces the whole
model instead.
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
from .scopes import scopes_of, set_scopes


@dataclass
class _Block:
    """Nodes of one traced block, the value that enters from the block before, and the one that the next block takes."""

    number: int
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
    parts = _split(graph, blocks.prefix, len(traced))
    _connect(parts, graph)
    by_kind: dict[int, list[_Block]] = {}
    for part, source in zip(parts, traced, strict=True):
        by_kind.setdefault(blocks.kinds[source], []).append(part)
    prototypes = {kind: _check_alike(members, blocks.prefix) for kind, members in by_kind.items()}
    first, last = parts[0], parts[-1]
    tail = _after(graph, last.nodes)
    stamped: list[ir.Node] = []
    stream = first.entry
    for number, kind in enumerate(blocks.kinds):
        nodes, stream = _copy(prototypes[kind], number, blocks.prefix, stream, graph)
        stamped += nodes
    _replace(cast(ir.Value, last.exit), cast(ir.Value, stream))
    if tail:
        graph.insert_before(tail[0], stamped)
    else:
        graph.extend(stamped)
    for part in reversed(parts):
        graph.remove(list(reversed(part.nodes)), safe=True)
    RemoveUnusedNodesPass()(model)


def _split(graph: ir.Graph, prefix: str, count: int) -> list[_Block]:
    """Nodes by block: those inside the module ``prefix.i`` that depend on some block's parameters."""
    parts = [_Block(number) for number in range(count)]
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
    return parts


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
            if any(user is not part for user in users) or value in graph.outputs:
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
    same: dict[int, ir.Value] = {}
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


def _same_value(x: ir.Value, y: ir.Value, same: dict[int, ir.Value], prefixes: tuple[str, str]) -> bool:
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


def _copy(
    block: _Block, number: int, prefix: str, stream: ir.Value | None, graph: ir.Graph
) -> tuple[list[ir.Node], ir.Value]:
    """A copy of ``block`` as block ``number``, fed by ``stream``; returns its nodes and the value that leaves it.

    A first block that is the only one of its kind has no known entry, and needs none: it stays where it is.
    """
    old, new = f"{prefix}.{block.number}", f"{prefix}.{number}"
    mapping: dict[int, ir.Value] = {}
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
            graph.initializers.add(ir.Value(name=renamed, shape=value.shape, type=value.type))
        return graph.initializers[renamed]

    for node in block.nodes:
        outputs = [ir.Value(name=f"{new}/{value.name}", shape=value.shape, type=value.type) for value in node.outputs]
        inputs = [input_of(value) for value in node.inputs]
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, version=node.version)
        inside = [scope == old or scope.startswith(f"{old}.") for scope in scopes_of(node)]
        scopes = zip(scopes_of(node), inside, strict=True)
        set_scopes(copy, [new + scope.removeprefix(old) if moved else scope for scope, moved in scopes])
        mapping.update({id(value): output for value, output in zip(node.outputs, outputs, strict=True)})
        copies.append(copy)
    return copies, mapping[id(block.exit)]


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` take the place of ``old`` everywhere, as a graph output with its name."""
    output_name = old.name if old.is_graph_output() else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if output_name is not None:
        old.name, new.name = None, output_name
