"""Evaluations made up for the tests of the report."""

import random

from modeling_deepseek_moe.eval.results import Evaluation, Output, Question, TaskRun, write_evaluation

CATEGORIES = ("biology", "law", "math", "physics")
FIELDS = {
    "mmlu_pro.max_tokens": {"value": 8192, "status": "documented", "source": "V3 5.3.1"},
    "mmlu_pro.top_p": {"value": 1.0, "status": "assumed", "source": "not documented"},
}


def output(right, text="", *, answer="A", **fields):
    return Output(text=text or f"Thus the answer is ({answer}).", answer=answer, right=right, **fields)


def make_questions(n, accuracy=0.7, *, k=1, seed=0, chars=200, choices="ABCDEFGHIJ"):
    """``n`` questions whose outputs are right with chance ``accuracy``, some without answer, some truncated."""
    rng = random.Random(seed)
    questions = []
    for i in range(n):
        gold = choices[i % len(choices)]
        outputs = []
        for _ in range(k):
            right, blank = rng.random() < accuracy, rng.random() < 0.03
            answer = None if blank else gold if right else choices[(i + 1) % len(choices)]
            text = f"Step by step, for question {i}. " + rng.randbytes(chars // 2).hex()
            text += "" if blank else f" The answer is ({answer})."
            made = {"right": right and not blank, "stock_right": right and not blank and rng.random() < 0.8}
            made |= {"stock_answer": answer, "tokens": len(text) // 4, "truncated": blank}
            outputs.append(Output(text=text, answer=answer, **made))
        question = f"Question number {i}: which of the ten options is the one that was asked for?"
        asked = "The following are questions with answers.\n\n" * 8 + question
        category = CATEGORIES[i % len(CATEGORIES)]
        questions.append(
            Question(id=str(i), question=question, prompt=asked, gold=gold, outputs=tuple(outputs), category=category)
        )
    return questions


def make_task(task="dsv3_mmlu_pro", benchmark="mmlu_pro", *, rows=0, source="hub", changed=(), **settings):
    data = {"source": source, "path": "TIGER-Lab/MMLU-Pro", "revision": "b189ec7", "sha256": "0" * 64}
    settings = {"max_tokens": 8192, "temperature": 0.0, "k": 1} | settings
    return TaskRun(task=task, benchmark=benchmark, data=data, rows=rows, settings=settings, changed=tuple(changed))


def write_run(folder, tasks, *, label="Small-MoE", suite="v3-chat", fields=None):
    """``tasks``: pairs of a `TaskRun` and its questions; a task's ``rows`` of 0 stands for as many as were asked."""
    whole = [TaskRun(**{**vars(task), "rows": task.rows or len(questions)}) for task, questions in tasks]
    evaluation = Evaluation(
        model={
            "label": label,
            "path": "/models/small",
            "config_sha256": "ab" * 32,
            "dtype": "bfloat16",
            "parameters": 42,
        },
        suite=suite,
        protocol={"name": suite, "about": "As in the report.", "fields": FIELDS if fields is None else fields},
        tasks=tuple(whole),
        versions={"torch": "2.13.0", "lm_eval": "0.4.13"},
        seeds={"sampling": 1234},
        date="2026-11-24T12:00:00+00:00",
        seconds=321.5,
        command="deepseek-moe eval --model small --suite v3-chat",
        machine="2 cores",
    )
    write_evaluation(folder, evaluation, {task.task: questions for task, questions in tasks})
    return folder
