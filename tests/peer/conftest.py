"""Peer tests need other software; a test module that fetches it is left out of runs that leave out long tests."""

FETCHES = ("test_transformers_common.py",)
TRANSFORMERS_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "order",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own tests")


def pytest_ignore_collect(collection_path, config):
    if collection_path.name in FETCHES and "not long" in config.option.markexpr:
        return True
    return None
