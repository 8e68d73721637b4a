"""The reference: taken once and of the right policy, kept on disk, and never trusted where it may be wrong."""

import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import make_model
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny import TINY_LLAMA, short_run, some_pairs, tiny_llama

import mlx_lm.lora
import mlx_lm.utils
from mlx_lm.tuner.preference import batches as batches_module
from mlx_lm.tuner.preference import reference as module
from mlx_lm.tuner.preference.batches import ARRANGEMENTS, PLAIN, filled, lengths_of, make_batch
from mlx_lm.tuner.preference.layers import LeanLoRALinear
from mlx_lm.tuner.preference.logps import Scorer
from mlx_lm.tuner.preference.options import ConfigError
from mlx_lm.tuner.preference.reference import Reference, ample_tokens, batches_of
from mlx_lm.tuner.preference.reference_cache import ROW, Cache, checksum, fingerprint, row_key
from mlx_lm.tuner.trainer import TrainingArgs, evaluate
from mlx_lm.utils import get_batched_logps

ROOT = Path(__file__).parents[1]
PAIRS = some_pairs(10)


@pytest.fixture
def computed(monkeypatch):
    """The number of pairs of each reference pass, in order."""
    counts, compute = [], Reference._compute

    def counted(self, dataset, rows, values, split=""):
        counts.append(len(rows))
        compute(self, dataset, rows, values, split)

    monkeypatch.setattr(Reference, "_compute", counted)
    return counts


def row_by_row(model, pairs=PAIRS):
    """`(n, 2)`, the logps of chosen and rejected by upstream's forward pass over one row at a time."""

    def logps(prompt, response):
        tokens, targets = (prompt + response)[:-1], [-100] * (len(prompt) - 1) + response
        return get_batched_logps(model, mx.array([tokens] * 2), mx.array([targets] * 2), -100)[0].item()

    return np.array([[logps(pair.prompt, response) for response in (pair.chosen, pair.rejected)] for pair in pairs])


# What is taken


