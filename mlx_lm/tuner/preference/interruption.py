"""Signals that end a run: its step is finished and saved first, and a second one ends it at once."""

import os
import re
import shlex
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx.core as mx

# Ctrl-C, a scheduler's or a system's request to end, and a terminal that was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        status: the exit status by convention, 128 and the signal's number.
    """

    def __init__(self, number, sentence=""):
        super().__init__(sentence)
        self.number, self.status = number, 128 + number


class Request:
    """What signals have asked for.

    Attributes:
        number: of the signal that waits for the step's end, or None.
        patient: whether a step is running that will look at `number`.
    """

    def __init__(self):
        self.number, self.patient = None, False

    def __call__(self, number, frame):
        """Take a signal."""
        if self.number is not None or not self.patient:
            raise Interrupted(number)
        self.number = number
        # Written without print's buffer, which the step may just be writing to.
        os.write(2, b"\nThe step is finished and saved; once more ends the run at once.\n")

    @contextmanager
    def at_steps(self):
        """Within the context, a first signal waits for the step's end."""
        self.number, self.patient = None, True
        try:
            yield self
        finally:
            self.number, self.patient = None, False


REQUEST = Request()


def asked_anywhere(request, meets):
    """Whether a signal has asked any worker for the end; several workers compare where `meets` is set."""
    if mx.distributed.init().size() == 1:
        return request.number is not None
    if not meets:
        return False
    number = mx.distributed.all_max(mx.array(request.number or 0)).item()
    # One that came while the others were waited for is told at the next meeting.
    request.number = number or request.number
    return number != 0


@contextmanager
def handled_signals():
    """Within the context, signals go to REQUEST: for a command's main thread, not for a program that uses us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with ExitStack() as stack:
        for number in SIGNALS:
            # What is ignored (nohup) stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, REQUEST))
        yield


def given_command():
    """The words of this command's line; none in a program that calls us, whose own say nothing of the run."""
    # Of a program with subcommands, such as `mlx_lm lora`, sys.argv has lost the second word.
    program = sys.orig_argv[1:] if sys.orig_argv[1:2] == sys.argv[:1] else sys.argv
    place = module_place()
    name = Path(program[0]).name if place is None else sys.orig_argv[place]
    words = program if place is None else [_python(), *sys.orig_argv[1:]]
    return list(words) if name.startswith("mlx_lm") else []


def repeatable_command():
    """`given_command`; none where it reads a pipe, such as a shell's `<(...)`, which is gone when it runs again."""
    given = given_command()
    return [] if any(re.search("/dev/stdin|/fd/[0-9]", word) for word in given) else given


def _python():
    """The Python of this command's line. Of a framework build's on macOS, which has another started, its path."""
    # That other one knows nothing of the environment.
    return sys.executable if sys.orig_argv[0].endswith("Python.app/Contents/MacOS/Python") else sys.orig_argv[0]


def module_place():
    """Where this command's line names a module to Python's `-m`; None where it does not."""
    # Behind these words stand the module's own.
    words = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    # A notebook's kernel, which was started so, has been given other words since.
    return words.index("-m") + 1 if "-m" in words and sys.orig_argv[len(words) :] == sys.argv[1:] else None


def resume_command():
    """The command line that goes on with this command's run, or what does in a program that calls us."""
    given = repeatable_command()
    if not given:
        return "resume: true with the same settings"
    return shlex.join(given if "--resume" in given else [*given, "--resume"])
