"""The report's files: numbers, tables, charts, and that nothing a model wrote gets into the markup."""

import ast
import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from recorded import recorded as recorded_file
from report_cases import make_questions, make_task, output, write_run

from modeling_deepseek_moe.eval import extraction, published, report
from modeling_deepseek_moe.eval.report import explorer, page
from modeling_deepseek_moe.eval.report.figure import figures
from modeling_deepseek_moe.eval.report.gather import gather, pairs
from modeling_deepseek_moe.eval.results import BENCHMARKS, Question
from modeling_deepseek_moe.eval.statistics import METHOD
from modeling_deepseek_moe.pages import document

# Figure 1 of the V3 report: MMLU-Pro, GPQA-Diamond, MATH-500, AIME 2024, Codeforces, SWE-bench Verified; and Table 3's base models.
FIGURE_1 = {
    "DeepSeek-V3": [75.9, 59.1, 90.2, 39.2, 51.6, 42.0],
    "DeepSeek-V2.5": [66.2, 41.3, 74.7, 16.7, 35.6, 22.6],
    "Qwen2.5-72B-Inst": [71.6, 49.0, 80.0, 23.3, 24.8, 23.8],
    "Llama-3.1-405B-Inst": [73.3, 51.1, 73.8, 23.3, 25.3, 24.5],
    "GPT-4o-0513": [72.6, 49.9, 74.6, 9.3, 23.6, 38.8],
    "Claude-3.5-Sonnet-1022": [78.0, 65.0, 78.3, 16.0, 20.3, 50.8],
}
TABLE_3 = {
    "DeepSeek-V2-Base": {"mmlu_pro": 51.4, "math": 43.4},
    "Qwen2.5-72B-Base": {"mmlu_pro": 58.3, "math": 54.4},
    "LLaMA-3.1-405B-Base": {"mmlu_pro": 52.8, "math": 49.0},
    "DeepSeek-V3-Base": {"mmlu_pro": 64.4, "math": 61.6},
}
ATTACK = "<script>alert(1)</script></script><img src=x onerror=alert(1)><!--"


