"""Compare every way that a training step takes gradients with the plain pass in float32, on this machine's device.

    python benchmarks/check_gradients.py                                      # the embedded example
    python benchmarks/check_gradients.py --model DIR --data DIR --dtype bfloat16

Batches come in a run's own order and lengths, in one process; for each the arrangements take turns, eager and compiled,
with and without grad_checkpoint. What is compared is the LoRA gradient of DPO's loss: its cosine with that of
`dpo_loss` on padded rows, the model in float32; of each batch, and of all together as one vector. The first row is
upstream's plain pass in the model's own dtype, which shows what rounding alone does. Where chosen and rejected
responses nearly cancel, half precision loses much of a batch's small gradient, in any pass, and little of all together.
Exit status 1 where in float32 a batch's cosine is below 0.9999, or where in half precision one is below 0.98 or that of
all together below 0.995.
"""

import argparse
import copy
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from records import keep  # noqa: E402, I001

import mlx_lm  # noqa: E402 (first: it chooses the BLAS that MLX multiplies with)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm._backend import prepare_for_training
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.preference.batches import PLAIN, Schedule, lengths_of, make_batch, shape_of
from mlx_lm.tuner.preference.layers import checkpointed_layers
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.objective import Objective
from mlx_lm.tuner.preference.step import Step
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dpo_loss, get_batched_logps, load
from held_out import IGNORED, padded

EXAMPLES = Path(mlx_lm.__file__).parent / "examples"
# Of all batches together, and of each.
LEAST = {mx.float32: 0.9999, mx.float16: 0.995, mx.bfloat16: 0.995}
LEAST_OF_EACH = {mx.float32: 0.9999, mx.float16: 0.98, mx.bfloat16: 0.98}
BETA = 0.1
PLAIN_PASS = ("plain pass", "eager", False)


def add_lora(model, keys=None, rank=8):
    """Put LoRA on the layers, no matrix of it at zero, so that every one has a gradient."""
    model.freeze()
    mx.random.seed(1)  # before both matrices are drawn: the same at every run
    linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": keys})
    model.update(tree_map(lambda x: x if x.any() else 0.02 * mx.random.normal(x.shape), model.trainable_parameters()))
    return model.train()


def padded_rows(pairs):
    """`(inputs, targets)`, each `(2B, T)`: whole rows, `IGNORED` where no response token is predicted."""
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return padded([pair.prompt for pair in pairs] * 2, responses, multiple=1)


def plain_gradient(model, pairs, reference=None):
    """The gradient of the loss summed over pairs, and the reference's logps `(B, 2, 2)`.

    Without a reference, its logps are the policy's, shifted a little, so that every pair's loss has a slope of its own.
    """
    rows = padded_rows(pairs)
    if reference is None:
        chosen, rejected = get_batched_logps(model, *rows, ignore_index=IGNORED)
        shifts = mx.linspace(-1.0, 1.0, len(pairs))
        reference = [chosen + shifts, rejected - shifts]
    else:
        reference = [reference[:, 0, 0], reference[:, 1, 0]]

    def loss(model):
        return dpo_loss(model, BETA, 0.0, *reference, *rows, IGNORED)[0] * len(pairs)

    gradient = nn.value_and_grad(model, loss)(model)[1]
    mx.eval(gradient, reference)
    return gradient, mx.stack([mx.stack([x, mx.zeros_like(x)], axis=-1) for x in reference], axis=1)


def products(found, expected):
    """Of two trees of gradients as vectors: their product, and that of each with itself."""
    found, expected = ({name: x.astype(mx.float32) for name, x in tree_flatten(tree)} for tree in (found, expected))
    if found.keys() != expected.keys():
        raise ValueError(f"gradients of other parameters: {sorted(found.keys() ^ expected.keys())}")
    pairs = [(found[name], y) for name, y in expected.items()]
    sums = mx.stack([mx.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()]) for x, y in pairs]).sum(axis=0)
    return sums.tolist()


def cosines(found):
    """The cosine of each batch, of `products`' values `(batches, 3)`."""
    product, one, other = np.array(found).T
    return (product / np.sqrt(one * other)).tolist()


def together(found):
    """The cosine of all batches' gradients as one vector."""
    return cosines([np.sum(found, axis=0)])[0]


