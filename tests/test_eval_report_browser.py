"""The report page in a real browser: clicks, typing, filters and drill-down, as a reader would."""

import time

import pytest
from browser import browse, find_browser
from report_cases import make_questions, make_task, output, write_run

from modeling_deepseek_moe.eval.report import write_report
from modeling_deepseek_moe.eval.results import Question

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs Chromium and chromedriver")

ATTACK = "<script>window.hit=1</script></script><img src=x onerror='window.hit=1'><svg onload='window.hit=1'>\"'&amp;"
ROW = "#list > li:nth-child({}) > details > summary"
BENCHMARK = 12_032


@pytest.fixture(scope="module")
def tab():
    with browse(*find_browser()) as page:
        yield page


@pytest.fixture
def page(tab):
    """A desktop tab; at the end, nothing was complained of in its console."""
    tab.device(1280, 900)
    tab.errors()
    yield tab
    assert tab.errors() == []


def shown(page):
    return page.texts("#list .what")


def count(page):
    page.wait("document.querySelector('#count').dataset.done")
    return page.text("#count")


def wait_count(page, text):
    page.wait("document.querySelector('#count').innerText === arguments[0]", text)


def questions():
    """Seven: right, wrong, no answer, truncated, sometimes right, hostile, and one with a long output."""
    made = [
        ("capital", "geography", [output(True, "Paris it is (A).", tokens=5, truncated=False)]),
        ("mountain", "geography", [output(False, "K2 (B).", answer="B", stock_answer="C", stock_right=False)]),
        ("river", "geography", [output(False, "I do not know.", answer=None, truncated=False)]),
        ("integral", "maths", [output(False, "We integrate and", answer=None, tokens=8192, truncated=True)]),
        ("coin", "maths", [output(True, "heads"), output(False, "tails", answer="B")]),
        (ATTACK, ATTACK, [output(False, ATTACK, answer=ATTACK, stock_answer=ATTACK, stock_right=False)]),
        ("long", "maths", [output(True, "start " + "x" * 60_000 + " needle")]),
    ]
    return [
        Question(
            id=f"id-{i}", question=text, prompt=f"PROMPT {text}", gold="A", category=category, outputs=tuple(outputs)
        )
        for i, (text, category, outputs) in enumerate(made)
    ]


@pytest.fixture
def small(tmp_path, page):
    run = write_run(tmp_path / "run", [(make_task(), questions()), (make_task("empty", "math500", rows=5), [])])
    page.open(write_report([run], tmp_path / "out"))
    wait_count(page, "7 of 7 questions")
    return page


@pytest.mark.parametrize(
    "verdict, wanted",
    [
        ("Right", ["capital", "long"]),
        ("Wrong", ["mountain", "river", "integral", ATTACK]),
        ("Sometimes right", ["coin"]),
        ("No answer", ["river", "integral"]),
        ("Truncated", ["integral"]),
        ("All", ["capital", "mountain", "river", "integral", "coin", ATTACK, "long"]),
    ],
)
def test_filter_by_verdict(small, verdict, wanted):
    small.choose("#verdict", verdict)
    assert count(small) == f"{len(wanted)} of 7 questions"
    assert shown(small) == wanted


def test_filter_by_category_and_search_together(small):
    small.choose("#category", "maths")
    wait_count(small, "3 of 7 questions")
    small.type("#search", "CO")
    wait_count(small, "1 of 7 questions")
    assert shown(small) == ["coin"]
    small.type("#search", "capital")
    wait_count(small, "No question of 7 matches.")
    small.choose("#category", "All")
    wait_count(small, "1 of 7 questions")
    assert shown(small) == ["capital"]


def test_search_in_outputs_only_when_asked(small):
    small.type("#search", "Paris it is")
    wait_count(small, "No question of 7 matches.")
    small.click("#deep")
    wait_count(small, "1 of 7 questions")
    assert shown(small) == ["capital"]
    small.type("#search", "prompt mountain")
    small.wait("document.querySelector('#list .what')?.innerText === 'mountain'")


