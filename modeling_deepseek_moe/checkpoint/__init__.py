"""Checkpoint folders: how their files are read and written. `streaming.reader` alone has a way of its own, past the page cache.

Reading: `headers`, `ranges`, `jsonfile`, `mapped`, `index`, `reader`, `scales`. Writing: `atomic`, `lock`, `journal`, `transaction`,
`writer`.
"""
