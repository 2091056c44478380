"""Ways into and out of a folder that transformers, PEFT and accelerate offer, next to transformers' own class.

| door | as transformers' own class, on the same weights |
|---|---|
| adapters | ``load_adapter``, an adapter's folder, ``add_adapter``: same logits, MTP layer kept; next to FP8 in fp32 |
| fewer layers | asked for in any way: same logits, and what is left out is said |
| ``resize_token_embeddings`` | saved and loaded again: same logits; the MTP layers follow |
| ``pipeline`` | a folder that is refused is refused here too |
| accelerate | offloaded models are saved; what cannot be loaded names the way |
"""

import json
import logging

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_greater_or_equal

from modeling_deepseek_moe import CheckpointError, DeepseekV3Config

pytestmark = pytest.mark.tools

IDS = torch.arange(5, 37)[None]
LOADING = "modeling_deepseek_moe.loading"
needs_add_adapter = pytest.mark.skipif(
    not is_peft_greater_or_equal(MIN_PEFT_VERSION),
    reason=f"this transformers adds adapters by peft {MIN_PEFT_VERSION}",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same shape with an MTP layer, in fp32 and in FP8."""
    parent = tmp_path_factory.mktemp("releases")
    write_release(parent / "fp32", SHAPES["v3-mtp"](), dtype=torch.float32)
    write_release(parent / "fp8", SHAPES["v3-mtp"](), fp8=True)
    return {"fp32": parent / "fp32", "fp8": parent / "fp8"}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def plain(folder, **kwargs):
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, **kwargs)


def write_adapter(folder, base, **settings):
    """An adapter with weights that change the logits, made by PEFT itself on the model in ``base``."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_b_proj", "o_proj"], init_lora_weights=False, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    parent = tmp_path_factory.mktemp("adapters")
    return {kind: (parent / kind, write_adapter(parent / kind, folder)) for kind, folder in folders.items()}


class TestAdapters:
    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    def test_load_adapter(self, folders, adapters, kind):
        folder, wanted = adapters[kind]
        model = AutoModelForCausalLM.from_pretrained(folders[kind])
        before = logits(model)
        model.load_adapter(folder)
        assert torch.equal(logits(model), wanted) and not torch.equal(before, wanted)
        assert len(model.model.mtp_layers) == model.config.num_nextn_predict_layers == 1

    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    def test_an_adapters_folder_is_base_and_adapter(self, adapters, kind):
        folder, wanted = adapters[kind]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(model), wanted)
        assert len(model.model.mtp_layers) == 1

    def test_the_logits_are_plains(self, folders, adapters):
        folder, wanted = adapters["fp32"]
        model = plain(folders["fp32"])
        model.load_adapter(folder)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)

    def test_beside_fp8_they_are_loaded_in_fp32(self, folders, adapters):
        model = AutoModelForCausalLM.from_pretrained(folders["fp8"])
        model.load_adapter(adapters["fp8"][0])
        saved = load_file(adapters["fp8"][0] / "adapter_model.safetensors")
        loaded = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
        assert len(loaded) == len(saved)
        for name, parameter in loaded.items():
            assert torch.equal(parameter, saved["base_model.model." + name.replace(".default", "")])

    @needs_add_adapter
    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    def test_add_adapter_saves_and_loads(self, folders, tmp_path, kind):
        model = AutoModelForCausalLM.from_pretrained(folders[kind])
        model.add_adapter(LoraConfig(r=4, target_modules=["q_b_proj", "o_proj"], init_lora_weights=False))
        assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.float32}
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(folders[kind])
        again.load_adapter(tmp_path)
        assert torch.equal(logits(again), logits(model))

    @needs_add_adapter
    def test_a_fresh_adapter_beside_fp8_changes_nothing_yet_and_is_no_rounded_one(self, folders):
        model = AutoModelForCausalLM.from_pretrained(folders["fp8"])
        before = logits(model)
        model.add_adapter(LoraConfig(r=4, target_modules=["o_proj"]))
        assert torch.equal(logits(model), before)
        first = model.model.layers[0].self_attn.o_proj.lora_A["default"].weight
        assert not torch.equal(first, first.to(torch.float8_e4m3fn).float())


WISHES = [
    ({"num_hidden_layers": 2}, "2, 3"),
    ({"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "2, 3"),
    ({"num_nextn_predict_layers": 0}, "3"),
]


class TestFewerLayers:
    @pytest.mark.parametrize("how", ["keywords", "config", "config, mismatched", "keywords, info"])
    @pytest.mark.parametrize(("wish", "left_out"), WISHES)
    def test_is_a_wish(self, folders, caplog, wish, left_out, how):
        keywords = dict(wish)
        if how.startswith("config"):
            keywords = {"config": AutoConfig.from_pretrained(folders["fp32"], **wish)}
        keywords |= {"ignore_mismatched_sizes": True} if "mismatched" in how else {}
        with caplog.at_level(logging.WARNING, LOADING):
            model = AutoModelForCausalLM.from_pretrained(
                folders["fp32"], output_loading_info="info" in how, **keywords
            )
        model = model[0] if "info" in how else model
        said = [record.message for record in caplog.records if record.name == LOADING]
        assert len(said) == 1 and f"layer(s) {left_out} left out" in said[0]
        depth = {"num_hidden_layers": wish.get("num_hidden_layers", 3)}
        torch.testing.assert_close(logits(model), logits(plain(folders["fp32"], **depth)), rtol=1e-4, atol=1e-4)
        assert len(model.model.layers) == depth["num_hidden_layers"] and not len(model.model.mtp_layers)

    @pytest.mark.parametrize("wish", [wish for wish, _ in WISHES])
    def test_of_fp8_are_saved_as_such(self, folders, tmp_path, wish):
        model = AutoModelForCausalLM.from_pretrained(folders["fp8"], **wish)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))

    def test_more_layers_are_refused(self, folders):
        with pytest.raises(CheckpointError, match="num_hidden_layers=4"):
            AutoModelForCausalLM.from_pretrained(folders["fp32"], num_hidden_layers=4)

    @pytest.mark.parametrize("wish", [{}, {"num_hidden_layers": 1}])
    def test_a_config_that_denies_its_own_files_is_refused(self, tmp_path, wish):
        write_release(tmp_path, SHAPES["v3-mtp"](), dtype=torch.float32)
        fields = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 2}))
        with pytest.raises(CheckpointError, match="found layer 3, wanted"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **wish)


