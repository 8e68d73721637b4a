"""The task of `sentiment.py`: prompts, continuations that a model samples, their scores, pairs, and training on them.

    PYTHONPATH=. python benchmarks/sentiment_task.py '{"work": "pairs", ...}'

Prints a JSON object as its last line; see `make_pairs` and `train_run`.
"""

import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from held_out import IGNORED, padded
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_lm import load
from mlx_lm._backend import prepare_for_training
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import Pair
from mlx_lm.tuner.preference.pairs import mismatched, single
from mlx_lm.tuner.trainer import TrainingArgs, train

CACHE_BYTES = 2**30

# A prompt is one of each: somebody saw something, and then the words before the opinion.
WHO = ("I watched", "We saw", "Last night I finally saw", "My sister made me watch", "I had been waiting for",
       "My friends and I rented", "On a long flight I watched", "After ten years I saw", "I sat through",
       "My father and I saw", "For my birthday we watched", "I stumbled upon")  # fmt: skip
WHAT = ("this film", "the movie", "this old western", "the sequel", "this thriller", "the new comedy", "this remake",
        "the director's cut", "this romance", "the documentary", "this horror movie", "the musical",
        "this cartoon", "the war film", "this science fiction film", "the whole series")  # fmt: skip
THEN = (", and the acting", ", and the story", ", and I have to say that", ". The first half hour", ". The music",
        ", and the ending", ". The lead actress", ". What I remember most", ", and everybody in the room",
        ". In my opinion it", ". The dialogue", ", and the whole time I")  # fmt: skip


def make_prompts(count, seed=0):
    """`count` different first words of a film review, in an order of the seed."""
    prompts = ["".join((f"{who} {what}", then)) for who, what, then in itertools.product(WHO, WHAT, THEN)]
    if count > len(prompts):
        raise ValueError(f"{count} prompts are asked for; there are {len(prompts)}.")
    return random.Random(seed).sample(prompts, count)


def scorer():
    """A function from a text to its sentiment from -1 to 1."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        sys.exit("vaderSentiment scores the texts and is not installed: pip install vaderSentiment.")
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def encode(tokenizer, text):
    """Tokens of plain text: no chat template, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False)


def sample(model, tokenizer, prompts, tokens, batch, seed):
    """A continuation of each prompt at temperature 1: its tokens, at most `tokens`, the one that ended it included."""
    mx.random.seed(seed)
    ends = sorted({*tokenizer.eos_token_ids, *tokenizer.all_special_ids})
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in ends],
        sampler=make_sampler(temp=1.0),
        completion_batch_size=batch,
        prefill_batch_size=batch,
    )
    uids = generator.insert(prompts, [tokens] * len(prompts))
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    generator.close()
    return [found[uid] for uid in uids]


