"""The page that reports of trainings and evaluations share: texts, plots, and what a reader sees first on a phone."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
from browser import browse, find_browser
from report_cases import make_questions, make_task, output, write_run

from modeling_deepseek_moe.cli._report_draw import draw
from modeling_deepseek_moe.eval.report import write_report
from modeling_deepseek_moe.eval.results import Question, read_evaluation, read_questions
from modeling_deepseek_moe.pages import plots, texts
from modeling_deepseek_moe.terminal import shown

BIDI = "\u202eevil\u2066\u200f\x1b[2J"
browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium and chromedriver")


def write_training(folder, steps=40, layers=3, experts=8, **more):
    folder.mkdir(exist_ok=True)
    history = [
        {"step": s, "lm_loss": 3 - s / steps, "loss": 3 - s / steps, "max_vio": 1 / s, "grad_norm": 1.0}
        for s in range(1, steps)
    ]
    history.append({"step": steps, "eval_loss": 2.1, **more})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    loads = [
        {"step": s, "load": {str(i + 1): [s * e for e in range(experts)] for i in range(layers)}}
        for s in range(1, steps)
    ]
    (folder / "expert_load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in loads))
    return folder


@pytest.mark.parametrize(
    "text, found",
    [
        (BIDI, "\\u202eevil\\u2066\\u200f\\u001b[2J"),
        ("half \ud83d", "half \\ud83d"),
        ("a" * 200_000, "a" * 119 + "…"),
        ("<b>&\"'", "&lt;b&gt;&amp;&quot;&#x27;"),
        ("two\nlines", "two\\u000alines"),
        ("שלום", "שלום"),
    ],
)
def test_names_are_text_of_bounded_length(text, found):
    assert texts.label(text) == f"<bdi>{found}</bdi>" and texts.plain(text) == found


@pytest.mark.parametrize("part", ["label", "category", "answer", "question", "id", "setting", "protocol", "command"])
@pytest.mark.parametrize("text", [BIDI, "\ud800 \udc00", "é" * 200_000], ids=["bidi", "surrogate", "long"])
def test_whatever_stands_in_an_evaluation(tmp_path, part, text):
    """The page is written, is UTF-8, obeys no control character and grows by the text once, not by every place that names it."""
    fields = {
        "x": {
            "value": text if part == "protocol" else 1,
            "status": "assumed",
            "source": text if part == "protocol" else "",
        }
    }
    answer = text if part == "answer" else "A"
    question = Question(
        id=text if part == "id" else "1",
        question=text if part == "question" else "q",
        prompt="p",
        gold=answer,
        category=text if part == "category" else "c",
        outputs=(output(True, "t", answer=answer, stock_answer=answer, stock_right=True),),
    )
    task = make_task(changed=[text], setting=text) if part == "setting" else make_task()
    run = write_run(tmp_path / "run", [(task, [question])], label=text if part == "label" else "model", fields=fields)
    page = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    assert not set(page) & set("\u202e\u2066\u200f\x1b")
    assert len(page) < 150_000 + (2_000_000 if part in ("answer", "question", "id") else 0)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["runs"][0]["label"] == (
        text if part == "label" else "model"
    )
    assert read_evaluation(run).model["label"] == (text if part == "label" else "model")
    (tmp_path / "out" / "chart.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["../../escape", "/tmp/escape", "a/b", "..", ".hidden", "", "x\0", "a\nb", "ü", "\ud800", "n" * 201, "%2e%2e/x"],
)
def test_samples_stay_in_their_folder(tmp_path, name):
    folder = tmp_path / "deep" / "run"
    questions = make_questions(2)
    write_run(folder, [(make_task(name), questions), (make_task(), make_questions(1))])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and sum(path.parent == folder / "samples" for path in files) == 2
    assert [one.id for one in read_questions(folder, name)] == [one.id for one in questions]
    page = write_report([folder], tmp_path / "out").read_text(encoding="utf-8")
    assert texts.plain(name) in page and len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("protocol",), [], "protocol: found list, wanted dict"),
        (("protocol", "fields"), [], "protocol: fields: found list, wanted dict"),
        (("protocol", "fields", "mmlu_pro.top_p"), 1, r"protocol.fields: mmlu_pro.top_p: found int, wanted dict"),
        (("model",), "x", "model: found str, wanted dict"),
        (("tasks",), {}, "tasks: found dict, wanted list"),
        (("tasks", 0, "rows"), "many", "rows: found str, wanted int"),
        (("tasks", 0, "changed"), "limit", "changed: found str, wanted tuple"),
        (("tasks", 0, "task"), 5, "task: found int, wanted str"),
        (("seconds",), "long", "seconds: found str, wanted int or float"),
        (("date",), None, "date: found NoneType, wanted str"),
    ],
)
def test_damaged_evaluations_are_named(tmp_path, where, value, message):
    run = write_run(tmp_path / "run", [(make_task(), make_questions(2))])
    file = run / "evaluation.json"
    values = json.loads(file.read_text())
    *path, last = where
    inner = values
    for step in path:
        inner = inner[step]
    inner[last] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        write_report([run], tmp_path / "out")


def test_why_lm_eval_reads_nothing(tmp_path):
    lost = [
        Question(
            id=str(i),
            question="q",
            prompt="p",
            gold="5",
            outputs=(output(True, r"\boxed{5}", answer="5", stock_right=False),),
        )
        for i in range(12)
    ]
    same = [
        Question(id=str(i), question="q", prompt="p", gold="A", outputs=(output(True, stock_right=True),))
        for i in range(9)
    ]
    run = write_run(tmp_path / "run", [(make_task("m", "math500"), lost), (make_task(), same)], label="tiny")
    page = write_report([run], tmp_path / "out").read_text()
    note = (
        "of 12 answers, 12 are right here and 0 by lm-eval's own task, which reads <bdi>what stands between the first"
    )
    assert page.count(note) == 1 and "of 9 answers" not in page


def test_the_page_of_a_training(tmp_path):
    page, last = draw(write_training(tmp_path / "sft", mtp_loss=math.nan, tokens_per_second=1320.4), tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert (
        last["step"] == 40 and json.loads((tmp_path / "out" / "report.json").read_text())["last"]["eval_loss"] == 2.1
    )
    assert [
        f'<section id="{name}">' in text for name in ("figures", "losses", "balance", "course", "load", "all")
    ] == [True] * 6
    assert text.count("data:image/png;base64,") == 4 and "no finite value" in text
    assert "Loss: lm_loss 2.025 at step 39, eval_loss 2.1 at step 40" in text  # and loss, the same curve, once
    assert "<script" not in text and "script-src 'none'" in text


@pytest.mark.parametrize(
    "state, message",
    [
        ("{", "found no log of a Trainer"),
        ("[]", "found no log of a Trainer"),
        ('{"log_history": 3}', "found no log of a Trainer"),
        ('{"log_history": [{"loss": 1}]}', "found no log of a Trainer"),
        ('{"log_history": [{"step": "1"}]}', "found no log of a Trainer"),
        ('{"log_history": []}', "found nothing logged"),
    ],
)
def test_damaged_trainings_are_named(tmp_path, state, message):
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=rf"trainer_state\.json: {message}"):
        draw(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"step": 1}',
        '{"step": 1, "load": {"a": [1]}}',
        '{"step": 1, "load": {"1": []}}',
        '{"step": 1, "load": {"1": ["x"]}}',
    ],
)
def test_damaged_loads_are_named(tmp_path, line):
    write_training(tmp_path)
    (tmp_path / "expert_load.jsonl").write_text('{"step": 1, "load": {"1": [1, 2]}}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"expert_load\.jsonl:2: found no expert loads"):
        draw(tmp_path, tmp_path / "out")


def test_a_heat_map_is_an_image_of_a_pixel_each():
    values = np.array([[0.0, 1.0, 2.0], [5.0, -1.0, math.nan]])
    data = plots.png(values)
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", data[16:24]) == (3, 2)
    palette = np.frombuffer(data[data.index(b"PLTE") + 4 :][:768], np.uint8).reshape(256, 3)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8).reshape(2, 4)
    assert rows[:, 0].tolist() == [0, 0]
    colors = palette[rows[:, 1:]]
    assert (
        (colors[0, 0] == plots.BLUE).all()
        and abs(colors[0, 1].astype(int) - plots.WHITE).max() <= 1
        and (colors[0, 2] == plots.RED).all()
    )
    assert (colors[1] == [plots.RED, plots.BLUE, plots.BLUE]).all()


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.8, 1.01, [0.8, 0.85, 0.9, 0.95, 1.0]),
        (1200, 1400, [1200, 1250, 1300, 1350, 1400]),
        (-0.1, 0.1, [-0.1, -0.05, 0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round(low, high, wanted):
    assert plots.ticks(low, high) == pytest.approx(wanted)


def test_noise_is_not_zoomed_in_on():
    """1,320 with 2 more or less, over an axis of at least a tenth of it: the line takes little of the height."""
    text = plots.lines("Speed", "", {"tokens": [(step, 1320 + 2 * (-1) ** step) for step in range(50)]})
    heights = [float(pair.split()[1]) for pair in text.split('d="M')[1].split('"')[0].split("L")]
    assert max(heights) - min(heights) < 0.05 * plots.HEIGHT
    assert len(plots.thin([(step, 1.0) for step in range(10_000)])) == plots.MOST_POINTS


@pytest.fixture(scope="module")
def tab():
    with browse(*find_browser()) as page:
        yield page


@browser
@pytest.mark.parametrize("width, height", [(390, 844), (360, 640)])
def test_the_score_is_what_a_phone_shows_first(tmp_path, tab, width, height):
    tab.device(width, height)
    run = write_run(
        tmp_path / "run",
        [(make_task(rows=50, changed=["limit"]), make_questions(20, 1.0))],
        label="A-long-name-of-a-model-" * 3,
    )
    tab.open(write_report([run], tmp_path / "out"))
    score = "document.querySelector('#scores td[data-label^=Score] b')"
    box = tab.run(f"const b = {score}.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]")
    others = tab.run(
        "return [...document.querySelectorAll('#scores tbody th, #scores td:not([data-label^=Score])')].map(e => e.getBoundingClientRect().top)"
    )
    assert 0 <= box[0] < box[1] <= width and box[3] < height and min(others) > box[2] - 10
    assert tab.run(f"return parseFloat(getComputedStyle({score}).fontSize)") >= 28
    assert tab.run("return document.documentElement.scrollWidth <= innerWidth")


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_training_fits_desktop_and_phone(tmp_path, tab, width, scheme):
    tab.device(width, 844, scheme)
    tab.errors()
    tab.open(draw(write_training(tmp_path / ("sft" + "x" * 150)), tmp_path / "out")[0])
    assert tab.errors() == []
    assert tab.run("return document.documentElement.scrollWidth <= innerWidth")
    outside = "[...document.querySelectorAll('.plot > svg')].filter(s => [...s.querySelectorAll('text, path, image')].some(e => {"
    outside += "const a = e.getBoundingClientRect(), b = s.getBoundingClientRect(); return a.right > b.right + 1 || a.left < b.left - 1 || a.bottom > b.bottom + 1}))"
    assert tab.run(f"return {outside}.length") == 0
    assert tab.run("return [...document.querySelectorAll('image')].every(e => e.getBoundingClientRect().width > 200)")


@browser
def test_a_name_from_right_to_left_turns_nothing_around_it(tmp_path, tab):
    tab.device(1280, 900)
    runs = [
        write_run(tmp_path / name, [(make_task(), make_questions(9, seed=i))], label=label)
        for i, (name, label) in enumerate([("a", "דגם"), ("b", "model 2")])
    ]
    tab.open(write_report(runs, tmp_path / "out"))
    left = "[...document.querySelectorAll('#comparison h3 bdi')].map(e => e.getBoundingClientRect().left)"
    assert tab.run(f"return {left}") == sorted(tab.run(f"return {left}"))
    assert shown("דגם") in tab.text("#comparison h3")
