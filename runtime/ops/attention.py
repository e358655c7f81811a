"""What FusedInferAttentionScore, PromptFlashAttention and IncreFlashAttention share: shapes, costs, and the CPU's part.

Semantics after the operators' documentation (aclnnFusedInferAttentionScore and the other two, CANN): scaled
dot-product attention with grouped heads, in layouts BSH and TND. What the reference computes is inner_precise 0, the
exact mode: scores and softmax in fp32, one rounding at the output. inner_precise 1, which PromptFlashAttention in fp16
has unless torch_npu is called with sparse_mode 10 to 14, keeps fp16 scores on the device; bf16 has one mode.

Lengths in BSH are one for all rows or one a row, and more than there are rows are ignored: keys beyond a row's length
are not read, queries beyond it come out 0. A query that sees no key comes out 0. sparse_mode 3 (rightDownCausal) aligns
the causal triangle with a row's last key and its last query, both by length.
"""

import functools
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from .base import Call, OpCost, Shape, TensorSpec, Work
from .kernel import Tensor, attribute, dtype_name, floating, ints, refused, required, same_dtype
from .shapes import fits

# sparse_mode 3 aligns the causal triangle with the end of the cache; the operator reads one fixed mask of this side
# instead of a mask of queries x keys
FULL, RIGHT_DOWN_CAUSAL = 0, 3
CAUSAL_MASK_SIDE = 2048
# Inputs by position in the operators' definitions; the rest must be unfed.
MASK, LENGTHS, LENGTHS_KV = 4, 5, 6
# what torch_npu says where nothing is hidden, of tokens before and after; without it PromptFlashAttention hides all
# that lies ahead, whatever the mask says
UNLIMITED = 2147483647
# Rows of the query that share one mask, so that a long prompt needs no mask of its own squared.
_QUERY_BLOCK = 512


def attention_shape(
    node: Call, q: TensorSpec, k: TensorSpec, v: TensorSpec, *rest: TensorSpec | None
) -> tuple[Shape, ...]:
    """BSH: q [batch, tokens, heads * dim], k and v [batch, length, kv_heads * dim]. TND: [tokens, heads, dim]."""
    fits(k.shape == v.shape and len(q.shape) == len(k.shape) == 3, "query, key and value do not fit")
    heads = node.attributes["num_heads"]
    kv_heads = node.attributes["num_key_value_heads"] or heads
    if node.attributes["input_layout"] == "BSH":
        fits(q.shape[2] * kv_heads == k.shape[2] * heads and q.shape[0] == k.shape[0], "query and key do not fit")
    else:
        fits(node.attributes["input_layout"] == "TND", f"the layout is {node.attributes['input_layout']}")
        fits(q.shape[1:] == (heads, k.shape[2]) and k.shape[1] == kv_heads, "query and key do not fit")
    return (q.shape,)


def attention_cost(node: Call, work: Work, lengths: int | None = None, lengths_kv: int | None = None) -> OpCost:
    """lengths, lengths_kv: the inputs that say how many queries, and how many keys, a row has; None where it is told by
    none. Raises ValueError without query, key and value."""
    q, k, v = work.inputs[:3]
    if q is None or k is None or v is None:
        raise ValueError(f"{node.where} has no query, key or value")
    others = sum(spec.bytes for spec in work.inputs[3:] if spec) + work.written_bytes
    if node.attributes["input_layout"] == "TND":
        pairs = sum(length * length for length in work.sequences.segments)
        return OpCost(4 * pairs * q.shape[1] * q.shape[2], q.bytes + k.bytes + v.bytes + others)
    batch, tokens, width = q.shape
    if lengths is not None and work.inputs[lengths] is not None:
        # the vision tower's segments, each over itself
        pairs = sum(length * length for length in work.sequences.segments)
        return OpCost(4 * pairs * width, q.bytes + k.bytes + v.bytes + others)
    told = lengths_kv is not None and lengths_kv < len(work.inputs) and work.inputs[lengths_kv] is not None
    # cache rows that are read: the valid ones where it is told, else all
    length = min(work.sequences.kv_length, k.shape[1]) if told else k.shape[1]
    pairs = tokens * length
    if node.attributes.get("sparse_mode") == RIGHT_DOWN_CAUSAL:
        # the last token sees all, every token before it one less
        pairs -= tokens * (tokens - 1) // 2
    cache = (k.bytes + v.bytes) * length // k.shape[1]
    return OpCost(4 * batch * pairs * width, q.bytes + cache + others)


