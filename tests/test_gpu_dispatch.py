"""Which backend a card gets, and what is said where it gets none: decided here, without any card."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu.libraries import EVERY, install
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from modeling_deepseek_moe.formats import by_name
from modeling_deepseek_moe.ops import _libraries, _trials, _triton, _triton_table
from modeling_deepseek_moe.ops._dispatch import LIBRARIES, UNUSED, BackendError, use_backend
from modeling_deepseek_moe.ops.experts import (
    Operands,
    grouped,
    may_run_natively,
    routed_quantized,
    routed_swiglu,
    runs_on_card,
    triton,
)
from modeling_deepseek_moe.quantized.experts import QuantizedMatrix

CARDS = (75, 80, 86, 89, 90, 120)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    _trials.forget()


@pytest.fixture
def card(monkeypatch):
    """Makes this machine one with Triton and a card of some generation."""

    def become(generation: int, triton: bool = True):
        monkeypatch.setattr(_triton, "_unusable", lambda: None if triton else "triton is not installed")
        monkeypatch.setattr(_triton, "_cannot_start", lambda index: None)
        monkeypatch.setattr(_triton, "_capability", lambda index: generation)

    return become


@pytest.mark.parametrize("generation", CARDS)
def test_cards_that_are_too_old_are_named(card, generation):
    card(generation)
    assert _triton.refusal(CUDA) == ("needs SM80, found SM75" if generation < 80 else None)
    fp8 = _triton.refusal(CUDA, _triton.FP8_CORES)
    assert fp8 == (f"needs SM89, found SM{generation}" if generation < 89 else None)


TRIED = {
    75: (),
    80: ("liger",),
    86: ("liger",),
    89: ("liger",),
    90: ("deep_gemm", "liger", "flash_attention_3", "flash_attention_4"),
    100: ("liger", "flash_attention_4"),
    120: ("liger",),
}


@pytest.mark.parametrize("generation", TRIED)
def test_libraries_that_a_card_may_get(monkeypatch, generation):
    """Of all that are installed, the ones that this package has a call for; faster they must be besides."""
    install(monkeypatch, EVERY)
    found = {library: _libraries.refusal(library, generation) for library in _libraries.LIBRARIES}
    assert tuple(library for library, reason in found.items() if reason is None) == TRIED[generation]
    assert found["flash_mla"].startswith("reads latents and rotated keys from one row")
    assert found["humming"].startswith("reads weights in an order of its own")
    assert {library for library in found if library not in UNUSED} == set(LIBRARIES)


def test_the_log_says_what_computes_and_what_lies_idle(card, monkeypatch, caplog):
    install(
        monkeypatch, {"triton": "3.7.1", "sgl-flash-mla": "1.0.0", "flash-attn-4": "4.0.0b36", "liger-kernel": "0.8.5"}
    )
    card(89)
    with caplog.at_level("INFO", logger="modeling_deepseek_moe"):
        for _ in range(2):
            assert _triton.refusal(CUDA) is None
    assert caplog.messages == [
        "cuda:0 (SM89): this package's kernels, by triton 3.7.1, and torch's; tried at first use: liger-kernel 0.8.5 (norms and "
        "SwiGLU with gradients); installed and not used: flash-attn-4 4.0.0b36 (is called on SM90 to SM119, found SM89), "
        "sgl-flash-mla 1.0.0 (reads latents and rotated keys from one row, in pages of 64 tokens; caches here hold them apart)"
    ]


def test_other_devices_and_missing_triton_are_named(card):
    card(90, triton=False)
    assert _triton.refusal(torch.device("cpu")) == "needs CUDA, got cpu"
    assert _triton.refusal(CUDA) == "triton is not installed"


@pytest.mark.parametrize("kernel", _triton_table.TABLE)
def test_every_card_has_tiles(kernel):
    for generation in CARDS[1:]:
        tiles = _triton_table.tiles(kernel, generation)
        assert (
            tiles == _triton_table.TABLE[kernel][max(key for key in _triton_table.TABLE[kernel] if key <= generation)]
        )
        assert not any(side & (side - 1) for side in (tiles.rows, tiles.columns, tiles.depth, tiles.warps))


E, I, D, T, K = 4, 64, 128, 3, 2  # noqa: E741
FORMATS = ("bf16", "fp8", "int4", "mxfp4", "nf4", "fp4")


def on_card(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    """A tensor of a card, without values."""
    with FakeTensorMode() as mode:
        return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), CUDA)


def layer(name: str, width: int = I, size: int = D) -> tuple[SimpleNamespace, Operands]:
    """Experts of a format on a card."""
    module = SimpleNamespace(act_fn=torch.nn.SiLU())
    if name == "bf16":
        stacks = on_card(E, 2 * width, size), on_card(E, size, width), None, None
        return module, Operands(stacks, None, width, torch.bfloat16)
    row = by_name(name)
    shapes = [(2 * width, size), (size, width)]
    stacks = [on_card(E, *row.code_shape(shape), dtype=row.code_dtype) for shape in shapes]
    stacks += [on_card(E, *row.scale_shape(shape), dtype=row.scale_dtype) for shape in shapes]
    return module, Operands(tuple(stacks), None, width, row.code_dtype, row.kernel if row.bits == 4 else None)


def refusal(module, weights, x=None, topk_weights=None, with_gradients=False) -> str | None:
    x, topk_weights = on_card(T, D) if x is None else x, on_card(T, K) if topk_weights is None else topk_weights
    return triton.refuses(module, weights, x, topk_weights, with_gradients)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("generation", CARDS)
def test_experts_of_every_format_run_from_ampere_on(card, generation, name):
    card(generation)
    reason = refusal(*layer(name))
    assert reason == ("needs SM80, found SM75" if generation == 75 else None)
    assert runs_on_card(reason) == (reason is None)
    with use_backend("cpu"):
        assert not runs_on_card(reason)


def test_experts_say_what_they_cannot(card):
    card(90)
    module, weights = layer("fp8")
    assert "takes activations in torch.bfloat16" in refusal(module, weights, on_card(T, D, dtype=torch.float16))
    assert "mapped from files" in refusal(module, weights._replace(stacks=()))
    assert refusal(module, weights._replace(kind="nf4_nested")) == "has no kernels for experts in nf4_nested"
    assert "with their scales" in refusal(module, weights._replace(stacks=(*weights.stacks[:3], None)))
    assert "whole groups of 4" in refusal(*layer("fp8", width=66))
    assert "found ReLU" in refusal(SimpleNamespace(act_fn=torch.nn.ReLU()), weights)
    assert refusal(module, weights, topk_weights=on_card(T, K).requires_grad_()) == "computes no gradients"
    strided = on_card(E, D, 2 * I).mT
    assert "contiguous" in refusal(
        *layer("bf16")[:1], layer("bf16")[1]._replace(stacks=(strided, on_card(E, D, I), None, None))
    )


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_of_experts_are_for_who_sees_to_them(card, name):
    card(80)
    x = on_card(T, D).requires_grad_()
    assert refusal(*layer(name), x, with_gradients=True) is None
    assert refusal(*layer(name), x) == "computes no gradients"


class Apart(torch.nn.Module):
    """Experts with gate and up apart, as bitsandbytes' are, on a card."""

    def __init__(self, name: str, width: int = I):
        super().__init__()
        self.act_fn, self.weight_format, self.nested = torch.nn.SiLU(), by_name(name), False
        self.matrix_shapes, self.rows = ((width, D // 2),), {"gate": (width, D), "up": (width, D), "down": (D, width)}

    def addresses(self):
        return None

    def stacked(self):
        row = self.weight_format
        return {
            name: QuantizedMatrix(
                on_card(E, *row.code_shape(shape), dtype=row.code_dtype),
                on_card(E, *row.scale_shape(shape), dtype=row.scale_dtype),
            )
            for name, shape in self.rows.items()
        }


def test_experts_with_gate_and_up_apart_run(card):
    x, topk_weights = on_card(T, D), on_card(T, K)
    card(80)
    assert grouped.refuses(Apart("nf4"), x, topk_weights) is None
    assert grouped.refuses(Apart("nf4"), x.requires_grad_(), topk_weights) is None
    assert "whole groups of 64" in grouped.refuses(Apart("nf4", width=96), x, topk_weights)
    assert "torch.bfloat16" in grouped.refuses(Apart("nf4"), on_card(T, D, dtype=torch.float32), topk_weights)
    other = Apart("nf4")
    other.weight_format = replace(other.weight_format, kernel=None)  # a block goes on in the next row
    assert "found nf4 rows of other lengths" in grouped.refuses(other, x, topk_weights)
    card(80, triton=False)
    assert grouped.refuses(Apart("nf4"), x, topk_weights) == "triton is not installed"


@pytest.mark.parametrize("generation", CARDS[1:])
def test_many_bf16_rows_are_torchs_where_it_has_kernels(card, generation):
    card(generation)
    _, weights = layer("bf16")
    assert triton.torch_is_faster(weights, on_card(T, D), 1000) == (generation == 90)
    assert not triton.torch_is_faster(weights, on_card(T, D), 8)
    assert not triton.torch_is_faster(layer("fp8")[1], on_card(T, D), 1000)


def test_nan_codes_are_found_once(card, monkeypatch):
    codes = torch.zeros((2, 4, 8), dtype=torch.uint8)
    module = SimpleNamespace()
    weights = Operands((codes.view(torch.float8_e4m3fn),) * 2, None, 8, torch.float8_e4m3fn)
    assert triton._refuses_nan(module, weights) is None
    with monkeypatch.context() as once:
        once.setattr(triton, "has_nan", None)
        assert triton._refuses_nan(module, weights) is None
    codes[1, 2, 3] = 0xFF
    assert "found NaN" in triton._refuses_nan(module, weights)
    with torch.inference_mode():  # whose tensors count no versions
        weights = weights._replace(stacks=(codes.clone().view(torch.float8_e4m3fn),) * 2)
        assert "found NaN" in triton._refuses_nan(module, weights)


def test_the_cpu_engine_is_not_for_tokens_on_a_card(card):
    card(90)
    module, weights = layer("bf16")
    with (
        use_backend("cpu"),
        pytest.raises(BackendError, match="routed experts: backend 'cpu' needs CPU tensors, found cuda:0"),
    ):
        may_run_natively(module, weights, on_card(T, D), on_card(T, K))


@pytest.mark.parametrize("function", [routed_swiglu, routed_quantized])
def test_on_a_cpu_the_reason_is_named(function):
    x, indices, weights = torch.randn(T, D).bfloat16(), torch.zeros((T, K), dtype=torch.int64), torch.ones((T, K))
    module = torch.nn.Module()
    module.act_fn, module.num_experts = torch.nn.SiLU(), E
    for name, shape in (("gate_up_proj", (E, 2 * I, D)), ("down_proj", (E, D, I))):
        module.register_parameter(name, torch.nn.Parameter(torch.randn(shape).bfloat16(), requires_grad=False))
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="routed experts: backend 'triton' needs CUDA, got cpu"),
    ):
        function(module, x, indices, weights)
