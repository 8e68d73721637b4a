"""The panel that a run ends with: how it went, where the adapters are, and the commands that come next."""

import shlex
from pathlib import Path

import mlx.core as mx

from ...cli_ui import make_console, print_header_panel
from .checkpoint import BEST_FOLDER
from .curves import PLOT_FILE
from .interruption import given_command
from .metrics import read_validations
from .page import PAGE_FILE, best_of


def print_closing(args, epochs):
    """Print the panel, on the first worker, after a run that asked for `epochs`, or None."""
    if mx.distributed.init().rank() != 0:
        return
    folder, console = Path(args.adapter_path), make_console()
    best, last = best_of(read_validations(folder))
    rows = []
    if last is not None:
        rows += [("best validation", _told(best)), ("last validation", _told(last))]
    rows.append(("adapters", str(folder / "adapters.safetensors")))
    if args.save_best and (folder / BEST_FOLDER).is_dir():
        rows.append(("best adapters", str(folder / BEST_FOLDER)))
    looks = [name for name in (PAGE_FILE, PLOT_FILE) if (folder / name).exists()]
    if looks:
        rows.append(("to look at", " · ".join(str(folder / name) for name in looks)))
    print_header_panel(console, "done", rows)
    for name, command in next_commands(args, epochs).items():
        # Not wrapped, so that a terminal copies a command as one line.
        console.print(f"  [ui.label]{name:8}[/ui.label] ", end="")
        console.print(command, soft_wrap=True, markup=False, style="ui.strong")


def _told(line):
    figures = (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"))
    told = (f"{name} {line[f'eval_{key}']:.3f}" for name, key in figures if line.get(f"eval_{key}") is not None)
    return f"{', '.join(told)} (iteration {line['iteration']})"


def next_commands(args, epochs=None):
    """Command lines by what they do, with this run's paths."""
    folder = Path(args.adapter_path)
    where = folder / BEST_FOLDER if args.save_best and (folder / BEST_FOLDER).is_dir() else folder
    trusted = ["--trust-remote-code"] if args.trust_remote_code else []
    adapters = ["--model", args.model, "--adapter-path", str(where)]
    longer = ["--epochs", f"{2 * epochs:g}"] if epochs else ["--iters", str(2 * args.iters)]
    resume = [] if "--resume" in given_command() else ["--resume"]
    commands = {
        "generate": [*_program(), "generate", *adapters, *trusted, "--prompt", "Hello"],
        "test": [
            *given_command(),
            "--no-train",
            "--test",
            *([] if where == folder else ["--adapter-path", str(where)]),
        ],
        "fuse": [*_program(), "fuse", *adapters, *trusted, "--save-path", str(folder / "fused")],
        "resume": [*given_command(), *resume, *longer],
    }
    return {name: shlex.join(command) for name, command in commands.items()}


def _program():
    """How this command's program runs another subcommand."""
    given = given_command()
    if "-m" in given[:3]:
        return [*given[: given.index("-m") + 1], "mlx_lm"]
    name = "mlx_lm_dpo" if Path(given[0]).name.startswith("mlx_lm_dpo") else "mlx_lm"
    return [str(Path(given[0]).with_name(name)) if "/" in given[0] else name]