@dataclass(frozen=True)
class Operands:
    """BSH: q [batch, tokens, heads * dim], k and v [batch, length, kv_heads * dim].
    TND: q [tokens, heads, dim], k and v [length, kv_heads, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    kv_heads: int
    dim: int


def operands(node: Call, inputs: Sequence[Tensor | None], layout: str, takes: set[int]) -> Operands:
    fed = {i for i, x in enumerate(inputs) if x is not None}
    q, k, v = inputs[:3]
    if q is None or k is None or v is None or fed - {0, 1, 2} - takes:
        raise refused(node, f"inputs {sorted(fed)} are fed; supported are 0 to 2 and {sorted(takes)}")
    floating(node, q, k, v)
    same_dtype(node, q, k, v)
    heads = required(node, "num_heads", 1)
    kv_heads = attribute(node, "num_key_value_heads", 0) or heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise refused(node, f"{heads} heads do not share {kv_heads} key and value heads")
    shapes = f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}, {heads} and {kv_heads} heads"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise refused(node, f"layout {layout} does not hold {shapes}")
    if layout == "TND":
        dim = q.shape[2]
        fits = (q.shape[1], *k.shape[1:]) == (heads, kv_heads, dim)
    else:
        dim = q.shape[2] // heads
        fits = q.shape[2] == heads * dim and (k.shape[0], k.shape[2]) == (q.shape[0], kv_heads * dim)
    if not fits:
        raise refused(node, f"layout {layout} does not hold {shapes}")
    return Operands(q, k, v, heads, kv_heads, dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None, offset: int | None = None
) -> Tensor:
    """q [tokens, heads, dim], k and v [length, kv_heads, dim] to [tokens, heads, dim], computed in fp32.

    hidden [tokens, length]: true where a query does not see a key. offset: query i sees the keys up to i + offset.
    """
    import torch
    import torch.nn.functional as F

    out = torch.zeros_like(q)
    blind = max(0, -offset) if offset is not None else 0
    q, offset = q[blind:], None if offset is None else max(0, offset)
    tokens, length = q.shape[0], k.shape[0]
    if not tokens or not length:
        return out
    q4, k4, v4 = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if offset is None or tokens == 1 or not offset:
        seen = None if hidden is None else ~hidden
        attended = F.scaled_dot_product_attention(
            q4, k4, v4, seen, is_causal=offset == 0 and tokens > 1, scale=scale, enable_gqa=grouped
        )
    else:
        parts = []
        for start in range(0, tokens, _QUERY_BLOCK):
            rows = torch.arange(start, min(start + _QUERY_BLOCK, tokens))
            end = int(rows[-1]) + 1 + offset
            seen = torch.arange(end)[None] <= rows[:, None] + offset
            part = q4[:, :, start : int(rows[-1]) + 1]
            parts.append(
                F.scaled_dot_product_attention(
                    part, k4[:, :, :end], v4[:, :, :end], seen, scale=scale, enable_gqa=grouped
                )
            )
        attended = torch.cat(parts, 2)
    out[blind:] = attended[0].transpose(0, 1)
    return out


def _row_lengths(node: Call, tensor: Tensor | None, rows: int, limit: int) -> list[int]:
    """The lengths of a batch: all of `limit` if not given, one for all rows, or the first `rows` of them."""
    if tensor is None:
        return [limit] * rows
    values = ints(node, tensor)
    if tensor.dim() != 1 or len(values) not in (1, *range(rows, len(values) + 1)):
        raise refused(node, f"sequence lengths {list(tensor.shape)} for a batch of {rows}, expected 1 or {rows}")
    values = values * rows if len(values) == 1 else values[:rows]
    if any(not 0 <= value <= limit for value in values):
        raise refused(node, f"sequence lengths {values} are outside 0 to {limit}")
    return values


def attend_bsh(
    node: Call,
    of: Operands,
    scale: float,
    lengths: Tensor | None,
    lengths_kv: Tensor | None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """mask [batch or 1, tokens, length], true where hidden."""
    import torch

    batch, tokens, width = of.q.shape
    out = torch.zeros_like(of.q)
    ends = _row_lengths(node, lengths, batch, tokens)
    ends_kv = _row_lengths(node, lengths_kv, batch, of.k.shape[1])
    for row, (end, end_kv) in enumerate(zip(ends, ends_kv, strict=True)):
        out[row, :end] = _attend(
            of.q[row, :end].view(end, of.heads, of.dim),
            of.k[row, :end_kv].view(end_kv, of.kv_heads, of.dim),
            of.v[row, :end_kv].view(end_kv, of.kv_heads, of.dim),
            scale,
            None if mask is None else mask[row % len(mask), :end, :end_kv],
            end_kv - end if causal else None,
        ).reshape(end, width)
    return out


def attend_tnd(node: Call, of: Operands, scale: float, lengths: Tensor | None, lengths_kv: Tensor | None) -> Tensor:
    """The lengths are cumulative ends of the sequences, of queries and of keys."""
    import torch

    if lengths is None or lengths_kv is None:
        raise refused(node, "layout TND needs both sequence lengths")
    ends, ends_kv = ints(node, lengths), ints(node, lengths_kv)
    for each, x in ((ends, of.q), (ends_kv, of.k)):
        if any(not 0 <= end <= x.shape[0] for end in each):
            raise refused(node, f"sequence lengths {each} are outside 0 to {x.shape[0]}")
        if each != sorted(each) or each[-1:] != [x.shape[0]] or len(ends) != len(ends_kv):
            raise refused(
                node,
                f"TND lengths {ends} and {ends_kv} do not partition {of.q.shape[0]} tokens and {of.k.shape[0]} keys",
            )
    out = torch.zeros_like(of.q)
    start = start_kv = 0
    for end, end_kv in zip(ends, ends_kv, strict=True):
        out[start:end] = _attend(of.q[start:end], of.k[start_kv:end_kv], of.v[start_kv:end_kv], scale)
        start, start_kv = end, end_kv
    return out


@functools.cache
def _triangle() -> Tensor:
    import torch

    return torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool).triu(1)


@functools.cache
def _right_masks() -> MutableMapping[Tensor, int | None]:
    """Masks found right, with their versions: every layer is given the same one, and comparing 4 MB takes longer than
    the attention of a short prompt."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _mask_dtype(node: Call, mask: Tensor) -> None:
    if dtype_name(mask) not in ("bool", "int8", "uint8"):
        raise refused(node, f"the mask is {dtype_name(mask)}, expected bool, int8 or uint8")


