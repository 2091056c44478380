"""Logits of a GGUF file by llama.cpp, through its Python binding: `python llama_cpp_logits.py FILE.gguf IDS.json OUT.npy`."""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(file: str, ids: str, out: str) -> None:
    """For each row of ids the logits after each of them, stacked: ``[rows, T, V]``. The cache is fp32, and so is the file."""
    rows, found = json.loads(Path(ids).read_text()), []
    length = len(rows[0])
    settings = {"n_ctx": max(512, length), "n_batch": 512, "n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0}
    settings |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(file, logits_all=True, verbose=False, **settings)
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(np.array(model.scores[:length], dtype=np.float32))
    np.save(out, np.stack(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