class Ways:
    """The ways that steps take gradients, by name; each keeps what it has compiled.

    Args:
        model: the policy, in the dtype to check.
    """

    def __init__(self, model):
        scorer = Scorer(model)
        self.arrangements = list(dict.fromkeys([scorer.arrangement, PLAIN]))
        objective = Objective(scorer, preference_loss("dpo", beta=BETA))
        self.steps = {
            (arrangement, how, checkpoint): Step(model, None, objective, how == "compiled", together=not checkpoint)
            for arrangement in self.arrangements
            for how in ("eager", "compiled")
            for checkpoint in (False, True)
        }
        self.model = model

    def __call__(self, pairs, reference, shapes):
        """`{way: gradient}` of a batch, one after another."""
        for (arrangement, how, checkpoint), step in self.steps.items():
            batch, *_ = make_batch(pairs, arrangement, shapes[arrangement])
            with checkpointed_layers(self.model) if checkpoint else nullcontext():
                gradient = step.flat.views(step.gradient(batch, reference)[1])
                mx.eval(gradient)
            # Arrays of another arrangement fit none of these.
            mx.clear_cache()
            yield (arrangement, how, checkpoint), gradient


def dtype_of(model):
    """The dtype of the first floating array of a model."""
    return next(x.dtype for _, x in tree_flatten(model.parameters()) if mx.issubdtype(x.dtype, mx.floating))


def wrong(compared, dtype):
    """The ways, as text, whose gradients differ by more than rounding."""
    return [
        " ".join(map(str, way))
        for way, found in compared.items()
        if min(cosines(found)) < LEAST_OF_EACH[dtype] or together(found) < LEAST[dtype]
    ]


def in_float32(model):
    """A copy of a model in float32."""
    exact = copy.deepcopy(model)
    exact.set_dtype(mx.float32)
    return exact


def compare(model, pairs, batch_size, most):
    """Every way's gradients over the batches of a run beside those of the plain pass in float32.

    Args:
        model: the policy, with LoRA.
        pairs: the data set, as `Pair`s.
        batch_size, most: pairs in a batch, and batches at most.

    Returns:
        `{(arrangement, how, checkpoint): [products of each batch]}`.
    """
    exact, ways = in_float32(model), Ways(model)
    schedules = {kind: Schedule(pairs, batch_size, 0, kind) for kind in ways.arrangements}
    compared = {way: [] for way in (PLAIN_PASS, *ways.steps)}
    first = schedules[ways.arrangements[0]]
    for iteration in range(1, 1 + min(most, first.epoch_steps)):
        rows = first.rows(iteration)
        batch = [pairs[int(row)] for row in rows]
        expected, reference = plain_gradient(exact, batch)
        shapes = {kind: schedule.shape(iteration) for kind, schedule in schedules.items()}
        if len(batch) < batch_size:
            shapes = {kind: shape_of(lengths_of(batch), kind) for kind in shapes}
        rounded = exact if dtype_of(model) == mx.float32 else model
        compared[PLAIN_PASS].append(products(plain_gradient(rounded, batch, reference)[0], expected))
        for way, gradient in ways(batch, reference, shapes):
            compared[way].append(products(gradient, expected))
    return compared


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(EXAMPLES / "tiny_chat_model"), help="folder of a model")
    parser.add_argument("--data", default=str(EXAMPLES / "preferences"), help="folder with train.jsonl")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the model; its own by default")
    parser.add_argument("--batches", type=int, default=40, help="batches to compare, 40 by default")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--out", help="file for the cosines, as JSON")
    return parser.parse_args()


def main():
    args = read_arguments()
    prepare_for_training()
    model, tokenizer = load(args.model)
    if args.dtype:
        model.set_dtype(getattr(mx, args.dtype))
    dtype = dtype_of(model)
    add_lora(model)
    config = SimpleNamespace(
        data=args.data, train=True, test=False, loss_type="dpo", max_seq_length=args.max_seq_length
    )
    dataset, *_ = load_dataset(config, tokenizer)
    pairs = [dataset[i] for i in range(len(dataset))]
    start = time.perf_counter()
    compared = compare(model, pairs, args.batch_size, args.batches)
    seconds = time.perf_counter() - start
    device = mx.device_info().get("device_name", str(mx.default_device()))
    name = str(dtype).removeprefix("mlx.core.")
    print(f"{args.model}, {name}, {device}, MLX {mx.__version__}, {seconds:.0f} s")
    print(f"{'arrangement':12} {'step':9} {'grad_checkpoint':16} {'batches':>7} {'lowest':>9} {'median':>9} {'all':>9}")
    rows = []
    for (arrangement, how, checkpoint), found in compared.items():
        each = cosines(found)
        row = f"{arrangement:12} {how:9} {'yes' if checkpoint else 'no':16} {len(found):7}"
        print(f"{row} {min(each):9.6f} {float(np.median(each)):9.6f} {together(found):9.6f}")
        rows.append({"dtype": name, "way": [arrangement, how, checkpoint], "cosines": each, "all": together(found)})
    if args.out:
        keep(args.out, rows)
    if found := wrong(compared, dtype):
        sys.exit(f"Gradients are wrong on this device: {', '.join(found)}.")
    print("All are right.")


if __name__ == "__main__":
    main()