def scores_of(tokenizer, continuations):
    score = scorer()
    return [score(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in continuations]


def make_pairs(model, prompts, held_out, continuations, tokens, batch, seed=0):
    """Sample several continuations of each training prompt, and take the best and the worst of each as a pair.

    Args:
        model: a folder.
        prompts, held_out: how many to train on and to evaluate on.
        continuations: samples a prompt.
        tokens: at most, in a continuation.
        batch: sequences at a time.
        seed: of prompts and samples.

    Returns:
        A dict: `pairs`, each with token lists `prompt`, `chosen`, `rejected` and both `scores`; `held_out`, token
        lists; `mean_score` of all samples; `examples` of texts.
    """
    policy, tokenizer = load(model)
    texts = make_prompts(prompts + held_out, seed)
    encoded = [encode(tokenizer, text) for text in texts]
    asked = [prompt for prompt in encoded[:prompts] for _ in range(continuations)]
    sampled = sample(policy, tokenizer, asked, tokens, batch, seed)
    scores = scores_of(tokenizer, sampled)
    pairs = []
    for number, prompt in enumerate(encoded[:prompts]):
        own = range(number * continuations, (number + 1) * continuations)
        best, worst = max(own, key=scores.__getitem__), min(own, key=scores.__getitem__)
        if scores[best] > scores[worst]:
            pair = {"prompt": prompt, "chosen": sampled[best], "rejected": sampled[worst]}
            pairs.append(pair | {"scores": [scores[best], scores[worst]]})
    examples = [
        [tokenizer.decode(pair["prompt"]), tokenizer.decode(pair["chosen"]), tokenizer.decode(pair["rejected"])]
        for pair in pairs[:3]
    ]
    return {
        "pairs": pairs,
        "held_out": encoded[prompts:],
        "mean_score": float(np.mean(scores)),
        "examples": examples,
    }


def sequence_kl(policy, reference, prompts, responses, batch):
    """KL of the policy from the reference of each sampled response, in nats: the sum over its tokens' distributions.

    An estimate of less variance than the sampled logratio: each position's divergence is exact.
    """
    found = []
    for start in range(0, len(prompts), batch):
        inputs, targets = padded(prompts[start : start + batch], responses[start : start + batch])
        own, other = (nn.log_softmax(model(inputs).astype(mx.float32)) for model in (policy, reference))
        divergence = (mx.exp(own) * (own - other)).sum(axis=-1)
        found += (divergence * (targets != IGNORED)).sum(axis=-1).tolist()
        mx.clear_cache()
    return found


def likelihood_loss(alpha):
    """The loss of supervised training on the chosen responses, and with alpha of unlikelihood on the rejected ones.

    Mean logp of a token of the chosen responses up, and alpha times that of the rejected ones down: the paper's two
    baselines that need no reference (arXiv 2305.18290, section 6).
    """

    def loss(model, inputs, targets, chosen):
        scored = targets != IGNORED
        losses = nn.losses.cross_entropy(model(inputs).astype(mx.float32), mx.where(scored, targets, 0))
        sides = [(losses * scored * side).sum() / (scored * side).sum() for side in (chosen, 1 - chosen)]
        return sides[0] - alpha * sides[1], scored.sum()

    return loss


def likelihood_batches(dataset, batch_size, max_seq_length, loop=False, comm_group=None, **_):
    """Yield `likelihood_loss`'s arguments: pairs as `(2B, T)`, chosen first, in an order drawn anew each epoch."""
    while True:
        order = np.random.permutation(len(dataset))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            pairs = [dataset[i] for i in order[start : start + batch_size]]
            responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
            chosen = mx.array([[1.0]] * batch_size + [[0.0]] * batch_size)
            yield *padded([pair.prompt for pair in pairs] * 2, responses), chosen
        if not loop:
            return


class Frontier(TrainingCallback):
    """Samples held-out prompts at every report, and keeps score and KL."""

    def __init__(self, model, reference, tokenizer, prompts, spec):
        self.model, self.reference, self.tokenizer, self.prompts, self.spec = model, reference, tokenizer, prompts, spec
        self.points = []

    def on_train_loss_report(self, train_info):
        self.measure(train_info["iteration"], train_info["train_loss"])

    def measure(self, iteration, loss=None):
        spec = self.spec
        sampled = sample(
            self.model, self.tokenizer, self.prompts, spec["tokens"], spec["batch"], 1000 * spec["seed"] + iteration
        )
        divergences = sequence_kl(self.model, self.reference, self.prompts, sampled, spec["kl_batch"])
        scores = scores_of(self.tokenizer, sampled)
        point = {"iteration": iteration, "loss": loss, "kl": float(np.mean(divergences))}
        point |= {"score": float(np.mean(scores)), "length": float(np.mean([len(tokens) for tokens in sampled]))}
        point["score_error"] = float(np.std(scores, ddof=1) / len(scores) ** 0.5)
        self.points.append(point | {"sample": self.tokenizer.decode(sampled[0])})


def train_run(model, pairs, run, seed, steps, every, batch_size, learning_rate, rank=8, **spec):
    """Train one policy and follow its frontier.

    Args:
        model: a folder.
        pairs: the file that holds what `make_pairs` gave.
        run: `{"loss": a loss_type, "beta": ..., further options}`; of loss "likelihood", `{"alpha": ...}`.
        seed, steps, every: of the run; a point each `every` steps.
        batch_size, learning_rate, rank: of the training.
        spec: `tokens`, `batch` and `kl_batch` of the evaluation.

    Returns:
        A dict with `points`.
    """
    data = json.loads(Path(pairs).read_text())
    policy, tokenizer = load(model)
    reference, _ = load(model)
    dataset = [Pair(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in data["pairs"]]
    if run["loss"] == "kto":
        longest = max(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in dataset)
        dataset = mismatched([one for pair in dataset for one in single(pair)], longest, "pairs")
    mx.random.seed(seed)
    np.random.seed(seed)
    policy.freeze()
    linear_to_lora_layers(policy, len(policy.layers), {"rank": rank, "scale": 20.0, "dropout": 0.0})
    mx.eval(policy.parameters())
    frontier = Frontier(policy, reference, tokenizer, data["held_out"], spec | {"seed": seed})
    frontier.measure(0)
    options = {name: value for name, value in run.items() if name not in ("loss", "alpha")}
    likelihood = run["loss"] == "likelihood"
    further = {}
    if likelihood:
        further = {"loss": likelihood_loss(run["alpha"]), "iterate_batches": likelihood_batches}
    else:
        options |= {"loss_type": run["loss"], "reference_cache": "none", "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(
            batch_size=batch_size,
            iters=steps,
            steps_per_report=every,
            steps_per_save=steps + 1,
            adapter_file=f"{folder}/adapters.safetensors",
            **options,
        )
        optimizer = optim.Adam(learning_rate, bias_correction=True)
        train(policy, optimizer, dataset, None, args, training_callback=frontier, **further)
    finite = all(bool(mx.isfinite(value).all()) for _, value in tree_flatten(policy.trainable_parameters()))
    return {"points": frontier.points, "finite": finite, "device": str(mx.device_info().get("device_name", "cpu"))}


WORK = {"pairs": make_pairs, "train": train_run}

if __name__ == "__main__":
    # As the command has it; and several of these share a GPU.
    prepare_for_training()
    mx.set_cache_limit(CACHE_BYTES)
    asked = json.loads(sys.argv[1])
    print("\n" + json.dumps(WORK[asked.pop("work")](**asked)), flush=True)
