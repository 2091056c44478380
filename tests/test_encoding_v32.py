"""Prompts of a DeepSeek-V3.2 folder without a chat template: strings by the rules that the release publishes, and every door to them."""

import json
import shutil
from pathlib import Path

import pytest
from eval_harness import small_model, tokenizer
from huggingface_hub import constants
from jinja2 import TemplateError
from transformers import GenerationConfig

from modeling_deepseek_moe.cli._model import load_tokenizer
from modeling_deepseek_moe.cli._train_chat import encode_chat
from modeling_deepseek_moe.cli.chat import Conversation
from modeling_deepseek_moe.eval.model import DeepseekLM
from modeling_deepseek_moe.templates import complete_template, released_template
from modeling_deepseek_moe.tiny import tiny_checkpoint

BAR = "\uff5c"  # of the release's tokens
BOS, EOS, USER, ANSWER = "<s>", "</s>", f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"
SUM = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "title": "Größe <m>"}}}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = (
    "\n\n<|DSML|function_calls>\n"
    '<|DSML|invoke name="add">\n'
    '<|DSML|parameter name="unit" string="true">größte "m"</|DSML|parameter>\n'
    '<|DSML|parameter name="terms" string="false">[1, 2.5, null]</|DSML|parameter>\n'
    '<|DSML|parameter name="exact" string="false">true</|DSML|parameter>\n'
    "</|DSML|invoke>\n"
    '<|DSML|invoke name="now">\n'
    "\n"
    "</|DSML|invoke>\n"
    "</|DSML|function_calls>"
).replace("|", BAR)
ARGUMENTS = {"unit": 'größte "m"', "terms": [1, 2.5, None], "exact": True}
RESULTS = "\n\n<function_results>\n<result>3.5</result>\n<result>noon</result>\n</function_results>\n\n"


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(function, **arguments):
    return {"type": "function", "function": {"name": function, "arguments": arguments}}


TALK = [
    message("user", "hello"),
    message("assistant", "Hello!", reasoning_content="a guest"),
    message("user", "1+1=?"),
]
TOOL_TALK = [
    message("system", "Be brief."),
    message("user", "q"),
    message("assistant", "Let me see.", reasoning_content="add", tool_calls=[call("add", **ARGUMENTS), call("now")]),
    message("tool", "3.5"),
    message("tool", "noon"),
]
AFTER = [message("assistant", "3.5 m", reasoning_content="so"), message("user", "thanks")]


def v32_tokenizer():
    """The tiny one, with V3.2's marks and template."""
    made = tokenizer()
    made.add_special_tokens({"bos_token": BOS, "eos_token": EOS})
    made.chat_template = released_template("deepseek_v32")
    return made


@pytest.fixture
def made():
    return v32_tokenizer()


def render(made, messages, prompt=True, **arguments):
    return made.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)


def test_a_conversation(made):
    begin = f"{BOS}{USER}hello{ANSWER}</think>Hello!{EOS}{USER}1+1=?"
    assert render(made, TALK) == f"{begin}{ANSWER}</think>" == render(made, TALK, thinking=False)
    assert render(made, TALK, thinking=True) == f"{begin}{ANSWER}<think>"
    assert render(made, TALK, prompt=False, thinking=True) == begin  # of a row for training, not of a prompt
    whole = [*TALK, message("assistant", "2", reasoning_content="easy")]
    assert render(made, whole, thinking=True) == f"{begin}{ANSWER}<think>easy</think>2{EOS}"
    assert render(made, whole) == f"{begin}{ANSWER}</think>2{EOS}"
    as_said = [*TALK, message("assistant", "<think>easy</think>2")]  # in one text, as a model says it
    assert [render(made, as_said, thinking=on) for on in (True, False)] == [
        render(made, whole, thinking=on) for on in (True, False)
    ]


@pytest.mark.parametrize("thinking", [True, False])
def test_calls_of_tools_and_their_results(made, thinking):
    mark = "<think>" if thinking else "</think>"
    thought = "add</think>" if thinking else ""
    text = render(made, TOOL_TALK, tools=[SUM, NOW], thinking=thinking)
    system, _, rest = text.partition(USER)
    assert rest == f"q{ANSWER}{mark}{thought}Let me see.{CALLS}{EOS}{RESULTS}{mark}"
    assert system.startswith(f"{BOS}Be brief.\n\n## Tools\n\nYou have access to a set of tools you can use to answer")
    listed = '{"name": "add", "parameters": {"type": "object", "title": "Größe <m>"}}\n{"name": "now"}'
    assert system.endswith(f"in JSONSchema format:\n<functions>\n{listed}\n</functions>\n")
    own = [TOOL_TALK[0] | {"tools": [SUM, NOW]}, *TOOL_TALK[1:]]  # as the release's messages carry them
    assert render(made, own, thinking=thinking) == text
    later = render(made, TOOL_TALK + AFTER, tools=[SUM, NOW], thinking=thinking)  # a new turn: no thoughts before it
    assert (
        later
        == f"{system}{USER}q{ANSWER}</think>Let me see.{CALLS}{EOS}{RESULTS}</think>3.5 m{EOS}{USER}thanks{ANSWER}{mark}"
    )
    without_system = render(made, TOOL_TALK[1:], tools=[SUM, NOW], thinking=thinking)
    assert without_system == text.replace("Be brief.", "")


