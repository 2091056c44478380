"""What all commands share at the terminal: where output goes, how figures read, how errors end.

Results go to stdout, so that they can be piped; progress and remarks go to stderr.
"""

import functools
import inspect
import json
from collections.abc import Callable
from contextvars import ContextVar

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.segment import Segment

from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.terminal import shown

DEBUG: ContextVar[bool] = ContextVar("DEBUG", default=False)
# What this package and transformers raise for bad input: the message says it all.
EXPECTED = (CheckpointError, ValueError, OSError, ImportError)


class _Shown:
    """A renderable without control characters, but for the line ends and the terminal's own styles."""

    def __init__(self, renderable: ConsoleRenderable):
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)


class _ShowControls(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


class _Console(Console):
    """Whatever is printed, names out of checkpoints and labels too, reaches the terminal as text."""

    def __init__(self, **options):
        super().__init__(highlight=False, **options)
        self.push_render_hook(_ShowControls())

    def print(self, *objects, **options) -> None:
        # texts before rich sees them, since it drops some control characters silently
        super().print(*(shown(one) if isinstance(one, str) else one for one in objects), **options)


def stdout() -> Console:
    return _Console()


def stderr() -> Console:
    return _Console(stderr=True)


def guarded(command: Callable) -> Callable:
    """The command with every error as one line on stderr and exit code 2, unless ``--debug`` asks for more."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if DEBUG.get():
                raise
            message = " ".join(_sentence(error).split())
            if not isinstance(error, EXPECTED):
                message = f"{type(error).__name__}: {message} (deepseek-moe --debug ... shows the traceback)"
            stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def _sentence(error: Exception) -> str:
    """What an error says; the number that the system has for it says nothing to a reader."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def help_text(command: Callable) -> str:
    """The command's docstring with the lines of each paragraph joined, for the terminal to break; examples as they are."""
    paragraphs = inspect.getdoc(command).replace("\b\n", "").split("\n\n")
    return "\n\n".join(text if "\n  " in text else text.replace("\n", " ") for text in paragraphs)


def print_json(fields: dict) -> None:
    typer.echo(shown(json.dumps(fields, indent=2, ensure_ascii=False)))


def plural(number: int, noun: str) -> str:
    """``1 file``, ``1,234 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rate(per_second: float) -> str:
    """Three digits, never an exponent: ``0.0583``, ``12.4``, ``1,320``."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def size(nbytes: float) -> str:
    """``70272`` → ``70.3 kB``; powers of 1000, as disks and downloads are counted."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def count(values: float) -> str:
    """``671026419200`` → ``671.0B``, ``2451437056`` → ``2.45B``."""
    return _scaled(values, ("", "k", "M", "B", "T"), fine=2).replace(" ", "")


def _scaled(value: float, units: tuple[str, ...], fine: int = 1) -> str:
    """``fine`` digits after the point below 10, one from there on, none without a unit."""
    power = 0
    while abs(value) >= 999.95 and power < len(units) - 1:  # what would be rounded to 1000.0 takes the next unit
        value, power = value / 1000, power + 1
    digits = (fine if abs(value) < 9.995 else 1) if power else 0
    return f"{value:.{digits}f} {units[power]}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
