"""What all tests share: few threads, no network, a fixed seed."""

import os

import pytest
import torch
from transformers.utils import logging

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are tiny: threads only wait for each other
