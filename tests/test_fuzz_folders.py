"""Mutated checkpoint folders load or are refused by name: no hang, no signal, no error that says nothing."""

import fuzz_folders
import pytest


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return fuzz_folders.base(tmp_path_factory.mktemp("fuzz") / "original")


def findings(seeds, original, scratch):
    outcomes = list(fuzz_folders.run(list(seeds), original, scratch))
    assert len({outcome.seed for outcome in outcomes}) == len(seeds)
    return [outcome for outcome in outcomes if not outcome.is_named]


def test_some(original, tmp_path):
    assert not findings(range(40), original, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 3000, 250))
def test_two_thousand(first, original, tmp_path):
    assert not findings(range(first, first + 250), original, tmp_path)


def test_an_untouched_folder_opens_every_door(original):
    assert all(outcome.error is None for outcome in fuzz_folders.attempt(original, 0, ()))


def test_a_bare_error_a_signal_and_a_hang_are_seen(original, tmp_path, monkeypatch):
    """That the check can fail."""

    def door(folder):
        seed = int(folder.name)
        if seed == 0:
            raise KeyError("x")
        if seed == 1:
            fuzz_folders.os.kill(fuzz_folders.os.getpid(), fuzz_folders.signal.SIGSEGV)
        if seed == 2:
            fuzz_folders.time.sleep(60)

    monkeypatch.setattr(fuzz_folders, "DOORS", {"door": door})
    found = list(fuzz_folders.run([0, 1, 2, 3], original, tmp_path, seconds=3))
    assert [outcome.error for outcome in found] == ["KeyError: 'x'", "signal 11", "hang of 3 s", None]
    assert [outcome.is_named for outcome in found] == [False, False, False, True]
