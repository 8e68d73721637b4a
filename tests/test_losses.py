"""The preference losses against TRL's own numbers, the papers' formulas in float64, and what must hold of any."""

import inspect
import json
import math
from pathlib import Path

import make_tables
import mlx.core as mx
import numpy as np
import pytest

from mlx_lm.tuner import losses
from mlx_lm.tuner.losses import PairLogps
from mlx_lm.tuner.preference.loss_table import LOSS_OPTIONS, LOSSES
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.options import ConfigError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
NAMES = [name for name in LOSSES if name != "sigmoid"]
NOT_TRLS = {"dpop", "kto"}  # not its DPOTrainer's
LOGPS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")

# Four pairs of different lengths, logratios of both signs and nothing symmetric.
PAIRS = {
    "policy_chosen": [-12.0, -30.5, -7.25, -41.0],
    "policy_rejected": [-15.5, -22.0, -9.0, -38.25],
    "reference_chosen": [-14.0, -29.0, -6.5, -44.5],
    "reference_rejected": [-13.25, -24.5, -8.0, -35.0],
    "chosen_lengths": [6.0, 14.0, 3.0, 20.0],
    "rejected_lengths": [8.0, 9.0, 5.0, 16.0],
    "chosen_nll": [12.0, 30.5, 7.25, 41.0],
    "margins": [0.0, 0.5, -0.25, 0.125],
}


def make_pairs(**changes):
    return PairLogps(**{name: mx.array(value) for name, value in {**PAIRS, **changes}.items()})


def loss_of(name, **parameters):
    return preference_loss([name] if name == "sft" else name, **parameters)


def gradients(loss, pairs):
    """Gradients of the mean loss to the four logps and to chosen_nll, by field."""

    def mean_loss(fields):
        return mx.mean(loss(pairs._replace(**fields), *([mx.ones(4)] if loss.reads_wpo else [])))

    return mx.grad(mean_loss)({name: getattr(pairs, name) for name in (*LOGPS, "chosen_nll")})


# TRL


def trl_loss(case):
    """Our loss of a golden case, its gradients as the case has them, and its mean rewards."""
    inputs, parameters = GOLDEN["inputs"], case["parameters"]
    policy, reference, squares = (mx.array(inputs[name]) for name in ("policy", "reference", "log_sum_sq_probs"))
    chosen_lengths, rejected_lengths = mx.array(inputs["chosen_lengths"]), mx.array(inputs["rejected_lengths"])
    lengths = mx.concatenate([chosen_lengths, rejected_lengths])
    # TRL takes the whole list as given, also a single sft.
    loss = preference_loss(case["loss_type"], case["loss_weights"], **parameters)
    shared = mx.minimum(chosen_lengths, rejected_lengths)
    common = mx.arange(policy.shape[1]) < mx.concatenate([shared, shared])[:, None]

    def weighed(rows):
        return losses.ld_weighed(rows.sum(axis=1), (rows * common).sum(axis=1), loss.ld_alpha)

    def make(policy, reference_rows):
        policy_chosen, policy_rejected = mx.split(weighed(policy), 2)
        reference_chosen, reference_rejected = mx.split(reference_rows, 2)
        nll = -mx.split(policy.sum(axis=1), 2)[0]
        rows = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        return PairLogps(*rows, chosen_lengths, rejected_lengths, nll)

    def mean_loss(policy, reference_rows):
        aligned = mx.split((policy - squares).sum(axis=1), 2)
        wpo = losses.wpo_weights(*aligned, chosen_lengths, rejected_lengths) if loss.reads_wpo else None
        return mx.mean(loss(make(policy, reference_rows), wpo))

    reference_rows = weighed(reference)
    value, (tokens, rows) = mx.value_and_grad(mean_loss, argnums=(0, 1))(policy, reference_rows)
    last = mx.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    rewards = [mx.mean(reward).item() for reward in loss.rewards(make(policy, reference_rows))]
    return value.item(), (tokens[:, 0], last, rows), rewards


