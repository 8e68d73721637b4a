"""Faults of MLX and mlx-lm that this project works around: a test fails once upstream has mended one.

Each docstring is the text of a report. When a test fails, take the workaround that it names away, and the test too.
Versions: MLX 0.32.4 and mlx-lm 0.32.2.
"""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

import mlx_lm.lora
from mlx_lm._upstream import _find_upstream
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
from mlx_lm.tuner.preference.attention import on_cuda


@pytest.mark.device
@pytest.mark.skipif(not on_cuda(), reason="a fault of MLX's CUDA backend")
def test_cuda_plans_attentions_backward_pass_without_its_gradients_layout():
    """CUDA: gradients of attention are wrong when the output's gradient comes in a second memory layout.

    What happens: the backward plan of `mx.fast.scaled_dot_product_attention` is cached under shapes and strides of
    q, k and v. The gradient of the output is not part of the key, though the plan fixes its strides. The first layout
    that a process uses for a shape gives right gradients; any other layout of the same values is read with the first
    one's strides. Nothing is raised, and the forward pass is right.
    Reproduce: bfloat16 q, k, v as `(B, T, H, D)` arrays seen through `swapaxes(1, 2)`, causal; `mx.vjp` with a
    gradient laid out like q, then with `mx.contiguous` of it.
    Expected: both give the same gradients, up to rounding.
    Seen on: MLX 0.32.4, CUDA 13, H100 and H200. The cosine of the second gradient with the first is about 0.
    Workaround: `tokens_first` in tuner/preference/attention.py.
    """
    draw = np.random.default_rng(0).normal
    # A shape that no other test has, so that this process has no plan for it yet.
    q, k, v, slope = (mx.array(draw(size=(3, 384, 6, 64)), mx.bfloat16).swapaxes(1, 2) for _ in range(4))

    def gradient(slope):
        _, found = mx.vjp(
            lambda *qkv: mx.fast.scaled_dot_product_attention(*qkv, scale=0.125, mask="causal"), [q, k, v], [slope]
        )
        mx.eval(found)
        return np.concatenate([np.array(x.astype(mx.float32)).ravel() for x in found])

    first, second = gradient(slope), gradient(mx.contiguous(slope))
    assert first @ second / np.sqrt((first @ first) * (second @ second)) < 0.9


@pytest.mark.device
@pytest.mark.skipif(not on_cuda(), reason="a fault of MLX's CUDA backend")
def test_cuda_refuses_rope_of_few_dimensions_on_many_rows():
    """CUDA: `mx.fast.rope` over fewer than 32 dimensions fails for 128 rows of one token and more.

    What happens: the kernel is launched with the rows along a block's third axis, as many as leave 1,024 threads a
    block: with 8 pairs of dimensions that is 128, and CUDA allows 64.
    Reproduce: `mx.fast.rope` of a float32 array `(128, 4, 1, 16)` over 16 dimensions, with an offset for each row.
    Expected: the rotated array. Raised: cudaLaunchKernelExC ... invalid argument.
    Seen on: MLX 0.32.4, CUDA 13, H200.
    Workaround: `Scorer._same_logits` in tuner/preference/logps.py tries a model on as many rows; those that fail run
    on plain rows.
    """
    x, offset = mx.ones((128, 4, 1, 16)), mx.arange(128)
    with pytest.raises(RuntimeError, match="invalid argument"):
        mx.eval(mx.fast.rope(x, 16, traditional=False, base=1e4, scale=1.0, offset=offset))


@pytest.mark.device
@pytest.mark.skipif(not on_cuda(), reason="a fault of MLX's CUDA backend")
def test_cuda_takes_what_is_left_of_a_kept_kernel_for_the_whole(tmp_path):
    """CUDA: a compiled kernel that was not kept whole in the cache's folder ends all later processes.

    What happens: a kernel's code, names and source are written one after another under their own names, and what is
    there of the code is loaded later, with what is there of the names. A process that is killed between leaves the
    code alone: all later ones raise "There is no kernel named ...". Code that was cut, by a full disk or in a copy
    that was too, goes to the driver, which ends the process with a segmentation fault.
    Reproduce: `mx.eval` of a compiled function with `MLX_PTX_CACHE_DIR` set; remove the `.txt` files there; again.
    Expected: the kernel is compiled again. A file that is renamed once it is whole would do for the first.
    Seen on: MLX 0.32.4, CUDA 13, H200.
    Workaround: `_keep_kernels_whole` in _backend.py.
    """
    code = "import mlx.core as mx; mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.ones(8)))"
    given = {"env": os.environ | {"MLX_PTX_CACHE_DIR": str(tmp_path)}, "capture_output": True, "text": True}
    assert subprocess.run([sys.executable, "-c", code], **given).returncode == 0
    names = [*tmp_path.rglob("*.txt")]
    for path in names:
        path.unlink()
    assert names and "There is no kernel named" in subprocess.run([sys.executable, "-c", code], **given).stderr


