"""The CPU engine under torch.compile: its operators as torch wants them, layers and whole models in one graph."""

import pytest
import torch
from engine_calls import differing, every_call, run
from engine_cases import BACKENDS, needs_engine, random_fp8
from releases import SHAPES, same_bits, write_release
from transformers import AutoModelForCausalLM, StaticCache

from modeling_deepseek_moe import CheckpointError, use_backend
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts

pytestmark = [needs_engine, pytest.mark.tools]

COMPILERS = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
KEPT = []
CALLS = every_call(3, 150, 130, kept=KEPT)


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, compiler):
    return torch.compile(module, fullgraph=True, backend=compiler)


def test_every_operator_is_called():
    """By what runs over `every_call`: those that a CPU has."""
    operators = {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name[:13] == "deepseek_moe:" and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
    called = {function.operator._schema.name.partition("::")[2] for function, _ in CALLS.values()}
    assert called == operators, f"add calls of {operators - called} to engine_calls.every_call"


@pytest.mark.parametrize(
    "name", [name if name.endswith("bfloat16") else pytest.param(name, marks=pytest.mark.long) for name in CALLS]
)
def test_operator(name):
    """Shapes, dtypes and strides are foretold, for strided activations too; nothing is written to or shared."""
    function, arguments = CALLS[name]
    first = arguments[0].mT.contiguous().mT
    for given in (arguments, (first, *arguments[1:])):
        # test_schema multiplies tensors, which torch cannot do in FP8: the same is looked at below
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        found = torch.library.opcheck(function.operator, given, test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}
        tensors = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        results = run({"": (function, given)})[""]
        assert all(torch.equal(after.float(), tensor.float()) for after, tensor in zip(tensors, before, strict=True))
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        assert not storages & {result.untyped_storage().data_ptr() for result in results if result.numel()}


@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith("bfloat16")])
def test_calls_are_the_operators(name):
    """A function of an operator gives its bits, whether it goes through torch's dispatcher or not."""
    function, arguments = CALLS[name]
    found = run({"": (function, arguments)})
    assert not differing(run({"": (function.operator, arguments)}), found)


def test_who_looks_on_sees_operators():
    """A profiler, a dispatch mode and a tracer do; names are as the operator has them."""
    function, arguments = CALLS["fp8-linear-bfloat16"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*arguments)
    assert "deepseek_moe::fp8_linear" in {event.key for event in profile.key_averages()}
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(operator)
            return operator(*args, **(kwargs or {}))

    with Mode():
        function(*arguments)
    assert function.operator in seen
    x, codes, scale, bias = arguments
    traced = torch.jit.trace(lambda x: function(x, codes, scale, bias), (x,), check_trace=False)
    assert torch.equal(traced(x * 2), function(x * 2, codes, scale, bias))
    assert function.operator(x=x, weight=codes, scale_inv=scale, bias=bias).equal(
        function(x=x, weight=codes, scale_inv=scale, bias=bias)
    )


def test_tensors_without_addresses_are_the_dispatchers():
    """On another device, or of a subclass, whichever argument it is: C would read at address zero."""
    function, (x, codes, scale, bias) = CALLS["fp8-linear-bfloat16"]
    elsewhere = [tensor.to("meta") for tensor in (x, codes, scale, bias)]
    assert function(*elsewhere).is_meta

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
            raise NotImplementedError(f"saw {operator}")

    def without_storage(tensor):
        return torch.Tensor._make_wrapper_subclass(Subclass, tensor.shape, dtype=tensor.dtype)

    for place in range(4):
        given = [x, codes, scale, bias]
        given[place] = without_storage(given[place])
        with pytest.raises(NotImplementedError, match=r"saw deepseek_moe\.fp8_linear"):
            function(*given)


def test_operators_refuse_while_they_are_traced():
    """A call that does not fit is an error, whoever makes it."""
    function, (x, codes, scale, _) = CALLS["fp8-linear-float32"]
    with pytest.raises((ValueError, RuntimeError), match="wanted"):
        torch.compile(lambda x: function(x, codes, scale, None), backend="eager")(x[:, :100])


class Layers(torch.nn.Module):
    """An FP8 layer between norms."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.norm, self.linear = DeepseekRMSNorm(150), QuantizedLinear(150, 130, False, FP8)
        self.linear.weight.data, self.linear.weight_scale_inv.data = random_fp8((130, 150))
        self.last = DeepseekRMSNorm(130)
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        return self.last(self.linear(self.norm(x)))


@COMPILERS
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)], ids=["bf16", "fp32"]
)
def test_layers(dtype, compiler):
    layers = Layers(dtype)
    for backend in (*BACKENDS[:1], *BACKENDS[-1:]):
        torch._dynamo.reset()
        with use_backend(backend), torch.no_grad():
            run_compiled = compiled(layers, compiler)
            for tokens in (1, 3, 20):
                x = torch.randn(tokens, 150).to(dtype)
                assert same_bits(run_compiled(x), layers(x))


def test_gradients():
    """Of an FP8 layer's input, through a compiled forward and backward pass."""
    layer = Layers(torch.float32).linear
    x, dy = torch.randn(3, 150), torch.randn(3, 130)
    grads = []
    for call in (layer, compiled(layer, "aot_eager")):
        given = x.clone().requires_grad_()
        call(given).backward(dy)
        grads.append(given.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def model(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3"](), fp8=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype="bfloat16").eval()
    assert any(isinstance(module, MappedExperts) for module in model.modules())
    return model


def close(found, wanted, compiler):
    # inductor fuses what is between the operators, and leaves out roundings to bf16 there
    if compiler == "inductor":
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
    else:
        assert same_bits(found, wanted)


@COMPILERS
@torch.no_grad()
@pytest.mark.slow
def test_model(model, compiler):
    """A prompt in one graph, mapped experts included, of a model that has not run before; then one for every step."""
    ids = torch.arange(20, 32)[None]

    def logits(call):
        cache = StaticCache(config=model.config, max_cache_len=16)
        found = [call(ids[:, :6], cache=cache).logits[:, -1]]
        for i in range(6, 12):
            position = torch.tensor([[i]])
            found.append(call(ids[:, i : i + 1], position_ids=position, cache=cache).logits[:, -1])
        return torch.cat(found)

    found = logits(compiled(model, compiler))
    close(found, logits(model), compiler)


@pytest.mark.long
@torch.no_grad()
def test_files_are_looked_at_when_nothing_is_compiled(model, monkeypatch):
    """A compiled graph cannot look; eager code next to it does, and names the file."""
    ids = torch.arange(9)[None]
    call = compiled(model, "aot_eager")
    wanted = call(ids, use_cache=False).logits
    monkeypatch.setattr(MappedExperts, "check_seconds", 0.0)
    experts = next(module for module in model.modules() if isinstance(module, MappedExperts))
    file = experts.infos(0)["gate_proj"].file
    with file.open("ab") as stream:
        stream.write(b"more")
    assert same_bits(call(ids, use_cache=False).logits, wanted)
    with pytest.raises(CheckpointError, match=str(file)):
        model(ids, use_cache=False)


def test_results_of_every_operator():
    """One graph that holds them all gives the bits of calls one by one."""

    def everything():
        return {name: function(*arguments) for name, (function, arguments) in CALLS.items()}

    with torch.no_grad():
        found = torch.compile(everything, fullgraph=True, backend="aot_eager")()
    found = {name: list(parts) if isinstance(parts, tuple) else [parts] for name, parts in found.items()}
    assert not differing(found, run(CALLS))
