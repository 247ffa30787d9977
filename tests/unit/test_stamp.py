"""Repeating traced blocks: what comes out, and near misses that must not be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bismooth.export.artifact import Blocks
from bismooth.export.scopes import scopes_of, set_scopes
from bismooth.export.stamp import NotAlikeError, stamp

N = 4
FLOAT = ir.DataType.FLOAT
Inputs = list[ir.Value | None]


class Traced:
    """A traced graph by hand: embedding, blocks with the scopes of ``layers.i``, and a head."""

    def __init__(self) -> None:
        self.x = ir.val("x", FLOAT, ("batch", N))
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def parameter(self, name: str) -> ir.Value:
        if name not in self.initializers:
            self.initializers[name] = ir.val(name, FLOAT, (N, N))
        return self.initializers[name]

    def constant(self, name: str, value: Any) -> ir.Value:
        array = np.asarray(value, np.float32)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(FLOAT))
        value.const_value = ir.tensor(array, name=name)
        self.initializers[name] = value
        return value

    def node(self, kind: str, inputs: Inputs, scope: str, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        output = node.outputs[0]
        output.name, output.type, output.shape = (
            f"value_{len(self.nodes)}",
            ir.TensorType(FLOAT),
            ir.Shape(("batch", N)),
        )
        set_scopes(node, [*[""], *scope.split(" "), kind.lower()])
        self.nodes.append(node)
        return output

    def block(self, number: int, stream: ir.Value, **changes: Any) -> ir.Value:
        """x + LeakyRelu(x·W · gain), where gain is a constant, in the module ``layers.number``."""
        scope = f"layers layers.{number}"
        y = self.node("MatMul", [stream, self.parameter(f"layers.{number}.fc.weight")], f"{scope} layers.{number}.fc")
        y = self.node("Mul", [y, self.constant(f"gain_{number}", changes.get("gain", 0.5))], scope)
        y = self.node(changes.get("kind", "LeakyRelu"), [y], scope, **changes.get("attributes", {"alpha": 0.1}))
        return self.node("Add", [changes.get("skip", stream), y], scope)

    def model(self, output: ir.Value) -> ir.Model:
        output.name = "y"
        graph = ir.Graph(
            [self.x], [output], nodes=self.nodes, initializers=list(self.initializers.values()), opset_imports={"": 23}
        )
        return ir.Model(graph, ir_version=10)


def two_blocks(**changes: Any) -> ir.Model:
    """Embedding, block 0, block 1 (with ``changes``), head."""
    t = Traced()
    stream = t.node("MatMul", [t.x, t.parameter("embed")], "embed")
    stream = t.block(0, stream)
    stream = t.block(1, stream, **changes)
    return t.model(t.node("MatMul", [stream, t.parameter("head")], "head"))


def nodes(model: ir.Model) -> list[tuple[str, ...]]:
    """Operator, innermost module, parameters."""
    return [
        (node.op_type, scopes_of(node)[-2], *(str(v.name) for v in node.inputs if v and v.is_initializer()))
        for node in model.graph
    ]


def chained(model: ir.Model) -> bool:
    """Whether every MatMul but the first takes what the one before it led to."""
    reached: set[int] = set()
    for number, node in enumerate(node for node in model.graph if node.op_type == "MatMul"):
        if number and id(node.inputs[0]) not in reached:
            return False
        reached = {id(value) for value in node.outputs}
        for later in model.graph:
            if any(id(value) in reached for value in later.inputs) and later.op_type != "MatMul":
                reached |= {id(value) for value in later.outputs}
    return True


def block(number: int, gain: str = "gain_1") -> list[tuple[str, ...]]:
    scope = f"layers.{number}"
    return [
        ("MatMul", f"{scope}.fc", f"{scope}.fc.weight"),
        ("Mul", scope, gain),
        ("LeakyRelu", scope),
        ("Add", scope),
    ]


def test_two_blocks_become_four() -> None:
    model = two_blocks()
    stamp(model, Blocks("layers", (0, 0, 0, 0)), (0, 1))
    assert nodes(model) == [
        ("MatMul", "embed", "embed"),
        *(node for number in range(4) for node in block(number)),
        ("MatMul", "head", "head"),
    ]
    assert chained(model)
    assert set(model.graph.initializers) == {"embed", "head", "gain_1", *(f"layers.{i}.fc.weight" for i in range(4))}
    assert [value.name for value in model.graph.outputs] == ["y"]
    shapes = [value.shape for node in model.graph for value in node.outputs]
    assert all(shape == ir.Shape(("batch", N)) for shape in shapes)
    ir.to_proto(model)


def test_kinds_that_alternate() -> None:
    t = Traced()
    stream = t.x
    for number in range(4):
        stream = t.block(number, stream, gain=(2.0, 3.0)[number % 2])
    model = t.model(t.node("MatMul", [stream, t.parameter("head")], "head"))
    stamp(model, Blocks("layers", (0, 1, 0, 1, 0, 0)), (0, 1, 2, 3))
    gains = [name for kind, _, *rest in nodes(model) if kind == "Mul" for name in rest]
    assert gains == [f"gain_{2 + kind}" for kind in (0, 1, 0, 1, 0, 0)]
    assert chained(model)


def test_a_first_block_of_its_own_kind_stays_where_it_is() -> None:
    t = Traced()
    stream = t.block(0, t.x, kind="Relu", attributes={})
    stream = t.block(2, t.block(1, stream), gain=0.5)
    model = t.model(t.node("MatMul", [stream, t.parameter("head")], "head"))
    stamp(model, Blocks("layers", (0, 1, 1, 1)), (0, 1, 2))
    expected = block(0, "gain_0")
    expected[2] = ("Relu", "layers.0")
    assert nodes(model) == [*expected, *(n for i in (1, 2, 3) for n in block(i, "gain_2")), ("MatMul", "head", "head")]
    assert chained(model)


def test_a_model_that_ends_with_its_last_block() -> None:
    t = Traced()
    model = t.model(t.block(1, t.block(0, t.x)))
    stamp(model, Blocks("layers", (0, 0, 0)), (0, 1))
    assert nodes(model) == [node for number in range(3) for node in block(number)]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert model.graph.outputs[0].producer() is model.graph[-1]


def test_a_constant_that_all_blocks_share() -> None:
    """The optimizer merges equal constants; the one that is left has the name of the first block's."""
    t = Traced()
    gain = t.constant("layers.0.gain", 2.0)

    def scaled(number: int, stream: ir.Value) -> ir.Value:
        return t.node("Mul", [t.block(number, stream), gain], f"layers layers.{number}")

    model = t.model(t.node("MatMul", [scaled(1, scaled(0, t.x)), t.parameter("head")], "head"))
    stamp(model, Blocks("layers", (0, 0, 0)), (0, 1))
    assert [rest for kind, _, *rest in nodes(model) if kind == "Mul"] == [["gain_1"], ["layers.0.gain"]] * 3


