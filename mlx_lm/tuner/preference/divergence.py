"""How far a policy is from its reference: the Kullback-Leibler divergence of what both would write next."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np

from ...models.activations import fast_exp, fast_max
from .batches import make_batch
from .intercept import evaluating, without_adapters
from .logps import rows_of_chunk
from .memory import bounded_memory, one_behind
from .reference import batches_of
from .unpacked import unpacked_once
from .workers import confirm

# Both models run over these pairs, so that there are no more of them than a mean needs.
MOST_PAIRS = 64
# At most these at a validation, and of a small one a quarter: both models take as long as some three validations.
VALIDATED_PAIRS = 16


def mean_kl(policy, reference, dataset, rows, most=None, need=None):
    """The mean KL of the policy from the reference at the response tokens of rows, at most `most`, evenly from all.

    Workers share the rows, and all have the mean.

    Args:
        policy: a `Scorer`.
        reference: a `Scorer`, or None for the policy without its adapters.
        need: a `Need` of memory that is enough, if there is one.

    Returns:
        `(nats a token, pairs)`, or None where the reference is not at hand.
    """
    rows = np.asarray(rows)[np.unique(np.linspace(0, len(rows) - 1, most or MOST_PAIRS).astype(int))]
    world, total, count = mx.distributed.init(), 0.0, 0
    own = rows[world.rank() :: world.size()]
    with evaluating(policy.model), bounded_memory(need) as evaluate:
        for places in batches_of(policy, dataset, own) if len(own) else []:
            values = token_kl(policy, reference, [dataset[own[place]] for place in places], evaluate)
            if values is None:
                break
            total, count = total + values.sum(dtype=np.float64), count + len(values)
    if world.size() > 1:
        total, count = mx.distributed.all_sum(mx.array([total, count], mx.float32)).tolist()
        confirm()
    # Of a policy that is still its reference rounding leaves a little on either side of 0.
    return (max(float(total / count), 0.0), len(rows)) if count else None


def token_kl(policy, reference, pairs, evaluate):
    """The KL at each scored token of some pairs, `(M,)` float32, or None, as `mean_kl` within `bounded_memory`."""
    bare = without_adapters if reference is None else nullcontext
    reference = reference or policy
    batches = [make_batch(pairs, scorer.arrangement)[0] for scorer in (policy, reference)]
    states = policy.response_states(batches[0])
    with bare(reference.model) as adapted:
        if adapted is False:
            return None
        reference_states = reference.response_states(batches[1])
    words = [_vocabulary(policy, states), _vocabulary(reference, reference_states)]
    if words[0] != words[1]:
        return None  # they are filled up otherwise
    evaluate([states, reference_states])
    # Of single responses, those to other prompts do not count.
    sides = 2 if pairs[0].label is None else 1
    scored = np.flatnonzero(np.array(batches[0].sequences) < sides * len(pairs))
    values = np.zeros(len(scored), np.float32)
    # Of both models, and what comes of them: a test takes hardly more memory than without.
    size = rows_of_chunk(words[0], share=0.5)

    def kl_from(start):
        """`(KL of a chunk's tokens (n,), where they begin)`."""
        chunk = mx.array(scored[start : start + size])
        logits = policy.logits(states[chunk])
        with bare(reference.model):
            return kl_of_logits(logits, reference.logits(reference_states[chunk])), start

    with unpacked_once(), policy.lean_layers(), reference.lean_layers():
        for found, start in one_behind(evaluate, map(kl_from, range(0, len(scored), size))):
            values[start : start + size] = np.array(found)
    return values


def _vocabulary(scorer, states):
    """How many logits a scorer's response states give."""
    return scorer.head.vocabulary if scorer.head else states.shape[-1]


def kl_of_logits(logits, others):
    """The KL from the distributions of `others` to those of `logits`, both `(M, V)`, with one exponential of each."""
    logits, others = logits.astype(mx.float32), others.astype(mx.float32)
    tops = [fast_max(x) for x in (logits, others)]
    weights, other_weights = (fast_exp(x - top) for x, top in zip((logits, others), tops, strict=True))
    totals = [x.sum(axis=-1) for x in (weights, other_weights)]
    # Minus infinity, by which a model rules tokens out, adds nothing.
    gaps = mx.where(weights > 0, logits - others, 0.0)
    normalizers = [top.squeeze(-1) + mx.log(total) for top, total in zip(tops, totals, strict=True)]
    return (weights * gaps).sum(axis=-1) / totals[0] - normalizers[0] + normalizers[1]


def validated_pairs(count):
    """On how many of a validation's pairs its KL is taken."""
    return min(VALIDATED_PAIRS, -(-count // 4))


def validation_kl(objective, data):
    """The KL at a validation, on a few pairs; None where the reference is not the policy without its adapters."""
    if not data.of_bare:
        return None
    pairs = validated_pairs(len(data.valid_rows))
    kl = mean_kl(objective.scorer, None, data.valid_set, data.valid_rows, pairs, objective.need)
    return None if kl is None else kl[0]
