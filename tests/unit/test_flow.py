"""Channel labels through each operation: where they arrive, and where they must stop."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bismooth.passes._gs import set_type
from bismooth.passes.flow import Flow, trace
from bismooth.passes.flow_labels import keeps_order
from bismooth.passes.graph import Index
from bismooth.passes.linears import find_linears
from tests.graphs import Builder, Size
from tests.steps import MOVES, NEAR_MISSES, C, Step, everything, repeat_kv, swap_heads


def traced(b: Builder, folder: Path, start: str = "x", size: int = C) -> Flow:
    graph = b.graph(folder)
    return trace(start, size, find_linears(graph), Index.of(graph))


def through(step: Step, folder: Path, *, k: int = C) -> Flow:
    """Channels of x [batch, sequence, C] through one step into a linear of k inputs."""
    b = Builder()
    b.outputs.append(b.linear(step(b, b.tokens("x", C)), "fc", 3, k))
    return traced(b, folder)


def arrived(flow: Flow) -> list[int]:
    """The labels of the only consumer."""
    (consumer,) = flow.consumers
    return consumer.labels.tolist()


def reasons(flow: Flow) -> list[tuple[list[int], str, str]]:
    return [(pin.channels.tolist(), pin.reason, pin.node) for pin in flow.pinned]


def test_a_linear_absorbs_what_it_reads(tmp_path: Path) -> None:
    flow = through(lambda b, x: x, tmp_path)
    assert arrived(flow) == everything()
    assert flow.free.all()
    assert (flow.pinned, flow.biases) == ((), ())


@pytest.mark.parametrize(("step", "labels"), MOVES.values(), ids=MOVES.keys())
def test_labels_move_with_the_elements(step: Step, labels: list[int], tmp_path: Path) -> None:
    flow = through(step, tmp_path)
    assert arrived(flow) == labels
    assert not flow.pinned


def test_labels_that_are_cut_off_or_repeated(tmp_path: Path) -> None:
    def every_other(b: Builder, x: str) -> str:
        return b.op("Slice", x, b.ints(1), b.ints(C), b.ints(-1), b.ints(2))

    flow = through(every_other, tmp_path, k=4)
    assert arrived(flow) == [1, 3, 5, 7]
    assert flow.free.tolist() == [False, True] * 4, "a channel that no linear reads is not free"
    flow = through(repeat_kv, tmp_path, k=2 * C)
    assert arrived(flow) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


def test_input_that_comes_only_partly_from_the_producer(tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op("Concat", b.tokens("other", 2), x, axis=-1), tmp_path, k=C + 2)
    assert arrived(flow) == [-1, -1, *everything()]


@pytest.mark.parametrize("op", ["Sigmoid", "Gelu", "Tanh", "Erf", "Softmax", "Exp", "HardSwish", "Softplus"])
def test_what_does_not_commute_with_a_scale_is_opaque(op: str, tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op(op, x), tmp_path)
    assert not flow.consumers
    assert not flow.free.any()
    assert reasons(flow) == [(everything(), f"{op} does not commute with a scale per channel", f"graph/{op}")]


@pytest.mark.parametrize(("step", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_misses_are_pinned_with_a_reason(step: Step, reason: str, tmp_path: Path) -> None:
    flow = through(step, tmp_path)
    assert not flow.consumers
    assert not flow.free.any()
    assert {pin.reason for pin in flow.pinned} == {reason}


def test_another_use_of_the_channels_pins_them(tmp_path: Path) -> None:
    b = Builder()
    x = b.tokens("x", C)
    half = b.op("Slice", x, b.ints(0), b.ints(3), b.ints(2))
    b.outputs += [b.linear(x, "fc", 3, C), b.op("Sigmoid", half)]
    flow = traced(b, tmp_path)
    assert flow.free.tolist() == [False] * 3 + [True] * 5
    assert arrived(flow) == [-1, -1, -1, 3, 4, 5, 6, 7]
    assert reasons(flow) == [([0, 1, 2], "Sigmoid does not commute with a scale per channel", "graph/Sigmoid")]


def test_graph_output_pins(tmp_path: Path) -> None:
    b = Builder()
    y = b.op("Relu", b.tokens("x", C))
    b.outputs += [b.linear(y, "fc", 3, C), y]
    assert reasons(traced(b, tmp_path)) == [(everything(), "the channel is an output of the graph", y)]


def test_shape_does_not_depend_on_the_channels(tmp_path: Path) -> None:
    b = Builder()
    x = b.tokens("x", C)
    b.outputs += [b.linear(x, "fc", 3, C), b.op("Shape", x)]
    assert traced(b, tmp_path).free.all()


def test_use_in_a_subgraph_pins(tmp_path: Path) -> None:
    b = Builder()
    y = b.op("Relu", b.tokens("x", C))

    def branch(op: str) -> object:
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, [y], ["out"], name=f"inner_{op}")], op, [], [out])

    flag = b.input("flag", dtype=TensorProto.BOOL)
    b.outputs += [b.linear(y, "fc", 3, C), b.op("If", flag, then_branch=branch("Neg"), else_branch=branch("Exp"))]
    flow = traced(b, tmp_path)
    assert not flow.free.any()
    assert flow.pinned[0].reason.startswith("the channel enters a subgraph at ")


def test_bias_is_divided_with_the_channels(tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op("Sub", b.vector("bias", C), swap_heads(b, x)), tmp_path)
    (bias,) = flow.biases
    assert (bias.value, bias.node) == ("bias", "graph/Sub")
    assert bias.labels.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert flow.free.all()


def test_bias_of_heads(tmp_path: Path) -> None:
    def add_per_head(b: Builder, x: str) -> str:
        y = b.op("Add", b.heads(x, 2, 4), b.matrix("bias", 2, 1, 4))
        return b.merged(y, C)

    (bias,) = through(add_per_head, tmp_path).biases
    assert bias.labels.tolist() == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_bias_that_is_shared_pins(tmp_path: Path) -> None:
    b = Builder()
    bias = b.vector("bias", C)
    b.outputs += [b.linear(b.op("Add", b.tokens("x", C), bias), "fc", 3, C), b.op("Add", b.tokens("r", C), bias)]
    assert reasons(traced(b, tmp_path)) == [(everything(), "the bias bias is also used elsewhere", "graph/Add")]


def test_bias_that_is_too_big_or_not_simple_pins(tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op("Add", x, b.op("Exp", b.vector("v", C))), tmp_path)
    assert flow.pinned[0].reason == "the constant v0_0 is too big or not simple enough to be divided"


def test_product_with_an_activation_that_is_not_scaled(tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op("Mul", b.op("Sigmoid", b.tokens("g", C)), x), tmp_path)
    assert arrived(flow) == everything()
    assert flow.consumers[0].crossed == {"product"}


def test_gate_of_the_same_producer(tmp_path: Path) -> None:
    """silu(gate) · up with both from one producer: the gate is pinned, and then up is free."""

    def gated(b: Builder, x: str) -> str:
        gate, up = b.ops("Split", x, count=2, axis=-1, num_outputs=2)
        return b.op("Mul", b.silu(gate, "act"), up)

    flow = through(gated, tmp_path, k=4)
    assert arrived(flow) == [4, 5, 6, 7]
    assert flow.free.tolist() == [False] * 4 + [True] * 4
    assert flow.consumers[0].crossed == {"product"}


def test_product_of_two_scaled_operands_keeps_one(tmp_path: Path) -> None:
    def gated(b: Builder, x: str) -> str:
        gate, up = b.ops("Split", x, count=2, axis=-1, num_outputs=2)
        return b.op("Mul", b.op("Relu", gate), up)

    flow = through(gated, tmp_path, k=4)
    assert arrived(flow) == [4, 5, 6, 7]
    assert reasons(flow) == [([0, 1, 2, 3], "the channel is multiplied by another one that is scaled", "graph/Mul")]


def attention(b: Builder, x: str, **use: str) -> str:
    """Attention of 4 query heads over 2 key and value heads of size 4; ``use`` says which input x enters at."""
    q, k, v = b.input("q", "batch", 4, "sequence", 4), *(b.input(n, "batch", 2, "sequence", 4) for n in "kv")
    given = {"q": q, "k": k, "v": v, **{name: b.heads(x, 2, 4) for name in use}}
    return b.merged(b.op("Attention", given["q"], given["k"], given["v"]), 2 * C)


def test_attention_values_repeat_over_query_heads(tmp_path: Path) -> None:
    flow = through(lambda b, x: attention(b, x, v="x"), tmp_path, k=2 * C)
    assert arrived(flow) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert flow.consumers[0].crossed == {"attention"}


def test_attention_keys_are_pinned(tmp_path: Path) -> None:
    flow = through(lambda b, x: attention(b, x, k="x"), tmp_path, k=2 * C)
    assert reasons(flow) == [
        (everything(), "the channels enter Attention at input 1, not as values", "graph/Attention")
    ]


def test_attention_on_three_dimensions(tmp_path: Path) -> None:
    def flat(b: Builder, x: str) -> str:
        return b.op("Attention", b.tokens("q", 2 * C), b.tokens("k", C), x, q_num_heads=4, kv_num_heads=2)

    flow = through(flat, tmp_path, k=2 * C)
    assert arrived(flow) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


def test_attention_with_a_cache_is_opaque(tmp_path: Path) -> None:
    def cached(b: Builder, x: str) -> str:
        q, k = (b.input(name, "batch", 2, "sequence", 4) for name in "qk")
        past = [b.input(name, "batch", 2, "past", 4) for name in ("pk", "pv")]
        y, *present = b.ops("Attention", q, k, b.heads(x, 2, 4), "", *past, count=3)
        b.outputs += [b.op("Shape", value) for value in present]
        return b.merged(y, C)

    flow = through(cached, tmp_path)
    assert reasons(flow) == [(everything(), "Attention keeps its values in a cache", "graph/Attention")]


def test_decomposed_attention(tmp_path: Path) -> None:
    def attend(b: Builder, x: str) -> str:
        scores = b.op("Softmax", b.input("s", "batch", 4, "sequence", "sequence"), axis=-1)
        values = b.op("Unsqueeze", b.heads(x, 2, 4), b.ints(2))
        values = b.op("Reshape", b.op("Expand", values, b.ints(1, 1, 2, 1, 1)), b.ints(0, 4, -1, 4))
        return b.merged(b.op("MatMul", scores, values), 2 * C)

    flow = through(attend, tmp_path, k=2 * C)
    assert arrived(flow) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert flow.consumers[0].crossed == {"attention"}


def test_transposed_values_as_the_left_operand(tmp_path: Path) -> None:
    def attend(b: Builder, x: str) -> str:
        y = b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 1]), b.input("p", "batch", "sequence", "sequence"))
        return b.op("Transpose", y, perm=[0, 2, 1])

    assert arrived(through(attend, tmp_path)) == everything()


def test_scaled_probabilities_and_values_are_opaque(tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op("MatMul", x, b.op("Transpose", x, perm=[0, 2, 1])), tmp_path, k=5)
    assert not flow.free.any()


def test_interleaved_heads_of_one_fused_linear(tmp_path: Path) -> None:
    """GPT-NeoX: [heads, 3 · size], so that the values of head h are channels 12 h + 8 … 12 h + 11."""
    b = Builder()
    y = b.linear(b.tokens("h", 6), "qkv", 24, 6, bias=True)
    y = b.op("Transpose", b.op("Reshape", y, b.ints(0, 0, 2, 12)), perm=[0, 2, 1, 3])
    q, k, v = b.ops("Split", y, b.ints(4, 4, 4), count=3, axis=-1)
    b.outputs.append(b.linear(b.merged(b.op("Attention", q, k, v), C), "dense", 6, C))
    graph = b.graph(tmp_path)
    index = Index.of(graph)
    flow = trace(index.nodes["qkv/MatMul"].outputs[0].name, 24, find_linears(graph), index)
    assert arrived(flow) == [8, 9, 10, 11, 20, 21, 22, 23]
    assert flow.free.nonzero()[0].tolist() == arrived(flow)
    (bias,) = flow.biases
    assert bias.labels.tolist() == [-1] * 8 + [8, 9, 10, 11] + [-1] * 8 + [20, 21, 22, 23]


def test_flattened_linear(tmp_path: Path) -> None:
    """GPT-2: the linear is a Gemm on [batch · sequence, K]."""
    b = Builder()
    flat = b.op("Reshape", b.tokens("x", C), b.ints(-1, C))
    b.outputs.append(b.op("Gemm", flat, b.matrix("w", C, 3), at="fc"))
    flow = traced(b, tmp_path)
    assert arrived(flow) == everything()


def test_fixed_sizes_are_followed_element_by_element(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", 1, 3, C)
    flat = b.op("Reshape", b.op("Add", x, b.vector("bias", C)), b.ints(3, C))
    b.outputs.append(b.linear(b.op("Reshape", flat, b.ints(1, 3, C)), "fc", 3, C))
    flow = traced(b, tmp_path)
    assert arrived(flow) == everything()
    assert flow.biases[0].labels.tolist() == everything()


def test_fixed_sizes_that_mix_positions_pin(tmp_path: Path) -> None:
    b = Builder()
    y = b.op("Reshape", b.op("Transpose", b.input("x", 1, 3, C), perm=[0, 2, 1]), b.ints(1, 3, C))
    b.outputs.append(b.linear(y, "fc", 3, C))
    flow = traced(b, tmp_path)
    assert not flow.free.any()
    assert flow.pinned[0].reason == "positions of one channel come from different channels"


def test_shape_that_is_not_recorded(tmp_path: Path) -> None:
    b = Builder()
    r = b.tokens("r", C)
    b.outputs.append(b.linear(b.op("Add", b.op("Mul", b.tokens("x", C), b.op("Tanh", r)), r), "fc", 3, C))
    graph = b.graph(tmp_path)
    index = Index.of(graph)
    tanh = index.nodes["graph/Tanh"].outputs[0]
    set_type(tanh, None, None)
    flow = trace("x", C, find_linears(graph), index)
    assert reasons(flow) == [(everything(), f"the shape of {tanh.name} is not recorded", "graph/Mul")]


def test_recorded_shapes_that_contradict_an_operation(tmp_path: Path) -> None:
    wrong = {
        "Relu": ((1, 1, 9), "Relu gives (1, 1, 8), recorded is (1, 1, 9)"),
        "Tile": ((1, 1, 12), "Tile from (1, 1, 8) to (1, 1, 12) is not a repetition"),
        "Split": ((1, 1, 3), "the parts [3, 4] of Split do not add up to 8"),
    }
    for op, (shape, reason) in wrong.items():
        b = Builder()
        x = b.tokens("x", C)
        y = {
            "Relu": lambda b=b, x=x: b.op("Relu", x),
            "Tile": lambda b=b, x=x: b.op("Tile", x, b.ints(1, 1, 2)),
            "Split": lambda b=b, x=x: b.ops("Split", x, count=2, axis=-1, num_outputs=2)[0],
        }[op]()
        b.outputs.append(b.op("Neg", y))
        graph = b.graph(tmp_path)
        index = Index.of(graph)
        set_type(index.values[y], None, shape)
        assert trace("x", C, find_linears(graph), index).pinned[0].reason == reason


def test_product_of_a_vector(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.op("MatMul", b.input("x", C), b.input("p", C, 3)))
    assert traced(b, tmp_path).pinned[0].reason == "a product of a vector sums over the channels"


def test_operation_that_is_malformed(tmp_path: Path) -> None:
    flow = through(lambda b, x: b.op("Gather", x, b.constant("i", np.arange(1, C + 1)), axis=2), tmp_path)
    assert flow.pinned[0].reason.startswith("Gather cannot be followed: index 8 is out of bounds")


def test_concatenation_along_the_sequence(tmp_path: Path) -> None:
    def doubled(b: Builder, x: str) -> str:
        return b.op("Concat", x, b.op("Relu", x), axis=1)

    def cached(b: Builder, x: str) -> str:
        return b.op("Concat", b.input("past", "batch", "past_sequence", C), x, axis=1)

    assert arrived(through(doubled, tmp_path)) == everything()
    assert not through(cached, tmp_path).free.any()


def test_start_without_a_known_channel_axis(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.op("Relu", b.tokens("x", C)))
    flow = traced(b, tmp_path, size=5)
    assert reasons(flow) == [
        ([0, 1, 2, 3, 4], "x has shape ['batch', 'sequence', 8], expected [..., 5]", "x"),
    ]


@pytest.mark.parametrize(
    ("before", "after", "keeps"),
    [
        (("b", "s", 576), ("b", "s", 9, 64), True),
        (("b", "s", 576), ("b*s", 576), True),
        (("b", "s", 576), (None, None, 576), True),
        (("b", 3, 3, "s", 64), ("b", 9, "s", 64), True),
        (("b", 9, "s", 64), ("b", "s", 9, 64), False),
        (("b", 9, "s", 64), ("b*9", "s", 64), False),
        (("b", "s", 576), ("b", "576*s"), False),
        (("b", 9, "s", 64), ("b", 9, "t", 64), True),
        (("b", 9, "s", 64), ("b", 9, None, 64), True),
        (("b", 9, None, 64), ("b", 9, None, 64), True),
        (("b", 9, "s", 64), ("t", 9, "u", 64), False),
        (("b", 9, "s", 64), ("b", "t", 9, 64), False),
        ((None, 9, None, 64), (None, 9, None, 64), False),
        (("b", 9, "s", 64), ("b", 3, "t", 64), False),
        ((1, "s", 8), ("s", 1, 2, 4), True),
        ((2, 4), (8,), True),
    ],
)
def test_reshape_is_right_for_every_batch_and_length(
    before: tuple[Size | None, ...], after: tuple[Size | None, ...], keeps: bool
) -> None:
    assert keeps_order(before, after) is keeps


def concrete(dims: tuple[Size, ...], sizes: dict[str, int]) -> NDArray[np.int64]:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in dims]
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize(("heads", "length"), [(3, 2), (2, 5)])
def test_reshape_rule_against_real_sizes(heads: int, length: int) -> None:
    """The reshape that the rule refuses does move channels; the one that it accepts does not."""
    sizes = {"b": 2, "s": length}
    labels = np.broadcast_to(np.arange(heads)[None, :, None, None], concrete(("b", heads, "s", 4), sizes).shape)
    mixed = labels.reshape(2, length, heads, 4)
    assert (mixed != np.arange(heads)[None, None, :, None]).any()
    assert not keeps_order(("b", heads, "s", 4), ("b", "s", heads, 4))
