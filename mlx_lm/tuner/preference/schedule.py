"""Which pairs each training step takes, and their reference logps."""

import mlx.core as mx
import numpy as np

from .batches import make_batch, order_of_epoch, plan
from .options import ConfigError


def pair_lengths(pair):
    """Tokens of prompt, chosen and rejected."""
    return [len(pair.prompt), len(pair.chosen), len(pair.rejected)]


def reference_rows(reference, rows):
    """Rows of the reference's logps as an array for the model; zeros where there is no reference."""
    if reference is None:
        return mx.zeros((len(rows), 2, 2))
    return mx.array(reference[rows])


class Schedule:
    """Which rows each training step takes: like lengths together, shuffled by the seed, nothing left out.

    Args:
        dataset: gives a `Pair` for a row number.
        args: `TrainingArgs`.
        arrangement: of its batches, as `make_batch` takes it.

    Raises:
        ConfigError: the batch size is not a multiple of the number of workers.
    """

    def __init__(self, dataset, args, arrangement):
        world = mx.distributed.init()
        if args.batch_size % world.size():
            raise ConfigError(
                f"batch_size is {args.batch_size}; it must be a multiple of the number of workers, {world.size()}."
            )
        self.dataset = dataset
        self.seed = args.seed
        self.rank, self.workers = world.rank(), world.size()
        self.arrangement = arrangement
        self.batches = plan([pair_lengths(dataset[i]) for i in range(len(dataset))], args.batch_size, arrangement)
        self._epoch, self._order = None, None

    def rows(self, iteration):
        """All workers' rows of an iteration, counted from 1."""
        epoch, place = divmod(iteration - 1, len(self.batches))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order_of_epoch(len(self.batches), self.seed, epoch)
        return self.batches[self._order[place]]

    def visited(self, first, last):
        """The rows of the iterations from `first` to `last`, each once, in order."""
        last = min(last, first + 2 * len(self.batches))  # two epochs hold every row
        return np.unique(np.concatenate([self.rows(i) for i in range(first, last + 1)]))

    def batch(self, iteration, reference):
        """This worker's `(batch, reference logps)` of an iteration, and its tokens: processed and padding."""
        rows = self.rows(iteration)
        mine = rows[self.rank :: self.workers]
        size = -(-len(rows) // self.workers)
        # A worker without a row of its own runs one that counts for nothing.
        taken = mine if len(mine) else rows[:1]
        batch, processed, padding = make_batch([self.dataset[int(i)] for i in taken], self.arrangement, size=size)
        if not len(mine):
            batch = batch._replace(counts=mx.zeros_like(batch.counts), tokens=mx.zeros_like(batch.tokens))
        filled = np.concatenate([taken, np.repeat(taken[:1], size - len(taken))])
        return batch, reference_rows(reference, filled), (processed, padding)
