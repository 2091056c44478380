"""Mapped files and the experts in them: addresses, copies, and files that change while they are mapped."""

import copy
import errno
import gc
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from releases import SHAPES, same_bits, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError, CheckpointReader
from modeling_deepseek_moe.checkpoint import mapped
from modeling_deepseek_moe.checkpoint import reader as checkpoint_reader
from modeling_deepseek_moe.checkpoint.headers import read_header
from modeling_deepseek_moe.quantized.mapped import MappedExperts

NORM = "model.norm.weight"


@dataclass
class Loaded:
    folder: object
    tensors: dict
    model: torch.nn.Module

    @property
    def experts(self) -> MappedExperts:
        return self.model.model.layers[1].mlp.experts


@pytest.fixture
def loaded(tmp_path):
    tensors = write_release(tmp_path / "release", SHAPES["v3-mtp"](), fp8=True, shards=3)
    return Loaded(
        tmp_path / "release", tensors, AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype="float32")
    )


def logits(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def addresses(experts):
    """As `MappedExperts.addresses`, from the views."""
    return torch.tensor(
        [
            [[matrix.codes.data_ptr(), matrix.scales.data_ptr()] for matrix in experts.matrices(index).values()]
            for index in range(experts.num_experts)
        ]
    )


def test_addresses_are_those_of_the_matrices(loaded):
    found = loaded.experts.addresses()
    assert found.dtype == torch.int64 and found.shape == (16, 3, 2)
    assert torch.equal(found, addresses(loaded.experts))
    assert loaded.experts.addresses() is found
    for name, matrix in loaded.experts.named_matrices():
        released = f"model.layers.1.mlp.experts.{name}.weight"
        assert same_bits(matrix.codes, loaded.tensors[released])
        assert same_bits(matrix.scales, loaded.tensors[f"{released}_scale_inv"])
    assert loaded.experts.num_mapped == 16 * 3 * 32 * 64


def test_infos_say_where_to_read(loaded):
    for index in range(16):
        matrices = loaded.experts.matrices(index)
        assert list(loaded.experts.infos(index)) == list(matrices)
        for name, info in loaded.experts.infos(index).items():
            assert info == CheckpointReader.open(loaded.folder)[info.name]
            assert info.name == f"model.layers.1.mlp.experts.{index}.{name}.weight"
            with info.file.open("rb") as stream:
                codes = os.pread(stream.fileno(), info.nbytes, info.start)
            assert codes == matrices[name].codes.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copy_has_addresses_of_its_own(loaded, how):
    wanted, theirs = logits(loaded.model), loaded.experts.addresses().clone()
    if how == "deepcopy":
        model = copy.deepcopy(loaded.model)
    else:
        stream = io.BytesIO()
        torch.save(loaded.model, stream)
        assert len(stream.getvalue()) < 1.5 * sum(tensor.nbytes for tensor in loaded.tensors.values())
        stream.seek(0)
        model = torch.load(stream, weights_only=False)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(experts.addresses(), addresses(experts))
    assert not (experts.addresses()[..., 1] == theirs[..., 1]).any()
    del loaded.model
    assert torch.equal(logits(model), wanted)


def shard_of(experts):
    return experts.infos(0)["gate_proj"].file


def truncate(file):
    os.truncate(file, file.stat().st_size - 100)


def lengthen(file):
    os.truncate(file, file.stat().st_size + 100)


def rewrite(file):
    data = file.read_bytes()
    file.write_bytes(data)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("change", [truncate, lengthen, rewrite], ids=lambda change: change.__name__)
def test_a_file_changed_in_place_is_named(loaded, change):
    file = shard_of(loaded.experts)
    size = file.stat().st_size
    loaded.experts.check_seconds = 0
    loaded.experts.check_files()
    change(file)
    with pytest.raises(CheckpointError) as caught:
        loaded.experts.check_files()
    for fragment in (file, f"found {file.stat().st_size} bytes", f"wanted {size} bytes"):
        assert str(fragment) in str(caught.value)
    with pytest.raises(CheckpointError, match="found"):
        next(loaded.experts.named_matrices())


def test_files_are_looked_at_now_and_then(loaded, monkeypatch):
    truncate(shard_of(loaded.experts))
    loaded.experts.check_files()  # within the second
    other = loaded.model.model.layers[2].mlp.experts
    monkeypatch.setattr(MappedExperts, "check_seconds", 0.0)
    with pytest.raises(CheckpointError):
        other.check_files()
    monkeypatch.setattr(MappedExperts, "check_seconds", 60.0)
    loaded.experts.check_files()  # the other's look was for both


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_file_that_lost_its_name_is_still_mapped(loaded, how, tmp_path):
    wanted = logits(loaded.model)
    loaded.experts.check_seconds = 0
    for number, file in enumerate(loaded.folder.glob("*.safetensors")):
        if how == "deleted":
            file.unlink()
        else:
            other = tmp_path / str(number)
            other.write_bytes(b"something else")
            other.replace(file)
    loaded.experts.check_files()
    assert torch.equal(logits(loaded.model), wanted)
    stream = io.BytesIO()
    torch.save(loaded.experts, stream)
    stream.seek(0)
    with pytest.raises(CheckpointError, match=r"found .*wanted"):  # where there is nothing to map
        torch.load(stream, weights_only=False)


def test_a_file_replaced_after_its_header_was_read(tmp_path):
    write_release(tmp_path, SHAPES["v3"]())
    reader = CheckpointReader.open(tmp_path)
    file = tmp_path / "model.safetensors"
    (tmp_path / "other").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "other").replace(file)
    with pytest.raises(CheckpointError, match=rf"{file}: found \d+ bytes.*wanted \d+ bytes"):
        reader.tensor(NORM)
    file.unlink()
    with pytest.raises(CheckpointError, match="found no such file"):
        reader.tensor(NORM)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="a system without huge pages")
