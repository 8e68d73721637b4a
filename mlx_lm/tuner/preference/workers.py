"""Several workers: one that dies or fails ends the others, each error is printed once, and all do the same.

MLX's backends wait for ever for a worker that is gone. Beside their connections each worker has one to the first
worker, over which nothing is sent while all is well: the system closes it where a process ends, and TCP finds out where
a machine is gone. So it costs nothing in a step, and does not depend on the backend. It takes that a thread can run
while MLX waits for the device, so that training waits in `mx.eval` alone, which lets go of Python's lock.
"""

import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext, suppress

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients

from .options import ConfigError

GRACE = 2.0  # seconds in which a worker may come to an error of its own, after another one has ended
WAITING = 600.0  # seconds for all to be started
PATIENCE = 60.0  # seconds for finding each other, once all have started
SHOW_CURSOR = "\x1b[?25h\n"
NOT_BEGUN = "a worker ended, or has not answered, before the run began, and this one ends too"
PROBE, LOST = 123_457, "a worker is gone"
STATUS = 1  # of a worker that ends because another one did
# What may differ from worker to worker: files of a machine's own.
OWN = {"config", "model", "data", "adapter_path", "adapter_file", "resume_adapter_file", "reference_model"}
OWN |= {"reference_cache", "report_to", "project_name", "predictions"}
# Seconds without an answer after which a machine is taken to be gone: 60 and four times 30.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 4}

_several, _watch = False, None  # whether MLX has found other workers; the Watch, once they have joined


def gathered(text):
    """The texts that all workers give, in their order; `RuntimeError` where a worker is gone."""
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = of_all(np.array([len(content)]))
    padded = np.pad(content, (0, sizes.max() - len(content)))
    every = of_all(padded[None])
    return [row[:size].tobytes().decode() for row, size in zip(every, sizes, strict=True)]


def of_all(array):
    """Arrays `(n, ...)` of all workers joined, in their order; `RuntimeError` where a worker is gone."""
    gathered = mx.distributed.all_gather(mx.array(array))
    mx.eval(gathered)  # which other threads can run beside
    confirm()
    return np.array(gathered)


def confirm():
    """Raise `RuntimeError` where a worker is gone, before what all computed together is kept.

    MLX does not always tell that one is gone: what a collective operation gives then is any memory.
    """
    world = mx.distributed.init()
    if world.size() > 1 and mx.distributed.all_sum(mx.array(PROBE)).item() != PROBE * world.size():
        raise RuntimeError(LOST)


def means_over_workers(gradient, pairs):
    """The means over all workers of a gradient, a tree, and of how many pairs it is of.

    On Metal the CPU alone takes them, and they are waited for: a GPU that waits for some five seconds, as for a slower
    Mac, is taken to hang, and MLX ends with "Caused GPU Timeout Error".
    """
    workers, by_cpu = mx.distributed.init().size(), mx.metal.is_available()
    if workers == 1:
        return gradient, pairs
    with mx.stream(mx.cpu) if by_cpu else nullcontext():
        means = average_gradients(gradient), mx.distributed.all_sum(pairs) / workers
    if by_cpu:
        mx.eval(means)
    return means


def refuse_different_workers(settings):
    """Raise `ConfigError` on every worker where one has other `settings`, but for files of a worker's own.

    A value that is a function is what that gives, which one worker alone does not ask for.
    """
    if mx.distributed.init().size() == 1:
        return
    own = {name: str(value() if callable(value) else value) for name, value in settings.items() if name not in OWN}
    _compare([json.loads(text) for text in gathered(json.dumps(own))])


def _compare(workers):
    first = workers[0]
    for number, other in enumerate(workers):
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            told = (
                key if key.startswith("the ") else f"{key} ({first.get(key)} and {other.get(key)})" for key in differing
            )
            raise ConfigError(
                f"workers 0 and {number} were given different {', '.join(told)}; start all of them with the same files "
                "and flags."
            )


