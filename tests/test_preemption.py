import os
import signal
import subprocess
import sys
import threading

import pytest

from ecomjax import preemption
from ecomjax.preemption import Preempted


@pytest.fixture(params=preemption.SIGNALS, ids=lambda s: s.name)
def number(request):
    return request.param


def test_f03_a_signal_ends_what_is_running_and_no_handler_in_between_may_catch_it(number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted, match=r"^preempted; the same command resumes$"):
        with preemption.raised():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            except Exception:
                raise AssertionError from None
    assert signal.getsignal(number) == before


def test_f03_inside_a_loop_it_is_noted(number):
    with preemption.raised():
        with preemption.noted() as preempted:
            assert not preempted(1)
            os.kill(os.getpid(), number)
            assert preempted(2) and preempted(3)
        with preemption.noted() as preempted:
            assert not preempted(4)
        with pytest.raises(Preempted):
            os.kill(os.getpid(), number)


def test_f52_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.raised(), preemption.noted() as preempted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preempted(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_hear_nothing():
    heard = []

    def run():
        with preemption.raised(), preemption.noted() as preempted:
            heard.append(preempted(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [False]


def test_it_is_imported_without_jax():
    code = "import sys, ecomjax.preemption; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
