"""FusedInferAttentionScore, PromptFlashAttention and IncreFlashAttention on CPU.

Semantics after the operators' documentation (aclnnFusedInferAttentionScore and the other two, CANN): scaled
dot-product attention with grouped heads; layouts BSH and TND; actual_seq_lengths_kv limits what is read of the cache;
sparse_mode 3 (rightDownCausal) aligns the causal triangle with the last key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ....artifacts.errors import ArtifactError
from .graph import Node

_FULL, _RIGHT_DOWN_CAUSAL = 0, 3
# Inputs by position in the operator's definition; the rest must be unfed.
_ATTEN_MASK, _LENGTHS, _LENGTHS_KV = 4, 5, 6
# Rows of the query that share one mask, so that a long prompt needs no mask of its own squared.
_QUERY_BLOCK = 512


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q [tokens, heads, dim], k and v [length, kv_heads, dim] to [tokens, heads, dim], computed in fp32."""
    tokens, length = q.shape[0], k.shape[0]
    q4, k4, v4 = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if not causal or tokens == 1 or tokens == length:
        out = F.scaled_dot_product_attention(
            q4, k4, v4, is_causal=causal and tokens > 1, scale=scale, enable_gqa=grouped
        )
    else:
        parts = []
        for start in range(0, tokens, _QUERY_BLOCK):
            rows = torch.arange(start, min(start + _QUERY_BLOCK, tokens))
            seen = int(rows[-1]) + 1 + length - tokens
            mask = torch.arange(seen)[None] <= rows[:, None] + (length - tokens)
            part = q4[:, :, rows[0] : rows[-1] + 1]
            parts.append(
                F.scaled_dot_product_attention(
                    part, k4[:, :, :seen], v4[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=grouped
                )
            )
        out = torch.cat(parts, 2)
    return out[0].transpose(0, 1).to(q.dtype)


def _lengths(node: Node, tensor: Tensor | None, default: list[int], limit: int) -> list[int]:
    if tensor is None:
        return default
    found = [int(value) for value in tensor.tolist()]
    if any(not 0 <= value <= limit for value in found):
        raise ArtifactError(f"{node.where}: sequence lengths {found} are outside 0 to {limit}")
    return found


def _tnd(node: Node, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, lengths_kv: Tensor | None) -> Tensor:
    """q, k, v [tokens, heads, dim]; the lengths are cumulative ends of the sequences."""
    ends = _lengths(node, lengths, [q.shape[0]], q.shape[0])
    ends_kv = _lengths(node, lengths_kv, [k.shape[0]], k.shape[0])
    if len(ends) != len(ends_kv) or ends != sorted(ends) or ends_kv != sorted(ends_kv) or ends[-1:] != [q.shape[0]]:
        raise ArtifactError(f"{node.where}: TND lengths {ends} and {ends_kv} do not partition {q.shape[0]} tokens")
    out = torch.empty_like(q)
    start = start_kv = 0
    for end, end_kv in zip(ends, ends_kv, strict=True):
        if end > start:
            out[start:end] = _attend(
                q[start:end], k[start_kv:end_kv], v[start_kv:end_kv], node.attributes["scale"], causal=False
            )
        start, start_kv = end, end_kv
    return out


def _bsh(node: Node, scale: float, q: Tensor, k: Tensor, v: Tensor, lengths_kv: Tensor | None, causal: bool) -> Tensor:
    """q [batch, tokens, heads * dim], k and v [batch, length, kv_heads * dim]."""
    heads = node.attributes["num_heads"]
    kv_heads = node.attributes["num_key_value_heads"] or heads
    batch, tokens, width = q.shape
    dim = width // heads
    lengths = _lengths(node, lengths_kv, [k.shape[1]] * batch, k.shape[1])
    if len(lengths) != batch or k.shape[2] != kv_heads * dim:
        raise ArtifactError(f"{node.where}: {len(lengths)} lengths, key {list(k.shape)} for query {list(q.shape)}")
    out = torch.empty_like(q)
    for row, length in enumerate(lengths):
        if causal and tokens == 1:
            raise ArtifactError(f"{node.where}: with one query token the operator takes no causal mask")
        if causal and length < tokens:
            raise ArtifactError(f"{node.where}: {tokens} tokens attend to a cache of only {length}")
        out[row] = _attend(
            q[row].view(tokens, heads, dim),
            k[row, :length].view(length, kv_heads, dim),
            v[row, :length].view(length, kv_heads, dim),
            scale,
            causal,
        ).reshape(tokens, width)
    return out


def fused_infer_attention_score(node: Node, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Outputs attention_out; softmax_lse is a placeholder of one zero, as with softmax_lse_flag false on the device."""
    q, k, v = inputs[:3]
    fed = {i for i, x in enumerate(inputs) if x is not None}
    if q is None or k is None or v is None or fed - {0, 1, 2, _ATTEN_MASK, _LENGTHS, _LENGTHS_KV}:
        raise ArtifactError(f"{node.where}: inputs {sorted(fed)} are fed; supported are 0 to 2 and 4 to 6")
    mode, layout = node.attributes["sparse_mode"], node.attributes["input_layout"]
    if mode not in (_FULL, _RIGHT_DOWN_CAUSAL) or (mode == _FULL and _ATTEN_MASK in fed):
        raise ArtifactError(f"{node.where}: sparse_mode {mode} with this mask is not supported")
    if mode == _RIGHT_DOWN_CAUSAL and _ATTEN_MASK not in fed:
        raise ArtifactError(f"{node.where}: sparse_mode 3 needs its 2048 x 2048 mask")
    if layout == "TND" and mode == _FULL:
        out = _tnd(node, q, k, v, inputs[_LENGTHS], inputs[_LENGTHS_KV])
    elif layout == "BSH":
        out = _bsh(node, node.attributes["scale"], q, k, v, inputs[_LENGTHS_KV], causal=mode == _RIGHT_DOWN_CAUSAL)
    else:
        raise ArtifactError(f"{node.where}: layout {layout} with sparse_mode {mode} is not supported")
    return out, torch.zeros(1)


def incre_flash_attention(node: Node, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """One query token a row over the cache, by lengths: inputs query, key, value, and actual_seq_lengths as the 6th."""
    q, k, v = inputs[:3]
    fed = {i for i, x in enumerate(inputs) if x is not None}
    if q is None or k is None or v is None or fed - {0, 1, 2, 5} or node.attributes["input_layout"] != "BSH":
        raise ArtifactError(f"{node.where}: inputs {sorted(fed)} are fed; supported are 0 to 2 and 5, in layout BSH")
    return (_bsh(node, node.attributes["scale_value"], q, k, v, inputs[5], causal=False),)


def prompt_flash_attention(node: Node, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """All query tokens over all keys under a dense mask [1, 1, tokens, length], true where hidden; BSH, sparse_mode 0.

    Without a mask nothing is hidden. next_tokens limits the mask's reach and must not, here.
    """
    q, k, v, _, mask = inputs[:5]
    fed = {i for i, x in enumerate(inputs) if x is not None}
    given = node.attributes
    if q is None or k is None or v is None or fed - {0, 1, 2, 4} or given["input_layout"] != "BSH":
        raise ArtifactError(f"{node.where}: inputs {sorted(fed)} are fed; supported are 0 to 2 and 4, in layout BSH")
    if given.get("sparse_mode") or given["next_tokens"] < k.shape[1] or given["pre_tokens"] < k.shape[1]:
        raise ArtifactError(f"{node.where}: only sparse_mode 0 with unlimited tokens is supported, got {given}")
    heads = given["num_heads"]
    kv_heads = given["num_key_value_heads"] or heads
    batch, tokens, width = q.shape
    dim = width // heads
    q4, k4, v4 = (
        x.float().view(batch, -1, n, dim).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    )
    out = F.scaled_dot_product_attention(
        q4, k4, v4, attn_mask=None if mask is None else ~mask.bool(), scale=given["scale_value"], enable_gqa=True
    )
    return (out.transpose(1, 2).reshape(batch, tokens, width).to(q.dtype),)