@pytest.mark.parametrize("batch_size, share_prompt", [(None, True), (3, True), (100, False)])
def test_logps_are_those_of_the_model_without_dropout(batch_size, share_prompt):
    model = tiny_llama(moved=True, dropout=0.5)
    model.train()
    rows = [7, 0, 3, 3]
    logps = Reference(Scorer(model, share_prompt), batch_size).logps(PAIRS, rows)
    assert all(part.training for part in model.modules())
    model.eval()
    assert logps.dtype == np.float32 and logps.shape == (4, 2, 2)
    assert np.allclose(logps[:, :, 0], row_by_row(model)[rows], atol=1e-4)
    shorter = [min(len(pair.chosen), len(pair.rejected)) for pair in PAIRS]
    cut = [
        pair._replace(chosen=pair.chosen[:n], rejected=pair.rejected[:n])
        for pair, n in zip(PAIRS, shorter, strict=True)
    ]
    assert np.allclose(logps[:, :, 1], row_by_row(model, cut)[rows], atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_adapters_that_do_nothing_are_left_out_of_the_pass(use_dora, moved, monkeypatch):
    """To the last bit, for which DoRA's have to be run."""
    model, multiplied = with_adapters(tiny_llama(lora=False), use_dora=use_dora), []
    if moved:
        model.layers[1].mlp.up_proj.lora_b += 0.01
    kind = LeanLoRALinear if not use_dora else type(model.layers[1].mlp.up_proj)
    call, reference = kind.__call__, Reference(Scorer(model), len(PAIRS))
    with monkeypatch.context() as as_it_is:
        as_it_is.setattr(module, "_cheaper", lambda model: nullcontext())
        expected = reference.logps(PAIRS, range(len(PAIRS)))
    monkeypatch.setattr(kind, "__call__", lambda layer, x: multiplied.append(layer) or call(layer, x))
    assert np.array_equal(reference.logps(PAIRS, range(len(PAIRS))), expected)
    assert bool(multiplied) is (moved or use_dora)
    assert "lora_b" in model.layers[1].mlp.up_proj


def test_only_rows_that_the_run_visits_are_taken_and_each_once(tmp_path, computed):
    short_run(tiny_llama(), some_pairs(40), tmp_path, valid=some_pairs(9), iters=3, val_batches=2)
    assert computed == [12, 8]
    short_run(tiny_llama(), PAIRS, tmp_path, iters=9)  # ten rows, three epochs
    assert computed[2:] == [10]


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_stays_while_the_policy_moves(tmp_path, full):
    model = tiny_llama(lora=not full)
    if full:
        model.unfreeze()
    before = row_by_row(model)
    _, validation = short_run(model, PAIRS, tmp_path, optim.Adam(1e-2), valid=PAIRS, iters=8, beta=0.5)
    rewards = 0.5 * (row_by_row(model) - before)
    assert abs(rewards).max() > 0.5
    assert validation[-1]["eval_rewards/chosen"] == pytest.approx(rewards[:, 0].mean(), abs=1e-3)
    assert validation[-1]["eval_rewards/rejected"] == pytest.approx(rewards[:, 1].mean(), abs=1e-3)


@pytest.mark.parametrize(
    "loss",
    [{"loss_type": ["dpo", "sft"], "beta": 0.0}, {"loss_type": "simpo"}, {"loss_type": "orpo"}, {"loss_type": "cpo"}],
)
def test_no_reference_where_the_loss_reads_none(tmp_path, monkeypatch, loss):
    monkeypatch.setattr(Reference, "__init__", lambda *_: pytest.fail("a reference was made"))
    training, validation = short_run(tiny_llama(), PAIRS, tmp_path, valid=PAIRS, iters=2, **loss)
    assert len(training) == 2 and len(validation) == 2


def test_batches_are_as_large_as_memory_is_ample_for(monkeypatch):
    scorer = Scorer(tiny_llama())
    for memory, tokens in ((2**20, 1024), (2**40, 8192)):
        monkeypatch.setattr(module, "device_memory", lambda memory=memory: memory)
        assert ample_tokens(scorer, 30, 8192) == tokens
    # Width 32 in float32: 32 x (40 x 4 + 12 x 1024 / 64) = 11264 bytes a token, of a twentieth of the memory.
    monkeypatch.setattr(module, "device_memory", lambda: 20 * 11264 * 5000)
    assert ample_tokens(scorer, 1024, 8192) == 5000
    assert ample_tokens(scorer, 1024, 1024) == 1024
    monkeypatch.undo()
    assert 2**28 < module.device_memory() < 2**45


@pytest.mark.parametrize(
    "info, memory",
    [
        ({"max_recommended_working_set_size": 11 * 10**9, "memory_size": 17 * 10**9}, 11 * 10**9),  # Metal
        ({"free_memory": 70 * 10**9, "total_memory": 80 * 10**9}, 80 * 10**9),  # CUDA
    ],
)
def test_memory_is_what_a_device_lets_a_process_use(info, memory, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert module.device_memory() == memory


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_batches_within_the_tokens_hold_every_row_once(arrangement, monkeypatch):
    pairs = some_pairs(200, prompt=(5, 60), response=(1, 60))
    scorer = Scorer(tiny_llama())
    scorer.arrangement = arrangement
    lengths = np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])
    totals = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    monkeypatch.setattr(module, "ample_tokens", lambda *_: 1200)
    batches = batches_of(scorer, pairs, range(200))
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    if arrangement == PLAIN:
        sizes = [2 * len(rows) * totals[rows].max() for rows in batches]
    else:
        sizes = [lengths[rows].sum() for rows in batches]
    assert max(sizes) <= 1200 and np.mean(sizes[:-1]) > 900
    monkeypatch.setattr(module, "ample_tokens", lambda *_: 50)  # less than the longest pair: alone, but not left out
    batches = batches_of(scorer, pairs, range(200))
    assert max(map(len, batches)) < 6
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    assert [rows.tolist() for rows in batches_of(scorer, pairs, range(200), 7)] == [
        rows.tolist() for rows in filled(lengths, arrangement, 7)
    ]


