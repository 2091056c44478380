"""How a family's releases name tensors that the model has under other names, and which of theirs the model has no place for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class ReleaseNames:
    """One row: what to read otherwise than DeepSeek-V3's releases have it. The default changes nothing.

    ``fields``: of a config, the release's spelling → this package's. ``prefix`` stands before every tensor of the language
    model, as where that is a part of a larger one. ``moved``: within a tensor's name, the release's part → the model's.
    ``carried`` (a pattern of the model's names): tensors that no layer here reads, and that are saved as they came.
    ``optional`` (likewise): tensors that a release has all of, or none.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    moved: Mapping[str, str] = field(default_factory=dict)
    carried: str = ""
    optional: str = ""

    def own(self, name: str) -> str:
        """The model's name of a release's tensor."""
        name = name.removeprefix(self.prefix)
        for theirs, ours in self.moved.items():
            if ours not in name:
                name = name.replace(theirs, ours)
        return name

    def released(self, name: str) -> str:
        """The release's name of a model's tensor."""
        for theirs, ours in self.moved.items():
            name = name.replace(ours, theirs)
        return self.prefix + name

    def is_carried(self, name: str) -> bool:
        return bool(self.carried) and self._carried.match(name) is not None

    def is_optional(self, name: str) -> bool:
        return bool(self.optional) and self._optional.search(name) is not None

    @cached_property
    def _carried(self) -> re.Pattern:
        return re.compile(self.carried)

    @cached_property
    def _optional(self) -> re.Pattern:
        return re.compile(self.optional)
