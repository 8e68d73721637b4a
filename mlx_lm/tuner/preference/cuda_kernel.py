"""A kernel for NVIDIA's GPUs from its text: compiled once, given arrays by the names that the text has for them."""

import mlx.core as mx

# By name, which is quicker to find than a text with all names of its arrays.
_made = {}


def run_kernel(name, source, inputs, outputs, grid, threads, header="", **template):
    """The arrays that a kernel writes, a list.

    Args:
        name: the kernel's, of one text and one order of inputs and outputs alone.
        source, header: its text.
        inputs: arrays by name.
        outputs: `(shape, dtype)` by name.
        grid: threads along each axis.
        threads: of a block, along the first one.
        template: numbers and dtypes, constants of the text.
    """
    if name not in _made:
        names = {"input_names": list(inputs), "output_names": list(outputs)}
        _made[name] = mx.fast.cuda_kernel(name=name, source=source, header=header, **names)
    shapes, dtypes = zip(*outputs.values(), strict=True)
    return _made[name](
        inputs=list(inputs.values()),
        template=list(template.items()),
        grid=grid,
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
