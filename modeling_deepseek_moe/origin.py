"""Where a model's tensors came from: the files that they are still views of, and values as released where those are finer.

Weights loaded on a CPU are views into mapped files. A file that is cut short or written to under the model is an error
at the start of the next call. And a release may hold tensors in another dtype than it is computed in, such as norms in
fp32 (DeepSeek-V3.1-Terminus): what was not changed is written back as the file has it. So is what no layer here reads, such as
a vision tower.
"""

from collections.abc import Set
from itertools import chain

import torch
from torch import nn
from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.formats import split_scale
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.release import FLOATS, Release

logger = logging.get_logger(__name__)


class Origin:
    """Of one load. A copy of a model shares it; a pickled one holds its own data, and forgets it."""

    def __init__(self, release: Release | None = None, dtype: torch.dtype | None = None):
        """
        Args:
            dtype: what the model is computed in.
        """
        self._files = None if release is None else release.reader.mapped
        self._carried_files = self._files  # these stay: nothing of the model may be read from the files any more
        self._released: dict[str, torch.Tensor] = {}
        self._carried = {info.name: release.reader.view(info) for info in release.carried.values()} if release else {}
        if release is None or dtype != (release.announced_dtype or dtype):
            return  # computed in another dtype than the release says: the caller's wish, for the file too
        for name, info in release.infos.items():
            is_finer = info.dtype in FLOATS and info.dtype != dtype and split_scale(name)[1] is None
            if is_finer and not name.endswith(".e_score_correction_bias"):  # which its router remembers
                self._released[name] = release.reader.view(info)

    @classmethod
    def of_files(cls, files: MappedFiles) -> "Origin":
        """Of tensors that are what the files hold, in their dtypes: there is nothing but the files to be looked at."""
        origin = cls()
        origin._files = files
        return origin

    def check(self, model: nn.Module) -> None:
        """Look at the mapped files, if anything of ``model`` is still read from them.

        Raises:
            CheckpointError: a file was truncated, where reading on would kill the process, or rewritten.
        """
        if torch.compiler.is_compiling() or self._files is None:
            return
        try:
            self._files.check_unchanged()
        except CheckpointError:
            if self._is_read_by(model):
                raise
            self._files = None

    def _is_read_by(self, model: nn.Module) -> bool:
        if any(isinstance(module, MappedExperts) for module in model.modules()):
            return True
        return any(self._files.find(tensor) for tensor in chain(model.parameters(), model.buffers()))

    def as_released(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of ``tensors`` (by the release's names) those that are still what the file holds in another dtype: as it does."""
        wanted = {name: tensor for name, tensor in tensors.items() if name in self._released}
        if not wanted:
            return {}
        try:
            if self._files is None:
                raise CheckpointError("files that changed after the checkpoint was opened")
            self._files.check_unchanged()
        except CheckpointError as error:
            logger.warning(
                f"{error}. {len(wanted)} tensors that the release held in another dtype are saved in the model's."
            )
            return {}
        return {name: self._released[name] for name, tensor in wanted.items() if is_same(self._released[name], tensor)}

    @property
    def finer(self) -> Set[str]:
        """The names of what the release holds in another dtype than the model is computed in."""
        return self._released.keys()

    def carried(self) -> dict[str, torch.Tensor]:
        """What the release has and the model has no place for, by its names there.

        Raises:
            CheckpointError: the files that hold it changed after they were opened.
        """
        if self._carried and self._carried_files is not None:
            self._carried_files.check_unchanged()
        return self._carried

    def __deepcopy__(self, memo) -> "Origin":
        return self

    def __reduce__(self):
        return Origin, ()


def is_same(released: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a model's tensor is the released one, rounded to the dtype that the model is computed in."""
    return released.shape == tensor.shape and torch.equal(released.to(tensor.dtype), tensor.detach().cpu())


def released_bias(router: DeepseekTopkRouter, bias: torch.Tensor) -> torch.Tensor:
    """A router's bias in the dtype that its release stores it in, if it is still one of that dtype."""
    narrow = bias.to(router.bias_release_dtype)
    return narrow if torch.equal(narrow.to(bias.dtype), bias) else bias
