"""Instances of another package's classes that get methods of this package's in front of their own."""

import types
from functools import cache
from typing import Any


def put_in_front(instance: Any, mixin: Any) -> None:
    """Make an instance one whose methods are a mixin's first, by the names of its class. So are copies and pickles of it."""
    kind: Any = type(instance)
    if not issubclass(kind, mixin):
        instance.__class__ = _with(mixin, kind)


@cache
def _with(mixin: Any, kind: Any) -> type:
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce__": _reduce}
    return types.new_class(kind.__name__, (mixin, kind), exec_body=lambda body: body.update(own))


def _reduce(instance: Any) -> tuple:
    return _empty, type(instance).__bases__, instance.__dict__


def _empty(mixin: Any, kind: Any) -> Any:
    made = kind.__new__(kind)
    put_in_front(made, mixin)
    return made
