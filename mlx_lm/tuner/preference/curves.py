"""Pictures of runs: the curves of one in `training.png`, and those of several with what differs between them."""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np

from ...cli_ui import rprint
from .figures import WORDS
from .files import METRICS_FILE, PLOT_FILE, read_config, replace_file
from .metrics import read_metrics
from .options import ConfigError

COMPARISON_FILE = "comparison.png"
PANELS = (
    ("loss", ("loss",)),
    ("reward accuracy", ("rewards/accuracies",)),
    ("rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("logps (nats)", ("logps/chosen", "logps/rejected")),
)
COMPARED = "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"
# Where a run wrote, and what it did besides training: no difference of the runs' own.
NOT_COMPARED = {"adapter_path", "check", "config", "predictions", "project_name", "report_to", "resume"}
NOT_COMPARED |= {"sample_prompts", "test", "train"}
COLORS = [f"C{i}" for i in range(10)]
LEGEND_WIDTH, LEGEND_LINE = 110, 0.19  # letters that the picture is wide; inches that a line is high
STYLES = (("", "-", "training"), ("eval_", "o--", "validation"))


def plot_metrics(folder, lines):
    """Draw the curves of `lines`, a run's `metrics.jsonl`, into its folder's `training.png`.

    Returns:
        The path of the picture, or None without matplotlib or figures.
    """
    if not lines or (figure := _figure()) is None:
        return None
    # Placed by hand, which takes half the time of a layout that is computed.
    figure.subplots_adjust(left=0.07, right=0.98, top=0.95, bottom=0.07, hspace=0.28, wspace=0.18)
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(axes, title, [(lines, key, f"{key.rpartition('/')[2]}, ") for key in keys])
    return _written(figure, Path(folder) / PLOT_FILE)


def plot_runs(runs):
    """Draw several runs, the lines of their `metrics.jsonl` by folder, into `comparison.png` in the first folder.

    Returns:
        The path of the picture, or None where matplotlib is missing. With one run, what `plot_metrics` returns.
    """
    folders = list(runs)
    if len(folders) == 1:
        return plot_metrics(folders[0], runs[folders[0]])
    if (figure := _figure("constrained")) is None:
        return None
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    # The cycle has ten colors; no two runs may have the same.
    colors = COLORS if len(runs) <= len(COLORS) else colormaps["turbo"](np.linspace(0, 1, len(runs)))

    for axes, key in zip(figure.subplots(2, 2).flat, COMPARED, strict=True):
        _draw(axes, WORDS[key], [(lines, key, None) for lines in runs.values()], colors)
    handles = [Line2D([], [], color=color) for color, _ in zip(colors, runs, strict=False)]
    names = ["\n".join(textwrap.wrap(name, LEGEND_WIDTH)) for name in differences(folders)]
    # The legend of many runs is not taken off the panels' height.
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * "\n".join(names).count("\n"))
    legend = figure.legend(
        handles, names, loc="outside lower center", fontsize="small", title="lines, squares: training; circles: valid"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _written(figure, Path(folders[0]) / COMPARISON_FILE)


def differences(folders):
    """For each run's folder its name and what of its configuration is not the same in all of them."""
    configs = [read_config(folder) for folder in folders]
    keys = sorted(set().union(*configs) - NOT_COMPARED)
    told = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    names = []
    for folder, config in zip(folders, configs, strict=True):
        parts = (f"{key} {json.dumps(config.get(key)) if key in config else 'not set'}" for key in told)
        names.append(": ".join(filter(None, (str(folder), ", ".join(parts)))))
    return names


class Plot(argparse.Action):
    """`--plot FOLDER [FOLDER ...]`: draw runs, say where the picture is, and end."""

    def __call__(self, parser, namespace, folders, option_string=None):
        runs = {folder: read_metrics(Path(folder) / METRICS_FILE) for folder in folders}
        for folder, lines in runs.items():
            if not lines:
                raise ConfigError(f"--plot {folder}: there is no {METRICS_FILE} with figures of a run in it.")
        try:
            path = plot_runs(runs)
        except OSError as error:
            raise ConfigError(f"plot: the picture cannot be written ({error}).") from error
        if path is not None:
            print(f"The curves of {' and '.join(runs)} are in {path}.")
        parser.exit(0 if path is not None else 1)


def _figure(layout=None):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        rprint(f"[WARNING] matplotlib is not installed, so {PLOT_FILE} is not drawn: pip install matplotlib.")
        return None
    return Figure(figsize=(10, 7), layout=layout)


def _draw(axes, title, curves, colors=COLORS):
    """Draw a panel of `(lines, key, label)`s, a color each; a label of None is in no legend."""
    for color, (lines, key, label) in zip(colors, curves, strict=False):
        for prefix, style, kind in STYLES:
            points = [(line["iteration"], line.get(prefix + key)) for line in lines]
            # Beyond any figure of a run, and what no axis can show.
            points = [point for point in points if isinstance(point[1], (int, float)) and abs(point[1]) < 1e30]
            if points:
                # A line of one point is not seen.
                marker = "s" if len(points) == 1 and style == "-" else style
                axes.plot(*zip(*points, strict=True), marker, color=color, label=label and label + kind)
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _written(figure, path):
    replace_file(path, lambda file: figure.savefig(file, dpi=110))
    return path
