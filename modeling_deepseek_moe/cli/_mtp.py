"""What ``generate`` and ``chat`` share of MTP decoding: the options, and whether a folder can do it."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.cli._console import plural
from modeling_deepseek_moe.cli._model import RUNNING

MtpOption = Annotated[
    bool,
    typer.Option(
        "--mtp",
        help="Draft tokens by the model's MTP layers and verify them in one pass, for as long as that is faster.",
        rich_help_panel=RUNNING,
    ),
]
DraftsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Draft N tokens a step, faster or not.",
        show_default="with --mtp, one by each MTP layer",
        rich_help_panel=RUNNING,
    ),
]


def asked(folder: Path, mtp: bool, drafts: int | None, adapter: Path | None) -> dict[str, int | str]:
    """The argument of `generate` that ``--mtp`` and ``--drafts`` ask for, before anything is loaded; none without them.

    Raises:
        ValueError: the folder has no MTP layers, or an adapter is to be added, which they know nothing of.
    """
    if not mtp and drafts is None:
        return {}
    option = "--mtp" if mtp else "--drafts"
    if adapter is not None:
        raise ValueError(
            f"{option}: found --adapter {adapter} with it, wanted one of them: MTP layers were not trained with the "
            "adapter and are loaded without it; convert merge-adapter makes one model of both"
        )
    if not folder.is_dir():
        return {"use_mtp": drafts or "auto"}  # loading says what is wrong with it
    if not read_config(folder).num_nextn_predict_layers:
        raise ValueError(f"{option}: {folder}: num_nextn_predict_layers: found 0, wanted a model with MTP layers")
    return {"use_mtp": drafts or "auto"}


def summary(model: PreTrainedModel) -> str:
    """What drafting came to in the last run, in one line."""
    stats = model.draft_stats
    if not stats.drafted:
        return "MTP: nothing was drafted" + (f": {stats.reason}" if stats.reason else "")
    share = f"{stats.acceptance:.0%} of {plural(stats.drafted, 'draft')} stood"
    return f"MTP: {stats.tokens_per_pass:.2f} tokens a pass, {share}"
