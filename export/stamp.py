"""Repeat traced blocks: the graph of a short model becomes the graph of the whole one.

A block's nodes are found by data flow: they depend on a parameter of the block. What depends on no block's parameters is shared (masks,
rotary angles). Two traced blocks of the same kind must be equal node by node, constants included; then every other block of that kind
is a copy with its own parameters. If they differ, the caller traces the whole model instead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import onnx_ir as ir

from .artifact import Blocks

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass
class _Block:
    """Nodes of one traced block, the value that enters from the block before, and the one that the next block takes."""

    number: int
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    entry: ir.Value | None = None
    exit: ir.Value | None = None


class NotAlikeError(Exception):
    """The traced blocks are not copies of each other; the message says where."""


def scopes_of(node: ir.Node) -> list[str]:
    """Module paths around a traced node, outermost first; the last entry is the traced operation's own name."""
    text = node.metadata_props.get(SCOPES)
    return [scope for scope in cast(list[str], ast.literal_eval(text)) if scope] if text else []


def stamp(model: ir.Model, blocks: Blocks, traced: Sequence[int]) -> None:
    """Rewrite the graph of the short model, whose blocks are ``traced`` of ``blocks``, into that of the whole model, in place.

    Raises:
        NotAlikeError: two traced blocks of one kind differ, or blocks are connected by more than one value.
    """
    graph = model.graph
    parts = _split(graph, blocks.prefix, len(traced))
    _connect(parts, graph)
    by_kind: dict[int, list[_Block]] = {}
    for part, source in zip(parts, traced, strict=True):
        by_kind.setdefault(blocks.kinds[source], []).append(part)
    prototypes = {kind: _check_alike(members, blocks.prefix) for kind, members in by_kind.items()}
    last = parts[-1]
    assert last.exit is not None and parts[0].entry is not None
    tail = [node for node in _after(graph, last.nodes) if not any(node in part.nodes for part in parts)]
    stream = parts[0].entry
    stamped: list[ir.Node] = []
    for number, kind in enumerate(blocks.kinds):
        nodes, stream = _copy(prototypes[kind], number, blocks.prefix, stream, graph)
        stamped += nodes
    output_name = last.exit.name if last.exit.is_graph_output() else None
    last.exit.replace_all_uses_with(stream, replace_graph_outputs=True)
    if output_name is not None:
        last.exit.name, stream.name = None, output_name
    for node in stamped:
        graph.insert_before(tail[0], node) if tail else graph.append(node)
    for part in reversed(parts):
        graph.remove(list(reversed(part.nodes)), safe=True)
    used = {id(value) for node in graph for value in node.inputs if value is not None}
    for name, value in list(graph.initializers.items()):
        if id(value) not in used:
            graph.initializers.pop(name)


def _split(graph: ir.Graph, prefix: str, count: int) -> list[_Block]:
    """Nodes by block: those inside the module ``prefix.i`` that depend on some block's parameters."""
    parts = [_Block(number) for number in range(count)]
    moving = {id(value) for name, value in graph.initializers.items() if name.startswith(f"{prefix}.")}
    for node in graph:
        if not any(id(value) in moving for value in node.inputs):
            continue
        moving.update(id(value) for value in node.outputs)
        number = _block_number(node, prefix)
        if number is not None:
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
    """Find the one value that leaves each block, and the one that enters it."""
    owner = {id(node): part for part in parts for node in part.nodes}
    for part in parts:
        leaving: dict[int, ir.Value] = {}
        for node in part.nodes:
            for value in node.outputs:
                users = [owner.get(id(user)) for user, _ in value.uses()]
                if any(user is not part for user in users) or value in graph.outputs:
                    leaving[id(value)] = value
                if any(user is not None and user.number not in (part.number, part.number + 1) for user in users):
                    raise NotAlikeError(
                        f"{value.name} of block {part.number} is used further on than in the next block"
                    )
        if len(leaving) != 1:
            raise NotAlikeError(f"{len(leaving)} values leave block {part.number}, expected one")
        part.exit = next(iter(leaving.values()))
    for before, part in zip(parts, parts[1:], strict=False):
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
    if prototype.entry is None:
        raise NotAlikeError(f"{prefix}.{prototype.number} is the first block and the only one of its kind")
    return prototype


