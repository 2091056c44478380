"""What importing the package changes in transformers, and what it leaves alone."""

import json

import pytest
import torch
import transformers
from families import write_family
from releases import SHAPES
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

import modeling_deepseek_moe as dsm

FAMILIES = ("DeepseekV2", "DeepseekV3", "KimiK2")


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_give_this_package(family):
    config = getattr(dsm, f"{family}Config")
    assert type(AutoConfig.for_model(config.model_type)) is config
    for head in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"):
        auto = getattr(transformers, "AutoModel" + head.removeprefix("Model"))
        assert auto._model_mapping[config] is getattr(dsm, family + head)


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
def test_built_in_classes_stay(family):
    config = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")
    assert config.__module__.startswith("transformers.") and model.__module__.startswith("transformers.")
    assert model.config_class is config
    assert AutoModelForCausalLM._model_mapping[config] is model


def test_the_whole_of_kimi_k25_stays_transformers_own(tmp_path):
    """Its class is reached by name and by the Auto classes for images, and reads a release as without this package."""
    write_family(tmp_path, "kimi_k25")
    whole = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert hasattr(whole.model, "vision_tower")
    text = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    asked = {"attn_implementation": "eager", "experts_implementation": "eager"}
    made = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2, **asked))
    for config in (made.config, made.model.language_model.config, made.model.vision_tower.config):
        assert config._attn_implementation == config._experts_implementation == "eager"
    assert type(auto) is type(made) is type(whole) and len(made.model.language_model.layers) == 2
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = whole(input_ids=ids).logits
        assert (logits - text(ids).logits).abs().max() < 1e-4
        assert torch.equal(logits, auto(input_ids=ids).logits)


def test_processors_of_kimi_k25_are_transformers_own(tmp_path):
    """Though its files name code of their own. The tokenizer here is no code."""
    write_family(tmp_path, "kimi_k25")
    AutoTokenizer.from_pretrained(dsm.tiny_checkpoint()).save_pretrained(tmp_path)
    names = {"AutoProcessor": "kimi_k25_processor.KimiK25Processor", "AutoImageProcessor": "kimi_k25_vision.Images"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": names}))
    mappings = (PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, VIDEO_PROCESSOR_MAPPING)
    found = [mapping[dsm.KimiK25Config] for mapping in mappings]
    assert found == [mapping[transformers.Kimi_K25Config] for mapping in mappings]
    # where torchvision is missing something stands for the image processor by its name, and nothing for that of videos
    assert [found[0].__name__, found[1]["torchvision"].__name__] == ["Kimi_K25Processor", "Kimi_K25ImageProcessor"]
    if is_torchvision_available():
        made = AutoProcessor.from_pretrained(tmp_path)
        assert type(made) is transformers.Kimi_K25Processor
        assert type(made.image_processor) is transformers.Kimi_K25ImageProcessor
        assert type(made.video_processor) is transformers.Kimi_K25VideoProcessor
        return
    for auto_class in (AutoProcessor, AutoImageProcessor):
        with pytest.raises(ValueError, match="torchvision"):
            auto_class.from_pretrained(tmp_path)


def test_trainer_smooths_the_labels_of_kimi_as_of_deepseek(tmp_path):
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    ids = torch.randint(0, 128, (2, 9))
    losses = []
    for model_class in (dsm.DeepseekV3ForCausalLM, dsm.KimiK2ForCausalLM):
        torch.manual_seed(0)
        model = model_class(SHAPES["kimi"]()).eval()
        losses.append(Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()}))
    assert torch.equal(*losses)
