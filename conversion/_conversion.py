"""What a conversion is: a name, the options that it takes, and a function that plans the new checkpoint's tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._source import Source


class Options(NamedTuple):
    """What a conversion may be told. Those that it has no use for are refused unless they are left alone."""

    max_shard_size: str = "5GB"
    dtype: str | None = None
    scales_from: Path | None = None
    format: str | None = None
    world_size: int | None = None
    adapter: tuple[Path, ...] | None = None
    weight: tuple[float, ...] | None = None
    action: str | None = None
    mtp_from: Path | None = None
    keep: str | None = None
    keep_fp8: str | None = None
    head: str | None = None
    config: Path | None = None


def flag(option: str) -> str:
    """``max_shard_size`` → ``--max-shard-size``."""
    return f"--{option.replace('_', '-')}"


@dataclass(frozen=True)
class Output:
    """What a conversion makes of its input, from headers alone.

    Attributes:
        tensors: in the order in which they fill shards; or, by file name, in the files that the format prescribes.
        config: the new ``config.json``.
        also_read: what is read besides the input.
        report: what there is to say once it is written, line by line.
        decided_by: configs besides the input's that decide what is written.
    """

    tensors: list[TensorPlan] | dict[str, list[TensorPlan]]
    config: dict
    also_read: tuple[Source, ...] = ()
    report: Callable[[], Iterable[str]] = tuple
    decided_by: Sequence[dict] = ()


@dataclass(frozen=True)
class Conversion:
    """One conversion, declared as ``CONVERSION`` in the file that is named after it.

    Attributes:
        name: as the command line spells it.
        plan: the opened input and the options → what is to be written.
        options: names of the `Options` that it takes.
        required: of these, those that it cannot do without, with what each wants.
        inverse: the conversion that gives the same bytes back, perhaps by options of its own; or
        no_inverse: why none does.
        open: how its input is opened.
    """

    name: str
    plan: Callable[[Any, Options], Output]  # of what `open` makes, mostly a `Source`
    options: tuple[str, ...] = ("max_shard_size",)
    required: Mapping[str, str] = field(default_factory=dict)
    inverse: str = ""
    no_inverse: str = ""
    open: Callable[[Path], Any] = Source

    def __post_init__(self):
        assert bool(self.inverse) != bool(self.no_inverse), f"{self.name}: an inverse, or why there is none"

    def check(self, options: Options) -> None:
        """Refuse options that it has no use for, and the lack of those that it needs.

        Raises:
            ValueError: names the option.
        """
        check_unused(self.name, options, self.options)
        for option, wanted in self.required.items():
            if getattr(options, option) is None:
                raise ValueError(f"{self.name} wants {flag(option)}, {wanted}")


def check_unused(name: str, options: Options, used: tuple[str, ...] = ()) -> None:
    """
    Raises:
        ValueError: an option is set that is not ``used``.
    """
    for option, value in options._asdict().items():
        if option not in used and value != Options._field_defaults[option]:
            raise ValueError(f"{name} has no use for {flag(option)} {value}")
