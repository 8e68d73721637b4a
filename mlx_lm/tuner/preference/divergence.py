"""How far a policy is from its reference: the Kullback-Leibler divergence of what both would write next."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np

from .batches import filled, make_batch, pair_lengths
from .evaluation import without_adapters
from .intercept import evaluating
from .logps import CHUNK_LOGITS
from .memory import bounded_memory
from .reference import ample_tokens

# Both models run over these pairs, so that there are no more of them than a mean needs.
MOST_PAIRS = 64


def mean_kl(policy, reference, dataset, rows):
    """The mean KL of the policy from the reference at the response tokens of a data set's rows, or of some of them.

    Args:
        policy: a `Scorer`.
        reference: a `Scorer`, or None for the policy without its adapters.
        dataset: gives a `Pair` for a row number.
        rows: the row numbers.

    Returns:
        `(nats a token, pairs)`, or None where the reference is not at hand.
    """
    rows = np.asarray(rows)[np.unique(np.linspace(0, len(rows) - 1, MOST_PAIRS).astype(int))]
    lengths = np.array([pair_lengths(dataset[int(row)]) for row in rows])
    total, count = 0.0, 0
    with evaluating(policy.model), bounded_memory() as evaluate:
        for places in filled(lengths, ample_tokens(policy, int(lengths.sum(axis=1).max())), policy.arrangement):
            pairs = [dataset[int(rows[place])] for place in places]
            values = token_kl(policy, reference, pairs, evaluate)
            if values is None:
                return None
            total, count = total + values.sum(dtype=np.float64), count + len(values)
    return float(total / count), len(rows)


def token_kl(policy, reference, pairs, evaluate=mx.eval):
    """The KL at each scored token of some pairs, `(M,)` float32; arguments and None as for `mean_kl`."""
    bare = without_adapters if reference is None else nullcontext
    reference = reference or policy
    batches = [make_batch(pairs, scorer.arrangement)[0] for scorer in (policy, reference)]
    states = policy.response_states(batches[0])
    with bare(reference.model) as adapted:
        if adapted is False:
            return None
        reference_states = reference.response_states(batches[1])
    evaluate([states, reference_states])
    scored = np.flatnonzero(np.array(batches[0].sequences) < 2 * len(pairs))
    values = np.zeros(len(scored), np.float32)
    # Of both models, and what comes of them: a test takes no more memory than without.
    size = max(1, CHUNK_LOGITS // 8 // (policy.head.vocabulary if policy.head else states.shape[-1]))
    for start in range(0, len(scored), size):
        chunk = mx.array(scored[start : start + size])
        logps = log_probabilities(policy, states[chunk])
        with bare(reference.model):
            reference_logps = log_probabilities(reference, reference_states[chunk])
        if logps.shape != reference_logps.shape:
            return None  # vocabularies that are filled up otherwise
        found = (mx.exp(logps) * (logps - reference_logps)).sum(axis=-1)
        evaluate(found)
        values[start : start + size] = np.array(found)
    return values


def log_probabilities(scorer, states):
    """Log-probabilities `(M, V)` float32 of all tokens, of a scorer's response states."""
    logits = (scorer.head.logits(states) if scorer.head else states).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
