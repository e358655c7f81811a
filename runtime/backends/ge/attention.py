"""FusedInferAttentionScore, PromptFlashAttention and IncreFlashAttention on CPU.

Semantics after the operators' documentation (aclnnFusedInferAttentionScore and the other two, CANN): scaled
dot-product attention with grouped heads, in layouts BSH and TND. What the reference computes is inner_precise 0, the
exact mode: scores and softmax in fp32, one rounding at the output. inner_precise 1, which PromptFlashAttention in fp16
has unless torch_npu is called with sparse_mode 10 to 14, keeps fp16 scores on the device; bf16 has one mode.

Lengths in BSH are one for all rows or one a row, and more than there are rows are ignored: keys beyond a row's length
are not read, queries beyond it come out 0. A query that sees no key comes out 0. sparse_mode 3 (rightDownCausal) aligns
the causal triangle with a row's last key and its last query, both by length.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ....artifacts.ge.graph import Node
from .kernel import Outputs, attribute, dtype_name, floating, ints, kernel, refused, required, same_dtype

_FULL, _RIGHT_DOWN_CAUSAL = 0, 3
# Inputs by position in the operators' definitions; the rest must be unfed.
_ATTEN_MASK, _LENGTHS, _LENGTHS_KV = 4, 5, 6
_CAUSAL_MASK = 2048
# Rows of the query that share one mask, so that a long prompt needs no mask of its own squared.
_QUERY_BLOCK = 512


@dataclass(frozen=True)
class _Operands:
    """BSH: q [batch, tokens, heads * dim], k and v [batch, length, kv_heads * dim].
    TND: q [tokens, heads, dim], k and v [length, kv_heads, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    kv_heads: int
    dim: int


def _operands(node: Node, inputs: Sequence[Tensor | None], layout: str, takes: set[int]) -> _Operands:
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
    found = f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}, {heads} and {kv_heads} heads"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise refused(node, f"layout {layout} does not hold {found}")
    if layout == "TND":
        dim = q.shape[2]
        fits = (q.shape[1], *k.shape[1:]) == (heads, kv_heads, dim)
    else:
        dim = q.shape[2] // heads
        fits = q.shape[2] == heads * dim and (k.shape[0], k.shape[2]) == (q.shape[0], kv_heads * dim)
    if not fits:
        raise refused(node, f"layout {layout} does not hold {found}")
    return _Operands(q, k, v, heads, kv_heads, dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None, offset: int | None = None
) -> Tensor:
    """q [tokens, heads, dim], k and v [length, kv_heads, dim] to [tokens, heads, dim], computed in fp32.

    hidden [tokens, length]: true where a query does not see a key. offset: query i sees the keys up to i + offset.
    """
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
        found = F.scaled_dot_product_attention(
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
        found = torch.cat(parts, 2)
    out[blind:] = found[0].transpose(0, 1)
    return out


def _row_lengths(node: Node, tensor: Tensor | None, rows: int, limit: int) -> list[int]:
    """The lengths of a batch: all of `limit` if not given, one for all rows, or the first `rows` of them."""
    if tensor is None:
        return [limit] * rows
    found = ints(node, tensor)
    if tensor.dim() != 1 or len(found) not in (1, *range(rows, len(found) + 1)):
        raise refused(node, f"sequence lengths {list(tensor.shape)} for a batch of {rows}, expected 1 or {rows}")
    found = found * rows if len(found) == 1 else found[:rows]
    if any(not 0 <= value <= limit for value in found):
        raise refused(node, f"sequence lengths {found} are outside 0 to {limit}")
    return found


def _bsh(
    node: Node,
    of: _Operands,
    scale: float,
    lengths: Tensor | None,
    lengths_kv: Tensor | None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """mask [batch or 1, tokens, length], true where hidden."""
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


def _tnd(node: Node, of: _Operands, scale: float, lengths: Tensor | None, lengths_kv: Tensor | None) -> Tensor:
    """The lengths are cumulative ends of the sequences, of queries and of keys."""
    if lengths is None or lengths_kv is None:
        raise refused(node, "layout TND needs both sequence lengths")
    ends, ends_kv = ints(node, lengths), ints(node, lengths_kv)
    for found, x in ((ends, of.q), (ends_kv, of.k)):
        if any(not 0 <= end <= x.shape[0] for end in found):
            raise refused(node, f"sequence lengths {found} are outside 0 to {x.shape[0]}")
        if found != sorted(found) or found[-1:] != [x.shape[0]] or len(ends) != len(ends_kv):
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
    return torch.ones(_CAUSAL_MASK, _CAUSAL_MASK, dtype=torch.bool).triu(1)


# Masks found right, with their versions: every layer is given the same one, and comparing 4 MB takes longer than the
# attention of a short prompt.
_right_masks = WeakIdKeyDictionary()


def _mask_dtype(node: Node, mask: Tensor) -> None:
    if mask.dtype not in (torch.bool, torch.int8, torch.uint8):
        raise refused(node, f"the mask is {dtype_name(mask)}, expected bool, int8 or uint8")


def _check_causal_mask(node: Node, mask: Tensor) -> None:
    """sparse_mode 3 takes one mask, whatever the lengths: the strict upper triangle of 2048 x 2048."""
    # inference tensors count no versions
    version = None if mask.is_inference() else mask._version
    if version is not None and _right_masks.get(mask) == version:
        return
    _mask_dtype(node, mask)
    sizes = list(mask.shape)
    if sizes[-2:] != [_CAUSAL_MASK] * 2 or sizes[:-2] not in ([], [1], [1, 1]):
        raise refused(node, f"sparse_mode 3 takes a mask of 2048 x 2048, got {sizes}")
    if not torch.equal(mask.reshape(_CAUSAL_MASK, _CAUSAL_MASK).bool(), _triangle()):
        raise refused(node, "sparse_mode 3 takes a mask that hides what is above the diagonal, and nothing else")
    _right_masks[mask] = version


def _full_mask(node: Node, mask: Tensor, of: _Operands) -> Tensor:
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


@kernel
def fused_infer_attention_score(node: Node, *inputs: Tensor | None) -> Outputs:
    """Inputs query, key, value, and as 4 to 6 mask, lengths of the queries and of the keys.

    Without a mask pre_tokens and next_tokens have no effect, as documented. Outputs attention_out; softmax_lse is a
    placeholder of one zero, as with softmax_lse_flag false on the device.
    """
    layout, mode = attribute(node, "input_layout", "BSH"), attribute(node, "sparse_mode", _FULL)
    scale = attribute(node, "scale", 1.0)
    if layout not in ("BSH", "TND") or (layout == "TND" and mode != _FULL):
        raise refused(node, f"layout {layout} with sparse_mode {mode} is not supported")
    if attribute(node, "softmax_lse_flag", False):
        raise refused(node, "softmax_lse_flag is not supported")
    of = _operands(node, inputs, layout, {_ATTEN_MASK, _LENGTHS, _LENGTHS_KV})
    mask, lengths, lengths_kv = (*inputs, *[None] * _LENGTHS_KV)[_ATTEN_MASK : _LENGTHS_KV + 1]
    if mode not in (_FULL, _RIGHT_DOWN_CAUSAL) or (mode == _FULL and mask is not None):
        raise refused(node, f"sparse_mode {mode} with this mask is not supported")
    if layout == "TND":
        return _tnd(node, of, scale, lengths, lengths_kv), torch.zeros(1)
    if mode == _RIGHT_DOWN_CAUSAL:
        if mask is None:
            raise refused(node, "sparse_mode 3 needs its 2048 x 2048 mask")
        _check_causal_mask(node, mask)
        if of.q.shape[1] == 1:
            raise refused(node, "with one query token the operator takes no causal mask")
    out = _bsh(node, of, scale, lengths, lengths_kv, causal=mode == _RIGHT_DOWN_CAUSAL)
    return out, torch.zeros(1)


@kernel
def incre_flash_attention(node: Node, *inputs: Tensor | None) -> Outputs:
    """One query token a row over the cache: inputs query, key, value, and the lengths of the keys as 5; layout BSH."""
    layout = attribute(node, "input_layout", "BSH")
    if layout != "BSH":
        raise refused(node, f"layout {layout} is not supported")
    of = _operands(node, inputs, layout, {_LENGTHS})
    if of.q.shape[1] != 1:
        raise refused(node, f"takes one query token a row, got {of.q.shape[1]}")
    lengths_kv = inputs[_LENGTHS] if len(inputs) > _LENGTHS else None
    return (_bsh(node, of, attribute(node, "scale_value", 1.0), None, lengths_kv),)


@kernel
def prompt_flash_attention(node: Node, *inputs: Tensor | None) -> Outputs:
    """All query tokens over all keys, in layout BSH and sparse_mode 0.

    Inputs query, key, value, and as 4 to 6 a dense mask that is true where hidden, lengths of the queries and of the
    keys. Without a mask nothing is hidden, whatever pre_tokens and next_tokens say; with one, they limit what it shows
    and must not, here.
    """
    layout, mode = attribute(node, "input_layout", "BSH"), attribute(node, "sparse_mode", _FULL)
    if layout != "BSH" or mode != _FULL:
        raise refused(node, f"layout {layout} with sparse_mode {mode} is not supported")
    of = _operands(node, inputs, layout, {_ATTEN_MASK, _LENGTHS, _LENGTHS_KV})
    mask, lengths, lengths_kv = (*inputs, *[None] * _LENGTHS_KV)[_ATTEN_MASK : _LENGTHS_KV + 1]
    hidden = None
    if mask is not None:
        hidden = _full_mask(node, mask, of)
        before, after = attribute(node, "pre_tokens", 214748647), attribute(node, "next_tokens", 0)
        if before < of.q.shape[1] - 1 or after < of.k.shape[1] - 1:
            raise refused(node, f"pre_tokens {before} and next_tokens {after} beside a mask are not supported")
    return (_bsh(node, of, attribute(node, "scale_value", 1.0), lengths, lengths_kv, hidden),)
