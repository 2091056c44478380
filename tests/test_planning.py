"""Planning from figures of machines: verdicts, limits, advice."""

import pytest

from modeling_deepseek_moe import DeepseekV3Config, Machine, make_plan, parameter_breakdown, planning
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.machine import Bandwidth, Gpu, measure_disk, measure_read_bandwidth
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.planning import DISK_EFFICIENCY, FROM_DISK, IN_MEMORY, MEMORY_EFFICIENCY, TOO_LARGE


@pytest.fixture(scope="module")
def v3():
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return parameter_breakdown(DeepseekV3Config(quantization_config=quantization))


class TestPlanning:
    """The verdicts, on machines made up for them. DeepSeek-V3: 689 GB as FP8, 18.9 GB of it not experts or MTP."""

    def machine(self, gigabytes, gpus=()):
        bandwidth = Bandwidth(400e9, 10**9, 3)
        gpus = tuple(Gpu("GPU", free * 10**9, free * 10**9) for free in gpus)
        return Machine(gigabytes * 10**9, gigabytes * 10**9, 64, bandwidth, gpus, bandwidth if gpus else None)

    @pytest.mark.parametrize(
        "gigabytes, fp8, bf16",
        [
            (1400, IN_MEMORY, IN_MEMORY),
            (768, IN_MEMORY, TOO_LARGE),
            (64, FROM_DISK, TOO_LARGE),
            (16, TOO_LARGE, TOO_LARGE),
        ],
    )
    def test_verdicts(self, v3, gigabytes, fp8, bf16):
        plan = make_plan(v3, self.machine(gigabytes), 4096)
        assert [option.verdict for option in plan.options] == [fp8, bf16]
        assert plan.verdict == fp8

    def test_limit_counts_active_weights_and_the_cache(self, v3):
        short, long = (make_plan(v3, self.machine(768), context).options[0] for context in (1, 100_000))
        assert long.read_bytes_per_token - short.read_bytes_per_token == 70_272 * 99_999
        assert short.read_bytes_per_token == pytest.approx(37.7e9, rel=0.01)
        assert short.tokens_per_second_limit == pytest.approx(400 / 37.7, rel=0.01)

    def test_what_is_not_in_memory_comes_from_disk(self, v3):
        little, more = (make_plan(v3, self.machine(gigabytes), 4096).options[0] for gigabytes in (32, 512))
        routed = v3.active["routed experts"].nbytes(FP8)
        assert 0 < more.disk_bytes_per_token < little.disk_bytes_per_token < routed
        assert "GB are read per token" in " ".join(make_plan(v3, self.machine(32), 4096).advice)

    def test_more_memory_means_fewer_reads_and_more_tokens(self, v3):
        budgets = make_plan(v3, self.machine(64), 4096, disk=2e9).budgets
        assert budgets[0].memory_bytes == 64 * 10**9 and budgets[-1].hit_share == 1
        assert [b.disk_bytes_per_token for b in budgets] == sorted(
            (b.disk_bytes_per_token for b in budgets), reverse=True
        )
        assert [b.tokens_per_second for b in budgets] == sorted(b.tokens_per_second for b in budgets)
        first = budgets[0]
        assert first.tokens_per_second == pytest.approx(2e9 * DISK_EFFICIENCY / first.disk_bytes_per_token)
        faster = make_plan(v3, self.machine(64), 4096, disk=8e9).budgets[0]
        assert faster.tokens_per_second == pytest.approx(4 * first.tokens_per_second)
        assert not make_plan(v3, self.machine(768), 4096).budgets

    def test_what_is_expected_is_less_than_the_limit(self, v3):
        option = make_plan(v3, self.machine(768), 4096).options[0]
        assert option.tokens_per_second == pytest.approx(MEMORY_EFFICIENCY * option.tokens_per_second_limit)
        assert make_plan(v3, self.machine(64, gpus=[141] * 8), 4096).options[0].tokens_per_second is None

    def test_without_an_engine_the_advice_says_so(self, v3, monkeypatch):
        assert not any("engine" in line for line in make_plan(v3, self.machine(768), 4096).advice) or _native.missing()
        monkeypatch.setattr(planning._native, "missing", lambda: "was not built: install gcc")
        assert any("was not built: install gcc" in line for line in make_plan(v3, self.machine(768), 4096).advice)

    def test_a_disk_of_no_speed(self, v3):
        with pytest.raises(ValueError, match="disk speed"):
            make_plan(v3, self.machine(64), 4096, disk=-1)

    def test_the_disk_is_read_past_the_page_cache_or_not_at_all(self, tmp_path):
        assert measure_disk(tmp_path) is None
        (tmp_path / "model.safetensors").write_bytes(bytes(40 << 20))
        found = measure_disk(tmp_path, seconds=0.05)
        assert found is None or (found.passes >= 3 and found.bytes_per_second > 1e6)

    def test_gpus_come_first_and_together(self, v3):
        plan = make_plan(v3, self.machine(64, gpus=[141] * 8), 4096)
        assert [option.device for option in plan.options] == ["cuda", "cuda", "cpu", "cpu"]
        assert plan.options[0].verdict == IN_MEMORY
        assert "on the GPU with fp8" in plan.advice[0]

    def test_zero_context(self, v3):
        with pytest.raises(ValueError, match="context=0"):
            make_plan(v3, self.machine(64), 0)

    def test_the_measurement_reads_memory(self):
        bandwidth = measure_read_bandwidth(64 << 20, seconds=0.05)
        assert bandwidth.buffer_bytes == 64 << 20 and bandwidth.passes >= 3
        assert 1e8 < bandwidth.bytes_per_second < 1e13
