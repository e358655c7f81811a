"""Attention on CPU against its formula in float64: lengths, masks, layouts, and the edges of each."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.kernels import assert_close, assert_rounded, attention, normal, rounded, run, wide

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.runtime.ops import attention as attention_kernels

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
SCALE = 0.3
Ends = list[int] | None


def lengths(values: Ends) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=None if values else torch.int64)


def fia(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    ends: list[int] | None = None,
    ends_kv: list[int] | None = None,
    **given: Any,
) -> torch.Tensor:
    inputs = [q, k, v, None, mask, lengths(ends), lengths(ends_kv), *([None] * 20)]
    return run("FusedInferAttentionScore", *inputs, **{"scale": SCALE, **given})[0]


def pfa(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    ends: list[int] | None = None,
    ends_kv: list[int] | None = None,
    **given: Any,
) -> torch.Tensor:
    inputs = [q, k, v, None, mask, lengths(ends), lengths(ends_kv)]
    return run("PromptFlashAttention", *inputs, **{"scale_value": SCALE, "next_tokens": 1 << 30, **given})[0]


def ifa(q: Any, k: Any, v: Any, ends_kv: Ends = None, **given: Any) -> torch.Tensor:
    return run("IncreFlashAttention", q, k, v, None, None, lengths(ends_kv), **{"scale_value": SCALE, **given})[0]


def operands(batch: int, tokens: int, length: int, heads: int, kv_heads: int, dim: int, dtype: Any = None) -> list[Any]:
    sizes = ((tokens, heads), (length, kv_heads), (length, kv_heads))
    return [normal(batch, s, n * dim, seed=seed, dtype=dtype or torch.float32) for seed, (s, n) in enumerate(sizes)]


def exact(
    found: list[Any],
    heads: int,
    kv_heads: int,
    ends: list[int],
    ends_kv: list[int],
    causal: bool = False,
    hidden: Any = None,
) -> np.ndarray:
    """The formula by rows: keys beyond a length are not read, queries beyond one give zeros."""
    q, k, v = (wide(x) for x in found)
    out = np.zeros_like(q)
    for row, (end, end_kv) in enumerate(zip(ends, ends_kv, strict=True)):
        parts = [
            x[row, :size].reshape(size, n, q.shape[2] // heads)
            for x, size, n in ((q, end, heads), (k, end_kv, kv_heads), (v, end_kv, kv_heads))
        ]
        mask = None if hidden is None else wide(hidden)[row % len(hidden), :end, :end_kv]
        out[row, :end] = attention(*parts, SCALE, end_kv - end if causal else None, mask).reshape(end, q.shape[2])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_over_a_cache_reads_only_what_each_row_has(dtype: torch.dtype) -> None:
    found = operands(3, 1, 6, 4, 2, 8, dtype)
    for row, length in enumerate([3, 6, 0]):
        # what an earlier request left behind may be anything
        found[1][row, length:], found[2][row, length:] = float("nan"), float("inf")
    expected = exact(found, 4, 2, [1] * 3, [3, 6, 0])
    for got in (
        fia(*found, ends_kv=[3, 6, 0], num_heads=4, num_key_value_heads=2),
        ifa(*found, ends_kv=[3, 6, 0], num_heads=4, num_key_value_heads=2),
        pfa(*found, ends_kv=[3, 6, 0], num_heads=4, num_key_value_heads=2),
    ):
        if dtype == torch.float32:
            assert_close(got, expected)
        else:
            assert_rounded(got, rounded(expected, dtype))
        assert not got[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_any_key_attention_gives_zeros(dtype: torch.dtype) -> None:
    given = {"num_heads": 4, "num_key_value_heads": 2}
    found = operands(2, 3, 0, 4, 2, 8, dtype)
    packed = [x[0].view(-1, n, 8) for x, n in zip(found, (4, 2, 2), strict=True)]
    for got in (
        fia(*found, **given),
        fia(*found, TRIANGLE, sparse_mode=3, **given),
        pfa(*found, **given),
        ifa(found[0][:, :1], *found[1:], **given),
        fia(*packed, None, [3], [0], input_layout="TND", **given),
    ):
        assert got.dtype == dtype and got.numel() and not got.any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (12, 2), (8, 1), (5, 1), (3, 3)])
@pytest.mark.parametrize(("tokens", "length"), [(5, 5), (3, 9)])
def test_heads_share_keys_in_order(heads: int, kv_heads: int, tokens: int, length: int) -> None:
    found = operands(1, tokens, length, heads, kv_heads, 16)
    given = {"num_heads": heads, "num_key_value_heads": kv_heads}
    assert_close(fia(*found, **given), exact(found, heads, kv_heads, [tokens], [length]))
    assert_close(
        fia(*found, TRIANGLE, sparse_mode=3, **given), exact(found, heads, kv_heads, [tokens], [length], causal=True)
    )


@pytest.mark.parametrize("dim", [16, 72, 80, 84, 128, 511])
def test_any_head_dimension_is_computed(dim: int) -> None:
    found = operands(1, 4, 6, 2, 1, dim)
    given = {"num_heads": 2, "num_key_value_heads": 1}
    # sums of as many products as the head is wide
    assert_close(fia(*found, **given), exact(found, 2, 1, [4], [6]), 2e-5)
    packed = [x[0].reshape(len(x[0]), -1, dim) for x in found]
    got = fia(*packed, None, [4], [6], input_layout="TND", **given)
    assert_close(got.reshape(1, 4, -1), exact(found, 2, 1, [4], [6]), 2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("ends", "ends_kv"),
    [([1, 3], [3, 5]), ([3, 0], [5, 5]), ([2, 3], [0, 5]), ([3, 2], [1, 2]), ([3, 3], [5, 4]), ([0, 0], [0, 0])],
)
def test_queries_beyond_their_length_give_zeros_and_do_not_move_the_triangle(
    ends: list[int], ends_kv: list[int], causal: bool
) -> None:
    found = operands(2, 3, 5, 4, 2, 8)
    found[0][0, ends[0] :] = float("nan")
    given: dict[str, Any] = {"num_heads": 4, "num_key_value_heads": 2}
    mask = TRIANGLE if causal else None
    got = fia(*found, mask, ends, ends_kv, **given, sparse_mode=3 if causal else 0)
    assert_close(got, exact(found, 4, 2, ends, ends_kv, causal))
    if not causal:
        assert torch.equal(got, pfa(*found, None, ends, ends_kv, **given))


@pytest.mark.parametrize(("ends", "meant"), [([2], [2, 2, 2]), ([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 9, 0], [1, 2, 3])])
def test_one_length_serves_all_rows_and_lengths_beyond_the_rows_are_ignored(ends: list[int], meant: list[int]) -> None:
    found = operands(3, 3, 3, 2, 2, 8)
    given = {"num_heads": 2}
    expected = exact(found, 2, 2, meant, [3] * 3)
    assert_close(fia(*found, None, ends, **given), expected)
    assert_close(pfa(*found, None, ends, **given), expected)
    assert_close(fia(*found, None, None, ends, **given), exact(found, 2, 2, [3] * 3, meant))
    tokens = [found[0][:, :1], *found[1:]]
    assert_close(ifa(*tokens, ends, **given), exact(tokens, 2, 2, [1] * 3, meant))


@pytest.mark.parametrize("attend", [fia, pfa])
@pytest.mark.parametrize("which", ["ends", "ends_kv"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([2, 2], r"sequence lengths \[2\] for a batch of 3, expected 1 or 3"),
        ([], r"sequence lengths \[0\] for a batch of 3"),
        ([-1], "outside 0 to 3"),
        ([1, 2, 4], r"\[1, 2, 4\] are outside 0 to 3"),
        ([[1, 2, 3]], "for a batch of 3"),
        ([1.0, 2.0, 3.0], "got float32 values, expected int64 or int32"),
    ],
)
def test_lengths_that_do_not_fit_a_batch_are_refused(attend: Any, which: str, values: Any, message: str) -> None:
    found = operands(3, 3, 3, 2, 2, 8)
    with pytest.raises(ArtifactError, match=f"under_test: .*{message}"):
        attend(*found, **{which: values}, num_heads=2)


@pytest.mark.parametrize(
    ("tokens", "length"), [(5, 5), (3, 9), (600, 700), (1300, 1850), (1024, 1024), (513, 514), (9, 4), (600, 80)]
)
def test_right_down_causal_attention_aligns_with_the_end_of_the_cache(tokens: int, length: int) -> None:
    """More queries than keys: the first see nothing and give zeros."""
    found = operands(1, tokens, length + 3, 2, 1, 8)
    got = fia(*found, TRIANGLE, None, [length], num_heads=2, num_key_value_heads=1, sparse_mode=3)
    assert_close(got, exact(found, 2, 1, [tokens], [length], causal=True))
    assert not got[0, : max(0, tokens - length)].any()


def test_the_causal_mask_must_be_the_one_of_2048() -> None:
    x = normal(1, 9, 16)
    for mask, message in (
        (torch.ones(9, 9, dtype=torch.bool).triu(1), r"a mask of 2048 x 2048, got \[9, 9\]"),
        (TRIANGLE.expand(2, 1, 2048, 2048), r"got \[2, 1, 2048, 2048\]"),
        (TRIANGLE.half(), "the mask is float16"),
        (~TRIANGLE, "hides what is above the diagonal"),
        (None, "needs its 2048 x 2048 mask"),
    ):
        with pytest.raises(ArtifactError, match=message):
            fia(x, x, x, mask, num_heads=2, sparse_mode=3)
    same = [fia(x, x, x, mask, num_heads=2, sparse_mode=3) for mask in (TRIANGLE, TRIANGLE.int()[None].to(torch.int8))]
    assert torch.equal(*same)


def test_layers_that_share_a_causal_mask_compare_it_once_and_again_when_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    monkeypatch.setattr(attention_kernels, "_triangle", lambda: compared.append(1) or TRIANGLE)
    x, mask = normal(1, 9, 8), TRIANGLE.clone()
    for _ in range(3):
        fia(x, x, x, mask, num_heads=2, sparse_mode=3)
    assert len(compared) == 1
    mask[0, 0] = True
    with pytest.raises(ArtifactError, match="nothing else"):
        fia(x, x, x, mask, num_heads=2, sparse_mode=3)


def test_without_a_mask_nothing_is_hidden_whatever_the_tokens_say() -> None:
    found = operands(1, 4, 6, 2, 2, 8)
    expected = exact(found, 2, 2, [4], [6])
    for tokens in ({}, {"pre_tokens": 0, "next_tokens": 0}, {"pre_tokens": 65535, "next_tokens": 65535}):
        assert_close(fia(*found, num_heads=2, **tokens), expected)
        assert_close(pfa(*found, num_heads=2, **tokens), expected)


def masks(batch: int, tokens: int, length: int) -> list[tuple[int, ...]]:
    """Documented shapes of a dense mask."""
    shapes = [(*rows, *one, tokens, length) for rows in ((batch,), (1,)) for one in ((), (1,))]
    return [*shapes, (batch, length) if tokens == 1 else (tokens, length)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 3, 2), (2, 3, 2), (3, 3, 2), (2, 1, 2), (2, 2, 2)])
def test_a_dense_mask_belongs_to_rows_never_to_heads(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> None:
    found = operands(batch, tokens, 5, heads, 1, 8)
    given = {"num_heads": heads, "num_key_value_heads": 1}
    for seed, shape in enumerate(masks(batch, tokens, 5)):
        mask = (normal(*shape, seed=seed) > 0).to(dtype)
        hidden = mask.reshape(-1, tokens, 5)
        assert_close(pfa(*found, mask, **given), exact(found, heads, 1, [tokens] * batch, [5] * batch, hidden=hidden))
        ends, ends_kv = [*range(1, batch + 1)], [*range(4, 4 - batch, -1)]
        ends = [min(end, tokens) for end in ends]
        got = pfa(*found, mask, ends, ends_kv, **given)
        assert_close(got, exact(found, heads, 1, ends, ends_kv, hidden=hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_whose_keys_are_all_hidden_give_zeros(dtype: torch.dtype) -> None:
    found = operands(1, 700, 700, 2, 2, 8, dtype)
    mask = torch.zeros(1, 1, 700, 700, dtype=torch.bool)
    mask[..., :350, :] = True
    got = pfa(*found, mask, num_heads=2)
    assert not got[0, :350].any()
    assert got[0, 350:].isfinite().all() and got[0, 350:].any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 3, 5), r"a mask \[2, 2, 3, 5\] for 2 rows, 3 queries and 5 keys"),
        ((3, 3, 5), r"a mask \[3, 3, 5\]"),
        ((2, 1, 4, 6), "a mask"),
        ((5,), "a mask"),
        ((2, 5), "a mask"),
    ],
)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArtifactError, match=f"PromptFlashAttention under_test: {message}"):
        pfa(*operands(2, 3, 5, 2, 2, 8), torch.zeros(shape, dtype=torch.bool), num_heads=2)


def test_a_mask_that_tokens_would_narrow_is_refused() -> None:
    found, mask = operands(1, 3, 5, 2, 2, 8), torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    with pytest.raises(ArtifactError, match="next_tokens 0 beside a mask"):
        pfa(*found, mask, num_heads=2, next_tokens=0)
    with pytest.raises(ArtifactError, match="pre_tokens 1 and"):
        pfa(*found, mask, num_heads=2, pre_tokens=1)
    with pytest.raises(ArtifactError, match="the mask is float32"):
        pfa(*found, mask.float(), num_heads=2)


@pytest.mark.parametrize(
    ("ends", "ends_kv"),
    [([4, 4, 9], [4, 4, 9]), ([9], [9]), ([0, 9, 9], [2, 9, 9]), ([3, 9], [9, 9]), ([3, 6, 9], [0, 0, 9])],
)
def test_packed_sequences_attend_within_themselves(ends: list[int], ends_kv: list[int]) -> None:
    """Segments may be empty, of queries and of keys: a query without keys gives zeros."""
    q, k, v = (normal(9, n, 8, seed=seed) for seed, n in enumerate((4, 2, 2)))
    got = fia(q, k, v, None, ends, ends_kv, input_layout="TND", num_heads=4, num_key_value_heads=2)
    for start, end, start_kv, end_kv in zip([0, *ends], ends, [0, *ends_kv], ends_kv, strict=False):
        parts = wide(q[start:end]), wide(k[start_kv:end_kv]), wide(v[start_kv:end_kv])
        assert_close(got[start:end], attention(*parts, SCALE))


@pytest.mark.parametrize(
    ("ends", "ends_kv", "message"),
    [
        ([4], [4], "do not partition 9 tokens"),
        ([10], [10], "outside 0 to 9"),
        ([-1, 9], [9, 9], "outside 0 to 9"),
        ([5, 4, 9], [5, 4, 9], "do not partition"),
        ([4, 9], [9], "do not partition"),
        ([9], [7], "do not partition 9 tokens and 9 keys"),
        ([], [], "do not partition"),
        (None, [9], "needs both sequence lengths"),
        ([9], None, "needs both sequence lengths"),
        (None, None, "needs both sequence lengths"),
    ],
)
def test_packed_lengths_that_do_not_fit_are_refused(ends: Any, ends_kv: Any, message: str) -> None:
    x = normal(9, 2, 8)
    with pytest.raises(ArtifactError, match=message):
        fia(x, x, x, None, ends, ends_kv, input_layout="TND", num_heads=2)


def test_unsupported_attention_is_refused_by_name() -> None:
    x = normal(1, 9, 16)
    with pytest.raises(ArtifactError, match="sparse_mode 4"):
        fia(x, x, x, num_heads=2, sparse_mode=4)
    with pytest.raises(ArtifactError, match="layout BNSD"):
        fia(x, x, x, input_layout="BNSD", num_heads=2)
    with pytest.raises(ArtifactError, match="layout TND with sparse_mode 3"):
        fia(x[0].view(9, 2, 8), x, x, TRIANGLE, input_layout="TND", num_heads=2, sparse_mode=3)
    with pytest.raises(ArtifactError, match="softmax_lse_flag"):
        fia(x, x, x, num_heads=2, softmax_lse_flag=True)
    with pytest.raises(ArtifactError, match=r"inputs \[0, 1, 2, 7\] are fed"):
        run("FusedInferAttentionScore", x, x, x, *[None] * 4, x, num_heads=2)
    with pytest.raises(ArtifactError, match="layout TND with sparse_mode 0"):
        pfa(x, x, x, num_heads=2, input_layout="TND")
    with pytest.raises(ArtifactError, match="sparse_mode 2"):
        pfa(x, x, x, num_heads=2, sparse_mode=2)
    with pytest.raises(ArtifactError, match="takes one query token a row, got 9"):
        ifa(x, x, x, num_heads=2)


@pytest.mark.parametrize("attend", [fia, pfa, ifa])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "message"),
    [
        (3, 2, 18, "3 heads do not share 2"),
        (2, 4, 16, "2 heads do not share 4"),
        (3, 3, 16, "layout BSH does not hold query"),
        (2, 1, 16, "layout BSH does not hold query"),
        (0, 0, 16, "0 heads"),
        (-2, 0, 16, "-2 heads"),
    ],
)
def test_heads_that_do_not_fit_are_refused(attend: Any, heads: int, kv_heads: int, width: int, message: str) -> None:
    x = normal(1, 1, width)
    with pytest.raises(ArtifactError, match=message):
        attend(x, x, x, num_heads=heads, num_key_value_heads=kv_heads)


def test_operands_of_different_kinds_are_refused() -> None:
    x = normal(1, 1, 16)
    with pytest.raises(ArtifactError, match="float32, float16, float16, expected one dtype"):
        fia(x, x.half(), x.half(), num_heads=2)
    with pytest.raises(ArtifactError, match="got int8"):
        fia(x, x.to(torch.int8), x.to(torch.int8), num_heads=2)
    with pytest.raises(ArtifactError, match=r"key \[1, 1, 16\], value \[1, 2, 16\]"):
        fia(x, x, normal(1, 2, 16), num_heads=2)
    with pytest.raises(ArtifactError, match=r"query \[1, 1, 16\], key \[2, 1, 16\]"):
        fia(x, normal(2, 1, 16), normal(2, 1, 16), num_heads=2)
    with pytest.raises(ArtifactError, match="the attribute num_heads is missing"):
        fia(x, x, x)


def test_one_query_token_with_a_causal_mask_is_refused_as_the_operator_documents() -> None:
    x = normal(1, 1, 16)
    with pytest.raises(ArtifactError, match="takes no causal mask"):
        fia(x, x, x, TRIANGLE, num_heads=2, sparse_mode=3)
