"""Mixture of experts: router, routed experts in their two homes, and the layer that joins them."""
