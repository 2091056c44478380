"""What the task files of ``tasks/`` call: questions as lm-eval's data sets, and verdicts as its metrics."""

from collections.abc import Callable

from modeling_deepseek_moe.eval import benchmarks
from modeling_deepseek_moe.eval.data import HUB


def dataset(questions: Callable[..., tuple[list[dict], dict]], **settings):
    """lm-eval's ``custom_dataset``; it hands over all of a task's metadata, of which ``data`` and ``shots`` are ours.

    From lm-eval's own command line: ``--metadata '{"data": "FOLDER"}'``.
    """
    import datasets

    def load(data: str = HUB, shots: int | None = None, **_):
        chosen = settings if shots is None or "shots" not in settings else settings | {"shots": shots}
        rows, _ = questions(data=data, **chosen)
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    return load


def verdicts(benchmark: str, thinking: bool = False) -> Callable[[dict, list], dict[str, float]]:
    """lm-eval's ``process_results``: the mean over the k outputs, and the same by lm-eval's own reading where it has one."""
    scorer = benchmarks.SCORERS[benchmark]

    def process(doc: dict, results: list) -> dict[str, float]:
        judged = [benchmarks.judge(scorer, doc, text, thinking) for text in results[0]]  # all, by `keep_all`
        scores = {"exact_match": sum(one["right"] for one in judged) / len(judged)}
        if scorer.stock is not None:
            scores["stock"] = sum(one["stock_right"] for one in judged) / len(judged)
        return scores

    return process


def generation_kwargs(settings: dict) -> dict:
    """lm-eval's, of a protocol's ``max_tokens``, ``temperature`` and ``top_p``."""
    chosen = {name: settings[name] for name in ("temperature", "top_p")}
    return {"do_sample": settings["temperature"] > 0, **chosen, "max_gen_toks": settings["max_tokens"]}


def keep_all(outputs: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """A filter that keeps every repeat: lm-eval's default is the first."""
    return outputs
