"""Cases of kernels run in a process of their own, in Triton's interpreter, which is repaired there."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from gpu import interpreter

    interpreter.repair()


@pytest.fixture(autouse=True)
def a_card(monkeypatch):
    """What the functions that start kernels ask of a card, where there is none: SM80 with eight processors."""
    from modeling_deepseek_moe.ops import _triton

    monkeypatch.setattr(_triton, "capability", lambda device: 80)
    monkeypatch.setattr(_triton, "processors", lambda device: 8)
