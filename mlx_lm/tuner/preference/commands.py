"""Command lines for a user to type next: what goes on with a run, and what is done with its adapters."""

import re
import shlex
import sys
from itertools import chain, count
from pathlib import Path

from .check import schedule_end
from .files import BEST_FOLDER
from .sources import has_test_set

# The options of the command that runs in this process; empty in a program that calls us, whose words are its own.
GIVEN = []


def resume_command():
    """The command line that goes on with this command's run, or what does in a program that calls us."""
    given = repeatable_command()
    if not given:
        return "resume: true with the same settings"
    return shlex.join(given if "--resume" in given else [*given, "--resume"])


def next_commands(args, epochs=None, patience=None):
    """Command lines by what they do, with this run's paths; in a program that calls us those of mlx-lm's alone.

    None goes on where the learning rate of a longer run is 0: its schedule is kept. None repeats what came from a pipe.

    Args:
        epochs: what the run asked for, or None.
        patience: where early_stop has ended the run, one with which it goes on.
    """
    folder = Path(args.adapter_path)
    where = folder / BEST_FOLDER if args.save_best and (folder / BEST_FOLDER).is_dir() else folder
    trusted = ["--trust-remote-code"] if args.trust_remote_code else []
    adapters = ["--model", args.model, "--adapter-path", str(where)]
    longer = ["--epochs", f"{2 * epochs:g}"] if epochs else ["--iters", str(2 * args.iters)]
    longer += ["--early-stop", str(patience)] if patience else []
    given = repeatable_command()
    resume = [] if "--resume" in given else ["--resume"]
    schedule = getattr(args, "lr_schedule", None)
    ends = schedule and schedule_end(schedule, -(-2 * args.iters // args.grad_accumulation_steps)) is not None
    best = [] if where == folder else ["--adapter-path", str(where)]
    tested = ["--no-train"] if "--test" in given else ["--no-train", "--test"]
    test = {"test": [*given, *tested, *best]} if given and has_test_set(args) else {}
    # The model of this run may be what an earlier one was fused to: it is not written over.
    places = (folder / name for name in chain(["fused"], (f"fused-{number}" for number in count(2))))
    fused = next(place for place in places if not place.exists())
    program = run_module("mlx_lm")
    commands = {
        "generate": [*program, "generate", *adapters, *trusted, "--prompt", "Hello"],
        **test,
        "fuse": [*program, "fuse", *adapters, *trusted, "--save-path", str(fused)],
        **({"resume": [*given, *resume, *longer]} if given and not ends else {}),
    }
    return {name: shlex.join(command) for name, command in commands.items()}


def repeatable_command():
    """The words that run this command again; none where it read a pipe, such as a shell's `<(...)`, which is gone."""
    piped = any(re.search("/dev/stdin|/fd/[0-9]", word) for word in GIVEN)
    return [*run_module("mlx_lm.lora"), *GIVEN] if GIVEN and not piped else []


def run_module(name):
    """The words that run a module with this Python: under the name that was typed, or by its path."""
    typed = "".join(sys.orig_argv[:1])  # a Python within another program has none
    return [typed if typed and "/" not in typed else sys.executable, "-m", name]
