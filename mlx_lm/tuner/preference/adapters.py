"""Variants of LoRA's training: how large an adapter's scale and its second matrix's learning rate are."""

import math

import mlx.optimizers as optim


def rslora_scale(scale, rank):
    """A scale whose effect on a trained adapter does not shrink with its rank: alpha / sqrt(rank).

    mlx-lm's `scale` is alpha / rank. Source: arXiv 2312.03732.

    >>> rslora_scale(2.0, 16)
    8.0
    """
    return scale * math.sqrt(rank)


def lora_plus(make_optimizer, learning_rate, ratio):
    """An optimizer that trains `lora_b` with `ratio` times the learning rate. Source: arXiv 2402.12354.

    Args:
        make_optimizer: takes a learning rate, or a schedule of it, and returns an MLX optimizer.
        learning_rate: a number, or a function of the step.
        ratio: above 0; the paper's advice for large models is 16.

    Returns:
        An optimizer for a tree of parameters with LoRA in it; others than `lora_b` get `learning_rate`.

    Raises:
        ValueError: the ratio is not above 0.
    """
    if not ratio > 0:
        raise ValueError(f"lora_plus_ratio is {ratio}; it must be above 0.")

    def faster(step):
        return ratio * learning_rate(step)

    rate = faster if callable(learning_rate) else ratio * learning_rate
    optimizers = [make_optimizer(rate), make_optimizer(learning_rate)]
    return optim.MultiOptimizer(optimizers, [lambda path, _: path.rpartition(".")[2] == "lora_b"])