def find_others():
    """Have MLX find the other workers, if there are any; `ConfigError` where they cannot be found."""
    global _several
    # MLX waits for them without looking at what Python has to do: Ctrl-C has to end it by itself, and where they do not
    # come, because one has died already, an alarm.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if (rank := os.environ.get("MLX_RANK")) is not None:
        signal.setitimer(signal.ITIMER_REAL, WAITING)
    if rank == "0":
        print(f"Waiting for the other workers to be started, {WAITING / 60:.0f} minutes at most.", file=sys.stderr)
    try:
        _several = mx.distributed.init().size() > 1
    except (RuntimeError, ValueError) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"the other workers cannot be found ({told}); start all, with one list of hosts.") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, handler)


def join(config):
    """Connect the workers with the first one, and compare their configurations.

    Args:
        config: values by name; None on a worker that has found an error and will end.

    Raises:
        ConfigError: the configurations differ, or a worker has ended already.
    """
    global _several, _watch
    world = mx.distributed.init()
    if world.size() == 1 or _watch is not None:
        return
    own = {name: str(value) for name, value in (config or {}).items() if name not in OWN}
    server = _serve() if world.rank() == 0 else None
    told = {"config": own, "failed": config is None}
    told |= {"port": server.getsockname()[1], "hosts": _hosts(), "token": secrets.token_hex(16)} if server else {}
    limit = threading.Timer(PATIENCE, _end_process, [f"error: {NOT_BEGUN}."])
    limit.daemon = True
    limit.start()
    try:
        workers = [json.loads(text) for text in gathered(json.dumps(told))]
        peers = {} if server else _connected(workers[0], world.rank())
        reached = gathered("yes" if peers else "no").count("yes")
    except RuntimeError as error:
        _several = False  # there is nobody to tell it
        raise ConfigError(f"{NOT_BEGUN} ({error}).") from error
    finally:
        limit.cancel()
    if server:
        with server:
            peers = _accepted(server, workers[0]["token"], reached)
    elif not peers:
        print(
            f"[WARNING] Worker {world.rank()} cannot connect to worker 0 on port {workers[0]['port']}: if one of them "
            "dies, the other may wait for ever.",
            file=sys.stderr,
        )
    _watch = Watch(world.rank(), peers)
    if not any(worker["failed"] for worker in workers):
        _compare([worker["config"] for worker in workers])


def leave():
    """Part from the others at the end of a run."""
    global _several, _watch
    if _watch is not None:
        _watch.part()
        _several, _watch = False, None


def tell(sentence, status):
    """Print why this worker ends, unless another one has printed the same.

    Args:
        sentence: what is printed; None where it was printed already.
        status: the exit status: 2 for an error of this worker's own.

    Returns:
        The exit status, STATUS where another one's end is the reason.
    """
    if _several and _watch is None:
        with suppress(ConfigError):
            join(None)
    watch, first = _watch, True
    if watch is not None:
        if status != 2 and watch.over.is_set() and watch.status != status:
            # A launcher's signals, and MLX's errors, follow from the other's end.
            sentence, status = watch.sentence, STATUS
        else:
            first = watch.is_first_to_tell(sentence, status)
        watch.printed = True
    if sentence is not None and first:
        print(sentence, file=sys.stderr, flush=True)
    if watch is not None:
        watch.linger()
    return status


def is_over():
    """Whether another worker has ended, or does so within GRACE."""
    return _watch is not None and _watch.over.wait(GRACE)


