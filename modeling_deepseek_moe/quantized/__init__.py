"""Layers whose weights stay in a checkpoint's format: linear layers, and routed experts stacked or mapped from files."""
