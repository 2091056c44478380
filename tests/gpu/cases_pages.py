"""One new token of each request over latents in pages: the kernel against the definition, with NaN in rows of no request."""

import pytest
import torch
from gpu.cases_attention import BF16, FP16, FP32, Case

from modeling_deepseek_moe.ops.absorbed_attention import triton, triton_pages
from modeling_deepseek_moe.ops.absorbed_attention.pages import Pages


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    monkeypatch.setattr(triton, "BLOCK_KEYS", 16)


def paged(case: Case) -> Pages:
    """A case's latents in rows that were drawn, between others; halves have strides of their own."""
    latents = torch.cat((case.c_kv, case.k_pe), dim=-1)[:, 0]
    width = latents.shape[2]
    half = -(-width // 2)
    rows = torch.full((2 * sum(case.end) + 5, 2 * half), float("nan"), dtype=case.dtype)  # padding is not read either
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))[: sum(case.end)]
    rows[index, :width] = torch.cat([latent[:end] for latent, end in zip(latents, case.end, strict=True)])
    halves = []
    for columns, room in zip(rows.split(half, dim=1), (3, 8), strict=True):
        halves.append(torch.full((len(rows), half + room), float("nan"), dtype=case.dtype)[:, :half].copy_(columns))
    starts = torch.tensor((0, *case.end)).cumsum(0).int()
    return Pages(*halves, index, starts, max(case.end))


def attend(case: Case, pages: Pages) -> torch.Tensor:
    return triton_pages.decode.cuda(case.q_nope, case.q_pe, *pages, case.weight, case.scale, case.scaling)


@pytest.mark.parametrize("dtype, heads", ((BF16, 16), (BF16, 128), (FP16, 20), (FP32, 20)), ids=str)
def test_requests_of_unlike_lengths(dtype, heads):
    """One token, part of a block, several parts, and one request without any."""
    ends = (1, 40, 17, 0)
    case = Case(dtype, heads, (24, 40, 8, 48), (0,) * len(ends), ends)
    case.check(attend(case, paged(case)))


@pytest.mark.parametrize("dims", ((24, 40, 8, 47), (16, 16, 40, 24), (32, 32, 64, 512)), ids=str)
def test_halves_end_anywhere(dims):
    """An odd row, one whose rotated part begins in the first half, and the release's."""
    case = Case(BF16, 16, dims, (0, 0), (19, 4))
    case.check(attend(case, paged(case)))


def test_weights_in_codes():
    case = Case(BF16, 16, (24, 40, 8, 48), (0, 0), (33, 40), fp8=True)
    case.check(attend(case, paged(case)))


def test_more_requests_than_a_product_has_rows():
    ends = tuple(range(1, 18))
    case = Case(BF16, 16, (24, 40, 8, 48), (0,) * len(ends), ends)
    case.check(attend(case, paged(case)))


def test_lost_latents_are_seen_by_their_request_alone():
    case = Case(BF16, 16, (24, 40, 8, 48), (0, 0), (20, 30))
    case.c_kv[0, 0, 3, 5] = float("nan")
    found = attend(case, paged(case))
    assert found[0].isnan().any() and not found[1].isnan().any()


@pytest.mark.parametrize("broken", ("index", "starts", "halves", "weight"))
def test_refuses_what_does_not_fit(broken):
    case = Case(BF16, 16, (24, 40, 8, 48), (0, 0), (20, 30))
    pages = paged(case)
    if broken == "index":
        pages = pages._replace(rows=pages.rows.int())
    elif broken == "starts":
        pages = pages._replace(starts=pages.starts[:-1])
    elif broken == "halves":
        pages = pages._replace(second=pages.second[:, :-1])
    else:
        case.weight = case.weight[:-1]
    with pytest.raises(ValueError, match="do not fit"):
        attend(case, pages)
