"""Lint rules about the graph itself: nodes, values, operators, files."""

from collections import Counter
from collections.abc import Iterator

import onnx

from ..export.errors import BismoothError
from ._gs import external_location
from .lint_rule import ANY, ONNXRUNTIME, TENSORRT, Hit, error, warning
from .lint_view import T, View, label

_PLUGIN_DOMAINS = frozenset({"trt.plugins"})
_RUNTIME_DOMAINS = frozenset({"com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "ai.onnx.training"})


@error("cycle", ANY)
def cycle(view: View) -> Iterator[Hit]:
    """A value must not depend on itself, and nodes must be in order: no runtime loads such a file."""
    done = {"", *view.initializers, *(info.name for info in view.model.graph.input)}
    for node in view.nodes:
        late = [value for value in node.input if value not in done and value in view.producers]
        done.update(node.output)
        if late:
            yield (
                label(node),
                f"reads {late[0]} before {label(view.producers[late[0]])} computes it: a cycle, or nodes out of order. "
                "No runtime loads this. Sort the nodes, or export the model again.",
            )


@error("undefined-value", ANY)
def undefined_value(view: View) -> Iterator[Hit]:
    """Every value that is read must be a graph input, an initializer or a node's output."""
    known = {"", *view.initializers, *view.producers, *(info.name for info in view.model.graph.input)}
    reads = [(label(node), value) for node in view.nodes for value in node.input]
    reads += [("graph outputs", info.name) for info in view.model.graph.output]
    for reader, value in reads:
        if value not in known:
            yield reader, f"reads {value}, which nothing computes. No runtime loads this. Export the model again."


@error("duplicate-value", ANY)
def duplicate_value(view: View) -> Iterator[Hit]:
    """A value must have one source: a file with two is invalid, and runtimes differ in which they take."""
    sources = Counter(value for node in view.nodes for value in node.output if value)
    sources.update(set(view.initializers) & set(sources))
    for value, count in sources.items():
        if count > 1:
            yield value, f"has {count} sources. The file is invalid. Give each output a name of its own."


@warning("node-name")
def node_name(view: View) -> Iterator[Hit]:
    """Builders report kernels by node name: without unique names nobody can say which layer runs in which type."""
    names = Counter(node.name for node in view.nodes)
    for node in view.nodes:
        if not node.name:
            yield label(node), "has no name, so the build audit cannot attribute its kernel. Name every node."
    for name, count in names.items():
        if name and count > 1:
            yield name, f"names {count} nodes, so the build audit cannot tell them apart. Make node names unique."


@error("unknown-operator", ANY)
def unknown_operator(view: View) -> Iterator[Hit]:
    """An operator must exist in the opset that the file declares."""
    opset = view.opsets.get("", 0)
    functions = {(entry.domain, entry.name) for entry in view.model.functions}
    for node in view.nodes:
        if node.domain in ("", "ai.onnx") and ("", node.op_type) not in functions and not _exists(node.op_type, opset):
            yield (
                label(node),
                f"is a {node.op_type}, which opset {opset} does not have. No runtime loads this. "
                "Declare the opset that has it, or replace the operator.",
            )


def _exists(op: str, opset: int) -> bool:
    try:
        return not onnx.defs.get_schema(op, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


@error("foreign-operator", TENSORRT)
def foreign_operator(view: View) -> Iterator[Hit]:
    """TensorRT's parser knows ONNX's own operators and plugins; those of other runtimes are a parse error."""
    yield from _foreign(view, _PLUGIN_DOMAINS, "TensorRT refuses it")


@error("foreign-operator", ONNXRUNTIME)
def foreign_operator_of_onnxruntime(view: View) -> Iterator[Hit]:
    """ONNX Runtime knows ONNX's operators and its own; others need a library that registers them."""
    yield from _foreign(view, _RUNTIME_DOMAINS, "ONNX Runtime refuses it unless a library registers it")


def _foreign(view: View, domains: frozenset[str], consequence: str) -> Iterator[Hit]:
    functions = {(entry.domain, entry.name) for entry in view.model.functions}
    for node in view.nodes:
        known = node.domain in ("", "ai.onnx") or node.domain in domains or (node.domain, node.op_type) in functions
        if not known:
            yield (
                label(node),
                f"is {node.op_type} of the domain {node.domain}. {consequence}. "
                "Export with operators of the ONNX standard.",
            )


@error("types", ANY)
def types(view: View) -> Iterator[Hit]:
    """The types and shapes that operators require must agree, as ONNX's own inference sees them."""
    if view.inference_error:
        yield "graph", f"types do not fit: {view.inference_error}. No runtime loads this. Correct the types."


@error("external-data", ANY)
def external_data(view: View) -> Iterator[Hit]:
    """Weight files must be in the model's folder, and whole: ONNX Runtime refuses others, and so does this product."""
    for tensor in view.initializers.values():
        if tensor.data_location != T.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if view.folder is None:
            if not location or location.startswith("/") or ".." in location.split("/"):
                yield tensor.name, f"is stored at {location!r}. Runtimes refuse that. Put the file next to the model."
            continue
        try:
            external_location(tensor, view.folder)
        except BismoothError as problem:
            yield tensor.name, str(problem).removeprefix(f"{tensor.name}: ")
