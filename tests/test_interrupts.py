"""Signals at the first moments of a command, while the libraries are still being loaded."""

from __future__ import annotations

import gc
import os
import random
import signal
import stat
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastsrgan.cli import main as cli
from fastsrgan.core import signals
from fastsrgan.core.signals import AtOnce, Interrupts, Lasting, StopRequest, Terminated
from fastsrgan.errors import InputError

ROOT = Path(__file__).parent.parent
# More random moments than the two that come always.
MOMENTS = 20 if os.environ.get("FASTSRGAN_LONG_TESTS") else 2
WAIT = 120.0
TOLD = {
    signal.SIGINT: (130, "error: interrupted\n"),
    signal.SIGTERM: (143, "error: stopped: by SIGTERM\n"),
    signal.SIGUSR1: (143, "error: stopped: by SIGUSR1\n"),
}


@pytest.fixture(autouse=True)
def heard():
    """The signals as a terminal leaves them: a shell starts what it puts behind it with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def looked_after(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM, which Python itself never sets."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def started(tmp_path: Path, number: signal.Signals) -> subprocess.Popen:
    """A command at its first moment."""
    words = [sys.executable, "-m", "fastsrgan", "infer", "none.nii.gz", "-o", str(tmp_path / "o")]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        running = subprocess.Popen(
            words, cwd=ROOT, stdout=out, stderr=err, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
        )
    until = time.monotonic() + WAIT
    while not looked_after(running.pid):
        assert running.poll() is None and time.monotonic() < until, (tmp_path / "err").read_text()
        time.sleep(0.001)
    return running


@pytest.fixture(scope="module")
def loading(tmp_path_factory) -> float:
    """Seconds from the first moment of that command to its end: the shorter of two, since load comes and goes."""
    seconds = []
    for _ in range(2):
        running = started(tmp_path_factory.mktemp("whole"), signal.SIGTERM)
        began = time.monotonic()
        assert running.wait(WAIT) > 0, "the image is not there"
        seconds.append(time.monotonic() - began)
    return min(seconds)


def stopped(tmp_path: Path, number: signal.Signals, delay: float) -> tuple[int, str, str]:
    """Code, standard output and error of a command that got a signal ``delay`` seconds behind its first moment."""
    running = started(tmp_path, number)
    time.sleep(delay)
    running.send_signal(number)
    code = running.wait(WAIT)
    return code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()


@pytest.mark.fault(37, 38)
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_libraries_load_is_one_line(tmp_path, loading, number, moment):
    """Ended in a traceback out of an import of torch."""
    delay = 0.0 if moment == 0 else random.Random(moment).uniform(0.0, 0.4) * loading
    code, out, err = stopped(tmp_path, number, delay)
    assert (code, err) == TOLD[number] and out == ""


def test_what_is_run_before_the_signals_are_looked_after_loads_no_library():
    program = "import sys, fastsrgan.__main__; heavy = {'numpy', 'rich', 'torch'} & set(sys.modules); "
    program += "print(len(sys.modules), sorted(heavy))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    count, found = done.stdout.split(" ", 1)
    assert int(count) < 150 and found.strip() == "[]"


NO_ROOM = {
    "torch": "ImportError('libtorch_cpu.so: failed to map segment from shared object')",
    "numpy": "MemoryError()",
    "rich": "RuntimeError('std::bad_alloc')",
}


@pytest.mark.parametrize("library", NO_ROOM)
def test_libraries_that_do_not_fit_into_memory_are_one_line(library):
    """Ended in a traceback."""
    program = f"""
import sys
class Finder:
    def find_spec(name, *_):
        if name == {library!r}:
            raise {NO_ROOM[library]}
sys.path.insert(0, {str(ROOT)!r})
sys.meta_path.insert(0, Finder)
from fastsrgan.__main__ import main
sys.argv[1:] = ["infer", "scan.nii", "-o", "out"]
raise SystemExit(main())
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 5 and done.stderr.startswith("error: memory: not enough to load"), done
    assert done.stderr.count("\n") == 1


