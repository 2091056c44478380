"""What importing the package changes in transformers, and what it leaves alone."""

import pytest
import torch
import transformers
from releases import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

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


def test_trainer_smooths_the_labels_of_kimi_as_of_deepseek(tmp_path):
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    ids = torch.randint(0, 128, (2, 9))
    losses = []
    for model_class in (dsm.DeepseekV3ForCausalLM, dsm.KimiK2ForCausalLM):
        torch.manual_seed(0)
        model = model_class(SHAPES["kimi"]()).eval()
        losses.append(Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()}))
    assert torch.equal(*losses)
