"""Hot operations: one folder each, with the plain-torch reference that defines it."""
