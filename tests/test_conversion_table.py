"""The table of conversions: each declared where its name says, reversible as it says, run by both commands, one at a time."""

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from releases import same_bits, write_release
from safetensors.torch import load_file
from test_conversion_roundtrip import CONFIG, convert, ok, read

from modeling_deepseek_moe import conversion, formats
from modeling_deepseek_moe.cli import convert as command
from modeling_deepseek_moe.conversion import _job
from modeling_deepseek_moe.conversion._conversion import Conversion, Options
from modeling_deepseek_moe.conversion._table import CONVERSIONS, READERS

MODULES = [module.name for module in pkgutil.iter_modules(conversion.__path__) if not module.name.startswith("_")]
# options of a conversion, and of its inverse, which is given the input where it asks for a folder
THERE_AND_BACK = {
    "fp8-to-bf16": ([], ["--scales-from", "{in}"]),
    "reshard": (["--max-shard-size", "300kB"], []),
    "hf-to-native": (["--world-size", "2"], []),
    "native-to-hf": ([], ["--world-size", "2"]),
    "mtp": (["--action", "drop"], ["--action", "graft", "--mtp-from", "{in}"]),
}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "fp8"
    write_release(folder, CONFIG, fp8=True, shards=3)
    return folder


def test_every_file_declares_what_it_is_named_after():
    assert {name.replace("_", "-") for name in MODULES} == {*CONVERSIONS, *READERS}
    for name, found in CONVERSIONS.items():
        module = importlib.import_module(f"{conversion.__name__}.{name.replace('-', '_')}")
        assert module.CONVERSION is found and found.name == name
        assert ast.get_docstring(ast.parse(Path(module.__file__).read_text())).startswith(f"``{name}``:")
        assert set(found.required) <= set(found.options) <= set(Options._fields)
        assert not found.inverse or found.inverse in CONVERSIONS


def test_a_conversion_has_an_inverse_or_says_why_not():
    with pytest.raises(AssertionError, match="an inverse, or why there is none"):
        Conversion("x", plan=None)
    with pytest.raises(AssertionError, match="an inverse, or why there is none"):
        Conversion("x", plan=None, inverse="y", no_inverse="z")


def test_help_and_docs_name_all():
    help_text = " ".join(convert("--help").output.replace("│", " ").split())
    docs = (Path(__file__).parents[1] / "docs" / "conversion.md").read_text()
    for name, found in CONVERSIONS.items():
        assert name in command.convert.__annotations__["name"].__metadata__[0].help and name in help_text
        assert f"| `{name}` |" in docs
        undoes = f"`{found.inverse}`" if found.inverse else "–"
        assert any(line.startswith(f"| `{name}` |") and line.endswith(f"| {undoes} |") for line in docs.splitlines())


def test_there_and_back_is_complete():
    assert THERE_AND_BACK.keys() == {name for name, found in CONVERSIONS.items() if found.inverse}


@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_an_inverse_gives_every_byte_back(release, tmp_path, name):
    there, back = ([part.replace("{in}", str(tmp_path / "in")) for part in parts] for parts in THERE_AND_BACK[name])
    if name == "native-to-hf":
        ok("hf-to-native", release, tmp_path / "in", "--world-size", 2)
    else:
        (tmp_path / "in").symlink_to(release)
    ok(name, tmp_path / "in", tmp_path / "made", *there)
    ok(CONVERSIONS[name].inverse, tmp_path / "made", tmp_path / "back", *back)
    if name == "native-to-hf":
        files = sorted(path.name for path in (tmp_path / "in").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "back").iterdir())
        for file in (tmp_path / "in").glob("*.safetensors"):
            wanted, found = load_file(file), load_file(tmp_path / "back" / file.name)
            assert wanted.keys() == found.keys()
            assert all(same_bits(found[key], tensor) for key, tensor in wanted.items()), file.name
    else:
        assert "identical" in ok("diff", release, tmp_path / "back")
    fields = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "back")]
    assert fields[0] == fields[1]


