"""What a run leaves to look at, by the command: answers, the page in a browser, the model card, and what comes next."""

import contextlib
import errno
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import ModelCard
from mlx_lm.cli_ui import make_console
from mlx_lm.fuse import main as fuse
from mlx_lm.generate import generate
from mlx_lm.generate import main as generate_main

import mlx_lm.lora
from mlx_lm import load
from mlx_lm.tuner.preference import curves
from mlx_lm.tuner.preference.answers import MOST_TOKENS, print_side_by_side
from mlx_lm.tuner.preference.card import MARK, shared_name, write_card
from mlx_lm.tuner.preference.check import warn_of_ended_schedule
from mlx_lm.tuner.preference.commands import GIVEN, next_commands, resume_command
from mlx_lm.tuner.preference.figures import DESIRABLE
from mlx_lm.tuner.preference.metrics import best_of, read_metrics
from mlx_lm.tuner.preference.objective import preference_loss
from mlx_lm.tuner.preference.outcome import Outcome, print_closing
from mlx_lm.tuner.preference.page import table_rows, write_page
from mlx_lm.tuner.preference.pairs import Pair
from mlx_lm.tuner.preference.run import make_room

EXAMPLES = Path(__file__).parents[1] / "mlx_lm" / "examples"
MODEL = str(EXAMPLES / "tiny_chat_model")
HOSTILE = "</td><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> {{ 7 * 7 }}"


