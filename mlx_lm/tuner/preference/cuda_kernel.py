"""A kernel for NVIDIA's GPUs from its text: compiled once, given arrays by the names that the text has for them."""

import mlx.core as mx

from .cuda_cache import keep

# Of what the lanes of a warp have each, the sum.
SUM_OF = """
  auto sum_of = [](float sum) {
    for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    return sum;
  };
"""

# By name and shared memory, which are quicker to find than a text with all names of its arrays.
_made = {}


def run_kernel(name, source, inputs, outputs, grid, threads, header="", memory=0, copies=True, **template):
    """The arrays that a kernel writes, a list.

    Args:
        name: the kernel's, of one text and one order of inputs and outputs alone.
        source, header: its text.
        memory: bytes of shared memory that the text does not declare.
        copies: whether MLX makes copies of inputs that are not in a row.
        inputs: arrays by name.
        outputs: `(shape, dtype)` by name.
        grid: threads along each axis, of the first one as many as are needed: the last block is whole.
        threads: of a block, along the first one.
        template: numbers and dtypes, constants of the text.
    """
    keep(name, source, header, inputs, outputs, template)
    if (name, memory) not in _made:
        told = {"name": name, "input_names": list(inputs), "output_names": list(outputs), "shared_memory": memory}
        _made[name, memory] = mx.fast.cuda_kernel(source=source, header=header, ensure_row_contiguous=copies, **told)
    shapes, dtypes = zip(*outputs.values(), strict=True)
    needed, *others = grid
    return _made[name, memory](
        inputs=list(inputs.values()),
        template=list(template.items()),
        grid=(-(-needed // threads) * threads, *others),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
