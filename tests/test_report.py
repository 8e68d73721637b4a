"""What a run says of figures that look good and are not."""

import json

import pytest
import yaml
from test_interruption import VALUES
from tiny import short_run, some_pairs, tiny_llama

import mlx_lm.lora

VALID = some_pairs(4, seed=1, response=(8, 12))


def told(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rate, warned", [(1e-5, False), (1e-3, True)])
def test_a_run_that_makes_all_responses_unlikely_ends_with_a_warning(tmp_path, capsys, monkeypatch, rate, warned):
    values = VALUES | {"iters": 8, "learning_rate": rate, "adapter_path": str(tmp_path / "adapters")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("sys.argv", ["mlx_lm.lora", "--config", str(tmp_path / "config.yaml")])
    monkeypatch.setattr("mlx_lm.tuner.preference.outcome.plot_metrics", lambda *_: None)
    mlx_lm.lora.main()
    last = json.loads((tmp_path / "adapters" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["eval_rewards/chosen"] < -2) == warned and last["eval_loss"] < 0.7
    assert ("[WARNING] The chosen responses are" in told(capsys)) == warned


def test_a_validation_that_is_not_finite_is_said(tmp_path, capsys):
    heavy = [pair._replace(weight=3e38) for pair in VALID]
    # At the start its loss is 1 / (2 beta)^2, which is 25.
    short_run(tiny_llama(), some_pairs(4), tmp_path, valid=heavy, iters=1, val_batches=1, loss_type="ipo")
    assert "[WARNING] The validation loss is inf at iteration 0." in told(capsys)
