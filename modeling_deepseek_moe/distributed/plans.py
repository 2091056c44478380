"""transformers' parallel plans for this family: which entries a model has, and what is said and done before it is divided.

The tables are in `tables`, and `config` has them as ``base_model_tp_plan`` and the like.
"""

import copy
import os
import re

from torch import distributed, nn
from transformers.distributed import DistributedConfig
from transformers.distributed.pipeline_parallel import PipelineStage
from transformers.distributed.utils import is_dtensor
from transformers.utils import logging

from modeling_deepseek_moe import formats
from modeling_deepseek_moe._version import __version__
from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.distributed import checks, coded, gradients, latents, ranks
from modeling_deepseek_moe.quantized.mapped import MappedExperts

logger = logging.get_logger(__name__)

ASKED_BY = ("distributed_config", "tp_plan", "tp_size")  # arguments of `from_pretrained`
NOT_COMPARED = ("_name_or_path", "distributed_config", "transformers_version", "_attn_implementation_autoset")


class ParallelPlansMixin(ModelMixin):
    """What a model does when it is loaded over several ranks. Mixed in before `ReleaseLoadingMixin`."""

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        # The config's plans name every module that the family may have; this model keeps the entries that it has.
        named = (*self.named_modules(), *self.named_parameters())
        present = {re.sub(r"\d+", "*", name) for name, _ in named}
        for plan in (self.tp_plan, self.ep_plan, self.fsdp_plan):
            for name in plan.keys() - present:
                del plan[name]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `ReleaseLoadingMixin.from_pretrained`; over several ranks, what fails on one is an error on all.

        Raises:
            RankError: another rank failed, or has another config, checkpoint or version of a package.
            ValueError: the ranks do not divide heads, experts or blocks of the model.
        """
        path = pretrained_model_name_or_path
        if all(kwargs.get(name) is None for name in ASKED_BY) or _world_size() == 1:
            return super().from_pretrained(path, *args, **kwargs)
        ranks.join()
        with ranks.meeting(f"loading {path} over {distributed.get_world_size()} ranks"):
            return super().from_pretrained(path, *args, **kwargs)

    @classmethod
    def prepare_distribute_model(cls, distributed_config, device_map=None):
        if isinstance(distributed_config, dict):
            distributed_config = DistributedConfig.from_dict(distributed_config)
        if distributed_config is not None:
            # a copy: the caller's own may be asked for again, and the plan is made that of this model
            distributed_config = _with_sizes(copy.deepcopy(distributed_config))
            meeting = ranks.current()
            if meeting is not None:
                meeting.meet(
                    {"versions": ranks.versions(__version__), "distributed_config": distributed_config.to_dict()}
                )
        return super().prepare_distribute_model(distributed_config, device_map)

    def _resolve_parallel_plans(self, distributed_config):
        # transformers applies these after it took away the layers of a pipeline's other stages, which they still name
        plans = super()._resolve_parallel_plans(distributed_config)
        if distributed_config.pp_size == 1:
            return plans
        stage = PipelineStage(self._mesh_manager.get_mesh("pp"))
        return tuple({name: rule for name, rule in plan.items() if _is_of_stage(self, name, stage)} for plan in plans)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if mesh_manager is None:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        _divide(model, distributed_config, mesh_manager)
        meeting = ranks.current()
        if meeting is not None:
            fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_COMPARED}
            meeting.meet({"config": fields})
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        gradients.refuse_averaging_twice(model, distributed_config)
        if distributed_config.tp_size == 1:
            model._tp_size = None  # by which peft would gather all of the model on every rank, to save an adapter
        if distributed_config.pp_size > 1:
            _number_stage(model.base_model)
        return model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `ReleaseSavingMixin.save_pretrained`; what no rank has all of is refused on all of them.

        Raises:
            ValueError: ranks have parts of an adapter of the model's own, the model is a stage of a pipeline, or ranks have parts of its codes.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            # of what ranks have parts of, transformers would have one rank gather, and wait for the others
            if any(is_dtensor(parameter) for name, parameter in self.named_parameters() if ".lora_" in name):
                raise ValueError(
                    f"{save_directory}: found an adapter of which each rank has a part, put in by the model's own load_adapter or "
                    "add_adapter, wanted one of peft's get_peft_model or PeftModel.from_pretrained, whose save_pretrained gathers it"
                )
            return super().save_pretrained(save_directory, *args, **kwargs)
        if self.base_model.has_gaps:
            raise ValueError(
                f"{save_directory}: found a stage of a pipeline (pp_size), which has some of the layers, wanted all of them: "
                "load the model without pp_size to save it"
            )
        for module in self.modules():
            if isinstance(module, MappedExperts):
                module.refuse_part()
        for name, parameter in self.named_parameters():
            if is_dtensor(parameter) and any(formats.of_codes(parameter.dtype)):
                raise ValueError(
                    f"{save_directory}: {name}: found {parameter.dtype} codes that several ranks have parts of, wanted floating-point "
                    "weights, which are gathered: load with FineGrainedFP8Config(dequantize=True); the folder that codes were "
                    "loaded from has their bytes"
                )
        return super().save_pretrained(save_directory, *args, **kwargs)


def _world_size() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _with_sizes(asked: DistributedConfig) -> DistributedConfig:
    """``enable_expert_parallel=True`` alone asks for experts over all ranks; transformers makes sizes of 1 of it."""
    sizes = asked.tp_size, asked.ep_size, asked.fsdp_size, asked.dp_replicate_size, asked.pp_size
    world = _world_size()
    # an empty plan without a size is what it leaves, and what no one else has a reason to write
    if world == 1 or asked.tp_plan != {} or any(size != 1 for size in sizes):
        return asked
    logger.warning(
        f"enable_expert_parallel without sizes: the experts are divided over all {world} ranks, as "
        f"DistributedConfig(tp_size={world}, ep_size={world}, tp_plan={{}}) says."
    )
    return DistributedConfig(tp_size=world, ep_size=world, tp_plan={}, ep_implementation=asked.ep_implementation)


def _divide(model, asked: DistributedConfig, mesh_manager) -> None:
    """Check that the model can be divided so, and make its plans those of the layers that it has now.

    Raises:
        ValueError: it cannot.
    """
    config = model.config
    shared = [
        layer for layer in range(config.num_hidden_layers) if config.has_indexers and not config.has_indexer(layer)
    ]
    if asked.pp_size > 1 and shared:
        raise ValueError(
            f"pp_size={asked.pp_size}: found layers that attend to what an indexer of another one chose (the first: {shared[0]}), "
            "which a stage does not hand on; wanted tp_size, or fsdp_size"
        )
    plan = model.tp_plan
    if asked.tp_plan == {} and asked.tp_size > 1:
        # transformers takes an empty plan for a missing one: a rule that divides nothing stands for none
        plan.clear()
        asked.tp_plan = {"norm" if model.base_model is model else "model.norm": "replicate"}
    if isinstance(asked.tp_plan, dict):
        plan.update(asked.tp_plan)
    checks.check_model(model, plan, asked)
    latents.tell_dims(model)
    coded.divide_linears(model)
    if not coded.are_coded(model):
        return
    if asked.ep_size > 1:
        model.ep_plan = {**_without_experts(model.ep_plan), **coded.expert_plan(model, "ep_dispatch_experts")}
        mesh = mesh_manager.get_mesh("ep")
    elif asked.tp_size > 1 and any(style == "moe_tp_experts" for style in plan.values()):
        model.tp_plan = {**_without_experts(plan), **coded.expert_plan(model, coded.WHOLE_EXPERTS)}
        mesh = mesh_manager.get_mesh("tp")
    else:
        return
    coded.keep_own_experts(model, mesh.get_local_rank(), mesh.size())


def _is_of_stage(model, name: str, stage: PipelineStage) -> bool:
    """Whether a stage of a pipeline has the module or parameter of that name."""
    owner = stage.find_rank_for_key(f"{name}.", len(model.base_model.layers), model.base_model_prefix)
    tied = model.config.tie_word_embeddings and stage.pp_is_last_stage and name.endswith("embed_tokens")
    return owner in (None, stage.pp_rank) or tied


def _number_stage(model) -> None:
    """Count the layers of this stage of a pipeline from 0: they are what its cache holds, whose length the first one tells."""
    model.has_gaps = True
    own = [layer for layer in model.layers if not isinstance(layer, nn.Identity)]
    for number, layer in enumerate(own):
        layer.self_attn.layer_idx = number
    if own:
        # transformers takes the dtype of what stages send from their first parameter: a norm's, where others are codes
        modules = own[0]._modules
        modules |= {name: modules.pop(name) for name in list(modules) if name != "input_layernorm"}


def _without_experts(plan: dict[str, str]) -> dict[str, str]:
    return {name: style for name, style in plan.items() if ".mlp.experts" not in name}
