"""The trainable parameters of a model side by side in a few vectors, and LoRA+, which updates some of them faster.

LoRA trains hundreds of small matrices. To cast, scale, average and update them one by one took three in ten of a step's
kernels, and a GPU waits for whoever launches them: so that is done to all at once.
"""

import copy
import math
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .attention import on_cuda
from .batches import ALIGNMENT
from .cuda_copies import joined
from .intercept import exchanged, parameters_in
from .layers import lora_layers
from .siblings import LEAVES

# Values from one parameter's start to the next are a multiple of this, in half precision too. Zeros fill up, whose
# gradients are zeros.
ALIGNED = ALIGNMENT // 2
# Values of the largest parameter that is joined with others: a copy of its gradient must cost little.
LARGEST = 2**20
# What stands in a tree of parameters for those of layers that are computed together.
SIBLINGS = "siblings"
# Optimizers that read and write each value by itself.
BY_ELEMENT = (optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.Lion, optim.RMSprop, optim.Adagrad)


class Kind(NamedTuple):
    """What the parameters of one vector have in common.

    Attributes:
        leaf: "lora_b" or "others", by which LoRA+ tells its learning rates apart.
        dtype: the parameters'.
        rounded: the dtype in which their layers multiply, where these do nothing else with them; else None.
        scale: what they are multiplied by before they are rounded.
        name: of a parameter that is joined with no other, else "".
    """

    leaf: str
    dtype: mx.Dtype
    rounded: mx.Dtype | None
    scale: float
    name: str


class Rearranged(NamedTuple):
    """A vector in another order, with zeros between.

    Attributes:
        index, back: `(rows,)` int32: which row of the vector stands where, -1 standing for zeros, and the reverse.
        size: values in a row.
        parameters: names and shapes of what the vector holds then.
    """

    index: mx.array
    back: mx.array
    size: int
    parameters: list

    def of(self, vector, index):
        """The rows of `vector` that `index`, one of the two, names."""
        rows = vector.reshape(-1, self.size)[mx.maximum(index, 0)]
        return mx.where(index[:, None] >= 0, rows, 0).reshape(-1)


