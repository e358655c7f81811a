"""What one run of a graph costs at given lengths: activation memory, masks, arithmetic, bytes moved, a roofline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...artifacts.errors import TargetError
from ...artifacts.ge.binding import CACHE, CONSTANT, LENGTHS, PARAMETER, Binding, BoundInput
from ...artifacts.ge.graph import GeGraph, Node
from ...artifacts.ge.ops import INPUTS
from ...runtime.models import family_of
from ...runtime.models.base import Argument, GraphSpec, visual_sizes
from ...runtime.models.config import ModelConfig
from ...runtime.ops import OPERATORS, known
from ...runtime.ops.attention import MASK
from ...runtime.ops.base import LAYOUT, OpCost, Sequences, Specs, TensorSpec, Work
from .roofline import Assumptions, Estimate, estimate
from .shapes import live_nodes, node_inputs, propagate

# One picture of 504 x 728, and the prompt that asks about it: 1872 / 4 image tokens and 39 of text.
DEFAULT_PATCHES = 1872
DEFAULT_TOKENS = 507
# The fixed causal mask of the default form takes 4 MiB; a larger one than this is worth a word.
LARGE_MASK_BYTES = 64 << 20
MEMORY_ASSUMED = (
    "peak activations: operators run in the graph's order, one at a time; every output has memory of its own until its "
    "last reader has run, the graph's outputs to the end. Reshape and in-place writes reuse their input's memory, "
    "SplitV copies. Not in it: weights, KV cache, arguments, the kernels' own workspaces."
)


@dataclass(frozen=True)
class Lengths:
    """What the dynamic sizes of an artifact's graphs are taken to be.

    patches of the pictures, in segments that attend within themselves; tokens of the prompt, image_tokens of them from
    pictures; decode runs at a cache of `tokens` valid rows, the new token's among them.
    """

    patches: int
    segments: tuple[int, ...]
    tokens: int
    image_tokens: int


@dataclass(frozen=True)
class LargestTensor:
    """The largest argument or intermediate; `operator` is the type that makes it, "Data" for an argument."""

    name: str
    operator: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Mask:
    """A mask that attention reads; quadratic: one of its axes grows with the tokens that attend."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    quadratic: bool
    warning: str | None


@dataclass(frozen=True)
class GraphCost:
    """One run at `lengths`. peak_activation_bytes is reached while `peak_operator` runs; argument_bytes are the
    run-time inputs on the device; flops and moved_bytes are sums over device operators, weights included."""

    lengths: dict[str, int]
    peak_activation_bytes: int
    peak_operator: str
    argument_bytes: int
    largest_tensor: LargestTensor
    masks: tuple[Mask, ...]
    flops: int
    moved_bytes: int
    roofline_estimate: Estimate | None


