"""What the task files of ``tasks/`` call: questions as lm-eval's data sets, and verdicts as its metrics."""

from collections.abc import Callable

from lm_eval.api.task import ConfigurableTask

from modeling_deepseek_moe.eval import benchmarks
from modeling_deepseek_moe.eval.data import HUB


class ReorderedTask(ConfigurableTask):
    """A task whose every repeat has a prompt of its own: lm-eval asks the same prompt ``repeats`` times."""

    def __init__(self, config: dict | None = None):
        kept = {name: value for name, value in (config or {}).items() if name != "class"}
        # as many prompts as repeats, unless the caller's metadata says otherwise
        kept["metadata"] = {"k": kept.get("repeats", 1)} | (kept.get("metadata") or {})
        super().__init__(config=kept)

    def construct_requests(self, doc: dict, ctx: str, **kwargs) -> list:
        """
        Raises:
            ValueError: the prompt is not in the context as it was given, or there is not one for each repeat.
        """
        task, number, repeats = kwargs.pop("metadata")
        if repeats != len(doc["prompts"]):
            raise ValueError(
                f"{task}: found {len(doc['prompts'])} prompts for {repeats} repeats, wanted k = {repeats}"
            )
        if doc["prompt"] not in ctx:
            raise ValueError(f"{task}: found no prompt in the context, wanted a chat template that leaves it as it is")
        requests = []
        for i, prompt in enumerate(doc["prompts"]):
            request = super().construct_requests(
                doc, ctx.replace(doc["prompt"], prompt), metadata=(task, number, 1), **kwargs
            )
            request.idx = i
            requests.append(request)
        return requests


def dataset(questions: Callable[..., tuple[list[dict], dict]], **settings):
    """lm-eval's ``custom_dataset``; it hands over all of a task's metadata, of which ``data``, ``shots`` and ``k`` are ours.

    From lm-eval's own command line: ``--metadata '{"data": "FOLDER"}'``.
    """
    import datasets

    def load(data: str = HUB, shots: int | None = None, k: int | None = None, **_):
        given = {"shots": shots, "k": k}
        changed = {name: value for name, value in given.items() if value is not None and name in settings}
        rows, _ = questions(data=data, **settings | changed)
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    return load


def verdicts(benchmark: str, thinking: bool = False) -> Callable[[dict, list], dict[str, float]]:
    """lm-eval's ``process_results``: the mean over the k outputs, and the same by lm-eval's own reading where it has one."""
    scorer = benchmarks.SCORERS[benchmark]

    def process(doc: dict, results: list) -> dict[str, float]:
        texts = [text for repeats in results for text in repeats]  # all, by `keep_all`
        judged = [benchmarks.judge_repeat(scorer, doc, text, i, thinking) for i, text in enumerate(texts)]
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
