"""The weights that every token reads, brought from the mapped files into memory.

As pages of the file they would be read by page faults, slowly, and be the first to go when memory is short.
"""

import threading
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.machine import probe_machine
from modeling_deepseek_moe.planning import WORKSPACE_BYTES
from modeling_deepseek_moe.streaming.memory import Memory
from modeling_deepseek_moe.streaming.reader import Reader, plan_runs

logger = logging.get_logger(__name__)
SMALL = 1 << 20  # copied; what is larger is read past the page cache


class ResidentWeights:
    """Parameters and buffers of ``modules`` that are views into ``files``; embeddings, of which a token reads one row, stay there.

    They are read when the first token comes, not when the model is loaded.
    """

    def __init__(self, modules: Iterable[nn.Module], files: MappedFiles):
        self._modules = [weakref.ref(module) for module in modules if not isinstance(module, nn.Embedding)]
        self._files = files
        self._lock = threading.Lock()
        self._is_read = False

    def find(self) -> dict[torch.Tensor, TensorInfo]:
        """The tensors that are still in the files, and where."""
        found = {}
        for module in filter(None, (reference() for reference in self._modules)):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                place = self._files.find(tensor)
                if place is not None and tensor.is_contiguous():
                    file, start = place
                    found[tensor] = TensorInfo(
                        name, tensor.dtype, tuple(tensor.shape), file, start, start + tensor.nbytes
                    )
        return found

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.find().values())

    @torch.no_grad()
    def read(self) -> None:
        """Once: later calls do nothing. Without the memory for it, everything stays in the files."""
        if self._is_read:
            return
        with self._lock:
            if self._is_read:
                return
            found = self.find()
            nbytes = sum(info.nbytes for info in found.values())
            available = probe_machine(measure=False).ram_available
            if nbytes + WORKSPACE_BYTES // 2 > available:
                logger.warning(
                    f"{nbytes / 1e9:.1f} GB of weights besides the experts stay in the mapped files: found "
                    f"{available / 1e9:.1f} GB of memory available"
                )
                self._is_read = True
                return
            reader = Reader(self._files)
            try:
                for tensor, info in found.items():
                    tensor.data = tensor.clone() if info.nbytes < SMALL else _read(reader, info)
            finally:
                reader.close()
            self._is_read = True  # not after an error of the disk: the next token tries again


def _read(reader: Reader, info: TensorInfo) -> torch.Tensor:
    (run,) = plan_runs([info])
    memory = Memory(run.nbytes)
    reader.read(run, memory.part(0, run.nbytes))
    return memory.tensor(run.place_of(info), info.shape, info.dtype)