@pytest.mark.slow
def test_run_as_a_module(release, tmp_path):
    arguments = [sys.executable, "-m", "modeling_deepseek_moe.conversion", "reshard", release, tmp_path / "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "in 1 file" in done.stdout, done.stdout + done.stderr
    assert read(tmp_path / "out").keys() == read(release).keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nothing",), "conversion 'nothing' is not known, wanted one of fp8-to-bf16,"),
        (("reshard", "--dtype", "float32"), "reshard has no use for --dtype float32"),
        (("hf-to-native", "--max-shard-size", "1GB"), "hf-to-native has no use for --max-shard-size 1GB"),
        (("dtype",), "dtype wants --dtype, such as --dtype float32"),
        (("dtype", "--dtype", "int8"), "--dtype int8 is not known, wanted one of bfloat16, float16, float32"),
        (("merge-adapter",), "merge-adapter wants --adapter, a folder with adapter_config.json"),
        (("mtp",), "mtp wants --action, one of drop, extract, graft"),
        (("mtp", "--action", "x"), "--action x is not known"),
        (("hf-to-native", "--world-size", "0"), "--world-size 0 is not a number of ranks, wanted 1 to"),
    ],
)
def test_options_are_checked_by_name(release, tmp_path, arguments, message):
    name, *options = arguments
    result = convert(name, release, tmp_path / "out", *options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("second", ["reshard", "fp8-to-bf16"])
def test_two_at_once_into_one_folder(release, tmp_path, monkeypatch, second):
    """The second is refused by name, whatever it converts; the first is not disturbed."""
    write, under_way, go_on, written = _job.write_shard, threading.Event(), threading.Event(), []

    def wait(path, name, *arguments):
        if written:  # there is a finished shard, and another is being written
            under_way.set()
            assert go_on.wait(60)
        write(path, name, *arguments)
        written.append(name)

    monkeypatch.setattr(_job, "write_shard", wait)
    arguments = (release, tmp_path / "out", "--max-shard-size", "1MB", "--workers", 1)
    first = threading.Thread(target=lambda: _job.run(*job_of("reshard", release, tmp_path / "out")))
    first.start()
    assert under_way.wait(60)
    result = convert(second, *arguments)
    dry_run = convert("reshard", *arguments, "--dry-run")
    go_on.set()
    first.join()
    assert result.exit_code == 2
    assert f"{tmp_path}/out.partial: found another save or conversion" in " ".join(result.output.split())
    assert dry_run.exit_code == 0
    assert "identical" in ok("diff", release, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def job_of(name, folder, out):
    from modeling_deepseek_moe.conversion import _table

    return _table.make_job(name, folder, Options(max_shard_size="1MB")), out


def test_what_a_kill_left_does_not_reach_the_result(release, tmp_path):
    """Temporary files of a killed run are in OUT.partial, which becomes OUT."""
    job, out = job_of("reshard", release, tmp_path / "out")
    partial = _job.partial_folder(out)
    partial.mkdir()
    left = partial / ".model-00001-of-00004.safetensors.0123456789abcdef.tmp"
    left.write_bytes(b"half a shard")
    run = {"run": job.run()}
    _job.journal_file(out).write_text(json.dumps(run) + "\n" + '{"key": "model-00001-of-0000')
    ok("reshard", release, out, "--max-shard-size", "1MB")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert "identical" in ok("diff", release, out)


def test_a_shard_of_another_size_is_written_again(release, tmp_path):
    """A power cut may leave a name without all of its bytes: what the journal says is compared with the disk."""
    job, out = job_of("reshard", release, tmp_path / "out")
    partial = _job.partial_folder(out)
    partial.mkdir()
    name = next(iter(job.shards))
    (partial / name).write_bytes(b"half")
    lines = [{"run": job.run()}, {"key": name, "answer": 1_000_000}]
    _job.journal_file(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _job.finished_shards(job, out) == set()
    ok("reshard", release, out, "--max-shard-size", "1MB")
    assert "identical" in ok("diff", release, out)


def test_files_of_somebody_else_are_left_alone(release, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    result = convert("reshard", release, tmp_path / "out")
    assert result.exit_code == 2 and "found files without out.journal" in " ".join(result.output.split())
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_the_way_out_of_codes_names_them():
    """One command converts every format; its name is the first one's."""
    assert formats.by_name("fp8").converter == "`deepseek-moe convert fp8-to-bf16`"
    assert formats.by_name("int4").converter == "`deepseek-moe convert fp8-to-bf16`, which takes INT4 too"