def test_files_are_read_in_huge_pages(loaded):
    address = loaded.experts.matrices(0)["down_proj"].codes.data_ptr()
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    bounds = ([int(bound, 16) for bound in area.split(" ", 1)[0].split("-")] for area in areas)
    (area,) = (area for area, (first, last) in zip(areas, bounds, strict=True) if first <= address < last)
    assert ".safetensors" in area and "hg" in re.search("VmFlags: (.*)", area).group(1).split()


def test_a_kernel_without_huge_pages(loaded, monkeypatch):
    monkeypatch.setattr(mapped, "HUGE_PAGES", 9999)
    model = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype="float32")
    assert same_bits(model.model.norm.weight, loaded.model.model.norm.weight)


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    header = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        try:
            stream.truncate(8 + len(text) + size)
        except OSError as error:
            pytest.skip(f"no sparse files of {size} bytes here: {error}")
    tensor = CheckpointReader.open(tmp_path).tensor("x")
    assert len(tensor) == size and tensor[-1] == 0
    tensor[-1] = 7  # private: the file does not change
    assert CheckpointReader.open(tmp_path).tensor("x")[-1] == 0


@pytest.mark.parametrize("layout", ["together", "scattered"])
@pytest.mark.parametrize("preadv", [True, False], ids=["preadv", "no-preadv"])
def test_scales_are_read_wherever_they_lie(tmp_path, monkeypatch, preadv, layout):
    tensors = write_release(tmp_path, SHAPES["v3"](), fp8=True)
    file = tmp_path / "model.safetensors"
    if layout == "scattered":
        file.write_bytes(interleaved(tensors))
    calls = []
    if preadv:
        monkeypatch.setattr(os, "preadv", lambda *args, real=os.preadv: calls.append(args) or real(*args))
    else:
        monkeypatch.delattr(os, "preadv")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    # together, but for the correction biases of two layers, which are fp32 too
    assert len(calls) == (0 if not preadv else 3 if layout == "together" else len(scales))
    for name in scales:
        weight = name.removesuffix("_scale_inv").removesuffix(".weight")
        if ".experts." in name:
            prefix, _, rest = weight.partition(".experts.")
            index, projection = rest.split(".")
            found = model.get_submodule(f"{prefix}.experts").matrices(int(index))[projection].scales
        else:
            found = model.get_submodule(weight).weight_scale_inv
        assert same_bits(found.detach(), tensors[name])


