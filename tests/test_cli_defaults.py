"""Commands called with next to nothing, as a newcomer calls them: the checkpoint that ships, a question, lengths that fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modeling_deepseek_moe.cli import app, bench, generate
from modeling_deepseek_moe.cli._model import load_tokenizer
from modeling_deepseek_moe.tiny import tiny_checkpoint

TINY = tiny_checkpoint()


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.mark.parametrize(
    ("most", "found"),
    [(4096, ((128, 2048), 512)), (1024, ((128, 992), 512)), (100, ((68,), 100)), (33, ((1,), 33))],
)
def test_defaults_are_cut_to_the_model(most, found):
    assert bench._lengths(most, None, None, 32) == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prefill", 1025], "--prefill: found 1,025, wanted at most 1,024"),
        (["--tokens", 256], "--tokens and --repeat: found 1,024 tokens to decode, wanted fewer than 1,024"),
    ],
)
def test_lengths_that_were_asked_for_and_do_not_fit(options, words):
    result = run("bench", *options)
    assert result.exit_code == 2 and words in result.stderr


def test_a_small_model_by_default():
    result = run("bench", "--tokens", 1, "--repeat", 1, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["prefill"]["tokens"] == 512
    assert [row["context"] for row in found["decode"]] == [128, 1022]


def test_without_a_prompt_it_answers_a_question():
    for given in ((), ("-m", TINY), (TINY,)):
        result = run("generate", *given, "--temperature", 0)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.strip().endswith(r"The answer is \boxed{7}.")
        assert f"no prompt given: {generate.QUESTION}" in result.stderr
        assert ("no folder given: the tiny checkpoint that ships" in result.stderr) == (not given)


def test_the_question_is_put_as_the_model_is_spoken_to():
    tokenizer = load_tokenizer(Path(TINY))
    chat = tokenizer.decode(generate._question(tokenizer))
    tokenizer.chat_template = None
    text = tokenizer.decode(generate._question(tokenizer))
    assert chat == f"<bos>Question: {generate.QUESTION}\nAnswer:"
    assert text == f"Question: {generate.QUESTION}\nAnswer:"


@pytest.mark.slow
def test_an_empty_pipe_is_refused():
    program = "from modeling_deepseek_moe.cli import main; main()"
    command = [sys.executable, "-c", program, "generate"]
    result = subprocess.run(command, check=False, input="", capture_output=True, text=True)
    assert result.returncode == 2 and "error: stdin: found nothing, wanted a text" in result.stderr
