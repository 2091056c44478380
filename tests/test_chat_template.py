"""The arguments of a chat template: what a suite gives it, what a user may, and prompts that contradict the suite."""

import json

import pytest
from chat_templates import K2, MARKS, V31
from eval_harness import small_model, tokenizer, write_math
from transformers import GenerationConfig
from typer.testing import CliRunner

from modeling_deepseek_moe.chat_template import (
    answer_message,
    check_arguments,
    end_mark,
    prompt_end,
    taken_arguments,
    thinking_arguments,
)
from modeling_deepseek_moe.cli._template import template_arguments
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.cli.chat import Conversation
from modeling_deepseek_moe.eval.code import handover
from modeling_deepseek_moe.eval.protocols import read_protocols
from modeling_deepseek_moe.eval.results import read_evaluation, read_questions
from modeling_deepseek_moe.eval.run import Changes, evaluate, prepare

TURNS = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.get('depth', '') }}{% endfor %}"
CHOICE = (  # as DeepSeek-V3.1's: a choice of its own, and no thinking without it
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + "{% if add_generation_prompt %}[assistant]{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
TEMPLATES = {
    "choice": CHOICE,
    "other name": CHOICE.replace("thinking", "enable_thinking"),
    "empty thoughts": CHOICE.replace("'</think>'", "'<think>\\n\\n</think>\\n\\n'"),
    "always": TURNS + "[assistant]<think>\n",
    "never": TURNS + "[assistant]</think>",
    "silent": TURNS + "[assistant]",
}


def with_template(name):
    made = tokenizer()
    made.chat_template = TEMPLATES[name]
    return made


def test_what_a_template_reads():
    made = with_template("choice")
    offered = {"thinking": True, "enable_thinking": True, "depth": 1, "assistant": 1}
    assert taken_arguments(made, offered) == {"thinking": True}
    assert taken_arguments(with_template("silent"), offered) == {}
    check_arguments(made, {"thinking": False})
    with pytest.raises(ValueError, match=r"found 'depth', which the chat template of .* does not read"):
        check_arguments(made, {"depth": 1})
    for name in ("messages", "add_generation_prompt", "tokenize", "chat_template"):
        with pytest.raises(ValueError, match=f"found '{name}', which is set here"):
            check_arguments(made, {name: True})


def test_how_a_prompt_ends():
    assert prompt_end(with_template("choice"), {}) == "</think>"
    assert prompt_end(with_template("choice"), {"thinking": True}) == "<think>"
    assert prompt_end(with_template("empty thoughts"), {}) == "</think>"
    assert prompt_end(with_template("always"), {}) == "<think>" == end_mark("x<think> \n")
    assert prompt_end(with_template("silent"), {}) == ""
    made = with_template("silent")
    made.chat_template += "{{ 1 + effort }}"
    for arguments in ({}, {"effort": "high"}):
        with pytest.raises(ValueError, match=r"the chat template with \{.*\}: "):
            prompt_end(made, arguments)


@pytest.mark.parametrize("suite", [name for name in read_protocols() if name != "v3-base"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_says_what_the_suite_says_or_nothing_is_run(tmp_path, suite, template):
    write_math(tmp_path, 1)
    benchmark = "math500" if suite in ("v3-chat", "r1") else "aime25"
    (tmp_path / "aime25.jsonl").write_text('{"id": 1, "problem": "p", "answer": 3}\n')
    options = {"suite": suite, "benchmarks": [benchmark], "data": str(tmp_path)}
    made, thinks = with_template(template), suite != "v3-chat"
    if template == ("never" if thinks else "always"):
        with pytest.raises(
            ValueError, match=rf"the prompt ends in {'</think>' if thinks else '<think>'}, and {suite}"
        ):
            prepare(made, **options)
        return
    (run,) = prepare(made, **options)
    name = {"choice": "thinking", "empty thoughts": "thinking", "other name": "enable_thinking"}.get(template)
    assert run.settings["template_args"] == ({name: thinks} if name else {}) and not run.changed
    if name:
        with pytest.raises(ValueError, match="the prompt ends in"):
            prepare(made, **options, changes=Changes(template_args={name: not thinks}))


def test_template_arguments_are_recorded_and_used(tmp_path):
    write_math(tmp_path, 1)
    made = with_template("choice")
    made.chat_template = made.chat_template.replace("[assistant]", "{{ effort | default('') }}[assistant]")
    changes = Changes(max_tokens=4, k=1, template_args={"effort": "high"})
    options = {"suite": "r1", "benchmarks": ["math500"], "data": str(tmp_path), "out": tmp_path / "out"}
    evaluate(small_model(), made, changes=changes, **options)
    (task,) = read_evaluation(tmp_path / "out").tasks
    assert task.settings["template_args"] == {"thinking": True, "effort": "high"}
    assert "template_args {'thinking': True, 'effort': 'high'} instead of {'thinking': True}" in task.changed
    (question,) = read_questions(tmp_path / "out", "dsr1_math500")
    assert question.prompt.endswith("high[assistant]<think>") and "</think>" not in question.prompt


def test_arguments_without_a_template(tmp_path):
    options = {"benchmarks": ["mmlu_pro"], "data": "sample", "changes": Changes(template_args={"thinking": True})}
    with pytest.raises(ValueError, match="wanted none: v3-base asks without a template"):
        prepare(with_template("choice"), suite="v3-base", **options)
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="found no chat template, wanted one: is it a base model"):
        prepare(bare, suite="r1", **options)
    with pytest.raises(ValueError, match=r"found template arguments \['thinking'\] and no chat template"):
        handover.template_arguments(bare, {"thinking": True})


@pytest.mark.parametrize("command", [["eval"], ["predict", "programs"], ["chat"]])
@pytest.mark.parametrize("given, message", [("{", "wanted a JSON object"), ("[1]", "wanted a JSON object")])
def test_arguments_that_are_no_object(tmp_path, command, given, message):
    import modeling_deepseek_moe as dsm

    model = ["-m", str(dsm.tiny_checkpoint())] if command == ["chat"] else ["--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *model, "--template-args", given])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    unread = CliRunner().invoke(app, [*command, *model, "--template-args", json.dumps({"thinking": True})])
    assert unread.exit_code == 2 and "found 'thinking', which the chat template" in " ".join(unread.output.split())


@pytest.mark.parametrize(
    "prompt, text, want",
    [
        ("x<think>", "thoughts </think>\n\nanswer", "answer"),
        ("x<think>\n", "thoughts without end", ""),
        ("x", "<think>thoughts</think>answer", "answer"),
        ("x</think>", "answer", "answer"),
        ("x", "answer", "answer"),
    ],
)
def test_thoughts_are_no_program(prompt, text, want):
    assert handover.said({"prompt": prompt, "text": text}) == want


GLM = (  # as GLM-4.7's: tools before all, a choice of its own under another name
    "[gMASK]{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    + TURNS
    + "{% if add_generation_prompt %}[assistant]{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "template, arguments, mark",
    [
        pytest.param(V31, {"thinking": True}, "<think>", id="v3.1-thinking"),
        pytest.param(V31, {}, "</think>", id="v3.1"),
        pytest.param(K2, {"tools": [TOOL]}, "", id="kimi-k2-tools"),
        pytest.param(GLM, {"tools": [TOOL], "enable_thinking": False}, "</think>", id="glm-tools"),
        pytest.param(GLM, {}, "<think>", id="glm"),
    ],
)
def test_what_a_chat_is_given_reaches_its_prompts(template, arguments, mark):
    made = tokenizer()
    made.chat_template = MARKS.sub("", template)
    check_arguments(made, arguments)
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    conversation = Conversation(small_model(), made, settings, arguments)
    for turn in ("Hello", "And then?"):
        conversation.answer(turn)
        prompt = made.decode(conversation.seen[:-1])
        assert turn in prompt and end_mark(prompt) == mark
        assert ('"weather"' in prompt) == ("tools" in arguments)


REASONING = (  # as GLM-5's and Kimi-K2-Thinking's: reasoning in a field of its own, of earlier turns only when it is asked for
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content and (clear_thinking is defined and not clear_thinking or loop.index0 > ns.last) %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '<think>' if enable_thinking | default(true) else '</think>' }}{% endif %}"
)


def test_the_choice_of_thinking_under_the_template_s_name():
    for name in ("thinking", "enable_thinking"):
        made = with_template("choice" if name == "thinking" else "other name")
        assert thinking_arguments(made, True) == {name: True}
    with pytest.raises(
        ValueError, match=r"thinking off: found a chat template of .* that reads neither thinking nor enable_"
    ):
        thinking_arguments(with_template("always"), False)


@pytest.mark.parametrize("prompt, said", [("[a]<think>", "hm</think>yes"), ("[a]", "<think>hm</think>yes")])
def test_answers_go_back_in_the_fields_that_a_template_reads(prompt, said):
    made = with_template("choice")
    assert answer_message(made, prompt, said) == {"role": "assistant", "content": said}
    made.chat_template = REASONING
    answer = answer_message(made, prompt, said)
    assert answer == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    talk = [{"role": "user", "content": "q"}, answer, {"role": "user", "content": "and?"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert made.apply_chat_template(talk, **render) == "[user]q[assistant]yes[user]and?[assistant]<think>"
    kept = made.apply_chat_template(talk, **render, clear_thinking=False, enable_thinking=False)
    assert kept == "[user]q[assistant]<think>hm</think>yes[user]and?[assistant]</think>"
    assert answer_message(made, "[a]<think>", "hm") == {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert answer_message(made, "[a]</think>", "yes") == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "template, name", [(V31, "thinking"), (GLM, "enable_thinking"), (REASONING, "enable_thinking")]
)
def test_options_of_a_chat(tmp_path, template, name):
    made = tokenizer()
    made.chat_template = MARKS.sub("", template)
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL]))
    reads_tools = "tools" in template
    given = template_arguments(
        made, '{"clear_thinking": false}' if template is REASONING else None, False, file if reads_tools else None
    )
    assert given.pop(name) is False and given.pop("clear_thinking", False) is False
    assert given == ({"tools": [TOOL]} if reads_tools else {})
    with pytest.raises(ValueError, match=f"--template-args: found '{name}' and --thinking, wanted one of them"):
        template_arguments(made, json.dumps({name: True}), True, None)
    for text, fault in (
        ("{", "that is not JSON"),
        ("{}", "found a dict"),
        ('[{"name": "f"}]', "no function with a name"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"--tools .*tools.json: .*{fault}"):
            template_arguments(made, None, None, file)
    with pytest.raises(ValueError, match=r"absent.json: found a file that cannot be read"):
        template_arguments(made, None, None, tmp_path / "absent.json")