def test_drill_down(small):
    small.click(ROW.format(2))
    small.wait("document.querySelector('.detail')")
    facts = dict(zip(small.texts(".detail dt"), small.texts(".detail dd"), strict=True))
    assert facts == {
        "Gold": "A",
        "Extracted": "B",
        "Stock lm-eval": "C: wrong",
        "Tokens": "unknown",
        "Truncated": "unknown",
    }
    assert small.texts(".detail .output > summary") == ["Output: wrong"]
    assert small.texts(".detail .output pre") == ["K2 (B)."]
    small.click(".detail .prompt > summary")
    small.wait("document.querySelector('.detail .prompt pre')")
    assert small.text(".detail .prompt pre") == "PROMPT mountain"
    small.click(ROW.format(2))
    small.wait("!document.querySelector('#list details[open] > .detail')")
    small.click(ROW.format(4))
    small.wait("document.querySelectorAll('.detail').length === 2")
    assert {"8,192", "yes, at the token limit", "nothing"} <= set(small.texts(".detail dd"))


def test_several_outputs(small):
    small.click(ROW.format(5))
    small.wait("document.querySelector('.detail .output[open]')")
    assert small.texts(".detail .output > summary") == ["Output 1 of 2: right", "Output 2 of 2: wrong"]
    assert small.texts(".detail .output pre") == ["heads"]
    small.click(".detail .output:last-child > summary")
    small.wait("document.querySelectorAll('.detail .output pre').length === 2")
    assert small.texts(".detail .output pre") == ["heads", "tails"]


def test_long_output_is_cut_until_asked_for(small):
    small.click(ROW.format(7))
    small.wait("document.querySelector('.detail .output pre')")
    assert len(small.text(".detail .output pre")) == 20_000
    small.click(".detail .output button")
    assert small.text(".detail .output pre").endswith("needle")


def test_hostile_output_is_only_text(small):
    small.click(ROW.format(6))
    small.wait("document.querySelector('.detail .output pre')")
    small.click(".detail .prompt > summary")
    small.wait("document.querySelector('.detail .prompt pre')")
    assert small.text(".detail .output pre") == ATTACK
    assert small.text(".detail .prompt pre") == f"PROMPT {ATTACK}"
    assert ATTACK in small.texts(".detail dd")
    assert not small.run("return document.querySelectorAll('img, [onload], [onerror]').length")
    assert small.run("return window.hit") is None


def test_even_injected_markup_cannot_run(small):
    """The policy of the page, should something ever get past the escaping: scripts and loads are refused."""
    small.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')")
    time.sleep(0.3)
    assert small.run("return window.hit") is None
    complaints = small.errors()
    assert complaints and all("Content Security Policy" in message for message in complaints)


def test_empty_task(small):
    small.choose("#task", "MATH-500")
    wait_count(small, "No question was asked in this task.")
    assert shown(small) == []
    small.type("#search", "capital")
    small.choose("#task", "MMLU-Pro")
    wait_count(small, "1 of 7 questions")


def test_keyboard_alone(small):
    element = small.find(ROW.format(1))
    small.call(f"/element/{element}/value", text="\ue007")  # Enter on the row
    small.wait("document.querySelector('.detail .output pre')")
    assert small.text(".detail .output pre") == "Paris it is (A)."


def test_comparison(tmp_path, page):
    first = [Question(id=str(i), question=f"q{i}", prompt="", gold="A", outputs=(output(i < 6),)) for i in range(9)]
    second = [
        Question(id=str(i), question=f"q{i}", prompt="", gold="A", outputs=(output(i > 3, f"second wrote {i}"),))
        for i in reversed(range(9))  # another order: rows are matched by id
    ]
    a = write_run(tmp_path / "a", [(make_task(), first)], label="One")
    b = write_run(tmp_path / "b", [(make_task(), second)], label="Two")
    page.open(write_report([a, b], tmp_path / "out"))
    wait_count(page, "9 of 9 questions")
    page.click("[data-pair]")
    wait_count(page, "7 of 9 questions")
    assert shown(page) == ["q0", "q1", "q2", "q3", "q6", "q7", "q8"]
    page.click(ROW.format(5))
    page.wait("document.querySelectorAll('.detail .output pre').length === 2")
    assert page.texts(".detail h5") == ["One", "Two"]
    assert page.texts(".detail .output pre")[1] == "second wrote 6"
    page.click("#pair button")
    wait_count(page, "9 of 9 questions")
    page.choose("#run", "Two")
    page.wait("document.querySelector('#list .what').innerText === 'q8'")