def choose_lengths(config: ModelConfig, max_length: int, tokens: int | None, patches: int | None) -> Lengths:
    """One picture of `patches` and a prompt of `tokens`, by default DEFAULT_*, in a cache of max_length.

    Raises TargetError for lengths that no request can have.
    """
    merge = config.vision.spatial_merge_size**2
    if patches is not None and (patches < merge or patches % merge):
        raise TargetError(f"--patches {patches}: expected a multiple of {merge}, the patches of one image token")
    if tokens is not None and not 1 <= tokens <= max_length:
        raise TargetError(f"--tokens {tokens}: expected 1 to {max_length}, the tokens that the KV cache holds")
    patches = patches or max(DEFAULT_PATCHES // merge, 1) * merge
    tokens = tokens or min(DEFAULT_TOKENS, max_length)
    return Lengths(patches, (patches,), tokens, min(patches // merge, tokens))


def input_specs(binding: Binding, spec: GraphSpec, config: ModelConfig, lengths: Lengths) -> list[TensorSpec]:
    """The inputs of a graph with every dynamic size filled in. Raises TargetError for one that nothing fills."""
    sizes = {
        **visual_sizes(family_of(config), config, lengths.segments),
        "tokens": lengths.tokens,
        "image_tokens": lengths.image_tokens,
    }
    arguments = {argument.name: argument for argument in spec.arguments}
    return [_input_spec(bound, arguments.get(bound.name), sizes, binding.graph) for bound in binding.inputs]


def _input_spec(bound: BoundInput, argument: Argument | None, sizes: Mapping[str, int], graph: str) -> TensorSpec:
    if -1 not in bound.shape:
        return TensorSpec(bound.dtype, bound.shape)
    if argument is None or argument.bound != bound.shape:
        raise TargetError(f"{graph}.{bound.name}: no length is known for its shape {list(bound.shape)}")
    return TensorSpec(bound.dtype, tuple(sizes[size] if isinstance(size, str) else size for size in argument.shape))


def _stated(kind: str, lengths: Lengths) -> dict[str, int]:
    """The lengths that a graph depends on, by name."""
    if kind == "visual":
        return {"patches": lengths.patches, "segments": len(lengths.segments)}
    if kind == "prefill":
        return {"tokens": lengths.tokens, "image_tokens": lengths.image_tokens, "kv_length": lengths.tokens}
    return {"kv_length": lengths.tokens}


def graph_cost(
    graph: GeGraph,
    binding: Binding,
    spec: GraphSpec,
    inputs: Sequence[TensorSpec],
    lengths: Lengths,
    assumed: Assumptions | None,
    where: str,
) -> GraphCost:
    """Cost of one run on `inputs` (input_specs of the lengths).

    Raises ArtifactError for an operator without a rule, or one that its inputs do not fit.
    """
    specs = propagate(graph, inputs, where)
    nodes = live_nodes(graph)
    bound = {node.name: each for node, each in zip(graph.inputs, binding.inputs, strict=True)}
    constants = {node.name for node in nodes if node.constant is not None}
    sequences = Sequences(lengths.tokens, lengths.segments)
    costs = list(_costs(nodes, specs, constants, sequences))
    peak, peak_operator = peak_activations(graph, specs)
    arguments = {
        name for name, each in bound.items() if each.kind not in (PARAMETER, CONSTANT, CACHE, LENGTHS) and not each.host
    }
    return GraphCost(
        lengths=_stated(spec.kind, lengths),
        peak_activation_bytes=peak,
        peak_operator=peak_operator,
        argument_bytes=sum(specs[name][0].bytes for name in arguments),
        largest_tensor=_largest(nodes, specs, bound, arguments),
        masks=_masks(nodes, specs, bound),
        flops=sum(cost.flops for cost in costs),
        moved_bytes=sum(cost.bytes for cost in costs),
        roofline_estimate=estimate(costs, assumed) if assumed else None,
    )


def _costs(
    nodes: Sequence[Node], specs: Mapping[str, Specs], constants: set[str], sequences: Sequences
) -> Iterator[OpCost]:
    """Those of the device operators. See roofline.COUNTED."""
    for node in nodes:
        operator = OPERATORS.get(node.op)
        if operator is not None and operator.cost is not None:
            inside = [edge is not None and edge[0] in constants for edge in node.inputs]
            yield operator.cost(node, Work(node_inputs(node, specs), inside, specs[node.name], sequences))


def _behind(edge: tuple[str, int], by_name: Mapping[str, Node]) -> tuple[str, int]:
    """The output whose memory this one is: seen through Reshape and the like, and through writes in place."""
    node = by_name[edge[0]]
    while node.first is not None and (known(node.op).kind == LAYOUT or known(node.op).writes):
        edge = node.first
        node = by_name[edge[0]]
    return edge


def peak_activations(graph: GeGraph, specs: Mapping[str, Specs]) -> tuple[int, str]:
    """Bytes of intermediates that live at once, at most, and the operator that runs then. See MEMORY_ASSUMED."""
    nodes = live_nodes(graph)
    by_name = {node.name: node for node in nodes}
    made = {node.name: i for i, node in enumerate(nodes) if node.op not in INPUTS and node.constant is None}
    last_use: dict[tuple[str, int], int] = {}
    for i, node in enumerate(nodes):
        if node.name not in made:
            continue
        for output in range(len(specs[node.name])):
            last_use.setdefault(_behind((node.name, output), by_name), i)
        for edge in node.inputs:
            if edge is not None:
                last_use[_behind(edge, by_name)] = i
    for edge in graph.output.inputs:
        if edge is not None:
            last_use[_behind(edge, by_name)] = len(nodes) - 1
    # what every step adds before it runs, and what is free once it has run
    added, freed = [0] * len(nodes), [0] * len(nodes)
    for (name, output), last in last_use.items():
        if name in made:
            added[made[name]] += specs[name][output].bytes
            freed[last] += specs[name][output].bytes
    alive, peak, peak_operator = 0, 0, ""
    for node, new, gone in zip(nodes, added, freed, strict=True):
        alive += new
        if alive > peak:
            peak, peak_operator = alive, node.op
        alive -= gone
    return peak, peak_operator


def _largest(
    nodes: Sequence[Node], specs: Mapping[str, Specs], bound: Mapping[str, BoundInput], arguments: set[str]
) -> LargestTensor:
    """Among arguments and intermediates: neither weights nor the cache, which is what writes in place hand on."""
    made = [
        (spec.bytes, node, spec)
        for node in nodes
        if node.name in arguments or (node.constant is None and node.op not in INPUTS and not known(node.op).writes)
        for spec in specs[node.name]
    ]
    # the first of equals
    size, node, spec = max(made, key=lambda each: each[0])
    name = bound[node.name].name if node.name in bound else node.name
    return LargestTensor(name, node.op, spec.dtype, spec.shape, size)


def _masks(nodes: Sequence[Node], specs: Mapping[str, Specs], bound: Mapping[str, BoundInput]) -> tuple[Mask, ...]:
    """Every different mask that an attention reads."""
    by_name = {node.name: node for node in nodes}
    edges = [node.inputs[MASK] for node in nodes if known(node.op).attention and len(node.inputs) > MASK]
    masks: dict[str, Mask] = {}
    for edge in edges:
        if edge is not None:
            source = _behind(edge, by_name)[0]
            spec = specs[edge[0]][edge[1]]
            name = bound[source].name if source in bound else source
            # a mask made inside the graph is made of lengths, too
            quadratic = source not in bound or -1 in bound[source].shape
            masks[source] = Mask(name, spec.dtype, spec.shape, spec.bytes, quadratic, _warning(spec, quadratic))
    return tuple(masks.values())


def _warning(spec: TensorSpec, quadratic: bool) -> str | None:
    if not quadratic and spec.bytes <= LARGE_MASK_BYTES:
        return None
    why = ["it grows with the tokens that attend times those attended to"] if quadratic else []
    why += [f"it takes more than {LARGE_MASK_BYTES >> 20} MiB"] if spec.bytes > LARGE_MASK_BYTES else []
    return " and ".join(why)