def test_workers_that_take_batches_together_go_by_the_least_memory(monkeypatch):
    pairs, scorer = some_pairs(100, prompt=(5, 60), response=(1, 60)), Scorer(tiny_llama())
    monkeypatch.setattr(module, "of_all", lambda own: np.array([*own, 300]))
    monkeypatch.setattr(module, "ample_tokens", lambda *_: 1200)
    alone, together = batches_of(scorer, pairs, range(100)), batches_of(scorer, pairs, range(100), workers=2)
    sizes = [[lengths_of(pairs[row] for row in rows).sum() for rows in batches] for batches in (alone, together)]
    assert 900 < max(sizes[0]) <= 1200 and 400 < max(sizes[1]) <= 600
    monkeypatch.setattr(module, "ample_tokens", lambda *_: 300)
    assert [rows.tolist() for rows in batches_of(scorer, pairs, range(100), workers=2)] == list(map(list, together))


def test_large_batches_waste_little(monkeypatch):
    monkeypatch.setattr(batches_module, "multiple", lambda: 1)  # a GPU pads more, for few shapes
    monkeypatch.setattr(module, "ample_tokens", lambda *_: 8192)
    pairs = some_pairs(300, prompt=(20, 120), response=(5, 120))
    scorer = Scorer(tiny_llama())
    scorer.arrangement = PLAIN  # a packed row has none
    batches = batches_of(scorer, pairs, range(300))
    assert len(batches) < 15
    counts = [make_batch([pairs[row] for row in rows], PLAIN)[1:] for rows in batches]
    processed, padding = np.sum(counts, axis=0)
    assert padding / processed < 0.2


def test_logps_that_are_not_finite_are_refused(tmp_path):
    model = tiny_llama()
    model.model.norm.weight = model.model.norm.weight * float("nan")
    reference = Reference(Scorer(model), cache=tmp_path)
    with pytest.raises(ConfigError, match="not finite for 10 of 10 pairs"):
        reference.logps(PAIRS, range(10))
    assert list(tmp_path.iterdir()) == []


# The reference of a run