def test_the_other_fields(made):
    form = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n" + '{"a": "ä"}'
    asked = [message("system", "Be brief.", response_format={"a": "ä"}), message("developer", "go")]
    assert render(made, asked, thinking=True) == (
        f"{BOS}Be brief.{form}{USER}\n\n# The user's message is: go{ANSWER}<think>"
    )


@pytest.mark.parametrize(
    "messages, thinking, fault",
    [
        (
            [TALK[0], message("assistant", "2")],
            True,
            "an answer without reasoning_content after the last user message",
        ),
        ([*TOOL_TALK[:4], message("user", "and?")], False, "found 1 results of 2 tool calls, wanted one of each"),
        (TOOL_TALK[:4], False, "found 1 results of 2 tool calls, wanted one of each"),
        ([TALK[0], message("tool", "3")], False, "a result of a tool that was not called"),
        (TALK, "false", 'thinking: found the text "false", wanted true or false'),
        ([TALK[0], message("critic", "bad")], False, "found the role critic"),
        ([message("user", [{"type": "image", "image": "cat.png"}])], False, "a part of a content that is no text"),
        (
            [TALK[0], message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])],
            False,
            "found arguments of f that are no object",
        ),
    ],
)
def test_what_the_encoding_has_no_form_for(made, messages, thinking, fault):
    with pytest.raises(TemplateError, match=fault):
        render(made, messages, thinking=thinking)


def test_contents_in_parts_of_text(made):
    parts = [message("user", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}])]
    assert render(made, parts) == render(made, TALK[:1])


@pytest.mark.parametrize("thinking", [True, False])
def test_rows_for_training_learn_what_the_assistant_says(made, thinking):
    calls = [call("add", **ARGUMENTS), {"type": "function", "function": {"name": "now", "arguments": "{}"}}]
    messages = [*TOOL_TALK[:2], TOOL_TALK[2] | {"tool_calls": calls}, *TOOL_TALK[3:], AFTER[0]]
    row = {"messages": messages, "tools": [SUM, NOW], "chat_template_kwargs": {"thinking": thinking}}
    ids, labels = encode_chat(row, made, True, lambda note: pytest.fail(note) if thinking else None)
    thoughts = ("add</think>", "so</think>") if thinking else ("", "")
    wanted = f"{thoughts[0]}Let me see.{CALLS}{EOS}{thoughts[1]}3.5 m{EOS}"
    assert made.decode([label for label in labels if label != -100]) == wanted
    whole = [*TOOL_TALK, AFTER[0]]
    assert made.decode(ids) == render(made, whole, prompt=False, tools=[SUM, NOW], thinking=thinking)


def v32_folder(folder: Path) -> Path:
    """A tokenizer, and a config that says whose."""
    shutil.copytree(tiny_checkpoint(), folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v32"}))
    return folder


def test_every_door_finds_it(tmp_path, capsys):
    folder = v32_folder(tmp_path / "v32")
    made = load_tokenizer(folder)
    assert made.chat_template == released_template("deepseek_v32")
    assert "no chat template: prompts as its release encodes them" in capsys.readouterr().err
    bare = tokenizer()
    bare.chat_template, bare.name_or_path = None, str(folder)
    model = small_model()
    model.config.model_type = "deepseek_v32"
    lm = DeepseekLM(model, tokenizer=bare, batch_size=1, chat_template_args={"thinking": True})
    assert lm.apply_chat_template([TALK[0]]).endswith(f"{USER}hello{ANSWER}<think>")
    made.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == made.chat_template  # no longer missing


def test_releases_with_templates_keep_theirs(tmp_path):
    folder = v32_folder(tmp_path / "v32")
    made = tokenizer()
    assert not complete_template(made, folder) and made.chat_template == tokenizer().chat_template
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    made.chat_template = None
    assert not complete_template(made, folder) and made.chat_template is None
    (folder / "config.json").unlink()
    assert not complete_template(made, folder)


def test_a_name_on_the_hub_is_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    made, repository = tokenizer(), tmp_path / "models--deepseek-ai--DeepSeek-V3.2"
    made.chat_template, made.name_or_path = None, "deepseek-ai/DeepSeek-V3.2"
    for source in (None, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"found no folder .* no config .* revision 'main', wanted the model's"):
            complete_template(made, source)
    with pytest.raises(ValueError, match="found a tokenizer that came from no folder, wanted the model's config"):
        complete_template(made, "")
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    (snapshot / "config.json").write_text('{"model_type": "deepseek_v32"}')
    assert complete_template(made) and made.chat_template == released_template("deepseek_v32")
    (repository / "refs" / "main").rename(repository / "refs" / "pinned")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    made.chat_template = None
    with pytest.raises(ValueError, match=r"revision 'pinned', .* folder of the snapshot, or revision= and cache_dir="):
        complete_template(made, revision="pinned")
    with pytest.raises(ValueError, match="at revision 'main'"):
        complete_template(made, cache_dir=tmp_path)
    assert complete_template(made, revision="pinned", cache_dir=tmp_path)
    made.chat_template = None
    assert complete_template(made, snapshot)


def test_a_chat_drops_what_was_thought_before(made):
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    conversation = Conversation(small_model(vocab_size=len(made)), made, settings, {"thinking": True})
    conversation.answer("hello")
    first = conversation.messages[-1]
    assert first["content"] == "" and first["reasoning_content"]  # cut off in its thought
    conversation.answer("And now?")
    prompt = made.decode(conversation.seen[:-3])
    assert prompt.startswith(f"{BOS}{USER}hello{ANSWER}</think>{EOS}{USER}And now?{ANSWER}<think>")
