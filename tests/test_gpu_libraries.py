"""Libraries of others, without one and without a card: what is called with what, what a trial finds, and what is said of it.

Modules that compute by plain torch stand in their place, see ``gpu.libraries``; clocks are set by hand.
"""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gpu import libraries
from gpu.libraries import BF16, DEEP_GEMM, FLASH_3, LIGER, install

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.ops import _liger, _trials, block_fp8
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend
from modeling_deepseek_moe.ops.absorbed_attention import flash_attention as latents
from modeling_deepseek_moe.ops.block_fp8 import deep_gemm
from modeling_deepseek_moe.ops.experts import deep_gemm as grouped
from modeling_deepseek_moe.ops.prompt_attention import attend
from modeling_deepseek_moe.ops.rms_norm import liger as norm
from modeling_deepseek_moe.ops.rms_norm import reference, rms_norm
from modeling_deepseek_moe.ops.swiglu import liger as activation

GEMM = {"sgl-deep-gemm": "0.2.5"}


@pytest.fixture(autouse=True)
def forgotten():
    yield
    _trials.forget()


@pytest.fixture
def on_a_card(monkeypatch):
    libraries.be_a_card(monkeypatch)


def by_tile(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = block_fp8.quantize_tiles(x)
    room = torch.full((scale.shape[1], -(-len(x) // 4) * 4), torch.nan)
    room[:, : len(x)] = scale.t()
    return codes, room.t()[: len(x)]


def operands(rows=70, n=192, k=256):
    x = torch.randn(rows, k).to(BF16)
    return x, *block_fp8.quantize(torch.randn(n, k) * 0.1)


def asked(x, codes, own=lambda: None, rows=128) -> str | None:
    """Why DeepGEMM is not taken for a layer."""
    reason = deep_gemm.unsupported(90, x, codes)
    return reason or deep_gemm.unsuitable(x, codes, by_tile, lambda: None, own, rows)


def test_deep_gemm_is_taken_where_it_is_faster(monkeypatch):
    told = install(monkeypatch, GEMM, deep_gemm=DEEP_GEMM)
    x, codes, scale = operands()
    assert asked(x, codes) is None
    assert told == [
        "FP8 linear torch.bfloat16, 192, 256, 128 on cpu: DeepGEMM (sgl-deep-gemm 0.2.5): 1 µs, this package's kernels 2"
    ]
    found = deep_gemm.multiply(*by_tile(x), codes, scale)
    wanted = block_fp8.gemm(*block_fp8.quantize_tiles(x), codes, scale)
    assert found.dtype == BF16 and torch.equal(found, wanted.to(BF16))


def test_a_verdict_is_found_once_for_a_shape(monkeypatch):
    told = install(monkeypatch, GEMM, deep_gemm=DEEP_GEMM)
    (x, codes, _), runs = operands(), []
    for rows in (128, 128, 256):
        assert asked(x, codes, partial(runs.append, rows), rows) is None
    assert runs == [128, 256] and len(told) == 2


def test_a_slower_library_runs_only_where_it_is_asked_for(monkeypatch):
    told = install(monkeypatch, GEMM, times=(30.0, 20.0), deep_gemm=DEEP_GEMM)
    x, codes, _ = operands()
    assert asked(x, codes) == "took 30 µs, this package's kernels 20"
    assert told[0].endswith(
        "on cpu: this package's kernels: DeepGEMM (sgl-deep-gemm 0.2.5) took 30 µs, this package's kernels 20"
    )
    with use_backend("deep_gemm"):
        assert asked(x, codes) is None


@pytest.mark.parametrize("fault", ["scales", "transposed", "nan", "shape"])
def test_what_computes_something_else_is_refused(monkeypatch, fault):
    def wrong(a, b, d):
        libraries.fp8_gemm_nt(a, b, d)
        if fault == "scales":
            libraries.fp8_gemm_nt((a[0], a[1].flip(1)), b, d)
        elif fault == "transposed":
            libraries.fp8_gemm_nt(a, (b[0], b[1].flip(0).contiguous()), d)
        elif fault == "nan":
            d[3, 5] = torch.nan
        else:
            d[:, -1] = 0

    told = install(monkeypatch, GEMM, deep_gemm={"fp8_gemm_nt": wrong})
    x, codes, _ = operands()
    reason = asked(x, codes)
    assert reason.startswith("differs by ") and reason in told[0]
    with use_backend("deep_gemm"):
        assert asked(x, codes) == reason


def test_what_a_library_raises_is_told(monkeypatch):
    def broken(a, b, d):
        raise RuntimeError("no nvcc\nin /usr/local/cuda")

    told = install(monkeypatch, GEMM, deep_gemm={"fp8_gemm_nt": broken})
    x, codes, _ = operands()
    assert asked(x, codes) == "raised RuntimeError: no nvcc in /usr/local/cuda"
    assert "this package's kernels: DeepGEMM (sgl-deep-gemm 0.2.5) raised RuntimeError" in told[0]


def test_releases_without_the_call_are_named(monkeypatch):
    x, codes, _ = operands()
    install(monkeypatch, {"deep-gemm": "1.0.0"}, deep_gemm={"gemm_fp8_fp8_bf16_nt": lambda lhs, rhs, out: None})
    assert asked(x, codes) == "deep-gemm 1.0.0 has no fp8_gemm_nt(a, b, d)"
    install(monkeypatch, GEMM, deep_gemm={"fp8_gemm_nt": lambda a, b, out: None})
    assert asked(x, codes) == "sgl-deep-gemm 0.2.5 has no fp8_gemm_nt(a, b, d): no d"
    install(monkeypatch, GEMM)
    monkeypatch.setitem(libraries.sys.modules, "deep_gemm", None)
    assert asked(x, codes).startswith("sgl-deep-gemm 0.2.5 cannot be imported: ModuleNotFoundError: ")
    install(monkeypatch, {})
    assert asked(x, codes) == "is not installed (sgl-deep-gemm or deep-gemm)"


def test_functions_that_tell_no_parameters_are_tried(monkeypatch):
    install(monkeypatch, GEMM, deep_gemm={"fp8_gemm_nt": max})  # its signature cannot be read
    x, codes, _ = operands()
    assert asked(x, codes).startswith("raised ")


def test_shapes_and_cards_that_are_not_its_are_named(monkeypatch):
    install(monkeypatch, GEMM, deep_gemm=DEEP_GEMM)
    x, codes, _ = operands()
    assert deep_gemm.unsupported(89, x, codes) == "is called on SM90, found SM89"
    assert deep_gemm.unsupported(100, x, codes) == "is called on SM90, found SM100"
    assert "writes bf16, found torch.float16" in deep_gemm.unsupported(90, x.half(), codes)
    assert "K of whole 128, found [192, 200]" in deep_gemm.unsupported(90, x, torch.empty(192, 200))
    assert "whole blocks of 128" in grouped.unsupported(90, torch.empty(2, 128, 128), torch.empty(2, 128, 64))


def test_nothing_is_tried_without_values_or_within_a_graph(monkeypatch):
    told = install(monkeypatch, GEMM, deep_gemm=DEEP_GEMM)
    x, codes, _ = operands()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert asked(fake, codes) == "is tried on values, found tensors that have shapes alone"
    card = torch.empty((), device="meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_cuda = type("OnCuda", (), {"device": torch.device("cuda", 0), "dtype": BF16})()
    reason = _trials.trials().reason("deep_gemm", "FP8 linear", on_cuda, (1,), lambda: card)
    assert reason == "was not tried before a CUDA graph was captured" and told == []


def test_backends_by_name():
    x, codes, scale = operands()
    with use_backend("deep_gemm"), pytest.raises(BackendError, match="FP8 linear: backend 'deep_gemm' needs CUDA"):
        block_fp8.linear(x, codes, scale)
    for name in ("liger", "flash_attention_3"):
        with use_backend(name):  # other operations are as they were
            assert block_fp8.linear(x, codes, scale).shape == (70, 192)
    with use_backend("liger"), pytest.raises(BackendError, match="RMSNorm with gradients: backend 'liger' needs CUDA"):
        rms_norm(torch.randn(2, 8, requires_grad=True), torch.ones(8), 1e-6)
    q = torch.randn(1, 2, 5, 8)
    for name in ("flash_attention_3", "flash_attention_4"):
        with (
            use_backend(name),
            pytest.raises(BackendError, match=f"attention over prompts: backend '{name}' needs CUDA"),
        ):
            attend(None, None, q, q, q, None)
    with pytest.raises(
        BackendError, match="backend 'flash_mla' is not used: it reads latents and rotated keys from one row"
    ):
        dsm.use_backend("flash_mla").__enter__()
    with pytest.raises(BackendError, match="backend 'humming' is not used: it reads weights in an order of its own"):
        dsm.use_backend("humming").__enter__()


def test_own_kernels_asked_for_by_name_try_nothing(monkeypatch, on_a_card):
    told = install(monkeypatch, {"liger-kernel": "0.8.5"}, liger_kernel__ops=LIGER)
    x, weight = torch.randn(3, 5, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    with use_backend("triton"):
        rms_norm(x, weight, 1e-6)
    assert told == []
    rms_norm(x, weight, 1e-6)
    assert told[0].startswith("RMSNorm torch.float32, 64, 16, True, True on cpu: Liger (liger-kernel 0.8.5): 1 µs")


@pytest.mark.parametrize("dtype", (torch.float32, BF16), ids=str)
def test_liger(monkeypatch, on_a_card, dtype):
    """Results and gradients, twice from one graph; nothing is written over."""
    told = install(monkeypatch, {"liger-kernel": "0.8.5"}, liger_kernel__ops=LIGER)
    leaves = [torch.randn(3, 5, 96, dtype=dtype, requires_grad=True) for _ in range(2)]
    leaves.append(torch.randn(96, dtype=dtype, requires_grad=True))
    kept = [leaf.detach().clone() for leaf in leaves]
    x, up, weight = leaves
    cases = [
        (rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), (x, weight)),
        (activation.activate(x, up), F.silu(x) * up, (x, up)),
    ]
    assert activation.unsuitable(x, up) is None and len(told) == 2
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == BF16 else {}
    for found, wanted, inputs in cases:
        torch.testing.assert_close(found, wanted, **tolerance)
        above = torch.randn_like(found)
        gradients = torch.autograd.grad(wanted, inputs, above)
        for _ in range(2):
            again = torch.autograd.grad(found, inputs, above, retain_graph=True)
            torch.testing.assert_close(again, gradients, **tolerance)
    assert all(torch.equal(leaf, other) for leaf, other in zip(leaves, kept, strict=True))


def test_norms_start_on_their_tensors_card(monkeypatch):
    """Triton starts a kernel on the current device."""
    held, called = [], []

    class Norm(LIGER["LigerRMSNormFunction"]):
        @staticmethod
        def forward(ctx, X, W, eps, offset, casting_mode, in_place):
            called.append(list(held))
            return LIGER["LigerRMSNormFunction"].forward(ctx, X, W, eps, offset, casting_mode, in_place)

        @staticmethod
        def backward(ctx, dY):
            called.append(list(held))
            return LIGER["LigerRMSNormFunction"].backward(ctx, dY)

    @contextlib.contextmanager
    def current(device):
        held.append(device)
        yield
        held.pop()

    install(monkeypatch, {"liger-kernel": "0.8.5"}, liger_kernel__ops={**LIGER, "LigerRMSNormFunction": Norm})
    monkeypatch.setattr(norm, "current", current)
    x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    norm.rms_norm(x, weight, 1e-6).sum().backward()
    assert called == [[torch.device("cpu")]] * 2 and not held


def test_liger_is_not_for_graphs_and_mixed_dtypes(monkeypatch, on_a_card):
    install(monkeypatch, {"liger-kernel": "0.8.5"}, liger_kernel__ops=LIGER)
    x, weight = torch.randn(3, 64, requires_grad=True), torch.ones(64, dtype=BF16)
    assert "takes activations in one of" in _liger.unsupported((), x, weight)
    assert rms_norm(x, weight, 1e-6).dtype == torch.float32
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "not called in graphs" in _liger.unsupported((), x)


def test_latents_are_read_where_they_lie(monkeypatch):
    told = install(monkeypatch, {"flash-attn-3": "3.0.0"}, flash_attn_interface=FLASH_3)
    buffers = [torch.full((2, 1, 90, size), torch.nan, dtype=BF16) for size in (512, 64)]
    for buffer in buffers:
        buffer[:, :, :77] = torch.randn_like(buffer[:, :, :77])
    c_kv, k_pe = (buffer[:, :, :77] for buffer in buffers)
    latent, q_pe = torch.randn(2, 5, 512).to(BF16), torch.randn(2, 5, 64).to(BF16)
    found = latents.attend(latent, q_pe, c_kv, k_pe, scaling=0.07)
    wanted = latents._defined(*[tensor.float() for tensor in (latent, q_pe, c_kv, k_pe)], scaling=0.07)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)

    def reason(card=90, masked=False, c_kv=c_kv):
        query = torch.empty(2, 5, 1, 128, dtype=BF16)
        return latents.unsuitable(card, query, c_kv, k_pe, masked, 0.07, lambda: None, lambda: None)

    assert reason() is None and "attention over latents torch.bfloat16, 5, 2, 128 on cpu" in told[0]
    assert "found a mask" in reason(masked=True)
    assert reason(card=100) == "is called on SM90, found SM100"
    assert "found torch.bfloat16, 256 and 64" in reason(c_kv=c_kv[..., :256])


@pytest.mark.parametrize("counts", [(0, 130, 1, 128), (0, 0, 0, 0), (5, 0, 0, 300)], ids=str)
def test_segments_of_experts(counts):
    """Any routing: nothing for an expert, a whole segment, slots that are served elsewhere."""
    slots, elsewhere = torch.randperm(sum(counts) + 7).int(), 7
    ends = torch.tensor(counts).cumsum(0).int()
    slots[sum(counts) :] = -(2**31)  # what is left over was never written
    found = grouped.segments(slots, ends)
    rows = len(found.owners)
    assert rows % 128 == 0 and len(found.rows) == len(slots) and found.owners.dtype == torch.int32
    begin, row = 0, 0
    for expert, count in enumerate(counts):
        whole = -(-count // 128) * 128
        assert (found.owners[row : row + whole] == expert).all()
        assert torch.equal(found.slots[row : row + count], slots[begin : begin + count].long())
        assert (found.slots[row + count : row + whole] == len(slots)).all()
        assert torch.equal(found.rows[slots[begin : begin + count].long()], torch.arange(row, row + count))
        begin, row = begin + count, row + whole
    assert (found.owners[row:] == -1).all() and row < rows and elsewhere == (found.rows == rows - 1).sum()


def test_grouped_products(monkeypatch):
    told = install(monkeypatch, GEMM, deep_gemm=DEEP_GEMM)
    x = torch.randn(4, 128).to(BF16)
    assert grouped.unsuitable(x, (256, 128, 1024), lambda: None, lambda: None) is None
    assert told[0].startswith(
        "FP8 experts torch.bfloat16, 256, 128, 1024 on cpu: DeepGEMM (sgl-deep-gemm 0.2.5): 1 µs"
    )