class Markup(HTMLParser):
    """Start tags with their attributes, the text outside scripts, and the scripts by id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts, self._script = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id", "code")
            self.scripts[self._script] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.words.append(data)
        else:
            self.scripts[self._script] += data

    def unpack(self, run, task, piece=0):
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[f"t-{run}-{task}-{piece}"])))


def written(out, *folders):
    path = report.write_report(list(folders), out)
    return Markup(path.read_text(encoding="utf-8")), json.loads((out / "report.json").read_text())


def bars(folder, *others):
    """Title of a figure -> benchmark -> its measured bars."""
    found = figures(gather([folder, *others]))
    return {f.title: {g.title: [bar for bar in g.bars if bar.measured] for g in f.groups} for f in found}


def test_published_equals_the_reports():
    ours = published.published("v3-chat")
    assert {model.name: list(model.scores.values()) for model in ours.models if model.figure} == FIGURE_1
    assert {model.name: model.scores for model in published.published("v3-base").models} == TABLE_3
    r1 = next(model for model in published.published("r1").models if model.name == "DeepSeek-R1")
    assert sorted(r1.scores.values()) == [49.2, 71.5, 79.8, 84.0, 96.3, 97.3]


def test_published_names_benchmarks_that_exist():
    for suite in ("v3-chat", "r1", "v3.2", "k2.5", "v3-base"):
        table = published.published(suite)
        assert table.source and table.url.startswith("https://")
        assert all(set(model.scores) <= set(table.metrics) <= set(BENCHMARKS) for model in table.models)
    assert published.published("unknown") is None


def test_writes_three_files_and_every_number(tmp_path):
    questions = make_questions(50, k=4)
    run = write_run(tmp_path / "run", [(make_task(k=4, rows=400, changed=["asked 50 of 400"]), questions)])
    markup, numbers = written(tmp_path / "out", run)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chart.svg", "report.html", "report.json"]
    drawn = ElementTree.parse(tmp_path / "out" / "chart.svg")
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) == 1  # one whisker, of the one measured bar
    task = numbers["runs"][0]["tasks"]["dsv3_mmlu_pro"]
    assert task["score"] == pytest.approx(sum(o.right for q in questions for o in q.outputs) / 200)
    assert (task["n"], task["k"], task["partial"], task["sample"]) == (50, 4, True, False)
    assert list(task["pass_at"]) == ["1", "2", "4"]
    evaluation = numbers["runs"][0]["evaluation"]
    assert evaluation["model"]["config_sha256"] == "ab" * 32
    assert evaluation["seeds"] == {"sampling": 1234}
    assert numbers["interval"] == {"level": 0.95, "method": METHOD, "over": "questions"}
    assert numbers["published"]["v3-chat"]["models"][0]["scores"]["mmlu_pro"] == 75.9
    words = " ".join(markup.words)
    for shown in (
        f"{100 * task['score']:.1f}",
        "of 12,032",
        "asked 50 of 400",
        "documented",
        "assumed",
        "pass@k",
        "75.9",
    ):
        assert shown in words
    assert "deepseek-moe eval --model small" in words


def test_same_evaluations_same_page(tmp_path):
    run = write_run(tmp_path / "run", [(make_task(), make_questions(20))])
    first = report.write_report([run], tmp_path / "one").read_bytes()
    assert first == report.write_report([run], tmp_path / "two").read_bytes()


def test_needs_no_network(tmp_path):
    markup, _ = written(tmp_path / "out", write_run(tmp_path / "run", [(make_task(), make_questions(5))]))
    for tag, attrs in markup.tags:
        assert not ({"src", "srcset", "action", "data"} & attrs.keys()), (tag, attrs)
        if tag == "link":
            assert attrs["href"].startswith("data:")
    style = (page.FOLDER / "page.css").read_text() + document.style("theme", "plots", "page")
    assert "@import" not in style and "url(" not in style
    assert "fetch(" not in markup.scripts["code"] and "innerHTML" not in markup.scripts["code"]


def test_what_a_model_wrote_is_never_markup(tmp_path):
    clean = make_questions(1)
    known = {"tokens": 9, "truncated": False}
    dirty = [
        Question(
            id=ATTACK,
            question=ATTACK,
            prompt=ATTACK,
            gold=ATTACK,
            category=ATTACK,
            outputs=(output(False, ATTACK, answer=ATTACK, stock_answer=ATTACK, stock_right=False, **known),),
        )
    ]
    fields = {ATTACK: {"value": ATTACK, "status": ATTACK, "source": ATTACK}}
    bad = make_task(changed=[ATTACK], **{ATTACK: ATTACK})
    calm = write_run(
        tmp_path / "calm", [(make_task(changed=["x"]), clean)], fields={"x": fields[ATTACK] | {"status": "x"}}
    )
    evil = write_run(tmp_path / "evil", [(bad, dirty)], label=ATTACK, fields=fields)
    want, _ = written(tmp_path / "one", calm)
    got, _ = written(tmp_path / "two", evil)
    extra = {"tr", "th", "td", "code", "bdi"}  # the setting that was added

    def shape(markup):
        return [tag for tag, _ in markup.tags if tag not in extra]

    assert shape(got) == shape(want)
    assert not [attrs for _, attrs in got.tags if any(name.startswith("on") for name in attrs)]
    assert json.loads(got.scripts["index"])["runs"][0]["tasks"][0]["rows"][0][0] == ATTACK
    assert got.unpack(0, 0)[0]["outputs"][0]["text"] == ATTACK


def test_odd_characters_survive(tmp_path):
    odd = "\u2028 \U0001f600 \x00 é $x$ ${title} \\ \r\n"
    questions = [Question(id="1", question=odd, prompt=odd, gold="A", outputs=(output(True, odd, answer=odd),))]
    run = write_run(tmp_path / "run", [(make_task(), questions)], label="$title $x^2$ %s")
    markup, _ = written(tmp_path / "out", run)
    assert json.loads(markup.scripts["index"])["runs"][0]["tasks"][0]["rows"][0][2] == odd
    assert markup.unpack(0, 0)[0]["prompt"] == odd


def test_pieces_hold_every_question_once(tmp_path):
    questions = make_questions(2 * explorer.PIECE + 3)
    markup, _ = written(tmp_path / "out", write_run(tmp_path / "run", [(make_task(), questions)]))
    found = [one for piece in range(3) for one in markup.unpack(0, 0, piece)]
    assert [one["outputs"][0]["text"] for one in found] == [q.outputs[0].text for q in questions]
    assert "t-0-0-3" not in markup.scripts


def test_log_likelihoods_that_are_no_json_number(tmp_path):
    scores = {"A": -0.5, "B": float("-inf")}
    questions = [Question(id="1", question="q", prompt="p", gold="A", outputs=(output(True, " ", scores=scores),))]
    run = write_run(tmp_path / "run", [(make_task("base", shots=5), questions)], suite="v3-base")
    markup, _ = written(tmp_path / "out", run)
    assert markup.unpack(0, 0)[0]["outputs"][0]["scores"] == {"A": "-0.500", "B": "-inf"}


def test_measured_bars_stand_beside_published_ones(tmp_path):
    run = write_run(tmp_path / "run", [(make_task(rows=12_032, changed=["limit"]), make_questions(100))])
    found = figures(gather([run]))
    assert [group.title for group in found[0].groups] == [
        BENCHMARKS[name] for name in published.published("v3-chat").metrics
    ]
    group = found[0].groups[0]
    assert [bar.measured for bar in group.bars] == [False] * 6 + [True]
    bar = group.bars[-1]
    assert (bar.note, bar.changed, bar.low < bar.value < bar.high) == ("100 of 12,032", True, True)
    assert bar.color not in {other.color for other in group.bars[:-1]}
    assert not [bar for group in found[0].groups[1:] for bar in group.bars if bar.measured]


def test_a_folder_with_part_of_a_benchmark_is_a_part(tmp_path):
    whole, part = make_task("dsv3_aime24", "aime24"), make_task(source="folder")
    run = write_run(tmp_path / "run", [(whole, make_questions(30)), (part, make_questions(280))])
    found = next(iter(bars(run).values()))
    assert [bar.note for bar in (*found["AIME 2024"], *found["MMLU-Pro"])] == ["", "280 of 12,032"]


def test_sample_rows_never_stand_beside_published_bars(tmp_path):
    run = write_run(tmp_path / "run", [(make_task(source="sample"), make_questions(40))])
    (sample, real) = figures(gather([run]))
    assert not real.is_measured and "compared" not in real.title and "measured" not in real.title
    assert not any(bar.measured for group in real.groups for bar in group.bars)
    assert "published figures only" in real.note
    assert all(bar.measured for group in sample.groups for bar in group.bars)
    assert "not the benchmarks" in sample.note
    markup, _ = written(tmp_path / "out", run)
    assert "sample rows only" in markup.words


def test_codeforces_is_a_percentile_or_nothing(tmp_path):
    questions = make_questions(10, accuracy=1)
    swe = (make_task("swe", "swebench"), questions)
    solved = write_run(tmp_path / "solved", [(make_task("cf", "codeforces"), questions), swe])
    rated_task = make_task("cf", "codeforces")
    rated_task.harness["percentile"] = 41.5
    rated = write_run(tmp_path / "rated", [(rated_task, questions)])
    found = next(iter(bars(solved, rated).values()))
    assert [(bar.value, bar.low) for bar in found["Codeforces"]] == [(41.5, None)]
    assert len(found["SWE-bench Verified"]) == 1


def test_unpublished_suite(tmp_path):
    run = write_run(tmp_path / "run", [(make_task(), make_questions(10))], suite="mine")
    (figure,) = figures(gather([run]))
    assert [bar.measured for group in figure.groups for bar in group.bars] == [True]
    markup, numbers = written(tmp_path / "out", run)
    assert "Nothing was published for the suite mine." in "".join(markup.words)
    assert numbers["published"] == {}


@pytest.mark.parametrize("source", ["hub", "sample"])
def test_empty_task(tmp_path, source):
    run = write_run(tmp_path / "run", [(make_task(rows=500, source=source), [])], suite="mine")
    markup, numbers = written(tmp_path / "out", run)
    assert numbers["runs"][0]["tasks"]["dsv3_mmlu_pro"]["score"] is None
    assert ("of 500" if source == "sample" else "of 12,032") in markup.words
    assert json.loads(markup.scripts["index"])["runs"][0]["tasks"][0]["rows"] == []


def test_comparison(tmp_path):
    right, wrong = make_questions(60, accuracy=1, seed=1), make_questions(80, accuracy=0, seed=1)
    first = write_run(tmp_path / "a", [(make_task(), right)])
    second = write_run(tmp_path / "b", [(make_task(temperature=0.7), wrong)])
    markup, numbers = written(tmp_path / "out", first, second)
    (found,) = numbers["comparisons"]
    ones = sum(q.outputs[0].right for q in right)
    assert found["runs"] == ["Small-MoE (a)", "Small-MoE (b)"]
    assert found["found"]["difference"] == pytest.approx(-ones / 60)
    assert found["found"]["p_value"] == pytest.approx(2 * 0.5**ones)
    assert (found["found"]["only_first"], found["found"]["only_second"]) == (0, 20)
    assert found["unlike"] == ["temperature: 0.0 and 0.7"]
    pair = json.loads(markup.scripts["index"])["pairs"][0]
    assert (len(pair["first"]), pair["second"]) == (ones, [])
    words = "".join(markup.words)
    assert f"Show the {ones} questions where they differ" in words and "20 only in Small-MoE (b)" in words


def recorded(model):
    """The 280 recorded outputs of a model to MMLU-Pro, judged as a run judges them."""
    made = []
    for row in map(json.loads, recorded_file("mmlu_pro_280_replay.jsonl").read_text(encoding="utf-8").splitlines()):
        text, gold = row["recorded"][model]["output"], row["answer"]
        answer, stock = extraction.mmlu_pro_letter(text), extraction.stock_mmlu_pro_letter(text)
        one = output(answer == gold, text, answer=answer, stock_answer=stock, stock_right=stock == gold)
        fields = {"question": row["question"], "prompt": row["question"], "category": row["category"]}
        made.append(Question(id=row["question_id"], gold=gold, outputs=(one,), **fields))
    return made


def test_recorded_outputs_of_two_models(tmp_path):
    """139 by lm-eval's own scorer and 168 by the authors' chain, of 280; and two real models next to each other."""
    models = ("DeepSeek-Coder-V2", "gemini-1.5-pro-002")
    runs = [
        write_run(tmp_path / model, [(make_task(rows=12_032, changed=["280 rows"]), recorded(model))], label=model)
        for model in models
    ]
    _, numbers = written(tmp_path / "out", *runs)
    coder, gemini = (run["tasks"]["dsv3_mmlu_pro"] for run in numbers["runs"])
    assert (round(280 * coder["stock"]), round(280 * coder["score"])) == (139, 168)
    assert (round(280 * gemini["stock"]), round(280 * gemini["score"])) == (183, 183)
    (pair,) = numbers["comparisons"]
    found = pair["found"]
    assert 280 * found["difference"] == pytest.approx(15)
    assert len(found["second_better"]) - len(found["first_better"]) == 15
    assert found["low"] < 15 / 280 < found["high"]


def test_runs_that_cannot_be_compared_say_why(tmp_path):
    first = write_run(tmp_path / "a", [(make_task(), make_questions(4, choices="AB"))])
    other = write_run(tmp_path / "b", [(make_task(), make_questions(4, choices="CD"))])
    refused = write_run(tmp_path / "c", [(make_task("dsv3_math500", "math500"), make_questions(4))])
    (pair,) = pairs(gather([first, other, refused]))
    assert (pair.runs, pair.found) == ((0, 1), None)
    markup, numbers = written(tmp_path / "out", first, other, refused)
    assert "found the golds 'A' and 'C'" in "".join(markup.words)
    assert numbers["comparisons"][0]["found"] is None


def test_refuses(tmp_path):
    run = write_run(tmp_path / "run", [(make_task(), make_questions(3))])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="found no folder, wanted that of at least one finished evaluation"):
        report.write_report([], out)
    with pytest.raises(FileNotFoundError, match=r"found no evaluation\.json"):
        report.write_report([tmp_path], out)
    with pytest.raises(ValueError, match="run: found twice"):
        report.write_report([run, tmp_path / "." / "run"], out)
    twice = write_run(tmp_path / "twice", [(make_task(), make_questions(3) + make_questions(1))])
    with pytest.raises(ValueError, match="twice: dsv3_mmlu_pro: found the question '0' twice"):
        report.write_report([twice], out)
    assert not out.exists()  # refused before anything is written


def test_page_files_are_shipped():
    """The suffixes of what the package reads besides its modules are in ``package_data``."""
    root = Path(__file__).resolve().parents[1]
    setup = ast.unparse(ast.parse((root / "setup.py").read_text()))
    for file in (*(root / "eval" / "report").iterdir(), *(root / "modeling_deepseek_moe" / "pages").iterdir()):
        if file.is_file() and file.suffix != ".py":
            assert f"**/*{file.suffix}" in setup, file
    assert re.search(r"\*\*/\*\.json'", setup)
