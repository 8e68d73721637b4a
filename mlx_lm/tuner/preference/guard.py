"""A process beside a worker that ends it once it has not answered for long, with a sentence.

`workers.py` runs this file as a script and sends it a byte from time to time. A thread of the worker itself is not
enough: where MLX waits for the device in a call that keeps Python's lock, for a worker that is gone, no thread runs.
"""

import os
import select
import signal
import sys


def watch(process, seconds, sentence):
    """Wait for the end of standard input; end `process` where nothing comes for so many seconds."""
    late = False
    while True:
        if select.select([0], [], [], seconds / 2)[0]:
            if not os.read(0, 4096):
                return
            late = False
        elif not late:
            # Both may have been stopped, by a shell say: then the worker has the other half to answer.
            late = True
        else:
            os.write(2, f"{sentence}\n".encode())
            os.kill(process, signal.SIGKILL)
            return


if __name__ == "__main__":
    # The worker decides what these do, and its end is this one's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