class TestResizedEmbeddings:
    @pytest.mark.parametrize("mean_resizing", [True, False])
    @pytest.mark.parametrize("size", [136, 100])
    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    def test_are_saved_and_loaded(self, folders, tmp_path, kind, size, mean_resizing):
        model = AutoModelForCausalLM.from_pretrained(folders[kind])
        before = logits(model)
        model.resize_token_embeddings(size, mean_resizing=mean_resizing)
        kept = min(size, 128)
        assert torch.equal(logits(model)[..., :kept], before[..., :kept])
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(model))
        last = torch.full_like(IDS, size - 1)
        hidden = torch.randn(*IDS.shape, 64, dtype=model.dtype)
        with torch.no_grad():
            wanted, got = (one.mtp_logits(0, last, hidden)[0] for one in (model, again))
        assert wanted.shape[-1] == size and torch.equal(got, wanted)

    def test_are_plains(self, folders):
        torch.manual_seed(3)
        ours = AutoModelForCausalLM.from_pretrained(folders["fp32"])
        ours.resize_token_embeddings(130, pad_to_multiple_of=8)
        torch.manual_seed(3)
        theirs = plain(folders["fp32"])
        theirs.resize_token_embeddings(130, pad_to_multiple_of=8)
        assert logits(ours).shape[-1] == 136
        assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
        assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)

    def test_tied(self, tmp_path):
        config = SHAPES["v3-mtp"]()
        config.tie_word_embeddings = True
        write_release(tmp_path / "tied", config, dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
        model.resize_token_embeddings(140)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))

    def test_copies_in_mtp_layers_stay_copies(self, tmp_path):
        tensors = write_release(tmp_path, SHAPES["v3-mtp"](), dtype=torch.float32)
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        model.resize_token_embeddings(140)
        layer = model.model.mtp_layers[0]
        assert torch.equal(layer.embed_tokens.weight, model.model.embed_tokens.weight)
        assert torch.equal(layer.shared_head.head.weight, model.lm_head.weight)


class TestPipeline:
    LOST = ("model.layers.2.self_attn.o_proj.weight", "lm_head.weight", "model.layers.1.mlp.experts.5.up_proj.weight")

    def make(self, folder):
        words = Tokenizer(WordLevel({"a": 5, "b": 6, "<unk>": 0}, unk_token="<unk>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>")
        return pipeline("text-generation", model=str(folder), tokenizer=tokenizer)

    def test_of_a_whole_folder_is_this_packages(self, folders):
        assert type(self.make(folders["fp32"]).model).__module__ == "modeling_deepseek_moe.modeling"

    @pytest.mark.parametrize("lost", LOST)
    def test_of_a_folder_with_a_gap_is_refused(self, tmp_path, lost):
        tensors = write_release(tmp_path, SHAPES["v3-mtp"](), dtype=torch.float32)
        del tensors[lost]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{lost}: found no such tensor"):
            self.make(tmp_path)

    def test_of_a_folder_with_another_shape_is_refused(self, tmp_path):
        tensors = write_release(tmp_path, SHAPES["v3-mtp"](), dtype=torch.float32)
        tensors["model.norm.weight"] = torch.ones(65)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight: found shape \[65\]"):
            self.make(tmp_path)


class TestAccelerate:
    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    @pytest.mark.parametrize("to", ["memory", "disk"])
    def test_offloaded_models_are_saved(self, folders, tmp_path, kind, to):
        from accelerate import cpu_offload, disk_offload

        model = AutoModelForCausalLM.from_pretrained(folders[kind])
        wanted = load_file(folders[kind] / "model.safetensors")
        if to == "memory":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, tmp_path / "offload", execution_device="cpu")
        model.save_pretrained(tmp_path / "out")
        saved = load_file(tmp_path / "out" / "model.safetensors")
        assert saved.keys() == wanted.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor.float(), wanted[name].float()), name

    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    def test_loaders_that_copy_tensor_by_tensor_name_the_way(self, folders, kind):
        from accelerate import init_empty_weights, load_checkpoint_and_dispatch

        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders[kind]))
        with pytest.raises(
            NotImplementedError, match=r"experts\.gate_up_proj: found no data.*from_pretrained\(folder"
        ):
            load_checkpoint_and_dispatch(model, str(folders[kind]), device_map="auto")


@pytest.mark.parametrize("size", [7, 1, 0])
def test_a_rotary_part_that_has_no_pairs_is_refused(size):
    with pytest.raises((ValueError, StrictDataclassError), match=f"qk_rope_head_dim={size} must be even"):
        DeepseekV3Config(qk_rope_head_dim=size)
