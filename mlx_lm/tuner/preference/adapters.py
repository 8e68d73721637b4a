"""Variants of LoRA's training: how large an adapter's scale and its second matrix's learning rate are."""

import copy
import math

import mlx.optimizers as optim


def rslora_scale(scale, rank):
    """A scale whose effect on a trained adapter does not shrink with its rank: alpha / sqrt(rank).

    mlx-lm's `scale` is alpha / rank. Source: arXiv 2312.03732.

    >>> rslora_scale(2.0, 16)
    8.0
    """
    return scale * math.sqrt(rank)


def lora_plus(optimizer, ratio):
    """An optimizer that trains `lora_b` with `ratio` times the learning rate. Source: arXiv 2402.12354.

    Args:
        optimizer: an MLX optimizer, not used yet, whose schedule is followed where it has one.
        ratio: above 0; the paper's advice for large models is 16.

    Returns:
        An optimizer whose `learning_rate` is that of all other parameters.
    """
    faster = copy.deepcopy(optimizer)
    schedule = faster._schedulers.get("learning_rate")
    if schedule is None:
        faster.learning_rate = ratio * optimizer.learning_rate
    else:
        faster._schedulers["learning_rate"] = lambda step: ratio * schedule(step)
    return optim.MultiOptimizer([optimizer, faster], [lambda path, _: path.rpartition(".")[2] != "lora_b"])
