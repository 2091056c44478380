"""Conversion between the checkpoint formats of the family; no converter is here yet."""