class Watch:
    """What a worker knows of the others.

    Args:
        rank: of this worker.
        peers: connections by rank: the first worker's to all others, and theirs to it.

    Attributes:
        over: set once another worker has ended before the run did.
        sentence: why this one has to end then.
        status: the other one's exit status, None where it did not tell.
        printed: whether the main thread has printed why it ends.
    """

    def __init__(self, rank, peers):
        self.rank, self.peers = rank, peers
        self.over, self.sentence, self.status, self.printed = threading.Event(), None, None, False
        self._told, self._lock, self._answers = set(), threading.Lock(), queue.SimpleQueue()
        self._telling = False
        self._threads = [threading.Thread(target=self._listen, args=item, daemon=True) for item in peers.items()]
        for thread in self._threads:
            thread.start()

    def is_first_to_tell(self, sentence, status):
        """Whether no other worker has told a sentence; they end too."""
        self._telling = True
        if self.rank == 0:
            self._send({"ended": 0, "status": status})
            return self._is_new(sentence)
        self._send({"failed": sentence, "status": status})
        with suppress(queue.Empty):
            return self._answers.get(timeout=GRACE)
        return True

    def linger(self):
        """Wait until the others have told their errors: the first worker knows which one is printed."""
        if self.rank == 0:
            for thread in self._threads:
                thread.join(2 * GRACE)

    def part(self):
        """Tell the others that this worker's run is over."""
        self._telling = True
        self._send({"done": True})
        for peer in self.peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_WR)

    def _listen(self, rank, peer):
        """Take what a worker says, until it ends."""
        with suppress(OSError, ValueError), peer.makefile(encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "done" in message:
                    return
                if "print" in message:
                    self._answers.put(message["print"])
                elif "ended" in message:
                    self._end(message["ended"], message["status"])
                else:
                    self._send({"print": self._is_new(message["failed"])}, to=rank)
                    self._end(rank, message["status"])
        self._answers.put(True)
        self._end(rank, None)

    def _end(self, rank, status):
        """End this worker within GRACE, unless it does so by itself, since the one of `rank` has ended."""
        with self._lock:
            if self.sentence is not None:
                return
            how = "is gone (killed or crashed, or its machine or network failed)"
            if status is not None:
                how = "was interrupted" if status > 128 else "ended with an error"
            self.status = status
            self.sentence = (
                f"error: worker {rank} {how}, and this one ends too; files saved before are complete, and resume "
                "goes on from the last checkpoint."
            )
        self.over.set()
        if self.rank == 0:
            self._send({"ended": rank, "status": status}, without=rank)
        timer = threading.Timer(GRACE, self._exit)
        timer.daemon = True
        timer.start()

    def _exit(self):
        """End the process, whose main thread may wait in a collective operation for ever, unless it ends by itself."""
        if self._telling:
            return
        _end_process("" if self.printed else self.sentence)

    def _is_new(self, sentence):
        with self._lock:
            new = sentence not in self._told
            self._told.add(sentence)
        return new

    def _send(self, message, to=None, without=None):
        line = (json.dumps(message) + "\n").encode()
        for rank, peer in self.peers.items():
            if to in (None, rank) and rank != without:
                with suppress(OSError):
                    peer.sendall(line)


def _end_process(sentence):
    """End the process, whatever its main thread waits for."""
    if sentence:
        # A progress bar has hidden the cursor.
        os.write(2, f"{SHOW_CURSOR if sys.stderr.isatty() else ''}{sentence}\n".encode())
    os._exit(STATUS)


def _hosts():
    """Names by which the first worker may be reached, the likeliest first."""
    found = []
    with suppress(OSError, ValueError, LookupError, TypeError, KeyError):
        with open(os.environ["MLX_HOSTFILE"]) as file:
            found.append(json.load(file)[0][0].rpartition(":")[0])
    found.append(os.environ.get("NCCL_HOST_IP"))
    found.append(os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0])
    return [*filter(None, found), socket.gethostname(), "127.0.0.1"]


def _serve():
    try:
        return socket.create_server((_hosts()[0], 0))
    except OSError:
        return socket.create_server(("", 0))  # the name is one of another network's


def _connected(first, rank):
    """`{0: connection}` with the first worker, empty where it cannot be reached."""
    for host in first["hosts"]:
        with suppress(OSError):
            peer = socket.create_connection((host, first["port"]), timeout=PATIENCE / 2 / len(first["hosts"]))
            peer.sendall(f"{first['token']} {rank:6d}\n".encode())
            return {0: _kept_alive(peer)}
    return {}


def _accepted(server, token, count):
    """The connections of `count` workers by their ranks; whoever does not know the token is none."""
    peers, until = {}, time.monotonic() + PATIENCE
    while len(peers) < count and (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        with suppress(OSError, ValueError):
            peer, _ = server.accept()
            peer.settimeout(left)
            greeting = peer.recv(len(token) + 8, socket.MSG_WAITALL)
            if secrets.compare_digest(greeting[: len(token)], token.encode()):
                peers[int(greeting[len(token) :])] = _kept_alive(peer)
    return peers


def _kept_alive(peer):
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
