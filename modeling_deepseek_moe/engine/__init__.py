"""The CPU engine's view of a model: a guest that looks at it from outside. No module of the model knows of it.

`reasons` says of each kind of module why the engine cannot run it, `plan` which stages of which layers it runs in one
call while a model decodes, `fused` how it runs halves of a layer elsewhere, `runs` is what the model's loop over its
layers asks, `report` what a user sees.
"""
