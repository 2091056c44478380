"""What the names in a LoRA config stand for on these models.

Under transformers 5 peft reads ``gate_proj``, ``up_proj`` and ``down_proj`` as the stacks of the routed experts, whatever is written in
front of them. Here a bare name means that too; one that says whose projection it is, such as ``shared_experts.up_proj`` or
``mlp.down_proj``, means the linear layers that end in it.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.utils import logging

from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops.experts import STACKS
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.terminal import shown

logger = logging.get_logger(__name__)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
ROUTER = "gate"  # peft reads it as "gate.weight"
FAMILY = "deepseek_v3"  # a model type that peft has its reading for; it is the same for all that it has
INSIDE = re.compile(r"\.(lora_\w+|base_layer|original_module|modules_to_save)\b")


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that they have without adapters."""
    found = {}
    for name, module in nn.Module.named_modules(model):
        short = re.sub(r"\.(base_layer|original_module)\b", "", name)
        if not INSIDE.search(short):
            found[short] = module
    return found


def is_experts(module: nn.Module) -> bool:
    return isinstance(module, DeepseekExperts | QuantizedExperts)


def stacks_of(config) -> set[str]:
    """The stacks of experts among a LoRA config's targets, as in ``target_parameters`` once peft has read it."""
    if isinstance(config.target_modules, str):
        return set(STACKS) if config.target_modules.lower() == ALL_LINEAR else set()
    reading = copy.copy(config)
    reading.rank_pattern, reading.alpha_pattern = dict(config.rank_pattern), dict(config.alpha_pattern)
    read(reading)
    return {name for name in reading.target_parameters or () if name.rpartition(".")[2] in STACKS}


def has_stacks(config) -> bool:
    """Whether stacks of experts are among ``target_parameters``."""
    named = {name.rpartition(".")[2] for name in getattr(config, "target_parameters", None) or ()}
    return not named.isdisjoint(STACKS)


def suffix(target: str, name: str) -> bool:
    """Whether peft takes a module of that name for a target of a list."""
    return name == target or name.endswith(f".{target}")


