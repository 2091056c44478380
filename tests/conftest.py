"""What all tests share: few threads, no network, a fixed seed."""

import os

import pytest
import torch
from recorded import MISSING
from transformers.utils import logging

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are tiny: threads only wait for each other


def pytest_terminal_summary(terminalreporter):
    """Tests that need recorded answers of others are named when those are not there: a green run says what it left out."""
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if MISSING in str(report.longrepr)]
    if left_out:
        terminalreporter.section(f"{len(left_out)} not checked: they need recorded data")
        for report in left_out:
            terminalreporter.line(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