class FlatParameters:
    """A model's trainable parameters as vectors, which are an optimizer's parameters in their place.

    Args:
        model: its trainable parameters are read once, and again by `read`.
        optimizer: what will update them, or None; unless it is one of BY_ELEMENT, or `LoraPlus` of such, nothing is
            joined, and each has its own name.
        siblings: the model's `Siblings`, for which the model is given joined matrices.

    Attributes:
        vectors: a module whose parameters they are.
    """

    def __init__(self, model, optimizer=None, siblings=()):
        self.vectors, self._model = nn.Module(), model
        self._lora = [pair for pair in lora_layers(model) if "lora_b" in pair[0].trainable_parameters()]
        of_lora = {id(x): (dtype, module.scale) for module, dtype in self._lora for x in (module.lora_a, module.lora_b)}
        parts = optimizer.optimizers if isinstance(optimizer, LoraPlus) else [optimizer]
        joins, kinds = optimizer is None or all(type(part) in BY_ELEMENT for part in parts), {}
        for name, value in tree_flatten(model.trainable_parameters()):
            leaf = "lora_b" if name.endswith(".lora_b") else "others"
            rounded, scale = of_lora.get(id(value), (None, 1.0))
            alone = "" if joins and value.size <= LARGEST else name
            kind = Kind(leaf, value.dtype, rounded, scale if leaf == "lora_b" else 1.0, alone)
            kinds.setdefault(kind, []).append((name, value.shape))
        self._parts = {part[0].name or f"part_{i}.{part[0].leaf}": part for i, part in enumerate(kinds.items())}
        self._siblings, self._rearranged = [], {}
        self._rearrange(siblings)
        self.read()

    def _rearrange(self, siblings):
        """Find out how vectors are rearranged so that each of `siblings` has its joined matrices in one place."""
        names = {id(value): name for name, value in tree_flatten(self._model.trainable_parameters())}
        size, rows, joined = siblings[0].layers[0].lora_a.shape[1] if siblings else 1, {}, {}
        for kind, parameters in self._parts.values():
            start = 0
            for name, shape in parameters:
                count = math.prod(shape)
                # A row is as wide as a first matrix; what is no matrix of LoRA is not scaled and rounded as these are.
                if not kind.name and kind.rounded is not None and shape[1] % size == 0 == ALIGNED % size:
                    rows[name] = np.arange(start, start + count, size).reshape(shape[0], -1) // size
                start += _whole(count)
        for own in siblings:
            told = [[names[id(x)] for x in of_leaf] for of_leaf in own.matrices()]
            if not rows.keys() >= {*told[0], *told[1]}:
                continue
            indices = own.joined(*([rows[name] for name in of_leaf] for of_leaf in told), np, -1)
            for leaf, of_leaf, index in zip(LEAVES, told, indices, strict=True):
                joined |= dict.fromkeys(of_leaf)
                shape = len(index), index.shape[1] * size
                joined[of_leaf[0]] = f"{SIBLINGS}.{len(self._siblings)}.{leaf}", shape, index
            self._siblings.append(own)
        for place, (_, parameters) in self._parts.items():
            if any(name in joined for name, _ in parameters):
                self._rearranged[place] = _in_order(parameters, joined, size)

    def read(self):
        """Take the values that the model has, which has views of the vectors then."""
        for place, vectors in self.join(self._model.trainable_parameters()).items():
            self.vectors[place] = vectors
        self.write()

    def write(self):
        """Give the model the values of the vectors."""
        self._model.update(self.views())

    def views(self, vectors=None, as_multiplied=False):
        """The tree of the model's parameters, each a part of a vector and no copy.

        Args:
            vectors: a tree like that of `vectors`, by default its own.
            as_multiplied: whether those of LoRA layers are wanted scaled and in the dtype of the products.
        """
        vectors, found = dict(tree_flatten(vectors or self.vectors)), {}
        for place, (kind, parameters) in self._parts.items():
            vector = vectors[place]
            if as_multiplied and kind.rounded is not None:
                vector = (vector if kind.scale == 1.0 else kind.scale * vector).astype(kind.rounded)
            if as_multiplied and place in self._rearranged:
                other = self._rearranged[place]
                vector, parameters = other.of(vector, other.index), other.parameters
            start = 0
            for name, shape in parameters:
                found[name] = vector if kind.name else mx.as_strided(vector, shape, offset=start)
                start += _whole(found[name].size)
        return tree_unflatten(found)

    def join(self, tree, as_multiplied=False):
        """The vectors of a tree like the model's.

        Args:
            tree: values or gradients.
            as_multiplied: whether it is a gradient with respect to views that were asked for so.
        """
        values, vectors = dict(tree_flatten(tree)), {}
        for place, (kind, parameters) in self._parts.items():
            other = self._rearranged.get(place) if as_multiplied else None
            parts = [values[name] for name, _ in (other.parameters if other else parameters)]
            # MLX copies one after another. To compile a kernel does not pay for what is done once a run.
            at_once = as_multiplied and on_cuda()
            vector = parts[0] if kind.name else (joined(parts, ALIGNED) if at_once else _side_by_side(parts))
            if other:
                vector = other.of(vector, other.back)
            if as_multiplied and kind.rounded is not None:
                vector = vector.astype(kind.dtype)
                vector = vector if kind.scale == 1.0 else kind.scale * vector
            vectors[place] = vector
        return tree_unflatten(list(vectors.items()))

    @contextmanager
    def as_multiplied(self):
        """Within the context, LoRA layers take their second matrix for one that is scaled already."""
        with ExitStack() as stack:
            for module, _ in self._lora:
                stack.enter_context(exchanged(module, "scale", 1.0))
            yield

    @contextmanager
    def in_model(self, parameters):
        """Within the context, the model has these parameters, of `views` as multiplied."""
        parameters = dict(parameters)
        joined = parameters.pop(SIBLINGS, [])
        with ExitStack() as stack:
            stack.enter_context(parameters_in(self._model, parameters))
            for own, matrices in zip(self._siblings, joined, strict=True):
                stack.enter_context(own.holding(*(matrices[leaf] for leaf in LEAVES)))
            yield


def _in_order(parameters, joined, size):
    """The `Rearranged` of a vector of parameters.

    Args:
        parameters: names and shapes.
        joined: name, shape and rows of what stands in a parameter's place, or None where it is a part of another's.
        size: values in a row.
    """
    found, index, start = [], [], 0
    for name, shape in parameters:
        stop = start + _whole(math.prod(shape))
        own = joined.get(name, (name, shape, np.arange(start // size, stop // size)))
        if own is not None:
            found.append(own[:2])
            index += [own[2].ravel(), np.full(_whole(own[2].size * size) // size - own[2].size, -1)]
        start = stop
    index = np.concatenate(index).astype(np.int32)
    back = np.full(start // size, -1, np.int32)
    back[index[index >= 0]] = np.flatnonzero(index >= 0)
    return Rearranged(mx.array(index), mx.array(back), size, found)


def _whole(size):
    """So many values filled up to a multiple of ALIGNED."""
    return -(-size // ALIGNED) * ALIGNED


def _side_by_side(arrays):
    """A vector of all values, each array's from a multiple of ALIGNED on."""
    parts = []
    for array in arrays:
        gap = -array.size % ALIGNED
        parts += [array.reshape(-1), mx.zeros(gap, array.dtype)] if gap else [array.reshape(-1)]
    return mx.concatenate(parts)


class LoraPlus(optim.MultiOptimizer):
    """One whose filter asks for a parameter's leaf alone, which vectors of several have too."""


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
    return LoraPlus([optimizer, faster], [lambda path, _: path.rpartition(".")[2] != "lora_b"])
