import sys

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import startup


def test_a_start_lasts_until_it_tells_the_line():
    told = "import sys, time; print('step 1/1', file=sys.stderr, flush=True); time.sleep(60)"
    assert startup._seconds_until("step 1/1", [sys.executable, "-c", told]) < 30


def test_a_start_that_fails_is_told_with_its_last_line():
    command = [sys.executable, "-c", "raise SystemExit('error: no such folder')"]
    with pytest.raises(UserError, match="status 1: error: no such folder"):
        startup._seconds(command)
    with pytest.raises(UserError, match="status 0"):
        startup._seconds_until("step 1/1", [sys.executable, "-c", "print('other')"])


@pytest.mark.slow
def test_a_first_step_and_another_start(tiny_base, monkeypatch):
    monkeypatch.setattr(startup, "ROUNDS", 1)
    results = list(startup.startup([f"--config.model.path={tiny_base}"]))
    names = ["startup_import", "startup_help", "startup_first_step", "startup_again"]
    assert [result.name for result in results] == names
    assert all(0 < result.ours < 120 for result in results)