@pytest.mark.skipif(sys.platform != "linux", reason="a flag of Linux")
@pytest.mark.parametrize("system", ["new", "old kernel", "old libc"])
@pytest.mark.parametrize("way", ["small once", "large once", "small", "large"])
def test_what_stays_mapped_leaves_no_small_pages(tmp_path, monkeypatch, way, system):
    """What is read once is read past the mapping whatever its size; what stays mapped, by its size, through it or uncached."""
    tensors = write_release(tmp_path, SHAPES["v3"](), fp8=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(interleaved(tensors))
    flags = []

    def read(descriptor, buffers, start, flag=0, preadv=os.preadv):
        flags.append(flag)
        if flag and system == "old kernel":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if flag and system == "old libc":
            raise NotImplementedError("preadv2: flags unavailable on this platform")
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(checkpoint_reader, "HUGE_PAGE", 1 if way.startswith("large") else 1 << 40)
    infos = [info for info in read_header(file).values() if "_scale_inv" in info.name]
    held = {info.name: bytearray(info.nbytes) for info in infos}
    reader = CheckpointReader.open(tmp_path)
    reader.read_into(infos, lambda info: memoryview(held[info.name]), among_mapped="once" not in way)
    assert all(held[name] == tensors[name].view(torch.uint8).numpy().tobytes() for name in held)
    uncached = [checkpoint_reader.DONT_CACHE] if system == "new" else [checkpoint_reader.DONT_CACHE, 0]
    wanted = {"small once": [0], "small": uncached}.get(way, []) * len(infos)
    assert flags == wanted and len(reader.mapped._mappings) == (way == "large")


def test_a_file_cut_short_before_it_is_read_through_its_mapping(loaded, monkeypatch):
    monkeypatch.setattr(checkpoint_reader, "HUGE_PAGE", 1)
    reader = CheckpointReader.open(loaded.folder)
    info = next(info for info in reader.values() if info.name.endswith("experts.3.up_proj.weight_scale_inv"))
    reader.view(info)
    os.truncate(info.file, info.start)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(info.file))}: found .*changed after the checkpoint"):
        reader.read_into([info], lambda info: memoryview(bytearray(info.nbytes)), among_mapped=True)


def interleaved(tensors) -> bytes:
    """A file in which every tensor has its scale next to it, and none lies aligned."""
    header, data = {}, b""
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = list(tensor.shape)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    return len(text).to_bytes(8, "little") + text + data


def test_a_size_must_be_an_integer(tmp_path):
    """A number that equals an integer seen before is none."""
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["b"]["shape"] = [4.0]
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(CheckpointError, match=r"tensor b: found .*wanted non-negative integers"):
        read_header(tmp_path / "x.safetensors")


def test_one_bad_scale_among_many_is_named(loaded):
    name = "model.layers.2.mlp.experts.11.up_proj.weight_scale_inv"
    file = CheckpointReader.open(loaded.folder)[name].file
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(loaded.folder)
    for fragment in (file, f"tensor {name}: found nan at [0, 0]", "wanted finite"):
        assert str(fragment) in str(caught.value)


def test_headers_are_read_once(loaded, monkeypatch):
    files = []
    monkeypatch.setattr(checkpoint_reader, "read_header", lambda file: files.append(file) or read_header(file))
    AutoModelForCausalLM.from_pretrained(loaded.folder)
    assert sorted(files) == sorted(loaded.folder.glob("*.safetensors"))
    monkeypatch.chdir(loaded.folder.parent)
    AutoModelForCausalLM.from_pretrained(loaded.folder.name)
    assert len(files) == 6


@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
def test_the_garbage_collector_is_left_as_it_was(loaded, enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        AutoModelForCausalLM.from_pretrained(loaded.folder)
        assert gc.isenabled() == enabled
        (loaded.folder / "model-00001-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError):
            AutoModelForCausalLM.from_pretrained(loaded.folder)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
