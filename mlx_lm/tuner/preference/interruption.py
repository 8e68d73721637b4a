"""Signals that end a run: its step is finished and saved first, and a second one ends it at once."""

import os
import signal
import threading
from contextlib import ExitStack, contextmanager

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
