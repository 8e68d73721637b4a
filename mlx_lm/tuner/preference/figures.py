"""The figures of pairs: TRL's names of them, the words that people read for those, and what many pairs come to."""

import numpy as np

# What is summed over pairs, in this order; TRL's names.
FIGURES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
)
# What an evaluation adds, means over a response's tokens; in a step they would cost more than they tell.
TOKEN_FIGURES = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
# Sums besides, from which a window's correlation of margins with differences of length comes.
MOMENTS = ("margins^2", "differences^2", "margins x differences")
CORRELATION = "rewards/length_correlation"
# Of single responses, whether it is desirable: figures of one side are 0 of the other.
DESIRABLE = "desirable"
# What the share of each expert in the routers' choices is called, with its number behind.
SHARES = "expert_shares/"
# What people read for a figure.
WORDS = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen reward",
    "rewards/rejected": "rejected reward",
    "kl": "KL, nats a token (kto: a response)",
    "entropy": "entropy, nats a token",
    "mean_token_accuracy": "token accuracy",
}
# The figure of each value of save_best, and the sign that makes more of it better.
BEST = {"eval_loss": ("loss", -1), "accuracy": ("rewards/accuracies", 1), "margin": ("rewards/margins", 1)}


def means_of(figures):
    """What pairs come to together, of the figures that `pair_figures` returns.

    Returns:
        A dict of means: of FIGURES over pairs, of TOKEN_FIGURES over tokens, as TRL has them; and the correlation of
        margins with differences of length, where both vary.
    """
    chosen, rejected = figures["lengths/chosen"], figures["lengths/rejected"]
    tokens = dict(zip(TOKEN_FIGURES, (chosen, rejected, chosen + rejected, chosen), strict=True))
    found = {name: _average(values, tokens.get(name)) for name, values in figures.items()}
    margins, differences = figures["rewards/margins"], chosen - rejected
    return _settled(found, map(np.mean, (margins**2, differences**2, margins * differences)))


def as_means(totals, further=()):
    """`(means, pairs, tokens)` of sums over pairs, an `Objective`'s as float64 with the names of its `further` ones."""
    sums = dict(zip((*FIGURES, "pairs", "tokens", *MOMENTS, *further), totals.tolist(), strict=True))
    pairs, tokens = sums.pop("pairs"), sums.pop("tokens")
    moments = [sums.pop(name) / pairs for name in MOMENTS]
    figures = {name: total / pairs for name, total in sums.items()}
    return _settled(figures, moments), pairs, tokens


def _average(values, weights):
    return float(np.average(values, weights=weights)) if weights is None or weights.any() else np.nan


def _settled(means, moments):
    """Means over pairs as they are reported: of single responses each side's over its own, NaN where there is none."""
    if (desirable := means.pop(DESIRABLE, None)) is None:
        means |= correlation(means, *moments)
    else:
        for side, share in (("chosen", desirable), ("rejected", 1 - desirable)):
            for name in (f"{figure}/{side}" for figure in ("rewards", "logps", "lengths")):
                means[name] = means[name] / share if share else np.nan
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if shares := {name: value for name, value in means.items() if name.startswith(SHARES)}:
        means |= {name: value / sum(shares.values()) for name, value in shares.items()}
    return means


def correlation(means, margins, differences, products):
    """Of margins with differences of length, from the means of FIGURES and of the two's squares and products.

    Returns:
        A dict with the one figure, empty where one of the two does not vary.
    """
    margin, difference = means["rewards/margins"], means["lengths/chosen"] - means["lengths/rejected"]
    spreads = margins - margin**2, differences - difference**2
    # Below that, margins are what rounding leaves.
    if not (spreads[0] > 1e-8 + 1e-6 * margin**2 and spreads[1] > 1e-6 * differences):
        return {}
    found = (products - margin * difference) / np.sqrt(spreads[0] * spreads[1])
    return {CORRELATION: float(np.clip(found, -1, 1))}


def rounded(value):
    """A figure as people read it; what rounds to 0 has no sign of its own."""
    return f"{round(value, 3) + 0.0:.3f}"


def signed(value):
    """The same with its sign."""
    return f"{round(value, 3) + 0.0:+.3f}"
