"""The command line, as a user types it, on small checkpoints with a small tokenizer."""

import copy
import json
import re
import shutil
import string

import pytest
import torch
from releases import SHAPES, write_release
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from modeling_deepseek_moe import Machine, parameter_breakdown, read_config
from modeling_deepseek_moe.cli import app, chat
from modeling_deepseek_moe.cli._console import count, rate, size
from modeling_deepseek_moe.cli._model import Dtype, IdStreamer, Meter, generation_settings, load_model, load_tokenizer
from modeling_deepseek_moe.cli.app import COMMANDS
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.machine import Bandwidth
from modeling_deepseek_moe.planning import IN_MEMORY

SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<user>{{ m.content }}{% else %}<assistant>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(folder, chat_template=TEMPLATE):
    """A byte-level tokenizer without merges: any text, a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=list(SPECIAL[2:])
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints in fp32 and in FP8, with a tokenizer, and one in bf16 without."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, fp8, dtype in (("fp32", False, torch.float32), ("fp8", True, torch.bfloat16)):
        config = SHAPES["v3-mtp"]()
        config.vocab_size, config.bos_token_id, config.eos_token_id = 260, 0, 1
        write_release(root / name, config, fp8=fp8, dtype=dtype, shards=2)
        write_tokenizer(root / name)
    write_release(root / "bare", SHAPES["v2-lite"]())
    return root


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def run_json(*arguments):
    result = run(*arguments, "--json")
    return json.loads(result.stdout), result.exit_code


@pytest.fixture
def quick(monkeypatch):
    """`plan` without measuring: 24 GB of memory at 40 GB/s."""
    machine = Machine(25 * 10**9, 24 * 10**9, 2, Bandwidth(40e9, 10**9, 3))
    monkeypatch.setattr("modeling_deepseek_moe.cli.plan.probe_machine", lambda: machine)


class TestHelp:
    def test_names_every_command(self):
        result = run("--help")
        assert result.exit_code == 0
        for command in ("plan", "inspect", "generate", "chat"):
            assert f"deepseek-moe {command}" in result.stdout
        listed = result.stdout.partition("Commands")[2]
        for command in COMMANDS:
            assert re.search(rf"^\W*{command.__name__} ", listed, re.MULTILINE), command.__name__

    @pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
    def test_teaches_by_example(self, command):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Examples:" in result.stdout
        assert f"deepseek-moe {command}" in result.stdout.partition("Examples:")[2]

    def test_version(self):
        assert run("--version").stdout.startswith("deepseek-moe 0.")


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("inspect", "nowhere"), "nowhere: found no such file or folder"),
            (("plan", "deepseek-ai/DeepSeek-V3"), "hf download deepseek-ai/DeepSeek-V3 config.json"),
            (("generate", "-m", "nowhere", "hello"), "nowhere: found no such folder"),
            (("chat", "-m", "nowhere"), "nowhere: found no such folder"),
            (("generate", "-m", "nowhere", "--token-ids", "1,x"), "'1,x', wanted integers"),
            (("generate", "-m", "nowhere", "hello", "--token-ids", "1"), "a prompt and --token-ids"),
        ],
    )
    def test_are_one_line(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert message in result.stderr

    def test_debug_shows_where(self, tmp_path):
        result = run("--debug", "inspect", tmp_path / "nowhere")
        assert isinstance(result.exception, ValueError)
        assert "nowhere" in str(result.exception)

    def test_a_defect_is_named_as_such(self, folders, monkeypatch):
        def fail(*arguments):
            raise KeyError("lost")

        monkeypatch.setattr("modeling_deepseek_moe.cli.inspect.inspect_checkpoint", fail)
        result = run("inspect", folders / "fp8")
        assert result.exit_code == 2
        assert "KeyError: 'lost'" in result.stderr and "--debug" in result.stderr


class TestInspect:
    def test_shows_what_there_is(self, folders):
        result = run("inspect", folders / "fp8")
        assert result.exit_code == 0
        for text in ("deepseek_v3", "routed experts", "scales", "float8_e4m3fn", "+ 1 MTP", "Loadable"):
            assert text in result.stdout

    def test_json(self, folders):
        found, code = run_json("inspect", folders / "fp8")
        assert code == 0 and found["loadable"] and found["findings"] == {}
        breakdown = parameter_breakdown(read_config(folders / "fp8"))
        assert found["parameters"]["total"] == breakdown.parameters
        assert sum(part["nbytes"] for part in found["parts"].values()) == found["bytes"]
        assert sum(dtype["tensors"] for dtype in found["dtypes"].values()) == found["tensors"]

    def test_exit_code_tells_a_folder_that_does_not_load(self, folders, tmp_path):
        broken = shutil.copytree(folders / "fp8", tmp_path / "broken")
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"n_routed_experts": 20}))
        result = run("inspect", broken, "--limit", 3)
        assert result.exit_code == 1
        # 4 experts more in each of 2 layers and the MTP layer, 3 matrices each
        assert "36 × missing tensors" in result.stdout
        assert "... and 33 more" in result.stdout
        assert "Not loadable" in result.stdout
        found, code = run_json("inspect", broken)
        assert code == 1 and not found["loadable"]
        assert found["findings"]["missing"]["count"] == 36


class TestPlan:
    def test_shows_what_fits(self, folders, quick):
        result = run("plan", folders / "fp8" / "config.json")
        assert result.exit_code == 0
        for text in (
            "fp8 mapped",
            "bf16 dequantised",
            "fits",
            "240 bytes per token",
            "24.0 GB available",
            "40.0 GB/s",
        ):
            assert text in result.stdout

    def test_json(self, folders, quick):
        plan, code = run_json("plan", folders / "fp8", "--context", 1000)
        assert code == 0 and plan["verdict"] == IN_MEMORY
        assert plan["cache_bytes"] == 240 * 1000
        option = plan["options"][0]
        assert option["tokens_per_second_limit"] == pytest.approx(40e9 / option["read_bytes_per_token"])

    def test_measures_this_machine(self, folders):
        plan, _ = run_json("plan", folders / "bare")
        assert plan["machine"]["bandwidth"]["bytes_per_second"] > 1e8
        assert plan["machine"]["ram_bytes"] >= plan["machine"]["ram_available"] > 0


class TestBench:
    def test_measures_a_folder(self, folders):
        found, _ = run_json("bench", folders / "fp8", "--context", 20, "--prefill", 16, "--tokens", 2, "--repeat", 1)
        (row,) = found["decode"]
        assert row["context"] == 20 and row["tokens_per_second"] > 0 and found["prefill"]["tokens"] == 16
        breakdown = parameter_breakdown(read_config(folders / "fp8"))
        assert row["bytes_per_token"] == breakdown.active_bytes(FP8) + breakdown.cache_bytes(20)
        share = row["bytes_per_token"] * row["tokens_per_second"] / found["bandwidth"]
        assert row["share_of_bandwidth"] == pytest.approx(share)

    def test_random_weights_of_a_config(self, folders):
        result = run("bench", folders / "fp8" / "config.json", "--layers", 2, "--context", 20, "--repeat", 1)
        assert result.exit_code == 0, result.stderr
        assert "decoding at 20" in result.stdout and "of bandwidth" in result.stdout

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--layers", 1], "is for random"),
            (["--context", 10**7], "--context: found 10,000,000, wanted at most 2,528"),
            (["--expert-memory", "8"], "size"),
        ],
    )
    def test_rejects_invalid_options(self, folders, options, words):
        result = run("bench", folders / "fp8", *options)
        assert result.exit_code == 2 and words in result.stderr


class TestGenerate:
    def expected(self, folder, prompt, count, **options):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)  # or generate would take id 0 for padding
        output = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return output[0, len(prompt) :].tolist()

    @pytest.mark.parametrize("kind", ["fp32", "fp8"])
    def test_ids_are_the_models(self, folders, kind):
        result = run("generate", "-m", folders / kind, "--token-ids", "0,50,60", "-n", 8, "--temperature", 0)
        assert result.exit_code == 0, result.stderr
        expected = self.expected(folders / kind, [0, 50, 60], 8, dtype="auto")
        assert result.stdout == ",".join(map(str, expected)) + "\n"

    def test_text_is_the_models(self, folders):
        result = run("generate", "-m", folders / "fp32", "Hello", "-n", 8, "--temperature", 0)
        tokenizer = AutoTokenizer.from_pretrained(folders / "fp32")
        expected = self.expected(folders / "fp32", tokenizer("Hello").input_ids, 8, dtype="auto")
        assert result.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
        # "Hello" and <bos>; 3 layers of 40 values in fp32
        assert "6 prompt tokens at" in result.stderr
        assert "8 new at" in result.stderr and "480 bytes per token" in result.stderr

    def test_prompt_from_a_pipe(self, folders):
        arguments = ("generate", "-m", folders / "fp32", "-n", 4, "--temperature", 0)
        assert run(*arguments, input="Hello").stdout == run(*arguments, "Hello").stdout

    def test_a_seed_repeats(self, folders):
        def sample(seed):
            return run("generate", "-m", folders / "fp32", "Hi", "-n", 12, "--temperature", 2, "--seed", seed).stdout

        assert sample(1) == sample(1) != sample(2)

    def test_dtype_attention_and_dequantize(self, folders):
        options = ("-n", 6, "--temperature", 0, "--dtype", "float32", "--attn", "eager", "--dequantize")
        result = run("generate", "-m", folders / "fp8", "--token-ids", "0,50,60", *options)
        assert result.exit_code == 0, result.stderr
        assert "480 bytes per token" in result.stderr  # the cache is fp32 too
        model = load_model(folders / "fp8", dtype=Dtype.FLOAT32, attention="eager", device="cpu", dequantize=True)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config._attn_implementation == "eager"

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("bare", "Hello"), "found no tokenizer"),
            (("bare", "--token-ids", "5,9999"), "token id 9999, wanted ids in [0, 128)"),
            (("bare", "--token-ids", "5", "--dequantize"), "wanted an FP8 checkpoint"),
            (("bare", "--token-ids", "5", "--attn", "psychic"), "psychic"),
            (("fp32", "Hello", "--temperature", "0", "--top-p", "0.5"), "--top-p"),
        ],
    )
    def test_errors(self, folders, arguments, message):
        name, *rest = arguments
        result = run("generate", "-m", folders / name, *rest)
        assert result.exit_code == 2
        assert message in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")

    def test_settings_of_the_folder_hold_until_an_option_says_otherwise(self, folders):
        model = load_model(folders / "fp32", dtype=Dtype.AUTO, attention=None, device="cpu", dequantize=False)
        model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
        kept = generation_settings(model, 5, None, None, None)
        assert (kept.do_sample, kept.temperature, kept.max_new_tokens) == (True, 0.6, 5)
        greedy = generation_settings(model, 5, 0, None, None)
        assert greedy.do_sample is False
        changed = generation_settings(model, 5, None, 0.9, None)
        assert (changed.do_sample, changed.temperature, changed.top_p) == (True, 0.6, 0.9)


@pytest.fixture(scope="module")
def conversation(folders):
    model = load_model(folders / "fp32", dtype=Dtype.AUTO, attention=None, device="cpu", dequantize=False)
    settings = generation_settings(model, 8, 0, None, None)
    return chat.Conversation(model, load_tokenizer(folders / "fp32"), settings)


class TestChat:
    def test_every_line_is_a_turn(self, folders):
        result = run("chat", "-m", folders / "fp32", "-n", 6, "--temperature", 0, input="Hi\n\nAnd?\n")
        assert result.exit_code == 0, result.stderr
        turns = [line for line in result.stderr.splitlines() if "prompt tokens" in line]
        assert len(turns) == 2
        # <bos> <user> H i <assistant>, and of the answer what the template renders as the same tokens
        assert turns[0].startswith("5 prompt tokens at")
        assert int(re.search(r"\((\d+) cached\)", turns[1])[1]) >= 5

    def test_commands(self, folders):
        lines = "/system Be brief.\nHi\n/reset\nHi\n/nonsense\n/exit\nnever answered\n"
        result = run("chat", "-m", folders / "fp32", "-n", 3, "--temperature", 0, input=lines)
        turns = [line for line in result.stderr.splitlines() if "prompt tokens" in line]
        assert len(turns) == 2
        # the system prompt is in both, and nothing is left in the cache after /reset
        assert all(turn.startswith("14 prompt tokens at") for turn in turns)
        assert "/nonsense is no command" in result.stderr

    def test_a_folder_without_template_is_named(self, folders, tmp_path):
        folder = shutil.copytree(folders / "fp32", tmp_path / "base-model")
        write_tokenizer(folder, chat_template=None)
        (folder / "chat_template.jinja").unlink()
        result = run("chat", "-m", folder)
        assert result.exit_code == 2
        assert "base-model: found a tokenizer without chat template" in result.stderr

    def fresh_answer(self, conversation, text):
        """The answer with nothing cached."""
        other = chat.Conversation(conversation.model, conversation.tokenizer, conversation.settings)
        other.messages = list(conversation.messages)
        other.answer(text)
        return other.messages[-1]["content"]

    def test_answers_are_those_without_a_cache(self, conversation):
        conversation.reset()
        for text in ("Hi", "And then?", "Why?"):
            expected = self.fresh_answer(conversation, text)
            conversation.answer(text)
            assert conversation.messages[-1]["content"] == expected
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3

    def test_answers_stay_in_the_cache(self, conversation):
        # letters only: what is decoded and encoded again is then the same tokens
        settings = copy.deepcopy(conversation.settings)
        letters = set(conversation.tokenizer.convert_tokens_to_ids(list(string.ascii_letters)))
        settings.suppress_tokens = sorted(set(range(260)) - letters)
        other = chat.Conversation(conversation.model, conversation.tokenizer, settings)
        # prompts of 5 and 20 tokens, and 7 of the 8 new ones: the last is not in the cache yet
        for text, cached in (("Hi", 0), ("Why?", 5 + 7), ("Oh", 20 + 7)):
            assert other.answer(text).cached == cached

    def test_a_changed_past_is_cut_off(self, conversation):
        conversation.reset()
        conversation.answer("Hi there")
        # as a template does that drops reasoning from earlier turns
        conversation.messages[-1]["content"] = "Something else"
        expected = self.fresh_answer(conversation, "Go on")
        meter = conversation.answer("Go on")
        # <bos> <user> "Hi there" <assistant>
        assert meter.cached == 11
        assert conversation.messages[-1]["content"] == expected

    def test_the_same_prompt_again_feeds_one_token(self, conversation):
        conversation.reset()
        conversation.answer("Hi")
        first = conversation.messages.pop()["content"]
        conversation.messages.clear()
        meter = conversation.answer("Hi")
        assert meter.prompt_tokens - meter.cached == 1
        assert conversation.messages[-1]["content"] == first

    def test_an_interrupted_turn_leaves_no_trace(self, conversation, monkeypatch):
        conversation.reset()
        conversation.answer("Hi")
        before = list(conversation.messages)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Meter, "put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            conversation.answer("More")
        assert conversation.messages == before
        expected = self.fresh_answer(conversation, "More")
        conversation.answer("More")
        assert conversation.messages[-1]["content"] == expected

    def test_a_conversation_too_long(self, conversation):
        conversation.reset()
        with pytest.raises(ValueError, match=r"the model's context 2,560: /reset"):
            conversation.answer("x" * 2560)


def test_figures_read_well():
    assert [size(n) for n in (0, 999, 1000, 70_272, 999_960, 688_574_839_360, 5e15)] == [
        "0 B", "999 B", "1.0 kB", "70.3 kB", "1.0 MB", "688.6 GB", "5000.0 TB",
    ]  # fmt: skip
    assert [count(n) for n in (7, 2_451_437_056, 671_026_419_200, 1.026e12)] == ["7", "2.45B", "671.0B", "1.03T"]
    assert [rate(n) for n in (0.05831, 12.44, 1320.2)] == ["0.0583", "12.4", "1,320"]


def test_the_meter_counts_what_passes(capsys):
    meter = Meter(IdStreamer())
    for value in (torch.tensor([[1, 2, 3]]), torch.tensor([4]), torch.tensor([5])):
        meter.put(value)
    meter.end()
    assert (meter.prompt_tokens, meter.new_tokens) == (3, 2)
    assert capsys.readouterr().out == "4,5\n"
