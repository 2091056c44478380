"""Checkpoint folders: whatever reads or writes their files does it through here.

Reading: `headers`, `ranges`, `jsonfile`, `mapped`, `index`, `reader`, `scales`. Writing: `atomic`, `lock`, `journal`, `transaction`,
`writer`.
"""