def case_id(case):
    return "+".join(case["loss_type"]) + "".join(f"-{name}={value}" for name, value in case["parameters"].items())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=case_id)
def test_loss_gradients_and_rewards_are_those_of_trl(case):
    loss, (first, last, reference), (chosen, rejected) = trl_loss(case)
    assert loss == pytest.approx(case["loss"], rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(first, case["policy_gradient"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(last, case["last_token_gradient"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(reference, case["reference_gradient"], rtol=1e-4, atol=1e-6)
    # TRL's rewards of sft alone have a reference; there is none here.
    if case["loss_type"] != ["sft"]:
        assert chosen == pytest.approx(case["rewards"]["chosen"], rel=1e-5)
        assert rejected == pytest.approx(case["rewards"]["rejected"], rel=1e-5)


def test_golden_cases_are_of_trl_1_16_and_cover_every_loss_that_it_has():
    assert GOLDEN["source"].startswith("TRL 1.16")
    covered = {name for case in GOLDEN["cases"] for name in case["loss_type"]}
    assert covered == {"sigmoid", *NAMES} - {"dpo"} - NOT_TRLS


# The papers, in float64


def sigma(x):
    return 1 / (1 + np.exp(-x))


def papers(name, b, beta, eps=0.0, tau=0.05, lam=50.0, gamma=0.5, alpha=1.0):
    """A pair's loss from the paper's formula, written as it stands there; `b` holds float64 arrays."""
    u = b["policy_chosen"] - b["reference_chosen"]
    v = b["policy_rejected"] - b["reference_rejected"]
    m = b["margins"]
    u_mean, v_mean = u / b["chosen_lengths"], v / b["rejected_lengths"]
    p_mean, q_mean = b["policy_chosen"] / b["chosen_lengths"], b["policy_rejected"] / b["rejected_lengths"]
    gaps = np.sort(b["policy_chosen"] - b["policy_rejected"]) - np.sort(b["reference_chosen"] - b["reference_rejected"])
    nll = b["chosen_nll"].sum() / b["chosen_lengths"].sum()
    h = beta * u - beta * v - m

    def ce(x):
        return -(1 - eps) * np.log(sigma(x)) - eps * np.log(sigma(-x))

    def odds(logp):
        return np.exp(logp) / (1 - np.exp(logp))

    formulas = {
        "dpo": lambda: ce(h),
        "robust": lambda: (-(1 - eps) * np.log(sigma(h)) + eps * np.log(sigma(-h))) / (1 - 2 * eps),
        "hinge": lambda: np.maximum(0, 1 - h),
        "ipo": lambda: (u_mean - v_mean - m / beta - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: -np.log(sigma(beta * (u_mean - v_mean) - m)),
        "exo_pair": lambda: sigma(h) * np.log(sigma(h) / (1 - eps)) + sigma(-h) * np.log(sigma(-h) / eps),
        "nca_pair": lambda: -np.log(sigma(beta * u)) - 0.5 * np.log(sigma(-beta * u)) - 0.5 * np.log(sigma(-beta * v)),
        "bco_pair": lambda: -np.log(sigma(beta * u)) - np.log(sigma(-beta * v)),
        "sppo_hard": lambda: (u - 1 / (2 * beta)) ** 2 + (v + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigma(beta * u) + sigma(beta * v),
        "apo_down": lambda: sigma(beta * u) + 1 - sigma(h),
        "discopop": lambda: -np.log(sigma(h)) * (1 - sigma(h / tau)) + np.exp(-h) * sigma(h / tau),
        "aot": lambda: ce(beta * gaps),
        "aot_unpaired": lambda: ce(beta * (np.sort(u) - np.sort(v))),
        "sft": lambda: np.full_like(u, nll),
        "dpop": lambda: ce(beta * (u - v - lam * np.maximum(0, -u)) - m),
        "simpo": lambda: ce(beta * p_mean - beta * q_mean - gamma - m),
        "orpo": lambda: nll - beta * np.log(sigma(np.log(odds(p_mean) / odds(q_mean)) - m)),
        "cpo": lambda: ce(beta * (b["policy_chosen"] - b["policy_rejected"]) - m) + alpha * nll,
        "kto": lambda: 1 - sigma(beta * u),
    }
    return formulas[name]()


PAPER_CASES = [
    *((name, {}) for name in NAMES),
    *((name, {"label_smoothing": 0.2}) for name in NAMES if "label_smoothing" in LOSSES[name].parameters),
    *((name, {"beta": 0.5}) for name in NAMES),
    ("dpop", {"dpop_lambda": 0.3}),
    ("dpop", {"dpop_lambda": 0.0}),
    ("discopop", {"discopop_tau": 1.5}),
    ("simpo", {"simpo_gamma": 1.4}),
    ("cpo", {"cpo_alpha": 0.0}),
]


@pytest.mark.parametrize("name, parameters", PAPER_CASES)
def test_loss_and_gradient_are_those_of_the_papers_formula(name, parameters):
    batch = {field: np.array(value) for field, value in PAIRS.items()}
    symbols = {"label_smoothing": "eps", "discopop_tau": "tau", "dpop_lambda": "lam", "simpo_gamma": "gamma"}
    symbols["cpo_alpha"] = "alpha"
    values = {"beta": 2.0 if name == "simpo" else 0.1, **({"eps": 1e-3} if name == "exo_pair" else {})}
    values.update({symbols.get(key, key): value for key, value in parameters.items()})
    loss = loss_of(name, **parameters)
    expected = papers(name, batch, **values)
    assert mx.mean(loss(make_pairs())).item() == pytest.approx(expected.mean(), rel=1e-5)
    if name not in ("sft", "orpo", "cpo"):  # whose NLL is shared out over the batch
        np.testing.assert_allclose(loss(make_pairs()), expected, rtol=1e-5)
    for field, gradient in gradients(loss, make_pairs()).items():
        for row in range(4):
            step = np.zeros(4)
            step[row] = 1e-5
            ahead = papers(name, {**batch, field: batch[field] + step}, **values).mean()
            behind = papers(name, {**batch, field: batch[field] - step}, **values).mean()
            assert gradient[row].item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-4, abs=1e-6), (field, row)


# Stability


@pytest.mark.parametrize("beta", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_finite_for_extreme_logratios_and_lengths_of_one(name, beta):
    settings = [{}]
    if LOSSES[name].f_divergence:
        settings += [{"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence", "alpha_divergence")]
        settings += [{"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a} for a in (1.01, 2.0, -3.0)]
    for parameters in settings:
        loss = loss_of(name, beta=beta, **parameters)
        for chosen, rejected in [(-1e4, -1e4), (-1.0, -1e4), (-1e4, -1.0), (-1.0, -1.0), (-80.0, -40.0)]:
            for reference_chosen, reference_rejected in [(-1.0, -1.0), (-10001.0, -1.0), (-1.0, -10001.0)]:
                pairs = make_pairs(
                    policy_chosen=[chosen] * 4,
                    policy_rejected=[rejected] * 4,
                    reference_chosen=[reference_chosen] * 4,
                    reference_rejected=[reference_rejected] * 4,
                    chosen_lengths=[1.0] * 4,
                    rejected_lengths=[1.0] * 4,
                    chosen_nll=[-chosen] * 4,
                )
                arrays = [loss(pairs), *loss.rewards(pairs), *gradients(loss, pairs).values()]
                assert all(mx.all(mx.isfinite(array)).item() for array in arrays), (parameters, pairs)


def test_discopops_exponential_is_exact_where_a_product_of_exponentials_is_not():
    # exp(1000) overflows and sigma(-20000) is 0, but their product is exp(-19000) = 0; what remains is softplus(1000).
    pairs = make_pairs(policy_chosen=[-1e4] * 4, policy_rejected=[-1.0] * 4, reference_chosen=[-1.0] * 4)
    pairs = pairs._replace(reference_rejected=pairs.policy_rejected, margins=mx.zeros(4))
    np.testing.assert_allclose(loss_of("discopop", beta=0.1)(pairs), [999.9] * 4, rtol=1e-6)


def test_a_response_that_is_certain_has_finite_odds():
    pairs = make_pairs(policy_chosen=[0.0] * 4, chosen_nll=[0.0] * 4, margins=[0.0] * 4)
    assert mx.all(mx.isfinite(loss_of("orpo")(pairs))).item()


def test_rows_without_tokens_leave_no_nan():
    pairs = make_pairs(**{name: [0.0] * 4 for name in PAIRS})
    for name in NAMES:
        assert mx.all(mx.isfinite(loss_of(name)(pairs))).item(), name


# What must hold of any


def swapped(pairs):
    return pairs._replace(
        policy_chosen=pairs.policy_rejected,
        policy_rejected=pairs.policy_chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
        chosen_lengths=pairs.rejected_lengths,
        rejected_lengths=pairs.chosen_lengths,
        margins=-pairs.margins,
    )


@pytest.mark.parametrize("name", NAMES)
def test_swapping_chosen_and_rejected_negates_reward_margins(name):
    loss = loss_of(name)
    margins, negated = (
        chosen - rejected for chosen, rejected in (loss.rewards(make_pairs()), loss.rewards(swapped(make_pairs())))
    )
    assert mx.all(mx.abs(margins) > 0).item()
    np.testing.assert_allclose(negated, -margins)


def test_robust_undoes_flipped_labels_on_average():
    pairs, eps = make_pairs(), 0.3
    loss = loss_of("robust", label_smoothing=eps)
    np.testing.assert_allclose((1 - eps) * loss(pairs) + eps * loss(swapped(pairs)), loss_of("dpo")(pairs), rtol=1e-5)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dpo", math.log(2)),
        ("sigmoid", math.log(2)),
        ("robust", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("dpop", math.log(2)),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("sppo_hard", 50.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        # Half logistic, half exponential.
        ("discopop", 0.5 * math.log(2) + 0.5),
        ("exo_pair", math.log(0.5) - 0.5 * math.log(0.999 * 0.001)),
    ],
)
def test_policy_equal_to_reference(name, expected):
    pairs = make_pairs(reference_chosen=PAIRS["policy_chosen"], reference_rejected=PAIRS["policy_rejected"])
    pairs = pairs._replace(margins=mx.zeros(4))
    np.testing.assert_allclose(loss_of(name)(pairs), [expected] * 4, rtol=1e-6)
    for kind in ("forward_kl", "js_divergence", "alpha_divergence") if LOSSES[name].f_divergence else ():
        np.testing.assert_allclose(loss_of(name, f_divergence_type=kind)(pairs), [expected] * 4, rtol=1e-5)


def test_an_f_divergence_leaves_rewards_as_they_are():
    plain, divergent = loss_of("dpo"), loss_of("dpo", f_divergence_type="forward_kl")
    np.testing.assert_array_equal(divergent.rewards(make_pairs()), plain.rewards(make_pairs()))
    assert not np.allclose(divergent(make_pairs()), plain(make_pairs()))


def test_a_list_is_the_weighted_sum_of_its_losses():
    pairs = make_pairs()
    parts = [loss_of(name)(pairs) for name in ("dpo", "bco_pair", "sft")]
    combined = preference_loss(["dpo", "bco_pair", "sft"], [0.8, 0.2, 1.0])(pairs)
    np.testing.assert_allclose(combined, 0.8 * parts[0] + 0.2 * parts[1] + parts[2], rtol=1e-6)
    np.testing.assert_allclose(preference_loss(["dpo", "bco_pair", "sft"])(pairs), sum(parts), rtol=1e-6)


def test_sft_is_the_token_mean_and_each_pair_answers_for_its_own_tokens():
    values = loss_of("sft")(make_pairs())
    # 90.75 nats over 43 tokens.
    assert mx.mean(values).item() == pytest.approx(90.75 / 43, rel=1e-6)
    np.testing.assert_allclose(values, np.array(PAIRS["chosen_nll"]) * 4 / 43, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_that_only_fills_up_the_batch_changes_no_other_pairs_value_or_gradient(name):
    loss, three = loss_of(name), make_pairs(**{field: values[:3] for field, values in PAIRS.items()})
    filled = {field: [*values[:3], values[0]] for field, values in PAIRS.items()}
    four = make_pairs(**filled, counts=[1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(loss(four)[:3], loss(three), rtol=1e-6)

    def total(chosen, pairs, counts):
        return (loss(pairs._replace(policy_chosen=chosen, chosen_nll=-chosen)) * counts).sum()

    expected = mx.grad(total)(three.policy_chosen, three, mx.ones(3))
    found = mx.grad(total)(four.policy_chosen, four, four.counts)
    np.testing.assert_allclose(found, [*expected.tolist(), 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_does_not_care_which_pair_is_which(name):
    order = [2, 0, 3, 1]
    shuffled = {field: [values[row] for row in order] for field, values in PAIRS.items()}
    loss = loss_of(name)
    np.testing.assert_array_equal(loss(make_pairs(**shuffled)), loss(make_pairs()))
    assert loss.sorts_batch and not loss.reads_margins


def test_only_losses_with_a_pairs_logit_read_margins():
    for name in NAMES:
        loss = loss_of(name)
        moved = not np.allclose(loss(make_pairs()), loss(make_pairs(margins=[0.0] * 4)))
        assert moved == loss.reads_margins == LOSSES[name].reads_margins, name


def test_only_losses_that_say_so_read_the_reference():
    for name in NAMES:
        read = gradients(loss_of(name), make_pairs())
        moved = any(mx.any(read[field] != 0).item() for field in ("reference_chosen", "reference_rejected"))
        assert moved == loss_of(name).needs_reference == LOSSES[name].needs_reference, name


@pytest.mark.parametrize("name", [name for name in NAMES if "beta" not in LOSSES[name].lowest])
def test_beta_zero_leaves_the_reference_out(name):
    loss = loss_of(name, beta=0)
    without = make_pairs(reference_chosen=[0.0] * 4, reference_rejected=[0.0] * 4)
    assert not loss.needs_reference
    np.testing.assert_allclose(loss(without), loss(make_pairs()))
    np.testing.assert_allclose(loss.rewards(without), np.zeros((2, 4)))


@pytest.mark.parametrize("name", [name for name in NAMES if "beta" not in LOSSES[name].lowest])
def test_only_losses_with_an_nll_have_a_gradient_where_beta_is_zero(name):
    moved = any(mx.any(gradient != 0).item() for gradient in gradients(loss_of(name, beta=0), make_pairs()).values())
    assert moved == loss_of(name).has_nll


def test_rewards_are_logratios_where_there_is_a_reference_and_the_policys_own_logps_elsewhere():
    def rewards(loss_type, **parameters):
        return np.array(preference_loss(loss_type, **parameters).rewards(make_pairs()))[:, 0]

    # First pair: logratios 2 and -2.25; logps -12 of 6 tokens and -15.5 of 8.
    np.testing.assert_allclose(rewards("ipo", beta=0.5), [1.0, -1.125])
    np.testing.assert_allclose(rewards(["sft", "cpo", "dpo"], beta=0.5), [1.0, -1.125])
    np.testing.assert_allclose(rewards("simpo"), [2 * -2.0, 2 * -15.5 / 8])
    np.testing.assert_allclose(rewards("orpo", beta=0.5), [-1.0, -15.5 / 16])
    np.testing.assert_allclose(rewards("cpo", beta=0.5), [-6.0, -7.75])
    np.testing.assert_allclose(rewards(["sft", "simpo"]), [-4.0, -3.875])
    np.testing.assert_allclose(rewards(["sft"], beta=0.5), [-6.0, -7.75])


def test_wpo_weights_multiply_each_pair_and_carry_no_gradient():
    loss, weights = loss_of("hinge", use_weighting=True), mx.array([0.5, 2.0, 1.0, 0.0])
    np.testing.assert_allclose(loss(make_pairs(), weights), loss_of("hinge")(make_pairs()) * weights)
    mixed = preference_loss(["dpo", "sft"], use_weighting=True)
    expected = preference_loss(["dpo", "sft"])(make_pairs()) * weights
    np.testing.assert_allclose(mixed(make_pairs(), weights), expected, rtol=1e-6)
    # exp(-3/6) x exp(-2/4)
    sums = mx.array([-3.0]), mx.array([-2.0]), mx.array([6]), mx.array([4])
    assert losses.wpo_weights(*sums).item() == pytest.approx(math.exp(-1), rel=1e-6)
    assert mx.grad(lambda x: losses.wpo_weights(x, *sums[1:]).sum())(sums[0]).item() == 0


def test_a_compiled_loss_is_the_eager_one():
    loss = preference_loss(["discopop", "aot", "sft"])
    compiled = mx.compile(lambda *fields: loss(PairLogps(*fields)))
    np.testing.assert_allclose(compiled(*make_pairs()), loss(make_pairs()), rtol=1e-5)


def test_fields_of_different_lengths_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"reference_rejected has shape \(3,\); policy_chosen has \(4,\)"):
        loss_of("dpo")(make_pairs(reference_rejected=[1.0, 2.0, 3.0]))


# What a user may ask for


@pytest.mark.parametrize(
    "loss_type, parameters, told",
    [
        ("dpoo", {}, r"loss_type is 'dpoo' \(did you mean dpo\?\); it must be a name, one of dpo, robust"),
        (["dpo", "hing"], {}, "did you mean hinge"),
        ([], {}, "loss_type is an empty list"),
        ("sft", {}, "loss_type is sft, which is upstream's training"),
        (["dpo", "sft"], {"loss_weights": [1.0]}, "loss_weights is .1.0., but loss_type has dpo, sft"),
        (["dpo", "sft"], {"loss_weights": 0.5}, "loss_weights is .0.5., but loss_type has dpo, sft"),
        (["dpo", "sft"], {"loss_weights": [0, 0]}, "one of them must be above 0"),
        (["dpo", "sft"], {"loss_weights": [1, -1]}, "loss_weights is -1"),
        ("dpo", {"loss_weights": float("inf")}, "loss_weights is inf; it must be a finite number, >= 0"),
        ("dpo", {"beta": -0.1}, "beta is -0.1; it must be a finite number, >= 0"),
        ("dpo", {"beta": float("inf")}, "beta is inf; it must be a finite number"),
        ("dpo", {"beta": float("nan")}, "beta is nan"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be a finite number, >= 0 and < 0.5"),
        ("discopop", {"discopop_tau": 0}, "discopop_tau is 0; it must be a finite number, >= 1e-06"),
        ("dpo", {"ld_alpha": 1.5}, "ld_alpha is 1.5; it must be a finite number, >= 0 and <= 1"),
        ("dpo", {"f_divergence_type": "kl"}, "f_divergence_type is 'kl'"),
        ("ipo", {"beta": 0}, "beta is 0.0, but ipo needs at least 1e-06; its default is 0.1"),
        (["dpo", "sppo_hard"], {"beta": 1e-9}, "beta is 1e-09, but sppo_hard needs at least 1e-06"),
        ("exo_pair", {"label_smoothing": 0}, "exo_pair needs at least 1e-12; its default is 0.001"),
        (["dpo", "simpo"], {}, r"beta has no one default for this loss_type \(0.1 for dpo, 2.0 for simpo\)"),
        (
            "hinge",
            {"label_smoothing": 0.1},
            "label_smoothing is 0.1, but loss_type hinge does not read it.*dpo, robust",
        ),
        ("dpo", {"simpo_gamma": 1.0}, "simpo_gamma is 1.0, but loss_type dpo does not read it.*: simpo"),
        ("simpo", {"reference_update_steps": 10}, "loss_type simpo does not read it"),
        (["sft"], {"ld_alpha": 0.5}, "loss_type sft does not read it"),
        ("dpo", {"beta": 0, "reference_update_steps": 10}, "beta 0 leaves the reference out"),
        (
            ["dpo", "bco_pair"],
            {"f_divergence_type": "js_divergence"},
            "f_divergence_type is js_divergence, but bco_pair has no form for it",
        ),
        ("dpop", {"f_divergence_type": "forward_kl"}, "dpop has no form for it"),
        ("dpo", {"f_alpha_divergence_coef": 2.0}, "f_divergence_type is reverse_kl, which does not read it"),
        ("aot", {"use_weighting": True}, "use_weighting weighs pairs, but aot sorts the batch"),
        (["dpo", "aot_unpaired"], {"use_weighting": True}, "aot_unpaired sorts the batch"),
        ("simpo", {"ld_alpha": 0.5}, "ld_alpha weighs the tokens of a logratio, and simpo has none"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(loss_type, parameters, told):
    with pytest.raises(ConfigError, match=told):
        preference_loss(loss_type, **parameters)


def test_defaults_are_the_options_or_the_losss_own():
    assert loss_of("dpo").parameters["beta"] == 0.1
    assert loss_of("simpo").parameters["beta"] == 2.0
    assert loss_of("simpo", beta=None).parameters["beta"] == 2.0
    assert loss_of("simpo", beta=0.1).parameters["beta"] == 0.1
    assert loss_of("exo_pair").parameters["label_smoothing"] == 1e-3
    assert preference_loss(["dpo", "simpo"], beta=0.5).parameters["beta"] == 0.5


def test_a_config_that_spells_out_every_default_is_accepted():
    written = {
        option.name: option.default for option in LOSS_OPTIONS if option.name not in ("loss_type", "loss_weights")
    }
    assert loss_of("hinge", **written).parameters == loss_of("hinge").parameters


def test_a_preference_loss_says_what_it_reads():
    loss = preference_loss(["sigmoid", "sft"], [1, 0.5], ld_alpha=0.5, reference_update_steps=8)
    assert (loss.names, loss.weights) == (("sigmoid", "sft"), (1.0, 0.5))
    assert loss.needs_reference and loss.reads_margins and not loss.reads_wpo and not loss.sorts_batch
    assert loss.ld_alpha == 0.5 and loss.parameters["reference_update_steps"] == 8
    assert "simpo_gamma" not in loss.parameters
    assert not preference_loss(["simpo", "sft"]).needs_reference
    assert preference_loss(["simpo", "dpo"], beta=1).needs_reference


# The table


@pytest.mark.parametrize("name", NAMES)
def test_each_row_agrees_with_its_function(name):
    loss, options = LOSSES[name], {option.name: option for option in LOSS_OPTIONS}
    assert getattr(losses, name) is loss.function
    assert f"arXiv {loss.source}" in inspect.getdoc(loss.function)
    assert "(B,)" in inspect.getdoc(loss.function)
    assert set(loss.parameters) <= set(options)
    assert set(loss.defaults) | set(loss.lowest) <= set(loss.parameters)
    for parameter in loss.parameters:
        assert options[parameter].check(loss.default(parameter)) is not None


def test_documents_have_a_row_for_each_loss_and_each_option():
    described, table = make_tables.describe_losses(), make_tables.options_table(LOSS_OPTIONS)
    rows = [line for line in described.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == NAMES
    assert [row.split("`")[1] for row in table.splitlines()[2:]] == [option.name for option in LOSS_OPTIONS]
    assert all(row.count("|") == 6 for row in rows) and all(row.count("|") == 5 for row in table.splitlines())
    assert "`dpo`, `sigmoid`" in described
    assert "`beta` (2, >= 0), `label_smoothing` (0, >= 0 and < 0.5), `simpo_gamma` (0.5, >= 0)" in described
    assert "`label_smoothing` (0.001, >= 1e-12 and < 0.5)" in described