def run_args(folder, **changes):
    """The command's configuration of a short run."""
    values = {"model": str(TINY_LLAMA), "adapter_path": str(folder / "adapters"), "reference_cache": "none", "iters": 2}
    values |= {"loss_type": "dpo", "train": True, "num_layers": 2, "learning_rate": 1e-3, "steps_per_report": 1}
    values |= {"lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}, "val_batches": -1, "beta": 0.1}
    return SimpleNamespace(**mlx_lm.lora.CONFIG_DEFAULTS | values | changes)


class Reports:
    """A callback that keeps the reports, and asks something at each training report."""

    def __init__(self, ask=lambda: None):
        self.training, self.validation, self.answers, self.ask = [], [], [], ask

    def on_train_loss_report(self, info):
        self.training.append(info)
        self.answers.append(self.ask())

    def on_val_loss_report(self, info):
        self.validation.append(info)


def test_another_models_logps_are_read_and_the_model_is_freed_before_training(tmp_path, monkeypatch):
    other = tiny_llama(moved=True, seed=9)
    expected = row_by_row(other)
    holder = [other]
    alive = [weakref.ref(other), *(weakref.ref(part) for part in other.modules())]
    del other
    monkeypatch.setattr(mlx_lm.utils, "load", lambda name, **_: (holder.pop(), None) if name == "other" else None)
    policy = tiny_llama(lora=False)
    start = row_by_row(policy)
    reports = Reports(lambda: sum(part() is not None for part in alive))
    gc.disable()  # what is freed must not be left to chance
    try:
        args = run_args(tmp_path, reference_model="other", batch_size=10)
        _, test_logps = mlx_lm.lora.train_model(args, policy, PAIRS, PAIRS, reports, PAIRS[:4])
    finally:
        gc.enable()
    assert reports.answers == [0, 0]
    rewards = 0.1 * (start - expected)
    assert abs(rewards).max() > 0.05
    assert reports.validation[0]["eval_rewards/chosen"] == pytest.approx(rewards[:, 0].mean(), abs=1e-4)
    assert reports.training[0]["rewards/rejected"] == pytest.approx(rewards[:, 1].mean(), abs=1e-4)
    assert np.allclose(test_logps[:, :, 0], expected[:4], atol=1e-4)


def test_an_evaluation_is_against_the_reference_model_and_tells_its_batches(monkeypatch):
    model, other, calls = tiny_llama(lora=False), tiny_llama(moved=True, seed=9), []
    monkeypatch.setattr(module, "load_named", lambda *_: (other, None))
    args = TrainingArgs(loss_type=["dpo", "sft"], reference_model="other", reference_cache="none")
    found = evaluate(model, PAIRS, 4, -1, args=args, progress_callback=lambda: calls.append(1))
    assert calls
    assert found == pytest.approx(evaluate(model, PAIRS, 4, -1, args=args, reference=Reference(Scorer(other))))


def test_a_reference_of_the_policy_itself_stays_usable(tmp_path):
    model = tiny_llama()
    reference = Reference(Scorer(model))
    short_run(model, PAIRS, tmp_path, reference=reference)
    assert np.allclose(reference.logps(PAIRS, [2])[:, :, 0], row_by_row(model)[2], atol=1e-4)


@pytest.mark.parametrize("scale", [20.0, 5.0])
def test_an_adapter_that_training_begins_with_is_part_of_the_reference(tmp_path, scale):
    sft = tiny_llama(moved=True, scale=scale)
    start = row_by_row(sft)
    assert abs(start - row_by_row(tiny_llama(lora=False))).max() > 0.1
    mx.save_safetensors(str(tmp_path / "sft.safetensors"), dict(tree_flatten(sft.trainable_parameters())))
    args = run_args(tmp_path, resume_adapter_file=str(tmp_path / "sft.safetensors"), batch_size=10)
    args.lora_parameters["scale"] = scale
    reports = Reports()
    _, test_logps = mlx_lm.lora.train_model(args, tiny_llama(lora=False), PAIRS, PAIRS, reports, PAIRS)
    assert reports.validation[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert reports.training[0]["train_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert reports.training[1]["train_loss"] < np.log(2)
    assert np.allclose(test_logps[:, :, 0], start, atol=1e-4)


# The fingerprint


def with_adapters(model, rank=4, seed=0, scale=20.0, use_dora=False, keys=None):
    mx.random.seed(seed)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=use_dora)
    return model


def quantized(model, bits=4, mode="affine"):
    nn.quantize(model, 32, bits, mode=mode)
    return model


BASES = {
    "plain": lambda: tiny_llama(lora=False),
    "quantized": lambda: quantized(tiny_llama(lora=False)),
    "mxfp4": lambda: quantized(tiny_llama(lora=False), mode="mxfp4"),
    "experts": lambda: make_model("mixtral"),  # LoRASwitchLinear
    "fused": lambda: make_model("afm7"),  # lora_b is a list
}


@pytest.mark.parametrize("base", list(BASES))
def test_adapters_that_change_nothing_yet_have_the_base_models_fingerprint(base):
    bare = fingerprint(BASES[base]())
    assert fingerprint(BASES[base]()) == bare
    assert fingerprint(with_adapters(BASES[base]())) == bare
    assert fingerprint(with_adapters(BASES[base](), rank=8, seed=5, scale=1.0)) == bare
    changed = with_adapters(BASES[base]())
    name, value = next(item for item in tree_flatten(changed.parameters()) if ".lora_b" in item[0])
    changed.update(tree_unflatten([(name, (mx.arange(value.size) == 0).astype(value.dtype).reshape(value.shape))]))
    assert fingerprint(changed) != bare, "a single value changes logps"


def test_adapters_on_embedding_and_head_have_the_base_models_fingerprint():
    bare = fingerprint(tiny_llama(lora=False))
    model = with_adapters(tiny_llama(lora=False), keys=["model.embed_tokens", "lm_head", "self_attn.q_proj"])
    assert "lora_b" in model.model.embed_tokens and "lora_b" in model.lm_head
    assert fingerprint(model) == bare
    model.model.embed_tokens.lora_b = model.model.embed_tokens.lora_b + 1
    assert fingerprint(model) != bare


def test_fingerprints_of_adapters_with_doras_magnitudes():
    """DoRA computes otherwise than the bare model, so it has a fingerprint of its own, but one for every draw."""
    first = fingerprint(with_adapters(tiny_llama(lora=False), use_dora=True))
    assert fingerprint(with_adapters(tiny_llama(lora=False), rank=2, seed=3, use_dora=True)) == first
    assert first != fingerprint(tiny_llama(lora=False))
    moved = with_adapters(tiny_llama(lora=False), use_dora=True)
    moved.layers[0].mlp.up_proj.m = moved.layers[0].mlp.up_proj.m * 1.01
    assert fingerprint(moved) != first


def flip_bit(array, place, bit):
    words = np.array(mx.view(array.reshape(-1), mx.uint32))
    words[place] ^= 1 << bit
    return mx.view(mx.array(words), mx.float32).reshape(array.shape)


def changed(change):
    """Makes the tiny Llama with a change."""

    def make():
        model = tiny_llama(moved=True)
        change(model)
        return model

    return make


def change_weight(change):
    def of(model):
        linear = model.layers[1].self_attn.o_proj.linear
        linear.weight = change(linear.weight)

    return changed(of)


def change_adapter(name, place=0):
    def of(model):
        layer = model.layers[0].mlp.gate_proj
        layer[name] = flip_bit(layer[name], place, 0)

    return changed(of)


CHANGES = {
    "the lowest bit of a weight": change_weight(lambda w: flip_bit(w, 0, 0)),
    "the sign of a weight": change_weight(lambda w: flip_bit(w, 700, 31)),
    "the sign of two weights": change_weight(lambda w: flip_bit(flip_bit(w, 3, 31), 700, 31)),
    "the order of rows": change_weight(lambda w: w[mx.array([16, *range(1, 16), 0, *range(17, 32)])]),
    "lora_a": change_adapter("lora_a"),
    "lora_b": change_adapter("lora_b", place=5),
    "LoRA's scale": lambda: tiny_llama(moved=True, scale=19.0),
    "the adapter": lambda: tiny_llama(moved=True, seed=1),
    "no adapter": lambda: tiny_llama(lora=False),
    "rope_theta": changed(lambda model: setattr(model.args, "rope_theta", 20000.0)),
    "a module's setting": changed(lambda model: setattr(model.layers[1].self_attn.rope, "base", 20000.0)),
    "the dtype, of the same values": changed(lambda model: model.set_dtype(mx.bfloat16)),
    "4 bits": changed(quantized),
    "8 bits": changed(lambda model: quantized(model, bits=8)),
    "mxfp4": changed(lambda model: quantized(model, mode="mxfp4")),
}


def test_whatever_changes_logps_changes_the_fingerprint():
    prints = {name: fingerprint(make()) for name, make in CHANGES.items()} | {"": fingerprint(tiny_llama(moved=True))}
    assert fingerprint(tiny_llama(moved=True)) == prints[""]
    assert len(set(prints.values())) == len(prints), prints


@pytest.mark.parametrize(
    "dtype, shape", [(mx.float32, (7, 5)), (mx.bfloat16, (3, 3)), (mx.uint8, (5,)), (mx.int32, ())]
)
def test_a_checksum_sees_every_bit(dtype, shape):
    array = mx.random.randint(0, 100, shape, key=mx.random.key(0)).astype(dtype)
    seen = {tuple(checksum(array))}
    raw = np.array(mx.view(array.reshape(-1), mx.uint8))
    for place in range(raw.size):
        for bit in range(8):
            other = raw.copy()
            other[place] ^= 1 << bit
            seen.add(tuple(checksum(mx.view(mx.array(other), dtype))))
    assert len(seen) == 1 + 8 * raw.size


def test_a_checksum_over_several_parts(monkeypatch):
    array = mx.random.normal((100,), key=mx.random.key(0))
    whole = checksum(array)
    monkeypatch.setattr("mlx_lm.tuner.preference.reference_cache.CHECKSUM_WORDS", 7)
    assert checksum(array) == whole
    assert checksum(mx.concatenate([array[50:], array[:50]])) != whole


def test_a_rows_key_tells_where_prompt_and_responses_part():
    pair = PAIRS[0]._replace(prompt=[1, 2, 3], chosen=[4, 5], rejected=[6])
    others = [
        pair._replace(prompt=[1, 2], chosen=[3, 4, 5]),
        pair._replace(chosen=[4], rejected=[5, 6]),
        pair._replace(chosen=[5, 4]),
        pair._replace(rejected=[4, 5], chosen=[6]),
    ]
    assert len({row_key(other) for other in (pair, *others)}) == 5
    assert row_key(pair._replace(margin=1.0, weight=0.5)) == row_key(pair)


# The cache on disk


def test_a_second_run_over_the_same_data_takes_no_reference_pass(tmp_path, computed):
    cache = {"reference_cache": str(tmp_path / "cache")}
    first, _ = short_run(tiny_llama(), PAIRS, tmp_path / "1", valid=PAIRS[:3], **cache)
    assert computed == [10]  # validation rows are training rows here, so they are known already
    for changes in ({"beta": 0.5}, {"loss_type": "ipo"}, {"batch_size": 3, "share_prompt": False}):
        short_run(tiny_llama(rank=2, seed=7), PAIRS, tmp_path / "2", optim.Adam(1e-2), **cache, **changes)
    assert computed == [10]
    again, _ = short_run(tiny_llama(), PAIRS, tmp_path / "3", **cache)
    assert [line["loss"] for line in again] == [line["loss"] for line in first]
    short_run(tiny_llama(), [*PAIRS[:9], some_pairs(11)[10]], tmp_path / "4", **cache)
    assert computed == [10, 1]  # one row is new
    short_run(tiny_llama(moved=True), PAIRS, tmp_path / "5", **cache)
    assert computed == [10, 1, 10]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path, computed):
    class Interrupted(Reference):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            score, self.batches = self.scorer, 0

            def scorer(batch):
                self.batches += 1
                if self.batches == 3:
                    raise KeyboardInterrupt
                return score(batch)

            self.scorer = scorer
            scorer.model, scorer.arrangement = score.model, score.arrangement

    with pytest.raises(KeyboardInterrupt):
        Interrupted(Scorer(tiny_llama()), batch_size=3, cache=tmp_path).logps(PAIRS, range(10))
    found = Reference(Scorer(tiny_llama()), batch_size=3, cache=tmp_path).logps(PAIRS, range(10))
    assert computed == [10, 7]  # the batch that was under way is lost
    assert np.allclose(found, Reference(Scorer(tiny_llama())).logps(PAIRS, range(10)), atol=1e-5)


def test_no_cache_where_none_is_wanted(tmp_path, computed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for _ in range(2):
        short_run(tiny_llama(), PAIRS, tmp_path / "run")
    assert computed == [10, 10] and not (tmp_path / "user").exists()
    for _ in range(2):
        short_run(tiny_llama(), PAIRS, tmp_path / "run", reference_cache=None)
    assert computed == [10, 10, 10]
    assert len(list((tmp_path / "user/mlx_lm/reference_logps").iterdir())) == 1


def with_a_value_changed(path):
    content = bytearray(path.read_bytes())
    content[ROW.itemsize - 1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_text("something else"),
    "a value changed": with_a_value_changed,
    "of another model": lambda path: path.write_bytes(another_entry(path.parent.parent / "other").read_bytes()),
}


def another_entry(folder):
    Reference(Scorer(tiny_llama(moved=True)), cache=folder).logps(PAIRS, range(10))
    return next(folder.iterdir())


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_entry_is_computed_again_and_said(tmp_path, computed, capsys, damage):
    model, folder = tiny_llama(), tmp_path / "cache"
    good = Reference(Scorer(model), cache=folder).logps(PAIRS, range(10))
    (path,) = folder.iterdir()
    DAMAGES[damage](path)
    computed.clear()
    capsys.readouterr()
    assert np.array_equal(Reference(Scorer(model), cache=folder).logps(PAIRS, range(10)), good)
    assert computed == [10]
    told = capsys.readouterr().out
    assert told.count("[WARNING]") == 1 and "computed again" in told and str(path) in told
    assert np.array_equal(Reference(Scorer(model), cache=folder).logps(PAIRS, range(10)), good)
    assert computed == [10] and "[WARNING]" not in capsys.readouterr().out


WRITER = """
import sys, numpy as np
from mlx_lm.tuner.preference.reference_cache import Cache
cache = Cache(sys.argv[1], "0" * 32, 1.0)
print("ready", flush=True); sys.stdin.readline()
for i in range(60):
    cache.write({bytes([j]) * 16: np.full(4, float(sys.argv[2]), np.float32) for j in range(200)})
"""


def test_two_processes_write_at_once(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), value], **pipes) for value in "12"]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        cache, seen = Cache(tmp_path, "0" * 32, 1.0), set()
        while any(writer.poll() is None for writer in writers):
            known = cache.read()
            assert len(known) in (0, 200)
            # An entry is one process's, whole.
            values = {float(value) for row in known.values() for value in row}
            assert len(values) < 2
            seen |= values
        outputs = [writer.communicate(timeout=60)[0] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0] and outputs == ["", ""]
    assert seen <= {1.0, 2.0} and len(cache.read()) == 200
    assert [path.name for path in tmp_path.iterdir()] == ["0" * 32 + ".logps"]