def _compare(first: _Block, second: _Block, prefix: str) -> ir.Value:
    """Raise unless two blocks are equal; returns what enters ``first`` where the residual stream enters ``second``."""
    if len(first.nodes) != len(second.nodes):
        raise NotAlikeError(
            f"blocks {first.number} and {second.number} have {len(first.nodes)} and {len(second.nodes)} nodes"
        )
    same: dict[int, ir.Value] = {}
    entry: ir.Value | None = None
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if (a.domain, a.op_type, len(a.inputs), len(a.outputs)) != (b.domain, b.op_type, len(b.inputs), len(b.outputs)):
            raise NotAlikeError(
                f"{a.op_type} of block {first.number} stands where {b.op_type} does in block {second.number}"
            )
        if _attributes(a) != _attributes(b):
            raise NotAlikeError(
                f"{a.op_type} has other attributes in block {first.number} than in block {second.number}"
            )
        for x, y in zip(a.inputs, b.inputs, strict=True):
            if x is None or y is None:
                if x is not y:
                    raise NotAlikeError(
                        f"{a.op_type} has other inputs in block {first.number} than in block {second.number}"
                    )
            elif y is second.entry:
                if entry not in (None, x):
                    raise NotAlikeError(f"two values enter block {first.number} where one enters block {second.number}")
                entry = x
            elif not _same_value(x, y, same, f"{prefix}.{first.number}.", f"{prefix}.{second.number}."):
                raise NotAlikeError(
                    f"{a.op_type} takes {x.name} in block {first.number} and {y.name} in block {second.number}"
                )
        same.update({id(x): y for x, y in zip(a.outputs, b.outputs, strict=True)})
    if entry is None or (first.exit and same.get(id(first.exit)) is not second.exit):
        raise NotAlikeError(f"blocks {first.number} and {second.number} are connected differently")
    return entry


def _same_value(x: ir.Value, y: ir.Value, same: dict[int, ir.Value], x_prefix: str, y_prefix: str) -> bool:
    if id(x) in same:
        return same[id(x)] is y
    if x is y:
        return True
    if x.is_initializer() and y.is_initializer():
        name, other = cast(str, x.name), cast(str, y.name)
        return name.startswith(x_prefix) and other == y_prefix + name[len(x_prefix) :] and x.shape == y.shape
    return False


def _attributes(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _after(graph: ir.Graph, nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Nodes that depend on these, in order."""
    reached = {id(value) for node in nodes for value in node.outputs}
    result: list[ir.Node] = []
    for node in graph:
        if any(id(value) in reached for value in node.inputs):
            reached.update(id(value) for value in node.outputs)
            result.append(node)
    return result


def _copy(block: _Block, number: int, prefix: str, stream: ir.Value, graph: ir.Graph) -> tuple[list[ir.Node], ir.Value]:
    """A copy of ``block`` as block ``number``, fed by ``stream``; returns its nodes and the value that leaves it."""
    old, new = f"{prefix}.{block.number}", f"{prefix}.{number}"
    assert block.entry is not None and block.exit is not None
    mapping: dict[int, ir.Value] = {id(block.entry): stream}
    copies: list[ir.Node] = []

    def input_of(value: ir.Value | None) -> ir.Value | None:
        if value is None or id(value) in mapping:
            return None if value is None else mapping[id(value)]
        name = value.name or ""
        if not (value.is_initializer() and name.startswith(f"{old}.")):
            return value
        renamed = new + name[len(old) :]
        if renamed not in graph.initializers:
            graph.initializers.add(ir.Value(name=renamed, shape=value.shape, type=value.type))
        return graph.initializers[renamed]

    for node in block.nodes:
        outputs = [ir.Value(name=f"{new}/{value.name}", shape=value.shape, type=value.type) for value in node.outputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            [input_of(value) for value in node.inputs],
            list(node.attributes.values()),
            outputs=outputs,
            version=node.version,
        )
        scopes = [
            scope.replace(old, new, 1) if scope == old or scope.startswith(f"{old}.") else scope
            for scope in scopes_of(node)
        ]
        copy.metadata_props[SCOPES] = repr(scopes)
        mapping.update({id(value): output for value, output in zip(node.outputs, outputs, strict=True)})
        copies.append(copy)
    return copies, mapping[id(block.exit)]
