"""transformers' own common model tests, taken from its source distribution on the package index.

The wheel has no tests. The source distribution has the mixins but not three modules that they import: stand-ins of
ours are put in their places. Everything lies under a package name of its own, since this folder is called tests too.
"""

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers

PACKAGE = "transformers_common_tests"
STAND_INS = {
    # `ConfigTester` loads this folder's __init__.py by its path
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": """\
# A value other than the default for each field of PreTrainedConfig that a decoder can take.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
    "tie_word_embeddings": True,
    "bos_token_id": 6,
    "pad_token_id": 7,
    "eos_token_id": 8,
}
""",
}


def find_sdist() -> Path:
    """The source distribution, an archive or a folder: ``TRANSFORMERS_SDIST``, or else downloaded once through pip."""
    if given := os.environ.get("TRANSFORMERS_SDIST"):
        return Path(given)
    name = f"transformers-{transformers.__version__}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modeling_deepseek_moe"
    archive = cache / f"{name}.tar.gz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            # without isolation pip fetches no build tools just to read the archive's metadata
            pip += ["--no-build-isolation", "--dest", folder, f"transformers=={transformers.__version__}"]
            subprocess.run(pip, check=True)
            Path(folder, archive.name).replace(archive)
    return archive


def lay_out(sdist: Path, folder: Path) -> None:
    """Copy the tests of ``sdist`` to ``folder``, and add what they import and it lacks."""
    if sdist.is_dir():
        for path in (sdist / "tests").glob("test_*.py"):
            shutil.copy(path, folder)
    else:
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = Path(member.name)
                if member.isfile() and path.parts[1:2] == ("tests",) and path.match("tests/test_*.py"):
                    (folder / path.name).write_bytes(archive.extractfile(member).read())
    for name, text in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def load(name: str) -> ModuleType:
    """The module ``tests/{name}.py`` of the source distribution."""
    if PACKAGE not in sys.modules:
        root = tempfile.mkdtemp(prefix=f"{PACKAGE}-")
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        folder = Path(root, PACKAGE)
        folder.mkdir()
        lay_out(find_sdist(), folder)
        sys.path.append(root)
    return importlib.import_module(f"{PACKAGE}.{name}")
