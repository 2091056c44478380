"""Two versions of transformers: the cache under both names, and what is said of a third version."""

import inspect
import warnings

import pytest
import torch
import transformers
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, DynamicCache

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import compat


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, SHAPES["v3"](), fp8=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_running_version_is_one_that_is_tested():
    version = ".".join(transformers.__version__.split(".")[:2])
    assert version in compat.TESTED
    plain = inspect.signature(transformers.DeepseekV3ForCausalLM.forward).parameters
    assert (
        compat.CACHE_NAME in plain
        and compat.CACHE_NAME in inspect.signature(dsm.DeepseekV3ForCausalLM.forward).parameters
    )


@pytest.mark.parametrize("version", [*(f"{version}.7" for version in compat.TESTED), "5.25.0", "5.22.3", "6.0.0.dev0"])
def test_another_version_is_named_in_one_line(version, monkeypatch):
    said = []
    monkeypatch.setattr(compat.logger, "warning", said.append)
    compat.warn_untested(version)
    if version.endswith(".7"):
        assert not said
    else:
        (line,) = said
        assert version in line and all(tested in line for tested in compat.TESTED) and "\n" not in line


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("part", ["model", "head"])
@torch.no_grad()
def test_both_names_of_the_cache_reach_it(model, part, name):
    """A name that is swallowed would give the second token no past, and no error."""
    call = model if part == "head" else model.model
    ids = torch.arange(5, 15)[None]
    wanted = call(ids, use_cache=False)[0][:, -1]
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        call(ids[:, :9], **{name: cache})
        out = call(ids[:, 9:], **{name: cache})
    assert cache.get_seq_length() == 10 and getattr(out, compat.CACHE_NAME) is cache
    torch.testing.assert_close(out[0][:, -1], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_old_name_is_as_deprecated_as_it_is_in_transformers(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.arange(5, 9)[None], past_key_values=DynamicCache(config=model.config))
    found = [warning for warning in caught if "past_key_values" in str(warning.message)]
    assert len(found) == (1 if compat.CACHE_NAME == "cache" else 0)
