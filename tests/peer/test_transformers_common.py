"""transformers' own common model tests over this package's classes, as its own models run them.

They need its source distribution, see `transformers_tests.find_sdist`; `make peer` runs them.
"""

import unittest
import unittest.mock

import pytest
import torch
from peer.transformers_tests import load

from modeling_deepseek_moe.registration import FAMILIES, HEADS, model_class

common = load("test_modeling_common")
ConfigTester = load("test_configuration_common").ConfigTester
TrainingTesterMixin = load("test_training_mixin").TrainingTesterMixin

pytestmark = [pytest.mark.peer, pytest.mark.long]


class ModelTester:
    """What the mixins ask of a model's own tests: a small config, inputs, and some sizes by name."""

    batch_size, seq_length = 13, 7
    is_training = True
    num_labels = 3
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }

    def __init__(self, family: str, fields: dict):
        self.config_class = FAMILIES[family]
        self.causal_lm_class = model_class(f"{family}ForCausalLM")
        self.fields = self.sizes | fields
        for name, value in self.fields.items():
            setattr(self, name, value)

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class CommonTests(common.ModelTesterMixin, TrainingTesterMixin):
    """All of the mixins' tests for one family in one shape."""

    family: str
    fields: dict = {}
    # our sources carry no copyright year, from which the test would guess that it does not apply
    test_can_init_all_missing_weights_before_2023 = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.all_model_classes = tuple(model_class(cls.family + head) for head in HEADS)

    def setUp(self):
        self.model_tester = ModelTester(self.family, self.fields)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        # it knows by name which class takes which labels, and transformers has no DeepseekV2ForTokenClassification
        if return_labels and model_class.__name__.endswith("ForTokenClassification"):
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_config(self):
        ConfigTester(self, config_class=FAMILIES[self.family], hidden_size=32).run_common_tests()

    def test_moe_models_record_router_logits(self):
        # it looks for the experts' decorator in the text of the models' module; ours are in another
        with unittest.mock.patch.object(common.inspect, "getsource", return_value="@use_experts_implementation"):
            super().test_moe_models_record_router_logits()

    @unittest.skip("a pickle checkpoint is refused: loading one runs code")
    def test_disk_offload_bin(self):
        pass

    @unittest.skip("generation tests are not in the source distribution")
    def test_generation_tester_mixin_inheritance(self):
        pass


class DeepseekV3Test(CommonTests, unittest.TestCase):
    family = "DeepseekV3"
    fields = {"q_lora_rank": 32, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0}


class DeepseekV3MtpTest(CommonTests, unittest.TestCase):
    family = "DeepseekV3"
    fields = {"q_lora_rank": 32, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1}
    test_all_params_have_gradient = False  # the plain loss does not reach the MTP layers


class DeepseekV2GreedyTest(CommonTests, unittest.TestCase):
    family = "DeepseekV2"
    fields = {"q_lora_rank": None}


class DeepseekV2GroupLimitedTest(CommonTests, unittest.TestCase):
    family = "DeepseekV2"
    fields = {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}


class KimiK2Test(CommonTests, unittest.TestCase):
    family = "KimiK2"
    fields = {"q_lora_rank": 32}
