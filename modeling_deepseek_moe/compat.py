"""What differs between the transformers versions that are tested: the cache is ``past_key_values`` in 5.23, ``cache`` since 5.24.

This package says ``cache``. Its models take both names, and hand the cache on under the one that is in force.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING

import transformers
from packaging.version import Version
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg

try:
    from transformers.utils.output_capturing import _active_collector as collector  # which has no public name
except ImportError:  # by whatever name a newer version knows it: its hooks are looked at as any others
    collector = None

# What a mixin may call: to a type checker it is a model, and a plain class in truth.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as ModelMixin
else:
    ModelMixin = object

logger = logging.get_logger(__name__)

TESTED = ("5.23", "5.24")
OLD_NAME = "past_key_values"
# of arguments and output fields of transformers
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else OLD_NAME


def takes_cache(forward: Callable) -> Callable:
    """Let ``forward(..., cache, ...)`` be called by the other name too; since 5.24 with transformers' own warning."""
    if CACHE_NAME != OLD_NAME:
        return deprecate_kwarg(OLD_NAME, "5.40.0", new_name="cache")(forward)

    @wraps(forward)
    def renamed(*arguments, **named):
        if OLD_NAME in named:
            named["cache"] = named.pop(OLD_NAME)
        return forward(*arguments, **named)

    # `generate` and `Trainer` look for the argument by the name that they pass
    signature = inspect.signature(forward)
    parameters = [p.replace(name=OLD_NAME if p.name == "cache" else p.name) for p in signature.parameters.values()]
    setattr(renamed, "__signature__", signature.replace(parameters=parameters))  # noqa: B010 - a function's own attribute
    return renamed


def is_idle(hook: Callable) -> bool:
    """Whether a forward hook is one that transformers has left on a layer whose outputs were asked for once, and that collects nothing now."""
    is_its = getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
    return is_its and collector is not None and not collector.get()  # empty where a call asks for nothing


def warn_untested(version: str = transformers.__version__) -> None:
    """One line where transformers is newer (or older) than the versions that are tested."""
    found = Version(version)
    if f"{found.major}.{found.minor}" not in TESTED:
        tested = " and ".join(TESTED)
        logger.warning(f"modeling_deepseek_moe is tested with transformers {tested}; found {version}.")
