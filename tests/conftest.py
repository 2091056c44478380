"""What all tests share: few threads, no network, a fixed seed, and a short list for the garbage collector."""

import gc
import os

import pytest
import torch
from recorded import MISSING
from transformers.utils import logging

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.disable_progress_bar()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # whatever the test tried: fixtures of modules are made before this one


@pytest.fixture
def by_layers(monkeypatch):
    """Calls a function while models decode by the calls of their layers: what the engine's runs of several are held against."""
    from engine_cases import by_layers_alone

    def compute(function, *arguments, **named):
        with monkeypatch.context() as patch:
            by_layers_alone(patch)
            return function(*arguments, **named)

    return compute


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Modules and tests live until the end: a full pass of the collector, half a second with them, leaves them out from here on."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter):
    """Tests that need recorded answers of others are named when those are not there: a green run says what it left out."""
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if MISSING in str(report.longrepr)]
    if left_out:
        terminalreporter.section(f"{len(left_out)} not checked: they need recorded data")
        for report in left_out:
            terminalreporter.line(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
