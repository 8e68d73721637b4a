"""LoRA+: another learning rate for an adapter's second matrix."""

import copy

import mlx.optimizers as optim


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