def check_causal_mask(node: Call, mask: Tensor) -> None:
    """sparse_mode 3 takes one mask, whatever the lengths: the strict upper triangle of 2048 x 2048."""
    import torch

    # inference tensors count no versions
    version = None if mask.is_inference() else mask._version
    if version is not None and _right_masks().get(mask) == version:
        return
    _mask_dtype(node, mask)
    sizes = list(mask.shape)
    if sizes[-2:] != [CAUSAL_MASK_SIDE] * 2 or sizes[:-2] not in ([], [1], [1, 1]):
        raise refused(node, f"sparse_mode 3 takes a mask of 2048 x 2048, got {sizes}")
    if not torch.equal(mask.reshape(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE).bool(), _triangle()):
        raise refused(node, "sparse_mode 3 takes a mask that hides what is above the diagonal, and nothing else")
    _right_masks()[mask] = version


def full_mask(node: Call, mask: Tensor, of: Operands) -> Tensor:
    """A mask of sparse_mode 0 as bool [batch or 1, tokens, length].

    Documented shapes: [batch or 1, 1, S, L], [batch or 1, S, L], [S, L], and for one query token [batch, L].
    """
    _mask_dtype(node, mask)
    (batch, tokens, _), length = of.q.shape, of.k.shape[1]
    documented = [[rows, *one, tokens, length] for rows in (batch, 1) for one in ([], [1])]
    documented.append([batch, length] if tokens == 1 else [tokens, length])
    if list(mask.shape) not in documented:
        raise refused(node, f"a mask {list(mask.shape)} for {batch} rows, {tokens} queries and {length} keys")
    return mask.reshape(-1, tokens, length).bool()
