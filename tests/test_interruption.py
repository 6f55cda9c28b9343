import os
import signal
import threading

import pytest

from swat_lm.interruption import SIGNALS, Interruption


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_a_request_and_handlers_return(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_a_terminal_that_is_closed_is_nothing_to_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_control_c_quits_at_once():
    with Interruption(), pytest.raises(KeyboardInterrupt):  # noqa: PT012 two signals are the subject
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_termination_after_control_c_does_not_quit():
    # torchrun passes both on
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested


def test_outside_the_main_thread_it_stays_quiet():
    seen = []

    def enter():
        with Interruption() as interruption:
            seen.append(interruption.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
