"""Mixture of experts: router, routed experts, and the layer that joins them."""
