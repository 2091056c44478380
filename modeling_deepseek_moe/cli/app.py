"""The application: which commands there are, and the options that come before a command."""

from collections.abc import Callable
from typing import Annotated

import typer

from modeling_deepseek_moe._version import __version__
from modeling_deepseek_moe.cli._console import DEBUG, guarded, help_text
from modeling_deepseek_moe.cli.bench import bench
from modeling_deepseek_moe.cli.chat import chat
from modeling_deepseek_moe.cli.convert import convert
from modeling_deepseek_moe.cli.demo import demo
from modeling_deepseek_moe.cli.eval import eval  # noqa: A004  the command's name
from modeling_deepseek_moe.cli.generate import generate
from modeling_deepseek_moe.cli.inspect import inspect
from modeling_deepseek_moe.cli.plan import plan
from modeling_deepseek_moe.cli.predict import predict
from modeling_deepseek_moe.cli.report import report
from modeling_deepseek_moe.cli.train import train
from modeling_deepseek_moe.machine import keep_to_quota

COMMANDS: tuple[Callable, ...] = (plan, inspect, bench, generate, chat, convert, train, eval, predict, report, demo)
FREE_OPTIONS: dict[Callable, dict] = {
    train: {"allow_extra_args": True, "ignore_unknown_options": True}
}  # read by the command itself

app = typer.Typer(
    name="deepseek-moe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepseek-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """DeepSeek-V2, V2-Lite, V3, R1, Moonlight and Kimi-K2 checkpoints, as they were released.

    A first session, from "will it run here" to talking to it:
      [cyan]deepseek-moe plan config.json[/]           before anything is downloaded
      [cyan]deepseek-moe inspect DeepSeek-V2-Lite[/]   is the download complete
      [cyan]deepseek-moe generate --model DeepSeek-V2-Lite "Once upon a time"[/]
      [cyan]deepseek-moe chat --model DeepSeek-V2-Lite-Chat[/]

    Errors are one line and exit code 2; [cyan]deepseek-moe --debug COMMAND ...[/] shows where they come from.
    """
    DEBUG.set(debug)
    keep_to_quota()


for command in COMMANDS:
    app.command(command.__name__, help=help_text(command), context_settings=FREE_OPTIONS.get(command))(
        guarded(command)
    )


def main() -> None:
    """Entry point of the console script."""
    app()