def test_what_depends_on_no_parameter_is_shared() -> None:
    """Also where it was traced inside of a block."""
    t = Traced()
    mask = t.node("Relu", [t.x], "layers layers.0")
    stream = t.block(1, t.block(0, t.x, skip=mask), skip=mask)
    model = t.model(t.node("MatMul", [stream, t.parameter("head")], "head"))
    stamp(model, Blocks("layers", (0, 0, 0)), (0, 1))
    assert [kind for kind, *_ in nodes(model)].count("Relu") == 1
    adds = [node for node in model.graph if node.op_type == "Add"]
    assert all(node.inputs[0] is mask for node in adds)


def missing_attribute(t: Traced, stream: ir.Value) -> ir.Value:
    return t.block(1, t.block(0, stream), attributes={})


def two_values_leave(t: Traced, stream: ir.Value) -> ir.Value:
    first = t.block(0, stream)
    inner = first.producer().inputs[1]  # pyright: ignore[reportOptionalMemberAccess]: every value here has a producer
    return t.node("Add", [t.block(1, first), inner], "head")


def inner_value_enters_the_next(t: Traced, stream: ir.Value) -> ir.Value:
    first = t.block(0, stream)
    inner = first.producer().inputs[1]  # pyright: ignore[reportOptionalMemberAccess]: every value here has a producer
    return t.block(1, first, skip=inner)


def the_stream_skips_a_block(t: Traced, stream: ir.Value) -> ir.Value:
    first = t.block(0, stream)
    return t.block(2, t.block(1, first), skip=first)


def an_operation_between_blocks(t: Traced, stream: ir.Value) -> ir.Value:
    return t.block(1, t.node("Relu", [t.block(0, stream)], "layers"))


def a_shared_value_in_place_of_the_stream(t: Traced, stream: ir.Value) -> ir.Value:
    stream = t.node("MatMul", [stream, t.parameter("embed")], "embed")
    return t.block(1, t.block(0, stream, skip=t.x))


def the_stream_in_place_of_a_shared_value(t: Traced, stream: ir.Value) -> ir.Value:
    stream = t.node("MatMul", [stream, t.parameter("embed")], "embed")
    return t.block(1, t.block(0, stream), skip=t.x)


def a_parameter_of_another_block(t: Traced, stream: ir.Value) -> ir.Value:
    stream = t.block(0, stream)
    t.initializers["layers.1.fc.weight"] = t.parameter("layers.0.fc.weight")
    return t.block(1, stream)


