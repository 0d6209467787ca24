"""A process that is forked while other threads use a model: what it computes is right, or it says why not."""

import os
import signal
import threading
import time

import pytest
import torch
from inside import gate
from torch import nn

import deltaspec
from deltaspec.documents.atomic import alone_in

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture
def compiled():
    deltas = [{"name": n, "method": "lora", "target": ["0", "1"], "params": {"rank": 2}} for n in ("a", "b")]
    c = deltaspec.compile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"deltaspec": 1, "deltas": deltas})
    for name in ("a", "b"):
        for parameter in c.deltas[name].parameters():
            nn.init.normal_(parameter)
    return c


def in_child(function):
    """Return whether a function returns true in a forked process, within a minute."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    for _ in range(6000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def beside(work, check, times):
    """Fork some times while a thread works, and check in each child."""
    stop = threading.Event()

    def run():
        while not stop.is_set():
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return [in_child(check) for _ in range(times)]
    finally:
        stop.set()
        thread.join()


def test_beside_a_thread_that_switches(compiled):
    x, want = torch.randn(2, 4), {}
    for name in ("a", "b"):
        compiled.only(name)
        want[name] = compiled(x)

    def work():
        compiled.only("a")
        compiled.only("b")

    def check():
        return all(torch.equal((compiled.only(n), compiled(x))[1], want[n]) for n in ("a", "b"))

    assert beside(work, check, 8) == [True] * 8


def test_beside_a_thread_that_saves(compiled, tmp_path):
    view = compiled.view()

    def check():
        compiled.only("a")
        compiled.save(tmp_path)
        return True

    def work():
        view.save(tmp_path)
        time.sleep(0.2)  # a lock of a directory is not fair: who has just had it would have it again

    assert beside(work, check, 3) == [True] * 3


def test_a_directory_that_a_thread_had_locked_is_free_once_it_is_done(tmp_path):
    with alone_in(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        thread = threading.Thread(target=lambda: alone_in(tmp_path).__enter__(), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()  # although the child still lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_view_that_another_thread_was_changing_refuses_in_the_child(compiled, monkeypatch):
    monkeypatch.setattr("deltaspec.runtime.forks.MOST_SECONDS", 0.05)
    held, done = threading.Event(), threading.Event()
    x = torch.randn(2, 4)

    def hold():
        with gate(compiled).switching():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait(30)

    def check():
        refused = 0
        for act in (lambda: compiled(x), lambda: compiled.only("a"), lambda: compiled(x, deltas=["a", None])):
            try:
                act()
            except deltaspec.DeltaSpecError as error:
                refused += error.diagnostics[0].code == "DS466"
        return refused == 3

    try:
        assert in_child(check)
    finally:
        done.set()
        thread.join()
    compiled.only("a")  # in the parent nothing is lost
    assert compiled.attached == ("a",) and compiled(x).isfinite().all()
