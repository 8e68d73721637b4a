"""The embedded example: small, well-formed, made again by its script, and read by mlx-lm and transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlx_lm import generate, load

EXAMPLES = Path(__file__).parents[1] / "mlx_lm" / "examples"
MODEL = EXAMPLES / "tiny_chat_model"
SIZES = {"train": 400, "valid": 80, "test": 80}


def rows(split, folder=EXAMPLES):
    text = (folder / "preferences" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_model_is_under_3_megabytes():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 3e6


def test_rows_are_well_formed_and_no_prompt_stands_in_two_splits():
    seen = {}
    for split, size in SIZES.items():
        assert len(rows(split)) == size
        for row in rows(split):
            assert set(row) == {"prompt", "chosen", "rejected"} and all(row.values())
            assert row["chosen"] != row["rejected"]
            assert seen.setdefault(row["prompt"], split) == split


def test_neither_answer_is_the_longer_one_throughout():
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows("train"))
    assert 0.2 < longer / SIZES["train"] < 0.8


def test_the_script_makes_the_same_rows_again(tmp_path):
    command = [sys.executable, str(EXAMPLES / "make_example.py"), "--data-only", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=EXAMPLES.parents[1], timeout=120)
    for split in SIZES:
        name = f"preferences/{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_transformers_reads_the_tokenizer_as_mlx_lm_does():
    _, tokenizer = load(str(MODEL))
    messages = [{"role": "user", "content": "What colour is snow?"}]
    expected = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Which colour does the night have?", "black"), ("What is the name for a young swan?", "cygnet")],
)
def test_the_model_answers_held_out_questions_and_stops(question, answer):
    assert question in [row["prompt"] for row in rows("test")]
    model, tokenizer = load(str(MODEL))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    text = generate(model, tokenizer, prompt, max_tokens=60)
    assert answer in text and len(tokenizer.encode(text)) < 60
