"""What others wrote reaches a terminal as text: a model's output, names in checkpoints and configs, labels, errors."""

import io
import json
import re
import sys

import pytest
import torch
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, read_header
from modeling_deepseek_moe.cli import _console, _model
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.terminal import shown

TITLE, CLIPBOARD, HIDE = "\x1b]0;OWNED\x07", "\x1b]52;c;cm0gLXJm\x1b\\", "\x9b2J\u202e\u2066\u200f"
HOSTILE = f"a{TITLE}{CLIPBOARD}{HIDE}\r\x7f\x08z"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def test_controls_are_shown_and_read_back():
    assert shown("\x1b[31mred\r\n\tü 中 🙂 é") == "\\u001b[31mred\\u000d\n\tü 中 🙂 é"
    assert shown("a\nb\tc", keep="") == "a\\u000ab\\u0009c"
    assert shown("\u202eevil\u2066\u061c\u2028\ud800") == "\\u202eevil\\u2066\\u061c\\u2028\\ud800"
    every = "".join(map(chr, range(0xD800))) + HOSTILE
    assert not OBEYED.search(shown(every))
    assert json.loads(shown(json.dumps(HOSTILE, ensure_ascii=False))) == HOSTILE
    assert shown("👩‍👩‍👧 می‌خواهم") == "👩‍👩‍👧 می‌خواهم"  # joiners are letters' business


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("out, obeyed", [(Terminal, False), (io.StringIO, True)], ids=["terminal", "pipe"])
def test_what_a_model_writes(monkeypatch, out, obeyed):
    """On a terminal it is shown; a pipe gets what the model wrote."""
    pieces = ["▁", "plain ", TITLE, "two\nlines\t", CLIPBOARD, HIDE, "end\n"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(dict(zip(pieces, range(9))), "▁")))  # noqa: B905
    tokenizer.clean_up_tokenization_spaces = False
    monkeypatch.setattr(sys, "stdout", out())
    streamer = _model.text_streamer(tokenizer)
    streamer.put(torch.tensor([[0]]))
    for token in range(1, len(pieces)):
        streamer.put(torch.tensor([token]))
    streamer.end()
    text = sys.stdout.getvalue()
    assert bool(OBEYED.search(text)) == obeyed
    assert "two\nlines\t" in text and (TITLE if obeyed else shown(TITLE)) in text


def rename(file, old, new):
    tensors = load_file(file)
    tensors[new] = tensors.pop(old)
    save_file(tensors, file, metadata={"format": "pt"})


def test_names_of_a_checkpoint(tmp_path):
    """Tensors that no model has, a part that is missing, a model type and a folder of that name: shown by every table and error."""
    folder = tmp_path / f"[red]{TITLE}"
    write_release(folder, SHAPES["v2-lite"](), shards=1)
    (file,) = folder.glob("*.safetensors")
    rename(file, "model.norm.weight", f"model.{HOSTILE}\nLoadable: all is well")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if file.name != "model.safetensors":
        file.rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [f"[link=http://evil]{HOSTILE}[/link]"]
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (
        ["inspect", str(folder)],
        ["inspect", str(folder), "--json"],
        ["generate", "-m", str(folder), "--token-ids", "1"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code in (1, 2) and not OBEYED.search(result.output), arguments
        assert "OWNED" in result.output and "\nLoadable" not in result.output, arguments


def test_tensors_that_transformers_names(tmp_path):
    """Its report of a load names those that have no place, in a log."""
    write_release(tmp_path, SHAPES["v2-lite"](), shards=1)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file) | {HOSTILE: torch.zeros(2), f"model.layers.0.{HOSTILE}\n": torch.zeros(2)}
    file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(found["unexpected_keys"]) == 2
    assert all("OWNED" in name and not OBEYED.search(name) and "\n" not in name for name in found["unexpected_keys"])


def test_errors_from_python(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        raise CheckpointError(f"model.safetensors: {HOSTILE}: found nothing")
    assert not OBEYED.search(str(caught.value)) and "OWNED" in str(caught.value)
    file = tmp_path / "x.safetensors"
    save_file({HOSTILE: torch.zeros(2)}, file)
    assert list(read_header(file)) == [HOSTILE]  # the name itself is as it was


def test_whatever_a_command_prints(capsys):
    from rich.table import Table

    console = _console.stdout()
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE, table, soft_wrap=True)
    console.print(f"[bold]{HOSTILE}[/]")
    _console.print_json({HOSTILE: HOSTILE})
    text = capsys.readouterr().out
    assert not OBEYED.search(text) and text.count("OWNED") >= 6
    assert json.loads(text[text.index("{") :]) == {HOSTILE: HOSTILE}
