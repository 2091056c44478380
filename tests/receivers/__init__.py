"""What other engines make of a folder: their parameters, and the names by which they find what goes into them.

A file each, in the engine's own terms, written from its source in the version that it names. `loaders` runs the engine's own
functions on the same folder where its source is at hand, so that a table that is out of date does not pass for the engine.
"""
