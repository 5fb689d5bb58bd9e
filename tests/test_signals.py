"""`signals.orderly_end`: the exit comes through, wherever the signal finds the process."""

import gc
import signal
import threading
import time

import pytest

from st4vla_jax.signals import NUMBERS, orderly_end


def send(number):
    signal.raise_signal(number)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("code", [None, 75])
def test_it_exits_and_leaves_handlers_as_they_were(number, code):
    before = [signal.getsignal(n) for n in (*NUMBERS, signal.SIGALRM)]
    with pytest.raises(SystemExit) as exit_, orderly_end(code):
        send(number)
    assert exit_.value.code == (128 + number if code is None else code)
    assert [signal.getsignal(n) for n in (*NUMBERS, signal.SIGALRM)] == before


def test_a_repeat_does_not_disturb_the_cleaning():
    cleaned = False
    with pytest.raises(SystemExit), orderly_end():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_a_later_signal_ends_a_cleaning_that_hangs(monkeypatch):
    monkeypatch.setattr("st4vla_jax.signals._SAME_S", 0.05)
    with pytest.raises(SystemExit), orderly_end():
        try:
            send(signal.SIGTERM)
        finally:
            time.sleep(0.1)
            send(signal.SIGTERM)
            pytest.fail("went on")


class Dies:
    def __del__(self):
        send(signal.SIGTERM)


def collector(phase, info):
    gc.callbacks.remove(collector)
    send(signal.SIGTERM)


def in_a_destructor():
    Dies()


def in_the_collector():
    gc.callbacks.append(collector)
    gc.collect()


@pytest.mark.parametrize("place", [in_a_destructor, in_the_collector])
def test_an_exit_that_python_drops_comes_again(place, capfd):
    with pytest.raises(SystemExit) as exit_, orderly_end():
        place()
        time.sleep(10)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert "ignored" not in capfd.readouterr().err


def test_other_dropped_errors_are_still_told(capfd, monkeypatch):
    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda dropped: told.append(dropped.exc_type))

    class Wrong:
        def __del__(self):
            raise ValueError

    with orderly_end():
        Wrong()
    assert told == [ValueError]


def test_other_threads_set_no_handlers():
    def run():
        with orderly_end():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [before]
