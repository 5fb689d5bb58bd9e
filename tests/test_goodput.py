"""Goodput and step times on a clock that the test turns; progress on a terminal and in a log."""

import io
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from st4vla_jax.goodput import Goodput, StepTimer, memory_metrics
from st4vla_jax.progress import Progress, duration


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def run(self, seconds):
        self.now += seconds


def spend(goodput, clock, kind, seconds):
    with goodput.losing(kind):
        clock.run(seconds)


def test_what_is_not_lost_is_productive(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, process_index=0, clock=clock)
    spend(goodput, clock, "compile", 3)
    clock.run(12)
    spend(goodput, clock, "data", 2)
    spend(goodput, clock, "data", 3)
    found = goodput.metrics()
    assert found["goodput/ratio"] == pytest.approx(12 / 20) and found["goodput/total"] == 20
    assert found["goodput/data"] == 5 and found["goodput/save"] == 0


def test_nested_losses_are_booked_once(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, process_index=0, clock=clock)
    with pytest.raises(KeyError), goodput.losing("startup"):
        clock.run(1)
        with goodput.losing("compile"):
            clock.run(4)
            spend(goodput, clock, "data", 2)
        clock.run(1)
        raise KeyError
    assert [goodput.lost[k] for k in ("startup", "compile", "data")] == [2, 4, 2]
    assert not goodput.metrics()["goodput/ratio"]
    with pytest.raises(ValueError, match="unknown kind of lost time 'complie': one of startup, "):
        spend(goodput, clock, "complie", 1)


def test_restarts_cost_the_gap_and_the_steps_done_twice(tmp_path):
    clock = Clock()
    first = Goodput(tmp_path, process_index=0, clock=clock)
    for step in range(1, 7):  # ten seconds a step, two of them waiting
        clock.run(8)
        spend(first, clock, "data", 2)
        first.heartbeat(step)
    clock.run(5)  # killed: nobody knows what these were
    clock.run(95)
    second = Goodput(tmp_path, process_index=0, first_step=4, clock=clock)
    assert second.lost["restart"] == 100 and second.lost["redo"] == 16 and second.lost["data"] == 12
    clock.run(16)
    second.heartbeat(6)
    found = second.metrics()
    assert found["goodput/total"] == 60 + 100 + 16
    assert found["goodput/ratio"] == pytest.approx((32 + 16) / 176)
    # Once more from the same checkpoint: what was redone is lost again.
    third = Goodput(tmp_path, process_index=0, first_step=4, clock=clock)
    assert third.lost["restart"] == 100 and third.lost["redo"] == 32


def test_only_process_0_keeps_the_account_and_a_broken_one_is_begun_anew(tmp_path, caplog):
    Goodput(tmp_path, process_index=1).heartbeat(1)
    assert not list(tmp_path.iterdir())
    clock = Clock()
    Goodput(tmp_path, process_index=0, clock=clock).heartbeat(1)
    (path,) = tmp_path.iterdir()
    for text in (path.read_text()[:-5], "[1]", json.dumps({"started": 1})):
        path.write_text(text)
        with caplog.at_level(logging.WARNING):
            goodput = Goodput(tmp_path, process_index=0, clock=clock)
        assert "goodput.json: not readable" in caplog.text and not any(goodput.lost.values())
        caplog.clear()


def test_step_times_leave_out_what_is_no_step(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, process_index=0, clock=clock)
    spend(goodput, clock, "startup", 50)
    timer = StepTimer(goodput, clock)
    assert timer.report() == {}
    spend(goodput, clock, "compile", 30)
    for _ in range(4):
        spend(goodput, clock, "data", 1)
        clock.run(2)
        timer.step(samples=6, tokens=90)
    spend(goodput, clock, "save", 7)
    assert timer.report() == {
        "time/step": 3, "data/wait": 1, "rate/samples": 2.0, "rate/tokens": 30.0
    }  # fmt: skip
    clock.run(10)
    timer.step(samples=5)
    assert timer.report() == {"time/step": 10, "data/wait": 0, "rate/samples": 0.5}


def test_memory():
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats or None)

    gib = 2**30
    found = memory_metrics([
        device(bytes_in_use=gib, peak_bytes_in_use=3 * gib, bytes_limit=8 * gib),
        device(bytes_in_use=2 * gib, peak_bytes_in_use=2 * gib, bytes_limit=8 * gib),
    ])  # fmt: skip
    assert [found[f"memory/{k}"] for k in ("device", "device_peak", "device_limit")] == [2, 3, 8]
    assert "memory/device" not in memory_metrics([device()])
    before = memory_metrics()
    held = np.ones(2**27, np.uint8)  # 128 MiB, all pages touched
    after = memory_metrics()
    assert after["memory/host"] - before["memory/host"] == pytest.approx(0.125, abs=0.03)
    assert after["memory/host_peak"] >= after["memory/host"] - 0.01
    del held


# --- Progress -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What a terminal would show: a carriage return with erase begins a line again."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


def test_log_lines():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10, 110, stream=stream, clock=clock)
    for done in range(11, 61):
        clock.run(3 if done > 11 else 100)  # the first step compiles
        progress.advance(done)
        if done in (11, 60):
            progress.report({"loss/total": 0.123456})
    progress.line("saved")
    progress.close()
    assert stream.getvalue() == (
        "step 11/110 (10.0%, ETA ?)  loss/total 0.1235\n"
        "step 60/110 (54.5%, ETA 2 min 30 s)  loss/total 0.1235\n"
        "saved\n"
    )


def test_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    clock, stream = Clock(), Terminal()
    progress = Progress(0, 1000, stream=stream, clock=clock)
    for done in range(1, 501):
        clock.run(0.02)
        progress.advance(done)
    drawn = stream.getvalue().count("\r")
    assert 80 <= drawn <= 100  # ten times a second at most
    progress.report({"loss/total": 0.5, "loss/action": 0.25, "grad/norm": 1.0})
    progress.line("saved")
    shown = "[############............] 500/1000 ETA 10 s  loss/total 0.5"
    assert stream.screen() == ["saved", shown[:59]]
    progress.close()
    progress.close()
    assert stream.screen() == ["saved", shown[:59], ""]


@pytest.mark.parametrize(
    "seconds,text",
    [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7500, "2 h 05 min"), (90_061, "1 d 1 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