def rows(count, first=0):
    return {i.to_bytes(16, "big"): np.full(4, -float(i), np.float32) for i in range(first, first + count)}


def test_the_folder_keeps_its_size_and_drops_what_was_used_longest_ago(tmp_path):
    names = [digit * 32 for digit in "abcd"]
    for age, name in enumerate(names[:3]):
        Cache(tmp_path, name, 100).write(rows(1000))
        os.utime(tmp_path / f"{name}.logps", (age, age))
    (tmp_path / "results.logps").write_bytes(b"x" * 10**6)
    (tmp_path / f".{names[0]}.logps.{'0a' * 8}.tmp").write_bytes(b"x" * 1000)  # left by a process that was stopped
    os.utime(tmp_path / f".{names[0]}.logps.{'0a' * 8}.tmp", (0, 0))
    entry = (tmp_path / f"{names[0]}.logps").stat().st_size
    assert Cache(tmp_path, names[0], 100).read()  # in use again: the second is now the oldest
    Cache(tmp_path, names[3], 3.5 * entry / 1e6).write(rows(1000))
    kept = {f"{name}.logps" for name in (names[0], names[2], names[3])}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"results.logps"}


def test_an_entry_larger_than_the_folder_may_be_keeps_its_last_rows(tmp_path):
    cache = Cache(tmp_path, "e" * 32, 100 * ROW.itemsize / 1e6)
    cache.write(rows(90) | rows(60, first=1000))
    assert list(cache.read()) == list(rows(40, first=50) | rows(60, first=1000))
    Cache(tmp_path / "nothing", "e" * 32, 0.0).write(rows(3))
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, capsys, computed):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    for _ in range(2):
        assert Reference(Scorer(tiny_llama()), cache=folder).logps(PAIRS, range(10)).shape == (10, 2, 2)
    told = capsys.readouterr().out
    assert computed == [10, 10] and f"could not be kept in {folder}" in told


def test_a_folder_that_can_only_be_read_is_read(tmp_path, capsys, monkeypatch):
    cache = Cache(tmp_path, "f" * 32, 1.0)
    cache.write(rows(5))

    def refused(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refused)
    assert cache.read().keys() == rows(5).keys() and "[WARNING]" not in capsys.readouterr().out


def test_the_folder_is_the_users_cache_unless_the_run_names_one(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert module.default_cache_folder() == Path("/somewhere/mlx_lm/reference_logps")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.default_cache_folder() == Path.home() / ".cache/mlx_lm/reference_logps"
    assert Cache("~/kept", "a", 1).folder == Path.home() / "kept"
    # A user without a home, as in some containers.
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert module.default_cache_folder() is None


def test_weights_in_another_order_are_the_same_model():
    model, other = tiny_llama(), tiny_llama()
    attention = other.layers[0].self_attn
    for name in sorted(attention.children(), reverse=True):
        attention[name] = attention.pop(name)
    assert fingerprint(other) == fingerprint(model)
    other.update(tree_map_with_path(lambda path, value: value + 1 if "q_proj" in path else value, other.parameters()))
    assert fingerprint(other) != fingerprint(model)