def an_input_left_out(t: Traced, stream: ir.Value) -> ir.Value:
    def clipped(number: int, stream: ir.Value, low: bool) -> ir.Value:
        scope = f"layers layers.{number}"
        y = t.node("MatMul", [stream, t.parameter(f"layers.{number}.w")], scope)
        bound = t.constant(f"low_{number}", 0.0)
        return t.node("Clip", [y, bound, None] if low else [y, None, bound], scope)

    return clipped(1, clipped(0, stream, True), False)


def one_more_node(t: Traced, stream: ir.Value) -> ir.Value:
    return t.node("Relu", [t.block(1, t.block(0, stream))], "layers layers.1")


def blocks_without_nodes(t: Traced, stream: ir.Value) -> ir.Value:
    return t.block(0, t.node("MatMul", [stream, t.parameter("layers.1.w")], "elsewhere"))


def third_block_differs(t: Traced, stream: ir.Value) -> ir.Value:
    return t.block(2, t.block(1, t.block(0, stream)), gain=0.25)


def side_by_side(t: Traced, stream: ir.Value) -> ir.Value:
    return t.node("Add", [t.block(0, stream), t.block(1, stream)], "head")


def another_value_leaves(t: Traced, stream: ir.Value) -> ir.Value:
    last = t.block(1, t.block(0, stream)).producer()
    return last.inputs[1]  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]: it is an Add


Make = Callable[[Traced, ir.Value], ir.Value]
NEAR_MISSES: dict[str, tuple[Make, str]] = {
    "an attribute": (
        lambda t, x: t.block(1, t.block(0, x), attributes={"alpha": 0.2}),
        "LeakyRelu has other attributes in block 0 than in block 1",
    ),
    "an attribute less": (lambda t, x: t.block(1, t.block(0, x), attributes={}), "LeakyRelu has other attributes"),
    "an operator": (
        lambda t, x: t.block(1, t.block(0, x), kind="Relu", attributes={}),
        "LeakyRelu of block 0 stands where Relu does in block 1",
    ),
    "a constant": (
        lambda t, x: t.block(1, t.block(0, x), gain=0.25),
        "Mul takes gain_0 in block 0 and gain_1 in block 1",
    ),
    "a constant's shape": (
        lambda t, x: t.block(1, t.block(0, x), gain=[0.5]),
        "Mul takes gain_0 in block 0 and gain_1",
    ),
    "an input left out": (an_input_left_out, "Clip has other inputs in block 0 than in block 1"),
    "a node more": (one_more_node, "blocks 0 and 1 have 4 and 5 nodes"),
    "two values leave": (two_values_leave, "2 values leave block 0, expected one"),
    "an inner value enters": (inner_value_enters_the_next, "2 values leave block 0, expected one"),
    "a skip connection": (the_stream_skips_a_block, "is used further on than in the next block"),
    "something between": (an_operation_between_blocks, "MatMul takes x in block 0 and value_4 in block 1"),
    "side by side": (side_by_side, "blocks 0 and 1 are connected differently"),
    "another value leaves": (another_value_leaves, "blocks 0 and 1 are connected differently"),
    "shared for stream": (a_shared_value_in_place_of_the_stream, "two values enter block 0 where one enters block 1"),
    "stream for shared": (the_stream_in_place_of_a_shared_value, "Add takes .* in block 0 and x in block 1"),
    "a foreign parameter": (
        a_parameter_of_another_block,
        "MatMul takes layers.0.fc.weight in block 0 and layers.0.fc.w",
    ),
    "no nodes": (blocks_without_nodes, "no traced node belongs to layers.1"),
    "the third block": (third_block_differs, "Mul takes gain_0 in block 0 and gain_2 in block 2"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_not_repeated(case: str) -> None:
    make, reason = NEAR_MISSES[case]
    t = Traced()
    model = t.model(t.node("MatMul", [make(t, t.x), t.parameter("head")], "head"))
    before = nodes(model)
    count = 3 if any(name.startswith("layers.2.") for name in t.initializers) else 2
    with pytest.raises(NotAlikeError, match=reason):
        stamp(model, Blocks("layers", (0,) * 5), tuple(range(count)))
    assert nodes(model) == before


def test_a_block_that_takes_something_else_than_its_like() -> None:
    t = Traced()
    first = t.block(0, t.x, kind="Relu", attributes={})
    third = t.block(2, t.block(1, t.node("Relu", [t.x], "embed")))
    model = t.model(t.node("Add", [first, third], "head"))
    with pytest.raises(NotAlikeError, match="block 1 takes value_4 where the others take the residual stream"):
        stamp(model, Blocks("layers", (0, 1, 1, 1)), (0, 1, 2))


def test_scopes_are_optional() -> None:
    assert scopes_of(ir.node("Relu", [ir.val("x")])) == []
