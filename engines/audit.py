"""Audit an engine: which linears run as INT8 x INT8 products, and which fell back to float.

TensorRT builds a float kernel without a word where it has no INT8 kernel for a graph's Q/DQ nodes. The kernels it lists
(:mod:`.kernel_log`) tell: a ``gemm`` that reads an Int8 activation and an Int8 weight is an INT8 product; a
``runtime_fusion`` with the same operands dequantizes both and multiplies floats.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..export.errors import BismoothError, GateError
from .kernel_log import Kernel, read_kernels
from .linears import Linear

FORMAT_VERSION = 1
_GEMM = "gemm"
_FUSED_GEMM = "runtime_fusion"
_INT8 = "Int8"
_CONTROL = frozenset({"shape_call", "signal", "wait", "ShapeHostToDevice"})
_ATTENTION = re.compile(r"mha|flash", re.IGNORECASE)
_ACTIVATION_MEMORY = re.compile(r"^Total Activation Memory: (\d+) bytes", re.MULTILINE)
_SHOWN = 10


@dataclass(frozen=True)
class LinearAudit:
    """How one linear runs.

    Attributes:
        name, node, macs, head: as in :class:`.linears.Linear`.
        kernel, kind: name and LayerType of the kernel that computes the product; ``None`` if no kernel names the node.
        input, weight, output: operand types of that kernel; ``weight`` is that of the largest constant.
        merged_with: other linears in the same kernel.
        int8: an INT8 x INT8 product.
        meant_int8: the recipe computes it in INT8.
    """

    name: str
    node: str
    macs: int
    head: bool
    kernel: str | None
    kind: str | None
    input: str | None
    weight: str | None
    output: str | None
    merged_with: tuple[str, ...]
    int8: bool
    meant_int8: bool

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LinearAudit:
        fields: dict[str, Any] = {**data, "merged_with": tuple(data["merged_with"])}
        return LinearAudit(**fields)

    def __str__(self) -> str:
        if self.kernel is None:
            return f"{self.node} (in no kernel)"
        return f"{self.node} ({self.kind}: {self.input} x {self.weight} -> {self.output})"


@dataclass(frozen=True)
class Figures:
    """The kernels that run for one optimization profile.

    Attributes:
        kinds: number of kernels by LayerType, control steps (``signal``, ``wait``, ``shape_call`` …) included.
        gemms: kernels that compute the linears; fewer than linears where q, k and v are merged.
        int8_gemms: those of them that are INT8 x INT8 products.
        fused_attention: fused attention kernels.
        activation_bytes: device memory for activations at the largest shapes, ``None`` if unknown.
    """

    kinds: Mapping[str, int]
    gemms: int
    int8_gemms: int
    fused_attention: int
    activation_bytes: int | None = None

    @property
    def kernels(self) -> int:
        """Number of kernels without control steps."""
        return sum(count for kind, count in self.kinds.items() if kind not in _CONTROL)

    def figures(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "kernels": self.kernels,
            "kinds": dict(self.kinds),
            "gemms": self.gemms,
            "int8_gemms": self.int8_gemms,
            "fused_attention": self.fused_attention,
            "activation_bytes": self.activation_bytes,
        }


@dataclass(frozen=True)
class Audit(Figures):
    """The audit of one engine. Its own figures are those of the first optimization profile.

    Attributes:
        linears: how each runs, in the profile in which it runs worst.
        others: figures of the second and later profiles.
    """

    linears: tuple[LinearAudit, ...] = ()
    others: tuple[Figures, ...] = ()

    def int8_share(self, *, with_head: bool) -> float:
        """Share of the linears' multiply-accumulates that run as INT8 x INT8, from 0 to 1."""
        counted = [linear for linear in self.linears if with_head or not linear.head]
        total = sum(linear.macs for linear in counted)
        return sum(linear.macs for linear in counted if linear.int8) / total if total else 0.0

    def meant_share(self) -> float | None:
        """Share of the MACs of the linears that were meant to be INT8 and are; ``None`` if none was meant to be."""
        meant = [linear for linear in self.linears if linear.meant_int8]
        total = sum(linear.macs for linear in meant)
        return sum(linear.macs for linear in meant if linear.int8) / total if total else None

    @property
    def fallbacks(self) -> tuple[LinearAudit, ...]:
        """The linears that were meant to be INT8 and are not."""
        return tuple(linear for linear in self.linears if linear.meant_int8 and not linear.int8)

    def check(self, subject: str) -> None:
        """Fail on fallbacks; ``subject`` opens the message.

        Raises:
            GateError: names the linears that were meant to be INT8 and are not.
        """
        if not self.fallbacks:
            return
        meant = sum(linear.meant_int8 for linear in self.linears)
        shown = "; ".join(map(str, self.fallbacks[:_SHOWN]))
        more = f"; and {len(self.fallbacks) - _SHOWN} more" if len(self.fallbacks) > _SHOWN else ""
        raise GateError(
            f"{subject}: {len(self.fallbacks)} of the {meant} linears that were meant to be INT8 fell back to float. "
            f"Expected {_GEMM}: {_INT8} x {_INT8}, got {shown}{more}. "
            "Look for the cause with 'bismooth inspect' on the ONNX file, or allow float linears."
        )

    def to_json(self) -> dict[str, Any]:
        """The audit as JSON values, with the derived figures."""
        return {
            "version": FORMAT_VERSION,
            "int8_share": self.int8_share(with_head=False),
            "int8_share_with_head": self.int8_share(with_head=True),
            "int8_linears": sum(linear.int8 for linear in self.linears),
            "fallbacks": [linear.node for linear in self.fallbacks],
            **self.figures(),
            **({"others": [figures.figures() for figures in self.others]} if self.others else {}),
            "linears": [asdict(linear) for linear in self.linears],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Audit:
        """Inverse of :meth:`to_json`; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        if data["version"] != FORMAT_VERSION:
            raise ValueError(f"it has audit version {data['version']}, this bismooth reads version {FORMAT_VERSION}")
        linears: list[dict[str, Any]] = data["linears"]
        others: list[dict[str, Any]] = data.get("others", [])
        return Audit(
            **_read_figures(data),
            linears=tuple(LinearAudit.from_json(linear) for linear in linears),
            others=tuple(Figures(**_read_figures(figures)) for figures in others),
        )


def audit_log(log: str, linears: Sequence[Linear], meant_int8: Iterable[str] = ()) -> Audit:
    """Audit the engine whose builder wrote ``log``.

    Args:
        log: the builder's verbose log.
        linears: the linears of the ONNX graph that was built.
        meant_int8: nodes of those that are to run in INT8.

    Raises:
        BismoothError: the log cannot be read, no kernel names a linear, or ``meant_int8`` names something else.
    """
    return audit_kernels(
        read_kernels(log), linears, meant_int8, [int(size) for size in _ACTIVATION_MEMORY.findall(log)]
    )


def audit_kernels(
    kernels: Sequence[Kernel],
    linears: Sequence[Linear],
    meant_int8: Iterable[str] = (),
    activation_bytes: Sequence[int] = (),
) -> Audit:
    """Audit a list of kernels; see :func:`audit_log`. ``activation_bytes`` ends with one per profile."""
    meant = check_meant(linears, meant_int8)
    by_node = {linear.node: linear for linear in linears}
    count = 1 + max((kernel.profile for kernel in kernels), default=0)
    profiles = [[kernel for kernel in kernels if kernel.profile == number] for number in range(count)]
    products = [_products(profile, by_node) for profile in profiles]
    if linears and not all(products):
        empty = profiles[next(number for number, found in enumerate(products) if not found)]
        raise BismoothError(
            f"audit: none of the engine's {len(empty)} kernels names any of the graph's {len(linears)} linears. "
            f"Expected ONNX names such as '{linears[0].node}' in the kernels' metadata. "
            "Was the engine built from this graph?"
        )
    memory = [*[None] * count, *activation_bytes][-count:]
    first, *others = (
        Figures(**_count(kernels, found), activation_bytes=size)
        for kernels, found, size in zip(profiles, products, memory, strict=True)
    )
    audited = [
        [_audit_linear(linear, found, by_node, linear.node in meant) for linear in linears] for found in products
    ]
    worst = tuple(min(runs, key=lambda run: run.int8) for runs in zip(*audited, strict=True))
    return Audit(**vars(first), linears=worst, others=tuple(others))


def check_meant(linears: Sequence[Linear], meant_int8: Iterable[str]) -> frozenset[str]:
    """``meant_int8`` as a set.

    Raises:
        BismoothError: one of the ONNX nodes is no linear of the graph.
    """
    meant, known = frozenset(meant_int8), {linear.node for linear in linears}
    for name in sorted(meant - known):
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise BismoothError(
            f"audit: '{name}' is to run in INT8, but the graph has no such linear. "
            f"Expected one of its {len(known)}.{hint}"
        )
    return meant


def _count(kernels: Sequence[Kernel], products: Mapping[str, Kernel]) -> dict[str, Any]:
    """What :class:`Figures` counts, of the kernels of one profile."""
    used = {kernel.name: kernel for kernel in products.values()}
    return {
        "kinds": dict(Counter(kernel.kind for kernel in kernels)),
        "gemms": len(used),
        "int8_gemms": sum(map(_is_int8, used.values())),
        "fused_attention": sum(map(_is_fused_attention, kernels)),
    }


def _read_figures(data: Mapping[str, Any]) -> dict[str, Any]:
    names = ("kinds", "gemms", "int8_gemms", "fused_attention", "activation_bytes")
    return {name: data[name] for name in names}


def _products(kernels: Sequence[Kernel], nodes: Iterable[str]) -> dict[str, Kernel]:
    """ONNX node → the kernel that computes it.

    NOTE: other kernels name the node as well: one that dequantizes its weight, rescales its result or pads its input.
    So a GEMM comes first, then a fused GEMM, then the rest; and to be on the safe side, float GEMMs before INT8 ones.
    """
    wanted, found = frozenset(nodes), dict[str, Kernel]()
    for kernel in sorted(kernels, key=_preference):
        for node in kernel.nodes:
            if node in wanted:
                found.setdefault(node, kernel)
    return found


def _preference(kernel: Kernel) -> tuple[bool, bool, bool]:
    return kernel.kind != _GEMM, kernel.kind != _FUSED_GEMM, _is_int8(kernel)


def _is_int8(kernel: Kernel) -> bool:
    weight = kernel.weight
    operands = (*kernel.inputs[:1], *([weight] if weight else []))
    return kernel.kind == _GEMM and [operand.type for operand in operands] == [_INT8, _INT8]


def _is_fused_attention(kernel: Kernel) -> bool:
    """By name (``_gemm_mha_v2_…``), for want of a LayerType. GEMMs do not count: they are named after ONNX nodes."""
    return kernel.kind not in (_GEMM, _FUSED_GEMM) and _ATTENTION.search(kernel.name) is not None


def _audit_linear(
    linear: Linear, products: Mapping[str, Kernel], by_node: Mapping[str, Linear], meant_int8: bool
) -> LinearAudit:
    kernel = products.get(linear.node)
    inputs, outputs = (kernel.inputs, kernel.outputs) if kernel else ((), ())
    weight = kernel.weight if kernel else None
    return LinearAudit(
        name=linear.name,
        node=linear.node,
        macs=linear.macs,
        head=linear.head,
        kernel=kernel.name if kernel else None,
        kind=kernel.kind if kernel else None,
        input=inputs[0].type if inputs else None,
        weight=weight.type if weight else None,
        output=outputs[0].type if outputs else None,
        merged_with=tuple(
            by_node[node].name for node, other in products.items() if other is kernel and node != linear.node
        ),
        int8=kernel is not None and _is_int8(kernel),
        meant_int8=meant_int8,
    )
