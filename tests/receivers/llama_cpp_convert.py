"""Runs llama.cpp's own `convert_hf_to_gguf.py` on a folder whose tokenizer llama.cpp has no name for.

    python llama_cpp_convert.py LLAMA_CPP FOLDER OUT.gguf f32

The converter knows a release by a hash of what its tokenizer makes of a text, and refuses a tokenizer it does not know, such as
that of the tiny checkpoint. A model class of its own, registered as the converter's are, answers that one question; configs
and tensors take the converter's path. With the tokenizer of a release the converter runs as it is.
"""

import runpy
import sys
from importlib import import_module
from pathlib import Path


def main(root: str, folder: str, out: str, outtype: str) -> None:
    sources = Path(root) / "vendor" / "llama.cpp"
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    # llama.cpp's package of that name, not this project's folder
    register = import_module("conversion").ModelBase.register
    release = import_module("conversion.deepseek").DeepseekV2Model

    @register("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
    class Converter(release):
        model_arch = release.model_arch

        def get_vocab_base_pre(self, tokenizer) -> str:
            return "gpt-2"  # byte-level BPE

    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", outtype]
    runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
