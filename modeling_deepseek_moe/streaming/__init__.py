"""Experts of a checkpoint larger than memory: read as they are routed to, kept in memory of a set size, used again.

`memory` is where experts are held, `reader` how they are read, `cache` which are held and read next, `layer` what a
layer computes with them as they arrive, `ahead` what the next layer will want, `model` what a user sees of it.
"""
