"""One layer's experts, computed as they arrive in memory.

Legend: T tokens, E experts, K experts per token, D hidden size, R rows routed to one expert.
"""

from contextlib import closing

import torch

from modeling_deepseek_moe.ops import experts
from modeling_deepseek_moe.ops.four_bit import NestedScales
from modeling_deepseek_moe.quantized.experts import QuantizedMatrix
from modeling_deepseek_moe.quantized.mapped import PROJECTIONS, MappedExperts, Table
from modeling_deepseek_moe.streaming.ahead import FEW_TOKENS, NextLayerPredictor
from modeling_deepseek_moe.streaming.cache import ExpertCache
from modeling_deepseek_moe.streaming.resident import ResidentWeights
from modeling_deepseek_moe.streaming.slots import Key


class LayerStream:
    """Layer ``number`` of an expert cache. Copies and pickles of it are ``None``: memory and threads are not copied.

    Args:
        resident: the model's other weights, read in before the first expert is.
        predictor: of the next layer, ``None`` for the last.
        here: what the layer before predicts of this one.
    """

    def __init__(
        self,
        cache: ExpertCache,
        number: int,
        resident: ResidentWeights,
        predictor: NextLayerPredictor | None = None,
        here: NextLayerPredictor | None = None,
    ):
        self.cache, self.number = cache, number
        self._resident, self._predictor, self._here = resident, predictor, here
        self._table: Table | None = None

    @torch.compiler.disable
    def run(
        self,
        module: MappedExperts,
        hidden_TD: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's result, with the same bits as from the mapped files."""
        weights = experts.operands(module)
        on_engine = experts.may_run_natively(module, weights, hidden_TD, topk_weights)
        self._resident.read()
        wanted = _experts_hit(topk_indices, module.num_experts)
        if self._here is not None:
            self._here.update(wanted)
        ahead = None
        if self._predictor is not None and len(hidden_TD) <= FEW_TOKENS:
            ahead = lambda: self._predict(hidden_TD)  # noqa: E731 - asked for later, or never
        groups = self.cache.serve(self.number, wanted, len(hidden_TD), None if on_engine else 1, ahead)
        with closing(groups):
            if not on_engine:
                return self._reference(module, hidden_TD, topk_indices, topk_weights, groups)
            if self._table is None:
                self._table = module.table()
            out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
            given = weights.width, weights.dtype, weights.kind
            for group in groups:
                rows = [slot.key[1] for slot in group]
                found = torch.tensor([self.cache.addresses(slot) for slot in group])
                self._table.fill(rows, found.unflatten(1, (-1, len(PROJECTIONS))).transpose(1, 2))
                experts.accumulate(out_TD, hidden_TD, topk_indices, topk_weights, self._table.addresses, *given)
                self._table.clear(rows)
            return out_TD.to(hidden_TD.dtype)

    def _reference(self, module, hidden_TD, topk_indices, topk_weights, groups) -> torch.Tensor:
        def expert(index: int, x_RD: torch.Tensor) -> torch.Tensor:
            (slot,) = next(groups)
            read = self.cache.views(slot, module.reads(index))
            held = [mapped.scales for mapped in module.matrices(index).values()]
            codes, scales = read[: len(held)], read[len(held) :] or held
            nested = [
                own._replace(codes=part) if isinstance(own, NestedScales) else part
                for own, part in zip(held, scales, strict=True)
            ]
            matrices = [QuantizedMatrix(*pair) for pair in zip(codes, nested, strict=True)]
            return module.expert(matrices, x_RD)

        return experts.run_experts(hidden_TD, topk_indices, topk_weights, expert, module.num_experts)

    def _predict(self, hidden_TD: torch.Tensor) -> list[Key]:
        following = self._predictor.layer
        if not self.cache.layers[following].missed:
            return []
        missing = [expert for expert in self._predictor.rank(hidden_TD) if not self.cache.holds((following, expert))]
        return [(following, expert) for expert in self._predictor.predict(missing)]

    def __reduce__(self):
        return type(None), ()


def _experts_hit(topk_indices: torch.Tensor, num_experts: int) -> list[int]:
    """Ascending; indices beyond the experts mark slots that are served elsewhere."""
    if topk_indices.numel() <= 64:
        found = sorted(set(topk_indices.flatten().tolist()))
    else:
        found = topk_indices.unique().tolist()
    return [index for index in found if 0 <= index < num_experts]
