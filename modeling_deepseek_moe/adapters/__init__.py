"""Adapters of peft on these models, by peft's own entry points.

`mixin` is where peft meets a model, `targets` what an adapter's names stand for, `refusals` what weights that stay in a
release's format cannot take, `stored` how an adapter's tensors find their layers. `layers` are the two layers that peft is given
for such weights and for stacked experts, by its custom module mapping; `merging` adds their differences to codes, `codes` has layers
of every method merge into them, and `tuners` looks at all layers before the first is merged. peft is imported where it is needed, never
by importing this package.
"""

from modeling_deepseek_moe.adapters.mixin import AdapterMixin

__all__ = ["AdapterMixin"]