@pytest.mark.device
@pytest.mark.skipif(not on_cuda(), reason="a fault of MLX's CUDA backend")
def test_cuda_compiles_a_kernel_of_ones_own_in_each_process(tmp_path):
    """CUDA: kernels of `mx.fast.cuda_kernel` are looked for among those that are kept, but never kept.

    What happens: MLX reads the folder of kept kernels before it compiles such a text, and does not write what it made
    of it there. A process that has twenty of them waits some 20 s each time.
    Reproduce: `mx.eval` of what such a kernel gives, with `MLX_PTX_CACHE_DIR` set: the folder stays empty.
    Expected: its code is kept under the name that it is looked for by, which has a hash of the text in it.
    Seen on: MLX 0.32.4, CUDA 13, H200.
    Workaround: tuner/preference/cuda_cache.py.
    """
    code = """import mlx.core as mx
kernel = mx.fast.cuda_kernel("one", ["x"], ["out"], "out[threadIdx.x] = x[threadIdx.x];")
given = {"inputs": [mx.ones(4)], "output_shapes": [(4,)], "output_dtypes": [mx.float32]}
mx.eval(kernel(grid=(4, 1, 1), threadgroup=(4, 1, 1), **given))"""
    environment = os.environ | {"MLX_PTX_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.rglob("custom_kernel_one*"))


@pytest.mark.usefixtures("one_by_one")
def test_checkpoint_keeps_what_it_computed_again():
    """`mx.checkpoint`: the gradient of a chain with parameters keeps the recomputed arrays of every function.

    What happens: the recomputation in the backward pass waits for the function's own output, not for the gradient
    that arrives, and nothing makes the gradient that is passed on wait for those of the parameters. Parameters'
    gradients are evaluated last, and all recomputed arrays that they need stay alive until then.
    Reproduce: twelve checkpointed functions of an array and a parameter of their own in a row; the peak memory of
    the parameters' gradients, against that of functions whose recomputation waits for the gradient, and whose passed-on
    gradient waits for the parameter's, both through `mx.depends`.
    Expected: little more than the inputs of the twelve functions and the intermediate arrays of one of them.
    Seen on: MLX 0.32.4, CPU: half as much again.
    Workaround: `recomputed` in tuner/preference/layers.py.
    """
    x, parameters = mx.random.normal((200, 1000)), [mx.random.normal((1000,)) for _ in range(12)]
    mx.eval(x, parameters)

    def block(x, parameter):
        return mx.sin(mx.exp(mx.sin(x * parameter)) * parameter)

    @mx.custom_function
    def waiting(x, parameter):
        return block(x, parameter)

    @waiting.vjp
    def again(inputs, slope, _):
        _, (passed_on, own) = mx.vjp(block, mx.depends(list(inputs), [slope]), [slope])
        return mx.depends([passed_on], [own])[0], own

    def peak(function):
        def total(parameters):
            states = x
            for parameter in parameters:
                states = function(states, parameter)
            return states.sum()

        gradient = mx.grad(total)(parameters)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(gradient)
        return mx.get_peak_memory() - before

    assert peak(mx.checkpoint(block)) > 1.25 * peak(waiting)


@pytest.mark.parametrize("through", ["vjp", "checkpoint"])
def test_an_array_that_is_returned_twice_loses_a_gradient(through):
    """`mx.vjp` and `mx.checkpoint`: of an array that a function returns twice, one gradient is lost.

    What happens: where two outputs of a function are one array, only one of the two gradients given for them is
    used; the other is dropped, and nothing is raised.
    Reproduce: `f(x)` makes `y = 2 * x` and returns `[y, y]`; `mx.vjp(f, [x], [ones, ones])`.
    Expected: 4, the sum of both, as where the outputs are `[2 * x, 2 * x]`.
    Seen on: MLX 0.32.4, CPU: 2.
    Workaround: functions given to `recomputed` in tuner/preference/layers.py return each array once.
    """
    x = mx.ones((3,))

    def twice(x):
        y = 2 * x
        return [y, y]

    def apart(x):
        return [2 * x, 2 * x]

    def gradient(function):
        if through == "vjp":
            return mx.vjp(function, [x], [mx.ones((3,))] * 2)[1][0].tolist()
        return mx.grad(lambda x: sum(y.sum() for y in mx.checkpoint(function)(x)))(x).tolist()

    assert gradient(apart) == [4, 4, 4]
    assert gradient(twice) == [2, 2, 2]


def test_lengths_of_a_cache_dataset_are_numbers_of_keys():
    """mlx-lm: batches of chat and completion rows are not sorted by length.

    What happens: `iterate_batches` sorts rows by `CacheDataset.itemlen`, which is `len` of the unprocessed row. A
    row of `ChatDataset` or `CompletionsDataset` is a dict, so that its length is its number of keys, the same for all.
    Reproduce: the `itemlen` of two chat rows, one short and one long.
    Expected: a longer row has a larger length: that of its tokens.
    Seen on: mlx-lm 0.32.2.
    Workaround: `PreferenceDataset` is not sorted by upstream; tuner/preference/batches.py plans by its tokens.
    """
    rows = [{"messages": [{"role": "user", "content": word}]} for word in ("a", "a much longer message " * 50)]
    dataset = CacheDataset(ChatDataset(rows, None))
    assert [dataset.itemlen(i) for i in range(2)] == [1, 1]


def test_the_clear_cache_threshold_never_arrives():
    """mlx-lm: `mlx_lm.lora --clear-cache-threshold` has no effect.

    What happens: the command parses the option, `TrainingArgs` has a field of that name and training reads it, but
    `train_model` in lora.py does not pass it on when it makes `TrainingArgs`.
    Reproduce: `mlx_lm.lora --train --clear-cache-threshold 1000000000 ...`; the field is 0 while it trains.
    Expected: the field is 1000000000.
    Seen on: mlx-lm 0.32.2.
    Workaround: `train_model` in lora.py passes it on itself in preference runs.
    """
    upstream = upstream_source("train_model")
    assert "TrainingArgs(" in upstream and "grad_checkpoint=" in upstream
    assert "clear_cache_threshold" not in upstream


def test_evaluation_prints_a_perplexity_of_whatever_loss():
    """mlx-lm: `evaluate_model` cannot be given a loss, and prints exp of what comes out as a perplexity.

    What happens: `evaluate_model` in lora.py calls `evaluate` without a loss, so that a model trained with another one
    is tested with cross entropy; and were it given one, exp(loss) would not be a perplexity.
    Reproduce: let `evaluate` return 2; it says "Test ppl 7.389".
    Expected: the loss of training is used, and a perplexity is printed of cross entropy alone.
    Seen on: mlx-lm 0.32.2.
    Workaround: `evaluate_model` in lora.py is our own for preference losses.
    """
    said, asked = [], []
    args = SimpleNamespace(batch_size=1, test_batches=1, max_seq_length=8, loss_type="sft")
    with (
        mock.patch.object(mlx_lm.lora, "evaluate", lambda **given: asked.append(given) or 2.0),
        mock.patch.object(mlx_lm.lora, "rprint", said.append),
    ):
        mlx_lm.lora.evaluate_model(args, None, [0])
    assert f"Test ppl {math.exp(2):.3f}" in said[0] and "loss" not in asked[0]


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="tells a child's processor time")
def test_mlx_launch_keeps_a_core_busy():
    """MLX: `mlx.launch` takes a whole core, or more, to wait for its workers.

    What happens: the thread of each worker asks `select` for its standard input among what can be written to. A pipe
    that nothing was written to always can, so that `select` returns at once, again and again. Where standard input
    is at its end, the main loop reads it likewise.
    Reproduce: `time mlx.launch --backend ring -n 2 -- python -c "import time; time.sleep(3)"`.
    Expected: next to no processor time.
    Seen on: MLX 0.32.4, Linux: 3.6 s of processor time in 3.1 s.
    Workaround: LORA.md starts workers that share a CPU by hand, as benchmarks/programs.py does.
    """
    worker = [sys.executable, "-c", "import time; time.sleep(1.5)"]
    launch = [Path(sys.executable).with_name("mlx.launch"), "--backend", "ring", "-n", "2", "--", *worker]
    given = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(launch, **given)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and usage.ru_utime + usage.ru_stime > 0.6


def upstream_source(name):
    """The source of upstream's function of this name in its lora.py."""
    text = Path(_find_upstream("mlx_lm.lora").origin).read_text()
    found = (item for item in ast.parse(text).body if isinstance(item, ast.FunctionDef) and item.name == name)
    return ast.get_source_segment(text, next(found))
