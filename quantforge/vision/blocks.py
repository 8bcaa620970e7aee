"""Reconstruction blocks: parts of the graph with one tensor in and one out.

A node is a cut where every edge from what comes before it (itself included) to what comes after
starts at it. Between neighbouring cuts lies a residual block, or a single layer with its activation
function. Single layers of one module (the expansion, depthwise and projection of a bottleneck
without a residual) are joined, as BRECQ (Li et al. 2021, arXiv 2102.05426) takes blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from quantforge.vision.network import Block
from quantforge.vision.sites import is_layer

JOINED = 4  # layers of single segments that are joined at most


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    source: fx.Node
    result: fx.Node
    layers: tuple[str, ...]
    branches: bool

    @property
    def module(self) -> str:
        """The layers' common module: their path up to its first number."""
        parts = self.layers[0].split(".") if self.layers else []
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return "" if place is None or place + 1 == len(parts) else ".".join(parts[: place + 1])


def find_blocks(graph: fx.Graph) -> tuple[Block, ...]:
    """Blocks in forward order, which hold every layer once."""
    joined: list[_Segment] = []
    for segment in _segments(graph):
        if joined and (not segment.layers or _belong(joined[-1], segment)):
            joined.append(_together(joined.pop(), segment))
        else:
            joined.append(segment)
    names: dict[str, int] = {}
    blocks = []
    for segment in joined:
        name = _common(segment.layers)
        names[name] = names.get(name, 0) + 1
        suffix = "" if names[name] == 1 else f" ({names[name]})"
        blocks.append(
            Block(
                name=name + suffix, source=segment.source.name, result=segment.result.name,
                layers=segment.layers,
            )
        )  # fmt: skip
    return tuple(blocks)


def _together(first: _Segment, second: _Segment) -> _Segment:
    return _Segment(
        source=first.source,
        result=second.result,
        layers=first.layers + second.layers,
        branches=first.branches or second.branches,
    )


def _belong(last: _Segment, segment: _Segment) -> bool:
    """Whether two neighbouring segments are one block."""
    if not last.layers:
        return True
    return (
        not (last.branches or segment.branches)
        and bool(last.module)
        and last.module == segment.module
        and len(last.layers) + len(segment.layers) <= JOINED
    )


def _common(layers: Sequence[str]) -> str:
    """The longest module path that all layers are in, or the only layer's own."""
    if len(layers) == 1:
        return layers[0]
    parts = [layer.split(".") for layer in layers]
    shared: list[str] = []
    for together in zip(*parts, strict=False):
        if len(set(together)) > 1:
            break
        shared.append(together[0])
    return ".".join(shared) or layers[0]


def _segments(graph: fx.Graph) -> list[_Segment]:
    """What lies between neighbouring cuts, in forward order."""
    nodes = [
        node for node in graph.nodes if node.op in ("placeholder", "call_module", "call_function")
    ]
    place = {node: index for index, node in enumerate(nodes)}
    end = len(nodes)
    # Numbers (sizes of the batch) cross every cut and hold nothing.
    tensors = [node for node in nodes if not str(node.target).startswith("aten.sym_size")]
    last_use = {
        node: max((place.get(user, end) for user in node.users), default=place[node])
        for node in tensors
    }
    found: list[_Segment] = []
    source, start, open_until = tensors[0], 0, 0
    for index, node in enumerate(tensors):
        following = tensors[index + 1] if index + 1 < len(tensors) else None
        is_cut = open_until <= place[node]
        open_until = max(open_until, last_use[node])
        if not is_cut or node is source or not _ends(node, following):
            continue
        inside = tensors[start + 1 : index + 1]
        layers = tuple(dict.fromkeys(str(one.target) for one in inside if is_layer(one)))
        branches = any(len(one.users) > 1 for one in (source, *inside[:-1]))
        found.append(_Segment(source=source, result=node, layers=layers, branches=branches))
        source, start = node, index
    return found


def _ends(node: fx.Node, following: fx.Node | None) -> bool:
    """Whether a segment may end here: not between a layer and what acts on its output alone."""
    if following is None or is_layer(following):
        return True
    reads = [one for one in following.args if isinstance(one, fx.Node) and one.op != "get_attr"]
    return len(node.users) > 1 or reads != [node]
