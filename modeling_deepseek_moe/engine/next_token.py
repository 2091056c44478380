"""One new token of each sequence from its id to its logits, in one call of the CPU engine.

Where a plan runs every stage of the layers, a step spends as long in Python and torch around them as in two layers of experts:
embedding, rotary tables, mask and head are small, but the interpreter finds its own code gone from the caches each time. What
`DeepseekMoeForCausalLM.forward` would do for such a step is done here in one go, with the same bits; whatever it does besides (for a hook,
an argument, a mode of torch) it is left to do.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from modeling_deepseek_moe.attention import ABSORBED, choose_mla_path
from modeling_deepseek_moe.engine import reasons
from modeling_deepseek_moe.engine.plan import SLOT, Plan
from modeling_deepseek_moe.engine.watch import Watch
from modeling_deepseek_moe.ops._hooks import any_hooked, every_module_is_hooked, is_hooked
from modeling_deepseek_moe.ops._library import needs_dispatcher
from modeling_deepseek_moe.ops._operands import matrix_of
from modeling_deepseek_moe.ops._structs import Ends
from modeling_deepseek_moe.ops.decode_step.cpu import FEW_TOKENS
from modeling_deepseek_moe.rope import DeepseekRotaryEmbedding

CPU = torch.device("cpu")  # said where tensors are made, since a default device may be another
ROWS = 64  # of rotary tables that are made at a time
DEPEND_ON_LENGTH = ("dynamic", "longrope")  # kinds of rotary embeddings whose rows change as a sequence grows


class Tables(NamedTuple):
    """Rows of rotary tables from position ``begin`` on, and the frequencies that they were made of."""

    frequencies: torch.Tensor
    begin: int
    rows: list[tuple[torch.Tensor, torch.Tensor]]

    def has(self, position: int) -> bool:
        """Whether the row of a position is among them."""
        return 0 <= position - self.begin < len(self.rows)


class NextToken:
    """What is before and after a plan's stages; ``reason`` is why the engine cannot run that, ``None`` where it can.

    A plan holds it, and it none: head and embedding live as long as the plan that they were found with, or until the next step.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        base, head = model.model, model.lm_head
        self.head, self.rotary, self.embedding = head, base.rotary_emb, base.embed_tokens
        self._tables: Tables | None = None
        self._watch = Watch()
        for module in (self.embedding, self.rotary, head):
            self._watch.add(module)
        self.reason, self.ends = self._unsupported_reason(plan), Ends()
        if self.reason is None:
            matrix, self._kept = matrix_of(head)
            self.ends = Ends(self.embedding.weight.data_ptr(), len(self.embedding.weight), matrix)
            self.reason = self._unfit(base.config.hidden_size)

    def _unsupported_reason(self, plan: Plan) -> str | None:
        """Why the modules cannot be read in place of their calls."""
        rotary = self.rotary
        if type(rotary) is not DeepseekRotaryEmbedding or rotary.rope_type in DEPEND_ON_LENGTH:
            return "needs rotary tables whose rows stay as they are"
        if is_hooked(rotary):
            return "cannot call the hooks of rotary tables"
        return reasons.embedding(self.embedding, plan.dtype) or reasons.linear(self.head, plan.dtype)

    def _unfit(self, hidden: int) -> str | None:
        """What the calls of modules that are not as wide as the states would say."""
        widths = self.embedding.weight.shape[1], self.ends.head.cols
        return None if widths == (hidden, hidden) else f"needs an embedding and a head of {hidden}, found {widths}"

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are a model's, and as they were; `Plan.is_current` says that of the layers."""
        base = model.model
        are_its = self.head is model.lm_head and self.rotary is base.rotary_emb and self.embedding is base.embed_tokens
        return are_its and self._watch.is_current()

    def run(self, plan: Plan, input_ids: torch.Tensor, cache: Cache, past_length: int) -> torch.Tensor:
        """Logits ``[B, 1, vocabulary]`` of ``input_ids [B, 1]`` at position ``past_length`` of their sequences.

        Raises:
            IndexError: an id that is not in the vocabulary.
        """
        batch = len(input_ids)
        shape = batch, 1, self.embedding.weight.shape[1]
        step = plan.step(shape, cache, past_length, self._rotary_rows(past_length), None)
        logits = torch.empty((batch, 1, self.ends.head.rows), dtype=plan.dtype, device=CPU)
        step.logits(input_ids.contiguous(), self.ends, logits)
        plan.advance(cache, past_length + 1)
        return logits

    def _rotary_rows(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[1, 1, p/2]``, of tables that are made for the next ROWS positions."""
        frequencies, tables = self.rotary.inv_freq, self._tables
        if tables is None or not (tables.has(position) and torch.equal(tables.frequencies, frequencies)):
            positions = torch.arange(position, position + ROWS, device=CPU)[None]
            cos, sin = (table.split(1, dim=1) for table in self.rotary(self.embedding.weight, positions))
            tables = self._tables = Tables(frequencies.clone(), position, [*zip(cos, sin, strict=True)])
        return tables.rows[position - tables.begin]


def logits(
    model: nn.Module,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    logits_to_keep: int | torch.Tensor,
    others: dict,
) -> torch.Tensor | None:
    """Logits ``[B, 1, vocabulary]``, and their rows in the cache; ``None`` where the model's own forward is to be called.

    Args:
        model: a causal language model.
        others: its forward's other arguments, of which none may ask for anything.
    """
    if needs_dispatcher((input_ids,)):
        return None
    base = model.model
    plan: Plan | None = base.__dict__.get(SLOT)
    if plan is None or not plan.runs_all or cache is None or type(cache) is not DynamicCache:
        return None
    if not plan.is_of(list(base.layers)[: base.config.num_hidden_layers], base.norm):
        return None
    if input_ids is None or not _is_step(input_ids):
        return None
    if not (_wants_logits_alone(base, logits_to_keep, others) and _is_plain(base)):
        return None
    if not plan.can_write(cache, len(input_ids)):
        return None
    past_length = cache.get_seq_length()
    if not past_length or choose_mla_path(base.config, 1, past_length + 1) != ABSORBED:
        return None
    if not _sees_all(attention_mask, past_length + 1) or not _are(position_ids, past_length):
        return None
    whole = _whole(model, plan)
    if whole.reason is not None or not plan.is_current(plan.dtype):
        return None
    base.origin.check(base)
    return whole.run(plan, input_ids, cache, past_length)


def _is_step(input_ids: torch.Tensor) -> bool:
    """Whether it is one token of a few sequences, without gradients."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or input_ids.ndim != 2:
        return False
    rows, tokens = input_ids.shape
    return tokens == 1 and 0 < rows <= FEW_TOKENS and input_ids.dtype == torch.long


def _wants_logits_alone(base: nn.Module, logits_to_keep: int | torch.Tensor, others: dict) -> bool:
    """Whether neither an argument nor the config asks for something else, or for some of the logits."""
    if any(value is not None and value is not False for value in others.values()):
        return False
    if any(getattr(base.config, f"output_{name}", False) for name in base._can_record_outputs):
        return False
    return type(logits_to_keep) is int and logits_to_keep >= 0  # 0: all, which are one


def _is_plain(base: nn.Module) -> bool:
    """Whether the decoder's own call does nothing but what is done here."""
    if every_module_is_hooked() or any_hooked((base.__dict__,)) or base.has_gaps:
        return False
    if type(base).__call__ is not nn.Module.__call__ or base._compiled_call_impl is not None:
        return False
    is_trained = base.training and base.training_state is not None
    return not is_trained and getattr(base.config, "is_causal", True)


def _whole(model: nn.Module, plan: Plan) -> NextToken:
    """The plan's own, made again where the model's parts are others now."""
    found = plan.next_token
    if found is None or not found.is_of(model):
        found = plan.next_token = NextToken(model, plan)
    return found


def _sees_all(attention_mask: torch.Tensor | None, length: int) -> bool:
    """Whether all that is cached may be seen."""
    if attention_mask is None:
        return True
    is_padding = type(attention_mask) is torch.Tensor and attention_mask.ndim == 2
    return is_padding and attention_mask.shape[1] == length and bool(attention_mask.all())


def _are(position_ids: torch.Tensor | None, position: int) -> bool:
    """Whether every sequence's new token is at that position: none is packed or padded."""
    if position_ids is None:
        return True
    return position_ids.ndim == 2 and position_ids.shape[1] == 1 and bool((position_ids == position).all())
