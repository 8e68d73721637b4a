"""Ctrl-C while the training command is still importing: an exit status and one line, where Python has a traceback."""

import os
import signal
import sys


def is_training_command(argv):
    """Whether a process of this command line is `mlx_lm.lora` or `mlx_lm lora`, as a program or with `-m`.

    The programs that this project installs under its own name count too.
    """
    words = [os.path.basename(word).replace("mlx_lm_dpo", "mlx_lm") for word in argv[1:4]]
    words = words[1:] if words[:1] == ["-m"] else words
    return words[:1] == ["mlx_lm.lora"] or words[:2] == ["mlx_lm", "lora"]


def end_quietly_while_importing():
    """Have Ctrl-C end the training command with status 130; what runs after the imports has handlers of its own."""
    if is_training_command(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def restore():
    """Give Ctrl-C back to Python."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame):
    # At once: an import cannot be unwound, and nothing has been begun.
    os.write(2, b"interrupted; nothing had been begun.\n")
    os._exit(128 + number)
