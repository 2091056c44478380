"""FP8 training: the products against fp64 and against their definition, what is swapped, cached and kept; a training."""

import copy

import pytest
import torch
from releases import SHAPES
from training_harness import Padded, Record, arguments
from transformers import AutoModelForCausalLM, Trainer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.moe.training_state import TrainingState
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.training.fp8 import Fp8TrainedExperts, Fp8TrainedLinear, Fp8TrainedMLP
from modeling_deepseek_moe.training.fp8_functions import Fp8LinearFunction, Fp8SwiGluFunction, Fp8Weight, Kept, wgrad

SIZES = [
    pytest.param(256, 256, 512, id="even"),
    pytest.param(100, 72, 200, id="ragged"),
    pytest.param(1, 8, 8, id="one"),
]


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def outliers(rows, cols):
    """Activations with a channel that is much larger than the others, in bf16."""
    x = torch.randn(rows, cols)
    x[:, cols // 3] *= 50
    return x.bfloat16()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiles_by_definition(power_of_two):
    x = outliers(5, 300)
    x[2, 128:256] = 0
    codes, scale = block_fp8.quantize_tiles(x, power_of_two)
    for row in range(5):
        for tile in range(3):
            part = x[row, 128 * tile : 128 * (tile + 1)].double()
            wanted = part.abs().max() / 448 if part.any() else torch.tensor(1.0, dtype=torch.float64)
            if power_of_two:
                wanted = 2.0 ** wanted.log2().ceil()
            assert scale[row, tile].double() == pytest.approx(wanted.item(), rel=1e-6)
            values = (part.float() / scale[row, tile]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(codes[row, 128 * tile : 128 * (tile + 1)].float(), values.float())
    again = block_fp8.dequantize_tiles(codes, scale, torch.float32)
    assert relative(again, x) < 0.04


def test_power_of_two_scales_survive_cutting_anew():
    """1 × 128 to 128 × 1 changes nearly every value with free scales, and next to none with powers of two."""
    x = torch.randn(256, 256) * torch.randn(256, 1).exp()
    changed = {}
    for power_of_two in (False, True):
        values = block_fp8.dequantize_tiles(*block_fp8.quantize_tiles(x, power_of_two), torch.float32)
        across = block_fp8.quantize_tiles(values.T.contiguous(), power_of_two)
        again = block_fp8.dequantize_tiles(*across, torch.float32).T
        changed[power_of_two] = (again != values).float().mean().item()
    assert changed[False] > 0.9
    assert changed[True] < 0.01


def test_nan_and_infinity_are_seen():
    x = torch.randn(2, 256)
    x[0, 3], x[1, 200] = torch.nan, torch.inf
    values = block_fp8.dequantize_tiles(*block_fp8.quantize_tiles(x), torch.float32)
    assert values[0, 3].isnan()
    assert not values[1, 200].isfinite()
    assert values[0, 128:].isfinite().all()


@pytest.mark.parametrize("m, n, k", SIZES)
def test_gemm_promotes_every_128(m, n, k):
    a, b = torch.randn(m, k), torch.randn(n, k)
    (a_codes, a_scale), (b_codes, b_scale) = block_fp8.quantize_tiles(a), block_fp8.quantize_tiles(b)
    found = block_fp8.gemm(a_codes, a_scale, b_codes, b_scale)
    wanted = torch.zeros(m, n)
    for tile in range(a_scale.shape[1]):
        part = slice(128 * tile, 128 * (tile + 1))
        partial = a_codes[:, part].float() @ b_codes[:, part].float().T
        wanted += partial * a_scale[:, tile, None] * b_scale[None, :, tile]
    assert relative(found, wanted) < 1e-6
    exact = block_fp8.dequantize_tiles(a_codes, a_scale, torch.float64)
    exact = exact @ block_fp8.dequantize_tiles(b_codes, b_scale, torch.float64).T
    assert relative(found, exact) < 1e-6


def test_gemm_refuses_other_shapes():
    codes, scale = block_fp8.quantize_tiles(torch.randn(4, 200))
    with pytest.raises(ValueError, match=r"A is .* with scales \[4, 1\], wanted .* with scales \[4, 2\]"):
        block_fp8.gemm(codes, scale[:, :1], codes, scale)
    with pytest.raises(ValueError, match="K of 200 and 100"):
        block_fp8.gemm(codes, scale, *block_fp8.quantize_tiles(torch.randn(4, 100)))


@pytest.mark.parametrize("fp8_wgrad", [True, False], ids=["fp8-wgrad", "bf16-wgrad"])
@pytest.mark.parametrize("m, n, k", SIZES[:2])
def test_linear_error_against_fp64(m, n, k, fp8_wgrad):
    x, w, dy = outliers(m, k).requires_grad_(), (torch.randn(n, k) * 0.02).requires_grad_(), torch.randn(m, n) * 1e-6
    y = Fp8LinearFunction.apply(x, w, Fp8Weight.of(w), fp8_wgrad)
    y.backward(dy.bfloat16())
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = [t.detach().double() for t in (x, w, dy.bfloat16())]
    assert relative(y, exact[0] @ exact[1].T) < 0.045
    assert relative(x.grad, exact[2] @ exact[1]) < 0.045
    assert relative(w.grad, exact[2].T @ exact[0]) < (0.06 if fp8_wgrad else 1e-3)


def test_wgrad_is_of_the_kept_codes():
    """What is kept is FP8, cut again: not the activation itself."""
    x, dy = outliers(200, 256), torch.randn(200, 128)
    kept = Kept.of(x, True)
    assert kept.saved()[2] is None
    assert kept.codes.dtype == torch.float8_e4m3fn
    found = wgrad(dy, kept.values(torch.float32), True)
    values = block_fp8.dequantize_tiles(kept.codes, kept.scale, torch.float32)
    across = block_fp8.dequantize_tiles(*block_fp8.quantize_tiles(values.T.contiguous(), True), torch.float64)
    dy_values = block_fp8.dequantize_tiles(*block_fp8.quantize_tiles(dy.T.contiguous()), torch.float64)
    assert relative(found, dy_values @ across.T) < 1e-6


@pytest.mark.parametrize("fp8_wgrad", [True, False], ids=["fp8-wgrad", "bf16-wgrad"])
def test_swiglu_gradients_against_fp64(fp8_wgrad):
    experts, width, dim, counts = 3, 72, 160, [40, 0, 25]
    gate_up = (torch.randn(experts, 2 * width, dim) * 0.1).requires_grad_()
    down = (torch.randn(experts, dim, width) * 0.1).requires_grad_()
    x = torch.randn(65, dim, requires_grad=True)
    quantized = [(*map(Fp8Weight.of, g.chunk(2)), Fp8Weight.of(d)) for g, d in zip(gate_up, down, strict=True)]
    y = Fp8SwiGluFunction.apply(x, gate_up, down, quantized, counts, fp8_wgrad)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = [t.detach().double().requires_grad_() for t in (x, gate_up, down)]
    parts = []
    for expert, rows in enumerate(exact[0].split(counts)):
        gate, up = (rows @ exact[1][expert].T).chunk(2, dim=1)
        parts.append((torch.nn.functional.silu(gate) * up) @ exact[2][expert].T)
    wanted = torch.cat(parts)
    wanted.backward(dy.double())
    assert relative(y, wanted) < 0.08
    for found, right in zip((x, gate_up, down), exact, strict=True):
        assert relative(found.grad, right.grad) < 0.1
    assert not gate_up.grad[1].any()


def make(kind="v3-mtp", fp8=None, **fields):
    config = SHAPES[kind]()
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return model if fp8 is None else dsm.prepare_fp8_training(model, fp8)


def test_what_is_swapped():
    model, plain = make(fp8=dsm.Fp8TrainingConfig()), make()
    kinds = {name: type(module) for name, module in model.named_modules()}
    kept = {name for name, kind in kinds.items() if kind is torch.nn.Linear}
    assert kept == {"lm_head", "model.layers.3.eh_proj", "model.layers.3.shared_head.head"}
    swapped = {name for name, kind in kinds.items() if kind is Fp8TrainedLinear}
    linears = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert swapped == linears - kept
    assert sum(kind is Fp8TrainedExperts for kind in kinds.values()) == 3
    assert sum(kind is Fp8TrainedMLP for kind in kinds.values()) == 4
    assert {n: (p.dtype, p.shape) for n, p in model.named_parameters()} == {
        n: (p.dtype, p.shape) for n, p in plain.named_parameters()
    }


@pytest.mark.parametrize("kind", list(SHAPES))
def test_logits_are_near(kind):
    ids = torch.randint(3, 128, (2, 24))
    model, plain = make(kind, dsm.Fp8TrainingConfig()), make(kind)
    with torch.no_grad():
        found, wanted = model(ids).logits, plain(ids).logits
    assert (
        0 < relative(found, wanted) < (0.6 if kind == "v2" else 0.35)
    )  # some tokens go to other experts, in V2 with 16 times the weight


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant):
    ids = torch.randint(3, 128, (2, 24))
    gradients = []
    for checkpointing in (False, True):
        model = make(fp8=dsm.Fp8TrainingConfig()).train()
        model.model.training_state = TrainingState()  # counted layers must be the same in both runs
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_weights_are_quantised_once_a_step(monkeypatch):
    model = make(fp8=dsm.Fp8TrainingConfig()).train()
    made = []
    of = Fp8Weight.of.__func__
    monkeypatch.setattr(Fp8Weight, "of", classmethod(lambda cls, weight: made.append(weight) or of(cls, weight)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(3, 128, (2, 24))
    per_step = []
    for _ in range(2):
        for _ in range(3):  # micro-batches
            model(ids, labels=ids).loss.backward()
        per_step.append(len(made))
        optimizer.step()
    matrices = 5 * 3 + 3 + 2 * 3 + 2 * 16 * 3  # attention, dense, shared and routed, without the MTP layer
    assert per_step == [matrices, 2 * matrices]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model(ids)
    assert len(made) == 3 * matrices
    copy.deepcopy(model)(ids)
    assert len(made) == 4 * matrices


def test_writes_past_the_version_counter_are_seen():
    """As optimizers of other libraries write."""
    linear = make(fp8=dsm.Fp8TrainingConfig()).model.layers[0].mlp.up_proj

    class Hidden(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.mul_(2)

    optimizer = Hidden([linear.weight], lr=0.1)
    x = torch.randn(3, 64)
    before = linear(x)
    linear.weight.grad = torch.zeros_like(linear.weight)
    optimizer.step()
    torch.testing.assert_close(linear(x), 2 * before)


def run(folder, fp8, steps=24, **settings):
    model, record = make(fp8=fp8, hidden_size=128, moe_intermediate_size=128), Record()
    settings = arguments(folder, max_steps=steps, per_device_train_batch_size=8, bf16=True, **settings)
    callbacks = [dsm.LoadBalanceCallback(), dsm.MtpLossCallback(), dsm.MoeTelemetryCallback(), record]
    Trainer(model, settings, train_dataset=Padded(), callbacks=callbacks).train()
    return model, [logs["lm_loss"] for logs in record.logs]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("plain"), None)[1]


@pytest.mark.parametrize("fp8_wgrad", [True, False], ids=["fp8-wgrad", "bf16-wgrad"])
@pytest.mark.slow
def test_trains_like_bf16(tmp_path, plain, fp8_wgrad):
    model, found = run(tmp_path, dsm.Fp8TrainingConfig(fp8_wgrad))
    assert found[-1] < 0.5 * found[0]
    # while the loss falls from 5.5 to 0.5: there bf16, or FP8, with attention summed in another order parts by up to 1.5 %
    assert sum(found[:10]) == pytest.approx(sum(plain[:10]), rel=0.03)
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.float32
    model.save_pretrained(tmp_path / "out", quantize="fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = Padded()[0]["input_ids"][None]
    with torch.no_grad():
        assert relative(again(ids).logits, model.eval()(ids).logits) < 0.2


def test_adapters_train_on_fp8(tmp_path):
    peft = pytest.importorskip("peft")
    model = make(fp8=dsm.Fp8TrainingConfig())
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    settings = arguments(tmp_path, max_steps=20, learning_rate=3e-2, per_device_train_batch_size=8)
    trainer = Trainer(wrapped, settings, train_dataset=Padded())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_what_cannot_train_in_fp8_is_refused():
    with pytest.raises(ValueError, match="found hidden_act='gelu', wanted 'silu'"):
        make(fp8=dsm.Fp8TrainingConfig(), hidden_act="gelu")
    model = make()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"FP8 codes in 0\.mlp\.up_proj\.weight"):
        dsm.prepare_fp8_training(model)