def test_signals_become_a_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop and stop.code == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.code == 143
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_ends_without_a_look_through_what_is_left():
    """Python collects the objects of all libraries before it ends: on a busy machine a study that was stopped, and had
    said so, was there for a minute more."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import fastsrgan.__main__ as command
from fastsrgan.cli import main as cli
class Kept:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("collected")
def work():
    Kept()
    print("worked")
    return 130
cli.main = work
raise SystemExit(command.main())
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "worked\n"), done


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        for kind in (AtOnce, Interrupts, StopRequest):
            with kind():
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.fault(37, 38)
@pytest.mark.parametrize("number", TOLD)
def test_an_interruption_that_a_library_turns_into_another_error_is_still_one(monkeypatch, capsys, number):
    def work(*_: object) -> int:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise SystemError("returned a result with an exception set") from None
        return 0

    monkeypatch.setattr(cli, "_doctor", work)
    assert (cli.main(["--quiet", "doctor"]), capsys.readouterr().err) == TOLD[number]


@pytest.mark.fault(37, 38)
@pytest.mark.parametrize("number", list(TOLD))
def test_a_signal_where_python_drops_what_is_raised_comes_again(capsys, number):
    """In the callback of a weak reference, as of the locks of imports: it was lost, and a traceback written."""

    class Thing:
        pass

    with pytest.raises(KeyboardInterrupt) as caught, Interrupts() as running:
        thing = Thing()
        kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
        del thing
        assert kept() is None and running.raised is None
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            time.sleep(0.01)
    assert caught.value is running.raised and capsys.readouterr() == ("", "")
    assert getattr(caught.value, "signal", signal.SIGINT) == number


def test_the_users_own_error_is_not_hidden_by_an_interruption(monkeypatch, capsys):
    def work(*_: object) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Terminated:
            raise InputError("scan.nii", "is damaged", "copy it again") from None
        return 0

    monkeypatch.setattr(cli, "_doctor", work)
    assert cli.main(["--quiet", "doctor"]) == 3
    assert "scan.nii" in capsys.readouterr().err


class Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def leaving(monkeypatch):
    """The process does not end: what it would have ended with is raised."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(signals.os, "_exit", leave)


def test_what_ends_at_once_leaves_what_was_printed_and_says_why(monkeypatch, leaving):
    done: list[object] = []
    for number, (code, line) in TOLD.items():
        with monkeypatch.context() as patch, pytest.raises(Left) as left:
            patch.setattr(signals.sys, "stdout", SimpleNamespace(flush=lambda: done.append("flushed")))
            patch.setattr(signals.os, "write", lambda *words: done.append(words))
            AtOnce()._stop(number, None)
        assert left.value.args == (code,) and done == ["flushed", (2, line.encode())]
        done.clear()


def raised_by(number: signal.Signals) -> BaseException | None:
    """What a signal raises here."""
    try:
        signal.raise_signal(number)
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("second", TOLD)
def test_a_second_signal_ends_a_command_at_once(leaving, second):
    with Interrupts() as found:
        first = raised_by(signal.SIGTERM)
        assert isinstance(first, Terminated) and found.raised is first
        left = raised_by(second)
    assert isinstance(left, Left) and left.args == TOLD[second][:1]


def test_only_a_second_interruption_from_again_after_on_stops_a_loop_at_once(monkeypatch):
    """As when Ctrl-C reaches every rank twice. The seconds count from the first; another signal stops nothing."""
    now = [100.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopRequest(again_after=5.0) as stop:
        for number, code in ((signal.SIGUSR1, 143), (signal.SIGTERM, 143), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
            assert raised_by(number) is None and stop and (stop.signal, stop.code) == (number, code)
            now[0] += 9
        now[0] -= 9
        for _ in range(2):
            now[0] += 2.4
            assert raised_by(signal.SIGINT) is None
        now[0] += 0.2
        assert type(raised_by(signal.SIGINT)) is KeyboardInterrupt
        assert raised_by(signal.SIGTERM) is None and stop.code == 143


def test_notes_that_nobody_reads_are_dropped_and_those_of_a_slow_reader_are_not():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        notes = Lasting(stream)
        for _ in range(2):
            assert notes.write("a line\n") == 7
            notes.flush()
        assert stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and notes.fileno() == write

    def full(*_: object) -> None:
        raise BlockingIOError

    slow = SimpleNamespace(write=full, flush=full, fileno=lambda: pytest.fail("it was taken away"))
    assert Lasting(slow).write("four") == 4
    Lasting(slow).flush()


@pytest.mark.parametrize("collected", [True, False])
def test_garbage_is_collected_after_loading_as_before_it(collected):
    before = gc.isenabled()
    try:
        (gc.enable if collected else gc.disable)()
        with pytest.raises(ValueError, match="its own"), signals.loading():
            assert not gc.isenabled()
            raise ValueError("its own")
        assert gc.isenabled() == collected
    finally:
        (gc.enable if before else gc.disable)()