def call(main, *words):
    """Run a command's `main` in this process, as a shell would start it; what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setenv("COLUMNS", "100")
        make_console.cache_clear()  # the console of the process may be as wide as another test's
        patch.setattr(sys, "argv", ["mlx_lm.lora", *words])
        patch.setattr(sys, "orig_argv", ["python", "-m", "mlx_lm.lora", *words])
        main()
        make_console.cache_clear()
    return re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two sampled prompts, and the validation rows' lines: one hostile, one that is another's reverse."""
    folder = tmp_path_factory.mktemp("run")
    for split, count in (("train", 24), ("valid", 8), ("test", 4)):
        lines = (EXAMPLES / "preferences" / f"{split}.jsonl").read_text().splitlines()[:count]
        if split == "valid":
            first = json.loads(lines[0])
            lines.append(json.dumps({"prompt": HOSTILE, "chosen": "Good question!", "rejected": HOSTILE}))
            lines.append(json.dumps(first | {"chosen": first["rejected"], "rejected": first["chosen"]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config = {"model": MODEL, "train": True, "data": str(folder), "loss_type": "dpo", "beta": 0.5, "iters": 6}
    config |= {"num_layers": 2, "batch_size": 8, "steps_per_report": 3, "steps_per_eval": 3, "save_every": 3}
    config |= {"learning_rate": 2e-4, "reference_cache": "none", "val_batches": -1}
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    words = ["--config", str(folder / "config.yaml"), "--adapter-path", str(folder / "out"), "--sample-prompts", "2"]
    said = call(mlx_lm.lora.main, *words)
    return SimpleNamespace(folder=folder / "out", said=said, words=words, config=config)


def test_answers_are_the_models_own_before_and_after(run):
    lines = read_metrics(run.folder / "samples.jsonl")
    assert [line["iteration"] for line in lines] == [0, 0, 3, 3, 6, 6]
    data = run.config["data"]
    assert [line["row"] for line in lines[:2]] == [f"{data}/valid.jsonl:1", f"{data}/valid.jsonl:2"]
    rows = [json.loads(line) for line in Path(data, "valid.jsonl").read_text().splitlines()]
    for adapters, answered in ((None, lines[:2]), (str(run.folder), lines[-2:])):
        model, tokenizer = load(MODEL, adapter_path=adapters)
        for row, line in zip(rows, answered, strict=False):
            assert (line["prompt"], line["chosen"], line["rejected"]) == (row["prompt"], row["chosen"], row["rejected"])
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            assert line["answer"] == generate(model, tokenizer, prompt, max_tokens=MOST_TOKENS)
    assert lines[0]["answer"] != lines[-2]["answer"]
    # The first pair side by side, once after each validation but the one before training.
    assert re.findall(r"before training +after iteration (\d)", run.said) == ["3", "6"]
    assert f"{lines[0]['answer']}" in run.said and f"{lines[-2]['answer']}" in run.said


def test_a_report_is_a_line_of_100_columns_and_bars_have_names(run):
    reports = [line for line in run.said.splitlines() if re.match(r" +\d+ +\d\.\d{3} ", line)]
    assert len(reports) == 5 and max(map(len, reports)) <= 100
    assert [line for line in reports if "validation of 10 pairs" in line] == [reports[i] for i in (0, 2, 4)]
    for name, total in (("reference, train", 24), ("reference, valid", 10), ("train           ", 6)):
        assert re.search(rf"^{name} .*100% +{total}/{total} 0:00:\d\d elapsed 0:00:00 left$", run.said, re.MULTILINE)


def test_sampling_changes_nothing_that_is_trained(run, tmp_path):
    call(mlx_lm.lora.main, *run.words[:2], "--adapter-path", str(tmp_path))
    ours, plain = (mx.load(str(folder / "adapters.safetensors")) for folder in (run.folder, tmp_path))
    assert all(mx.array_equal(value, plain[name]) for name, value in ours.items())
    assert not (tmp_path / "samples.jsonl").exists()


def test_sampling_needs_a_validation_set(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(mlx_lm.lora.main, *run.words, "--adapter-path", str(tmp_path / "none"), "--val-batches", "0")
    assert "sample_prompts need validations" in capsys.readouterr().err


@pytest.mark.parametrize(("iteration", "kept"), [(0, []), (4, [0, 4])])
def test_answers_of_an_interrupted_run_that_come_again_are_dropped(tmp_path, iteration, kept):
    (tmp_path / "samples.jsonl").write_text("".join(f'{{"iteration": {i}}}\n' for i in (0, 4, 8)))
    data, args = SimpleNamespace(valid_set=None), SimpleNamespace(sample_prompts=1)
    Outcome(tmp_path, None, data, args, {}, None, None, iteration)
    assert [line["iteration"] for line in read_metrics(tmp_path / "samples.jsonl")] == kept


# Presses the heads of the columns and filters, and writes down what the table then shows.
PRESS = """<script>
const all = () => [...document.querySelectorAll("#pairs tbody tr")];
const column = i => all().map(row => row.cells[i].innerText.split("\\n")[0]);
const press = i => { document.querySelectorAll("#pairs th")[i].querySelector("button").click(); return column(i); };
const seen = {first: column(0), down: press(0), loss: press(1), length: press(2), longest: press(2)};
seen.text = document.body.innerText;
document.getElementById("filter").value = "says the reverse";
document.getElementById("filter").dispatchEvent(new Event("input"));
seen.left = all().filter(row => row.offsetHeight > 0).length;
seen.title = document.title;
seen.scripts = document.querySelectorAll("script").length;
seen.images = document.querySelectorAll("img").length;
document.title = JSON.stringify(seen);
</script></body>"""


@pytest.fixture(scope="module")
def seen(run, tmp_path_factory):
    """What a browser shows of the page, with its columns pressed one after the other."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    page = tmp_path_factory.mktemp("page") / "page.html"
    page.write_text((run.folder / "report.html").read_text().replace("</body>", PRESS))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    flags += ["--virtual-time-budget=5000"]
    # A library that is loaded before others for MLX keeps the browser from starting.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, env=environment
    )
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))


def test_the_page_sorts_and_filters_in_a_browser(run, seen):
    margins = [float(value) for value in seen["first"]]
    assert len(margins) == 10 and margins == sorted(margins) and margins[0] < 0 < margins[-1]
    assert [float(value) for value in seen["down"]] == margins[::-1]
    losses, lengths = ([float(value) for value in seen[name]] for name in ("loss", "length"))
    assert losses == sorted(losses) and len(set(losses)) > 5
    assert seen["longest"][0] == seen["length"][-1] and len(lengths) == 10
    assert seen["left"] == 1


def test_what_stands_in_rows_stays_text(run, seen):
    assert seen["title"] == "out" and seen["scripts"] == 2 and seen["images"] == 1  # the page's, ours, and the curves
    assert seen["text"].count(HOSTILE) == 2  # as a prompt and as a rejected response


def test_the_page_has_settings_figures_places_and_no_address(run):
    text = (run.folder / "report.html").read_text()
    shown = html.unescape(text)
    assert f"{run.config['data']}/valid.jsonl:1 says the reverse" in shown
    assert f"{run.config['data']}/valid.jsonl:9" in shown and "learning_rate</td><td>0.0002" in text
    last = read_metrics(run.folder / "metrics.jsonl")[-1]
    assert f"{last['eval_rewards/margins']:.3f}" in text
    assert "10 pairs say little" in text
    assert not re.search(r"https?://|src=\"(?!data:)", re.sub(r"&lt;.*?&gt;", "", text))


def test_a_run_ends_with_commands_that_run(run, tmp_path):
    panel = run.said[run.said.index("─ done ─") :]
    assert "best validation   loss" in panel and "(iteration 6)" in panel
    commands = dict(re.findall(r"^  (\w+) +(python .*)$", panel, re.MULTILINE))
    assert list(commands) == ["generate", "test", "fuse", "resume"]
    words = {name: shlex.split(command) for name, command in commands.items()}
    assert [words[name][:4] for name in ("generate", "fuse")] == [
        ["python", "-m", "mlx_lm", x] for x in ("generate", "fuse")
    ]
    assert [words[name][:3] for name in ("test", "resume")] == [["python", "-m", "mlx_lm.lora"]] * 2
    assert len(call(generate_main, *words["generate"][4:], "--max-tokens", "5", "--temp", "0")) > 2
    assert "Test loss" in call(mlx_lm.lora.main, *words["test"][3:])
    copied = tmp_path / "copy"  # the others' tests read the run as it is
    shutil.copytree(run.folder, copied)
    moved = [word.replace(str(run.folder), str(copied)) for word in words["fuse"][4:]]
    call(fuse, *moved)
    # What fuse writes has a card of its own.
    assert MARK not in (copied / "fused" / "README.md").read_text() and load(str(copied / "fused"))


def test_a_resumed_run_goes_on_with_its_answers_and_pictures(run, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(run.folder, copied)
    for name in ("training.png", "report.html"):
        (copied / name).unlink()
    # As after a validation on other pairs: the first answer is to another prompt.
    first, second, *others = (copied / "samples.jsonl").read_text().splitlines(keepends=True)
    (copied / "samples.jsonl").write_text("".join([second, first, *others]))
    said = call(mlx_lm.lora.main, *run.words, "--adapter-path", str(copied), "--resume", "--iters", "9")
    assert [line["iteration"] for line in read_metrics(copied / "samples.jsonl")] == [0, 0, 3, 3, 6, 6, 9, 9]
    assert re.findall(r"before training +after iteration (\d)", said) == ["9"]
    page = (copied / "report.html").read_text()
    assert "first (iteration 0)" in page and "last (iteration 9)" in page
    before, other = (line["answer"] for line in read_metrics(run.folder / "samples.jsonl")[:2])
    assert before in said and other not in said
    assert html.escape(before, quote=False) in page and (copied / "training.png").exists()
    # Of a prompt that had no answer before there is nothing to show.
    (copied / "samples.jsonl").write_text(second)
    said = call(mlx_lm.lora.main, *run.words, "--adapter-path", str(copied), "--resume", "--iters", "10")
    assert "after iteration 10" not in said


def test_a_card_tells_the_hub_what_it_is(run, tmp_path):
    card = ModelCard.load(run.folder / "README.md")
    assert card.data.library_name == "mlx" and card.data.pipeline_tag == "text-generation"
    assert {"mlx", "dpo", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None and MODEL not in card.content  # a folder of this machine
    last = read_metrics(run.folder / "metrics.jsonl")[-1]
    assert f"{last['eval_loss']:.3f} |" in card.content and "| beta | 0.5 |" in card.content
    assert "None" not in card.content
    config = run.config | {"model": "someone/some-model", "hf_dataset": [{"path": "someone/pairs"}]}
    assert write_card(tmp_path, config, preference_loss(["dpo", "sft"]), [])
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets) == ("someone/some-model", ["someone/pairs"])
    assert data.to_dict()["base_model_relation"] == "adapter" and {"dpo", "sft"} <= set(data.tags)


def test_a_readme_of_the_users_is_left_alone(run, tmp_path):
    loss = preference_loss("dpo")
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    assert not write_card(tmp_path, run.config, loss, []) and path.read_text() == "# Mine\n"
    path.unlink()
    assert write_card(tmp_path, run.config, loss, []) and MARK in path.read_text()
    assert write_card(tmp_path, run.config | {"beta": 0.25}, loss, []) and MARK in path.read_text()
    path.write_text(path.read_text().replace(MARK, "") + "And more of mine.\n")
    assert not write_card(tmp_path, run.config, loss, []) and "more of mine" in path.read_text()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.md")
    assert not write_card(tmp_path, run.config, loss, []) and not (tmp_path / "elsewhere.md").exists()


@pytest.fixture
def given(monkeypatch):
    """The options of a command that was started as `python`; none at first."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mlx_lm.lora"])
    GIVEN.clear()
    yield GIVEN
    GIVEN.clear()


def test_commands_with_this_runs_paths_and_the_best_adapters(tmp_path, monkeypatch, given):
    (tmp_path / "best").mkdir()
    args = SimpleNamespace(
        adapter_path=str(tmp_path), save_best="accuracy", model="a/b", trust_remote_code=True, iters=5, data="a/prefs"
    )
    given[:] = ["--train"]
    where = f"--model a/b --adapter-path {tmp_path}/best --trust-remote-code"
    # What was started by its path may be another Python's start, such as a framework's on macOS.
    monkeypatch.setattr(sys, "executable", "/home/.venv/bin/python")
    for started, python in (("python", "python"), ("/Frameworks/Python", "/home/.venv/bin/python")):
        monkeypatch.setattr(sys, "orig_argv", [started, "/usr/bin/mlx_lm.lora", "--train"])
        found = next_commands(args, epochs=1.5)
        assert found["generate"] == f"{python} -m mlx_lm generate {where} --prompt Hello"
        assert found["fuse"] == f"{python} -m mlx_lm fuse {where} --save-path {tmp_path}/fused"
        command = f"{python} -m mlx_lm.lora --train"
        assert found["test"] == f"{command} --no-train --test --adapter-path {tmp_path}/best"
        assert found["resume"] == f"{command} --resume --epochs 3"
        assert resume_command() == f"{command} --resume"


def test_the_command_to_fuse_leaves_a_model_that_was_fused_before(tmp_path, given):
    settings = {"save_best": None, "model": str(tmp_path / "fused"), "trust_remote_code": False, "iters": 5}
    for name, told in (("fused", "fused"), ("fused-2", "fused-2"), ("fused-3", "fused-3")):
        found = next_commands(SimpleNamespace(adapter_path=str(tmp_path), **settings))
        assert found["fuse"].endswith(f" --save-path {tmp_path}/{told}")
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("words", [[], ["--config", "/dev/fd/63"], ["--config=/dev/stdin"], ["-c/proc/self/fd/63"]])
def test_no_command_repeats_what_came_from_a_pipe_or_was_called_by_a_program(tmp_path, given, words):
    args = SimpleNamespace(
        adapter_path=str(tmp_path), save_best=None, model="m", trust_remote_code=False, iters=5, data="a/prefs"
    )
    given[:] = words
    assert resume_command() == "resume: true with the same settings"
    found = next_commands(args)
    assert found.keys() == {"generate", "fuse"} and found["fuse"].startswith("python -m mlx_lm fuse")


def test_a_test_is_offered_where_there_is_a_test_set(tmp_path, given):
    given[:] = ["--train"]

    def offered(**data):
        settings = {
            "adapter_path": str(tmp_path),
            "save_best": None,
            "model": "m",
            "trust_remote_code": False,
            "iters": 1,
        }
        return "test" in next_commands(SimpleNamespace(**settings | {"hf_dataset": None, "data": None} | data))

    (tmp_path / "train.jsonl").touch()
    assert not offered(data=str(tmp_path)) and not offered(data=str(tmp_path / "train.jsonl"))
    (tmp_path / "test.jsonl").touch()
    assert offered(data=str(tmp_path))
    assert offered(hf_dataset={"path": "a", "test_split": "quiz"}) and not offered(hf_dataset=[{"path": "a"}])


def test_each_run_of_a_picture_has_a_color(tmp_path, monkeypatch, capsys):
    drawn, folders = [], [str(tmp_path / f"run {i}") for i in range(12)]
    for folder in folders:
        Path(folder).mkdir()
        (Path(folder) / "metrics.jsonl").write_text('{"iteration": 1, "loss": 0.7}\n')
    monkeypatch.setattr(curves, "_written", lambda figure, path: drawn.append(figure) or path)
    monkeypatch.setattr(sys, "argv", ["mlx_lm.lora", "--plot", *folders])
    with pytest.raises(SystemExit, match="0"):
        mlx_lm.lora.main()
    assert f"The curves of {folders[0]} and {folders[1]}" in " ".join(capsys.readouterr().out.split())
    # That of its line in the legend.
    lines, legend = drawn[0].axes[0].lines, drawn[0].legends[0].get_lines()
    found, expected = ([tuple(line.get_color()) for line in those] for those in (lines, legend))
    assert len(set(found)) == len(folders) and found == expected
    drawn[0].canvas.draw()
    assert drawn[0].axes[0].get_window_extent().height > 150


def test_a_picture_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 0.7}\n')
    monkeypatch.setattr("mlx_lm.tuner.preference.curves.replace_file", refused)
    with pytest.raises(SystemExit, match="2"):
        call(mlx_lm.lora.main, "--plot", str(tmp_path))
    assert "error: plot: the picture cannot be written (" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        call(mlx_lm.lora.main, "--plot", str(tmp_path), str(tmp_path / "none"))
    assert "none: there is no metrics.jsonl with figures of a run in it." in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for runs in ({tmp_path: [{}]}, {tmp_path: [{}], tmp_path / "other": [{}]}):
        assert curves.plot_runs(runs) is None
        assert "[WARNING] matplotlib is not installed" in capsys.readouterr().out


def test_answers_side_by_side_say_when_each_was_given(capsys):
    one, two = ({"iteration": iteration, "prompt": "Who?", "answer": "I."} for iteration in (15, 20))
    print_side_by_side(one, two)
    print_side_by_side(one | {"iteration": 0}, two)
    first, second = (line for line in capsys.readouterr().out.splitlines() if "after iteration 20" in line)
    assert "after iteration 15" in first and "before training" in second


@pytest.mark.parametrize("text, stays", [(MARK, False), ("# Mine\n", True)])
def test_a_new_run_moves_an_earlier_ones_card_aside(tmp_path, text, stays):
    (tmp_path / "adapters.safetensors").touch()
    (tmp_path / "README.md").write_text(text)
    make_room(tmp_path, {})
    assert (tmp_path / "README.md").exists() == stays
    assert (tmp_path / "earlier-1" / "README.md").exists() != stays


def test_the_last_panel_has_no_sign_before_a_zero(tmp_path, capsys):
    line = {"iteration": 0, "eval_loss": 0.6931, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": -1e-5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    settings = {"save_best": None, "model": "m", "trust_remote_code": False, "iters": 1, "data": "m"}
    print_closing(SimpleNamespace(adapter_path=tmp_path, early_stop=None, **settings), None)
    assert "loss 0.693, accuracy 0.500, margin 0.000 (iteration 0)" in capsys.readouterr().out


@pytest.mark.parametrize("early_stop, patience", [(1, " --early-stop 4"), (2, " --early-stop 4"), (3, "")])
def test_the_command_that_goes_on_does_so_after_an_early_stop(tmp_path, capsys, monkeypatch, early_stop, patience):
    monkeypatch.setattr("mlx_lm.tuner.preference.commands.repeatable_command", lambda: ["mlx_lm.lora"])
    monkeypatch.setattr("mlx_lm.tuner.preference.commands.has_test_set", lambda args: False)
    lines = [{"iteration": i, "eval_loss": loss} for i, loss in enumerate((0.7, 0.6, 0.65, None))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"save_best": None, "early_stop": early_stop, "model": "m", "trust_remote_code": False, "iters": 4}
    print_closing(SimpleNamespace(adapter_path=tmp_path, **settings), None)
    assert re.findall(r"mlx_lm\.lora ([\w -]*)", capsys.readouterr().out)[-1] == f"--resume --iters 8{patience}"


@pytest.mark.parametrize(
    "name, arguments, goes_on",
    [
        ("linear_schedule", [5e-5, 0.0, 18], False),
        ("cosine_decay", [1e-5, 18], False),
        ("cosine_decay", [1e-5, 18, 1e-7], True),
        ("linear_schedule", [1e-5, 1e-5, 1], True),
    ],
)
def test_no_command_goes_on_at_a_rate_of_zero(tmp_path, monkeypatch, capsys, name, arguments, goes_on):
    monkeypatch.setattr("mlx_lm.tuner.preference.commands.repeatable_command", lambda: ["mlx_lm.lora"])
    monkeypatch.setattr("mlx_lm.tuner.preference.commands.has_test_set", lambda args: False)
    schedule = {"name": name, "arguments": arguments, "warmup": 2}
    settings = {"save_best": None, "model": "m", "trust_remote_code": False, "iters": 40, "grad_accumulation_steps": 2}
    args = SimpleNamespace(adapter_path=tmp_path, lr_schedule=schedule, **settings)
    assert ("resume" in next_commands(args)) == goes_on
    for updates in (1, 20, 40):  # within the warmup, of this run, and of one twice as long
        warn_of_ended_schedule(schedule, updates)
    told = re.findall(r"rate is 0 by update (\d+) of (\d+)", capsys.readouterr().err)
    # It is from the 22nd on: upstream puts the schedule behind one more update than the warmup has.
    assert told == ([] if goes_on else [("22", "40")])


def test_paths_are_no_markup(tmp_path, capsys):
    folder = tmp_path / "a [red]b [/b]"
    folder.mkdir(parents=True)
    settings = {"save_best": None, "model": "m", "trust_remote_code": False, "iters": 1, "data": "m"}
    print_closing(SimpleNamespace(adapter_path=folder, early_stop=None, **settings), None)
    assert "a [red]b [/b]" in "".join(capsys.readouterr().out.split("\n")[:12])


def test_the_page_tells_pairs_that_say_the_same_or_the_reverse():
    pair = Pair([1], [2], [3])
    notes = [row["note"] for row in table_rows([pair, pair, pair._replace(chosen=[3], rejected=[2])], range(3), None)]
    assert notes == ["", "the same as 0 of the training data", "0 of the training data says the reverse"]


def test_the_page_of_single_responses_has_each_on_its_own_side(tmp_path):
    rows = [{"place": f"row {i}", "note": "", "prompt": "Who?", "chosen": "", "rejected": ""} for i in range(2)]
    figures = {name: np.zeros(2) for name in ("loss", "rewards/margins")}
    figures |= {DESIRABLE: np.array([1.0, 0.0])}
    for name in ("rewards", "logps", "lengths"):
        figures |= {f"{name}/chosen": np.array([1.0, 0.0]), f"{name}/rejected": np.array([0.0, 2.0])}
    reference = np.array([[-11.0, -77.0], [-22.0, -88.0]])
    write_page(tmp_path, {}, [], [], [], None, 3, rows, figures, reference)
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"logps ([\d.]+), reference (-[\d.]+)", text) == [("1.00", "-11.00"), ("2.00", "-22.00")]


def test_one_report_is_seen(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "_written", lambda figure, path: drawn.append(figure))
    for key in ("loss", "eval_loss"):
        curves.plot_metrics(tmp_path, [{"iteration": 9, key: 0.7}])
        assert drawn[-1].axes[0].lines[0].get_marker() in ("s", "o")
        kind = "training" if key == "loss" else "validation"
        assert drawn[-1].axes[0].get_legend().get_texts()[0].get_text() == f"loss, {kind}"


def test_runs_of_any_name_are_in_the_legend(tmp_path, monkeypatch):
    drawn, runs = [], {}
    monkeypatch.setattr(curves, "_written", lambda figure, path: drawn.append(figure))
    folders = [tmp_path / name for name in ("_under", "cost $x^$", "only validations")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        key = "eval_loss" if i == 2 else "loss"
        runs[folder] = [{"iteration": 1, key: 0.7}]
        (folder / "adapter_config.json").write_text(json.dumps({f"a key of some length {j}": i for j in range(9)}))
    curves.plot_runs(runs)
    drawn[0].canvas.draw()
    assert curves.differences(folders[:2]) == [
        f"{folder}: " + ", ".join(f"a key of some length {j} {i}" for j in range(9))
        for i, folder in enumerate(folders[:2])
    ]
    assert curves.differences(folders[:1]) == [str(folders[0])]
    assert drawn[0].legends[0].get_title().get_text() == "lines, squares: training; circles: valid"
    assert [line.get_marker() for line in drawn[0].axes[0].lines] == ["s", "s", "o"]
    texts = [text.get_text().replace("\n", " ") for text in drawn[0].legends[0].get_texts()]
    assert all(text.startswith(str(folder)) for text, folder in zip(texts, folders, strict=True))
    width = drawn[0].legends[0].get_window_extent().width
    assert width < drawn[0].bbox.width


def test_a_card_tells_a_schedule_and_a_command_that_a_shell_reads(run, tmp_path):
    schedule = {"name": "cosine_decay", "arguments": [5e-4, 900], "warmup": 2}
    config = run.config | {"model": str(tmp_path / "my model's"), "lr_schedule": schedule}
    write_card(tmp_path, config, preference_loss("dpo"), [])
    text = (tmp_path / "README.md").read_text()
    assert "| lr_schedule | {'name': 'cosine_decay', 'arguments': [0.0005, 900], 'warmup': 2} |" in text
    command = re.search(r"^mlx_lm.generate .*$", text, re.MULTILINE)[0]
    assert shlex.split(command)[1:3] == ["--model", "my model's"]


def test_a_folder_with_the_form_of_a_hub_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shared_name("models/tiny") == "models/tiny"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert shared_name("models/tiny") == "tiny"


def test_the_best_validation_is_the_one_that_save_best_asks_for():
    figures = [(0.5, 0.9, 0.3), (0.4, 0.8, 0.6), (0.45, 0.7, 0.7)]
    names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    lines = [dict(zip(names, row, strict=True)) for row in figures] + [{"eval_loss": None}]
    for by, place in ((None, 1), ("eval_loss", 1), ("accuracy", 0), ("margin", 2)):
        assert best_of(lines, by) == (lines[place], lines[2]), by
    assert best_of([], "margin") == (None, None)