def test_chart_has_every_bar_with_its_words(small):
    labels = small.run(
        "return [...document.querySelectorAll('.chart g[role=img]')].map(g => g.getAttribute('aria-label'))"
    )
    assert "DeepSeek-V3: 75.9, published" in labels
    assert len([label for label in labels if label.endswith(", published")]) == 36
    (measured,) = [label for label in labels if "measured here" in label]
    assert measured.startswith("Small-MoE: 35.7 (")
    box = small.run(
        "const b = document.querySelector('.chart rect.measured').getBoundingClientRect(); return b.height"
    )
    assert box > 1
    kinds = small.texts(".legend span")
    assert kinds == ["published"] * 6 + ["measured here"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out_or_fades(tmp_path, page, width, scheme):
    page.device(width, 800, scheme)
    run = write_run(tmp_path / "run", [(make_task(rows=50, changed=["limit"]), questions())], label="A" * 60)
    page.open(write_report([run], tmp_path / "out"))
    page.wait("document.querySelector('#list > li')")
    page.click(ROW.format(6))
    page.wait("document.querySelector('.detail .output pre')")
    page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    worst = page.run(CONTRAST)
    assert worst[0] >= 4.5, f"contrast of {worst}"


# The least contrast (WCAG 2) of a text with what is under it, and that text.
CONTRAST = """
const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => { x /= 255;
  return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
const under = (e) => { while (e) { const c = getComputedStyle(e).backgroundColor;
  if (!c.endsWith(', 0)')) return c; e = e.parentElement; } };
let worst = [99, ''];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('svg') || e.disabled || !e.offsetParent) continue;
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const [a, b] = [light(getComputedStyle(e).color), light(under(e))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40)];
}
return worst;
"""


@pytest.mark.slow
def test_a_whole_benchmark_is_usable_at_once(tmp_path, page, record_property):
    """12,032 questions with 3,000-character outputs: seconds until the list can be used, until a search and an opening."""
    made = make_questions(BENCHMARK, chars=3000)
    run = write_run(tmp_path / "run", [(make_task(), made)])
    file = write_report([run], tmp_path / "out")
    start = time.perf_counter()
    page.open(file)
    wait_count(page, "12,032 of 12,032 questions")
    seconds = {"opened": time.perf_counter() - start}
    assert len(shown(page)) == 50

    start = time.perf_counter()
    page.choose("#verdict", "No answer")
    blank = sum(question.outputs[0].answer is None for question in made)
    wait_count(page, f"{blank:,} of 12,032 questions")
    seconds["filtered"] = time.perf_counter() - start
    page.choose("#verdict", "All")

    start = time.perf_counter()
    page.type("#search", "number 12031:")
    wait_count(page, "1 of 12,032 questions")
    seconds["searched"] = time.perf_counter() - start

    start = time.perf_counter()
    page.click(ROW.format(1))
    page.wait("document.querySelector('.detail .output pre')")
    seconds["drilled"] = time.perf_counter() - start
    assert page.text(".detail .output pre") == made[-1].outputs[0].text

    page.type("#search", made[-1].outputs[0].text[100:130].strip())
    wait_count(page, "No question of 12,032 matches.")
    start = time.perf_counter()
    page.click("#deep")
    page.wait("document.querySelector('#count').innerText === '1 of 12,032 questions'", seconds=60)
    seconds["searched all outputs"] = time.perf_counter() - start
    page.type("#search", "")
    wait_count(page, "12,032 of 12,032 questions")

    page.click("#next")
    page.wait("document.querySelector('#place').innerText === '51–100 of 12,032'")
    assert shown(page)[0].startswith("Question number 50:")
    page.click("#previous")
    page.wait("document.querySelector('#previous').disabled")
    for name, value in seconds.items():
        record_property(name, round(value, 2))
    print({name: round(value, 2) for name, value in seconds.items()}, f"{file.stat().st_size / 1e6:.1f} MB")
    assert seconds["opened"] < 10
    assert max(seconds["filtered"], seconds["searched"], seconds["drilled"]) < 3