@dataclass
class Targets:
    """One adapter's targets, while peft reads its config: it is given back what it would take for something else.

    Attributes:
        config: the adapter's, changed in place, as peft does.
        apart: targets that peft would read as routed experts, which it gets once it has read the others.
        given: the targets that it was given to read.
        notes: what a user would not expect.
        experts: the names of the model's modules of routed experts.
        routers: those of its routers.
        linears: what ``all-linear`` stands for besides routers and routed experts, by the last parts of names.
        inner: what they begin with in a model with a head.
        reaches_experts: whether stacks of experts are among them.
        is_done: those of experts have their layers.
        is_loaded: its layers have got tensors that were stored.
    """

    config: Any
    apart: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    linears: set[str] = field(default_factory=set)
    inner: str = ""
    reaches_experts: bool = False
    is_done: bool = False
    is_loaded: bool = False

    @classmethod
    def of(cls, model: nn.Module, modules: dict[str, nn.Module], config) -> "Targets":
        """Divide a LoRA config's targets, and read the first part as peft does."""
        experts = [name for name, module in modules.items() if is_experts(module)]
        targets, converts = cls(config, experts=experts, inner=f"{model.base_model_prefix}."), _converts(model)
        targets.routers = [name for name in modules if name.rpartition(".")[2] == ROUTER]
        linears = [name for name, module in modules.items() if name.rpartition(".")[2] in PROJECTIONS]
        wanted = config.target_modules
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            targets._note_others(wanted, experts, linears)
            everything = _all_linear(model, modules, experts, config)
            targets.linears = everything.difference((ROUTER, *PROJECTIONS) if experts else ())
            wanted = None if converts else everything
        elif isinstance(wanted, str):
            wanted = targets._of_text(wanted, modules, experts, linears)
        else:
            targets._note_unmatched(set(wanted or ()), modules, experts, linears)
        if wanted is not None:
            targets._divide(set(wanted), experts, linears)
            targets.given = config.target_modules  # peft puts another set in its place
        targets._note_parameters(modules, experts)
        targets.reaches_experts = targets._has_experts()
        if config.layers_to_transform is not None and targets.reaches_experts and experts:
            targets.notes.append("layers_to_transform: not the routed experts, which peft adapts in every layer")
        if not converts:
            targets._read_as_peft()
        return targets

    def give_back(self) -> None:
        """Put targets back that were kept apart, if peft has read the others, and take those away that are excluded."""
        if self.apart and self.config.target_modules is not self.given:
            self.config.target_modules = set(self.config.target_modules or ()) | self.apart
            self.apart = set()
        self._take_excluded()

    def reaches(self, name: str) -> bool:
        """Whether peft will adapt the linear layer of that name."""
        from peft.tuners.tuners_utils import check_target_module_exists

        reading = copy.copy(self.config)
        if self.apart:
            reading.target_modules = {*(reading.target_modules or ()), *self.apart}
        elif isinstance(reading.target_modules, str) and reading.target_modules.lower() == ALL_LINEAR:
            reading.target_modules = self.linears
        return bool(check_target_module_exists(reading, name))

    def _has_experts(self) -> bool:
        """Whether stacks of routed experts are targets that ``exclude_modules`` leaves."""
        targets = stacks_of(self.config)
        return bool(targets) and (not self.experts or any(self._left(target)[1] for target in targets))

    def _take_excluded(self) -> None:
        """Name the stacks and routers that ``exclude_modules`` leaves, layer by layer: peft asks it of linear layers alone."""
        for target in sorted(getattr(self.config, "target_parameters", None) or ()):
            own, left = self._left(target)
            if len(left) < len(own):
                # without the name of a model within one with a head, so that both load the adapter
                named = {name.removeprefix(self.inner) for name in left}
                self.config.target_parameters = set(self.config.target_parameters) - {target} | named

    def _left(self, target: str) -> tuple[list[str], list[str]]:
        """The stacks or routers' weights that a target among ``target_parameters`` means, and those that ``exclude_modules`` leaves."""
        path, _, leaf = target.rpartition(".")
        if leaf in STACKS:
            own = [name for name in self.experts if not path or suffix(path, name)]
        else:
            own = [name for name in self.routers if leaf == "weight" and suffix(path, name)]
        left = [name for name in own if not _is_excluded(self.config, name, leaf)]
        return [f"{name}.{leaf}" for name in own], [f"{name}.{leaf}" for name in left]

    def say(self) -> None:
        """All notes in one warning."""
        if self.notes:
            logger.warning(
                "Targets of the adapter that match nothing, or not all that their name suggests:\n"
                + "\n".join(self.notes)
            )
        self.notes = []

    def _of_text(self, text: str, modules, experts: list[str], linears: list[str]) -> set[str] | None:
        """The targets that a regex stands for, layer by layer, where peft would take the last part of each."""
        from peft.tuners.tuners_utils import check_target_module_exists

        named = {name for name in modules if check_target_module_exists(self.config, name)}
        paths = [f"{name}{part}" for name in experts for part in ("", ".0")]
        stacked = {leaf for leaf in PROJECTIONS if any(re.fullmatch(text, f"{path}.{leaf}") for path in paths)}
        if not stacked:
            return named or None
        self._note_others(text, experts, [name for name in linears if name in named])
        return stacked | named.difference(linears)

    def _divide(self, wanted: set[str], experts: list[str], linears: list[str]) -> None:
        self.apart = {target for target in wanted if _means_linears(target, experts, linears)}
        self.config.target_modules = wanted - self.apart
        _check_pair(self.config.target_modules)

    def _read_as_peft(self) -> None:
        """For a model type that peft has no reading of: that of its kin."""
        if not isinstance(self.config.target_modules, str):  # a regex that matches nothing is peft's to refuse
            read(self.config)
        self.given = set()
        self.give_back()

    def _note_others(self, target: str, experts: list[str], linears: list[str]) -> None:
        """That a target stands for the routed experts alone, where other layers have projections of that name."""
        leaves = [leaf for leaf in PROJECTIONS if target == leaf] or list(PROJECTIONS)
        others = sorted({".".join(name.split(".")[-2:]) for name in linears if name.rpartition(".")[2] in leaves})
        if experts and others and not self.config.inference_mode:
            self.notes.append(
                f"{target}: the routed experts, as peft reads it, and not {', '.join(others)}, which have to be named"
            )

    def _note_unmatched(self, wanted: set[str], modules, experts: list[str], linears: list[str]) -> None:
        for target in sorted(wanted):
            leaf = target.rpartition(".")[2]
            matches = any(suffix(target, name) for name in modules)
            if leaf in PROJECTIONS and experts and not _means_linears(target, experts, linears):
                if "." not in target:
                    self._note_others(target, experts, linears)
                elif not any(suffix(target.removesuffix(f".{leaf}"), name) for name in experts) and not re.search(
                    r"experts\.\d+\.", target
                ):
                    self.notes.append(f"{target}: the routed experts, as peft reads it, since no layer has that name")
            elif not matches:
                self.notes.append(f"{shown(target, keep='')}: matches nothing")

    def _note_parameters(self, modules, experts: list[str]) -> None:
        for target in sorted(self.config.target_parameters or ()):
            path, _, leaf = target.rpartition(".")
            if leaf in STACKS and any(not path or suffix(path, name) for name in experts):
                continue
            if not any(
                suffix(target, f"{name}.{own}") for name, module in modules.items() for own in module._parameters
            ):
                self.notes.append(f"{shown(target, keep='')}: matches nothing")


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], experts: list[str], config) -> set[str]:
    """What peft takes ``all-linear`` for, where it has a reading: last parts of names, the router's and experts' too, not the head's."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    head = model.get_output_embeddings()
    if head is None and config.task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    # by name: a layer of another adapter may lie around it
    heads = {name for name, module in nn.Module.named_modules(model) if module is head}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in heads]
    return {name.rpartition(".")[2] for name in linears} | ({ROUTER, *PROJECTIONS} if experts else set())


def _check_pair(wanted: set[str]) -> None:
    """
    Raises:
        ValueError: of the routed experts' gate and up, which share a stack, one is meant without the other.
    """
    named = {leaf: sorted(target for target in wanted if suffix(leaf, target)) for leaf in PROJECTIONS[:2]}
    for leaf, other in (PROJECTIONS[:2], PROJECTIONS[1::-1]):
        if named[leaf] and not named[other]:
            raise ValueError(
                f"target_modules: found {shown(named[leaf][0], keep='')}, which is no linear layer of the model and so the "
                f"routed experts', without {other}, wanted both, since they share a stack; or a layer by its name, such as "
                f"shared_experts.{leaf}"
            )


def _is_excluded(config, path: str, leaf: str) -> bool:
    """Whether ``exclude_modules`` names the module of routed experts or a router, its stack or weight, or all projections in a stack.

    An adapter that was stored names what it has.
    """
    told = getattr(config, "exclude_modules", None)
    if not told or config.inference_mode:
        return False

    def is_named(name: str) -> bool:
        return bool(re.fullmatch(told, name)) if isinstance(told, str) else any(suffix(one, name) for one in told)

    inside = {STACKS[0]: PROJECTIONS[:2], STACKS[1]: PROJECTIONS[2:]}.get(leaf, ())
    parts = [(f"{path}.{projection}", f"{path}.0.{projection}") for projection in inside]
    are_all = bool(parts) and all(any(map(is_named, names)) for names in parts)
    return is_named(path) or is_named(f"{path}.{leaf}") or are_all


def _means_linears(target: str, experts: list[str], linears: list[str]) -> bool:
    """Whether a target of a list is some linear layers of dense or shared MLPs."""
    return ("." in target or not experts) and any(suffix(target, name) for name in linears)


def read(config, model_type: str = FAMILY) -> None:
    """Do what peft does to the targets in a list, in place.

    Raises:
        ValueError: of gate and up, which share a stack, one is missing.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    convert_peft_config_for_transformers(config, SimpleNamespace(config=SimpleNamespace(model_type=model_type)), None)


def _converts(model: nn.Module) -> bool:
    """Whether peft itself reads the projections of MLPs as stacks for models of this type."""
    from peft import LoraConfig

    probe = LoraConfig(target_modules=list(PROJECTIONS))
    read(probe, model.config.model_type)
    return bool(probe.target_parameters)


def injected(model: nn.Module) -> Iterator[str]:
    """The adapters that have layers on stacks of experts."""
    for _, module in nn.Module.named_modules(model):
        if module.__dict__.get("parameter_name") in STACKS:
            yield from module.lora_A
