"""Tools in ``deepseek-moe chat``: calls of an answer in each family's marks, their results typed or piped, and the next prompt."""

import io
import json

import pytest
import torch
from eval_harness import small_model, tokenizer
from test_encoding_v32 import ARGUMENTS, NOW, SUM, TOOL_TALK, call, message, render, v32_tokenizer
from transformers import GenerationConfig

from modeling_deepseek_moe.chat_template import answer_message
from modeling_deepseek_moe.cli._calls import result_message, with_calls
from modeling_deepseek_moe.cli.chat import Conversation, _converse

GLM = (
    "<tool_call>add\n<arg_key>unit</arg_key>\n<arg_value>m</arg_value>\n<arg_key>terms</arg_key>\n<arg_value>[1, 2]</arg_value>\n"
    "</tool_call><tool_call>now</tool_call>"
)
K2 = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{TEXT}<|tool_call_end|>"
    "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
)
V31 = "|calls_begin|>|call_begin|>add|sep|>{TEXT}|call_end|>|call_begin|>now|sep|>{}|call_end|>|calls_end|>"
V3 = (
    "|calls_begin|>|call_begin|>function|sep|>add\n```json\n{TEXT}\n```|call_end|>\n|call_begin|>function|sep|>now\n```json\n{}\n"
    "```|call_end|>|calls_end|>"
)
DEEPSEEK = {"calls_begin": "tool▁calls▁begin", "calls_end": "tool▁calls▁end", "call_begin": "tool▁call▁begin"}
DEEPSEEK |= {"call_end": "tool▁call▁end", "sep": "tool▁sep"}
TEXT = '{"unit": "m",  "terms": [1, 2]}'  # as a model may space it


@pytest.fixture
def made():
    return v32_tokenizer()


def deepseek(text):
    for name, mark in DEEPSEEK.items():
        text = text.replace(f"|{name}|>", f"<\uff5c{mark}\uff5c>")
    return text


@pytest.mark.parametrize(
    ("marks", "wanted", "ids"),
    [
        pytest.param(deepseek(V31), TEXT, ["call_0", "call_1"], id="v3.1"),
        pytest.param(deepseek(V3), TEXT, ["call_0", "call_1"], id="v3"),
        pytest.param(K2, TEXT, ["functions.add:0", "functions.now:1"], id="kimi-k2"),
        pytest.param(GLM, {"unit": "m", "terms": [1, 2]}, ["call_0", "call_1"], id="glm"),
    ],
)
def test_calls_of_each_family(marks, wanted, ids):
    """Arguments as its template takes them: the text itself, or an object."""
    answer = with_calls(message("assistant", "Let me see.\n\n" + marks.replace("{TEXT}", TEXT), reasoning_content="r"))
    assert answer["content"] == "Let me see." and answer["reasoning_content"] == "r"
    assert [one["id"] for one in answer["tool_calls"]] == ids
    empty = {} if isinstance(wanted, dict) else "{}"
    functions = [one["function"] for one in answer["tool_calls"]]
    assert functions == [{"name": "add", "arguments": wanted}, {"name": "now", "arguments": empty}]
    assert result_message(answer, 1, "noon") == message("tool", "noon", tool_call_id=ids[1], name="now")


@pytest.mark.parametrize("said", ["No calls.", deepseek(V31).replace("{TEXT}", "{'unit': 1}"), GLM[:-12], K2[:40]])
def test_what_is_no_call_stays_text(said):
    answer = message("assistant", said)
    assert with_calls(answer) == answer
    assert result_message(answer, 0, "1") == message("tool", "1")


def test_calls_of_v32_come_back_as_they_were_said(made):
    talk = TOOL_TALK[:3]
    whole, asked = (render(made, talk[:end], end < 3, thinking=True, tools=[SUM, NOW]) for end in (3, 2))
    said = whole.removeprefix(asked).removesuffix(made.eos_token)
    answer = with_calls(answer_message(made, asked, said))
    assert [one["function"] for one in answer["tool_calls"]] == [
        {"name": "add", "arguments": ARGUMENTS},
        {"name": "now", "arguments": {}},
    ]
    assert render(made, [*talk[:2], answer], False, thinking=True, tools=[SUM, NOW]) == whole


CALL = (message("user", "q"), message("assistant", "", tool_calls=[call("add", unit="m"), call("now")]))


class Scripted:
    """A model that says given texts, one after the other, and keeps the prompts that it is asked with."""

    def __init__(self, made, texts):
        self._model, self._made, self._texts, self.prompts = (
            small_model(max_position_embeddings=4096),
            made,
            iter(texts),
            [],
        )
        self.config, self.device = self._model.config, self._model.device

    def generate(self, input_ids, streamer, **_):
        self.prompts.append(self._made.decode(input_ids[0]))
        said = self._made(next(self._texts), add_special_tokens=False, return_tensors="pt").input_ids
        streamer.put(input_ids)
        streamer.put(said[0])
        streamer.end()
        return torch.cat((input_ids, said), dim=1)


@pytest.fixture
def talking(made):
    asked, called = render(made, CALL[:1]), render(made, CALL, False)
    said = called.removeprefix(asked)
    scripted = Scripted(made, [said, f"1 m at noon{made.eos_token}", f"Bye{made.eos_token}"])
    settings = GenerationConfig(max_new_tokens=9, eos_token_id=made.eos_token_id)
    return Conversation(scripted, made, settings, {"tools": [SUM, NOW]})


def test_results_are_tool_messages_of_the_next_prompt(talking):
    with pytest.raises(ValueError, match="/tool: found no answer to give a result to"):
        talking.give_result("1")
    talking.answer("q")
    assert talking.open_calls == 2 and talking.messages[-1]["tool_calls"][1]["function"]["name"] == "now"
    assert talking.give_result("1 m") is None and talking.open_calls == 1
    with pytest.raises(ValueError, match=r"found calls without a result \(1\), wanted /tool TEXT"):
        talking.answer("and?")
    talking.give_result("noon")
    prompt = talking.model.prompts[-1]
    assert prompt.endswith(
        "\n\n<function_results>\n<result>1 m</result>\n<result>noon</result>\n</function_results>\n\n</think>"
    )
    assert prompt.startswith(talking.model.prompts[0]) and talking.open_calls == 0
    assert [m["role"] for m in talking.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert talking.messages[-1]["content"] == "1 m at noon"
    with pytest.raises(ValueError, match="the chat template: messages: found a result of a tool that was not called"):
        talking.give_result("again")


def test_results_from_a_pipe(talking, monkeypatch, capsys):
    lines = 'q\n/tool {"m": 1}\n/tool noon\nThanks.\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    _converse(talking, stats=False)
    assert len(talking.model.prompts) == 3 and '<result>{"m": 1}</result>' in talking.model.prompts[1]
    told = capsys.readouterr()
    assert "2 calls to give a result to: /tool TEXT" in told.err and "1 call to give a result to" in told.err
    assert told.out.rstrip().endswith("Bye</s>") and "1 m at noon" in told.out


def test_without_tools_nothing_is_called():
    plain = tokenizer()
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    conversation = Conversation(small_model(), plain, settings)
    conversation.answer("Hello")
    with pytest.raises(ValueError, match="wanted --tools FILE and an answer that calls one"):
        conversation.give_result(json.dumps({}))
