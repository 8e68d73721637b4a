"""Adds to mlx_lm.lora: preference options, their checks, and what a preference run does."""

import re
import sys
from pathlib import Path

from . import _interruption
from ._backend import idle_gpu_hint, prepare_for_training, slow_blas_hint, unfit_gpu
from ._upstream import rebound, run_upstream

run_upstream(
    globals(),
    needs=("CONFIG_DEFAULTS", "build_parser", "train_model", "evaluate_model", "run", "main", "yaml", "yaml_loader"),
)

from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from io import StringIO
from signal import SIGINT
from types import SimpleNamespace

from rich.markup import escape

from ._version import __version__
from .tuner.callbacks import SUPPORT_CALLBACK, Services
from .tuner.preference import VERSION, workers
from .tuner.preference import load as loading
from .tuner.preference.attention import on_cuda
from .tuner.preference.batches import iterations
from .tuner.preference.check import (
    DEFAULTS,
    OPTIONS,
    check_config,
    check_file,
    holds_preferences,
    warn_of_ended_schedule,
    warn_of_unread_keys,
)
from .tuner.preference.checkpoint import starting_point
from .tuner.preference.commands import GIVEN, resume_command
from .tuner.preference.curves import Plot
from .tuner.preference.dry_run import NotMade, describe_data
from .tuner.preference.evaluation import evaluated_rows
from .tuner.preference.files import ADAPTERS_FILE
from .tuner.preference.from_trl import FromTrl
from .tuner.preference.interruption import Interrupted, handled_signals
from .tuner.preference.logps import Scorer
from .tuner.preference.loss_table import LOSS_DEFAULTS, describe_losses
from .tuner.preference.memory import LESS
from .tuner.preference.objective import loss_of, objective_of
from .tuner.preference.options import GROUPS, UPSTREAM_GROUP, ConfigError, first_line, is_preference, of_flag, size
from .tuner.preference.outcome import print_closing
from .tuner.preference.reference import Reference, reference_of
from .tuner.preference.run import check_and_digest, train_preference
from .tuner.preference.scores import compared, described, score, write_predictions

_upstream_build_parser = build_parser
_upstream_train_model, _upstream_evaluate_model = train_model, evaluate_model
_upstream_run, _upstream_main = run, main

VERSIONS = {"mlx": mx.__version__, "mlx_lm": __version__, "mlx_lm_dpo": VERSION}
CONFIG_DEFAULTS |= DEFAULTS


def build_parser():
    """Upstream's parser with a flag for each preference option, and its help in groups."""
    parser = _upstream_build_parser()
    # Upstream's defaults of these flags would hide the configuration file's values.
    parser.set_defaults(clear_cache_threshold=None, trust_remote_code=None)
    parser.usage = "%(prog)s [-h] [-c FILE] [--OPTION VALUE ...]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser._optionals.title = UPSTREAM_GROUP
    for key, title in GROUPS.items():
        group = parser.add_argument_group(title, describe_losses() if key == "loss" else None)
        for option in OPTIONS:
            if option.group == key:
                group.add_argument(option.flag, **option.argument())
                if option.words:
                    flag = option.flag.replace("--", "--no-", 1)
                    group.add_argument(flag, dest=option.name, action="store_false", default=None, help="The reverse.")
    flags = parser._option_string_actions
    flags["--clear-cache-threshold"].type = size
    flags["--report-to"].help = "Send reports to wandb, swanlab, tensorboard, several with commas, or none."
    # Both say how long to train, and a flag of one wins over the other in a file.
    flags["--iters"].type, flags["--epochs"].type = of_flag(int), of_flag(float)
    parser.add_argument("--no-train", dest="train", action="store_false", default=None, help="Only test.")
    parser.add_argument("--no-test", dest="test", action="store_false", default=None, help="Only train.")
    parser.add_argument(
        "--plot",
        action=Plot,
        default=argparse.SUPPRESS,
        nargs="+",
        metavar="FOLDER",
        help="Draw the curves of the run in FOLDER, or of several runs with what differs between them, and end.",
    )
    parser.add_argument(
        "--from-trl",
        action=FromTrl,
        const=yaml_loader,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="Print TRL's DPOConfig or KTOConfig in FILE (YAML or JSON) in this command's words, and end.",
    )
    return parser


def training_args(args, adapter_file):
    """`TrainingArgs` of a run's configuration."""
    known = {field.name: getattr(args, field.name) for field in fields(TrainingArgs) if hasattr(args, field.name)}
    return TrainingArgs(**known | {"steps_per_save": args.save_every, "adapter_file": adapter_file})


def train_model(args, model, train_set, valid_set, training_callback=None, test_set=(), tokenizer=None, loss=None):
    """Make the adapters and train them, as upstream's function of this name; with a preference loss, on pairs.

    Args:
        args, model, train_set, valid_set, training_callback: as upstream's.
        test_set: pairs that will be evaluated afterwards: their reference logps are taken before the first update.
        tokenizer: the model's, which a `reference_model`'s is compared with, or None.
        loss: the `PreferenceLoss` of `args`, where it is resolved already.

    Returns:
        With a preference loss `(objective, logps)`: the `Objective` that was trained, and the reference logps of the
        test set's rows `(n, 2, 2)`, or None.
    """
    if not is_preference(args.loss_type):
        return _upstream_train_model(args, model, train_set, valid_set, training_callback)
    if args.num_layers > len(model.layers):
        rprint(
            f"num_layers is {args.num_layers}, and the model has {len(model.layers)} layers: all of them are trained."
        )
        args.num_layers = len(model.layers)
    if args.epochs is not None:
        epochs, args.epochs = args.epochs, None
        args.iters = iterations(epochs, len(train_set), args.batch_size)
        rprint(f"{epochs:g} epochs of {len(train_set)} pairs are {args.iters} iterations.")
    warn_of_ended_schedule(args.lr_schedule, -(-args.iters // args.grad_accumulation_steps))
    if args.use_rslora:
        # alpha / sqrt(rank), where mlx-lm's scale is alpha / rank (arXiv 2312.03732). It is what is saved: plain mlx-lm
        # has to load the adapters with it.
        scale = args.lora_parameters["scale"] * math.sqrt(args.lora_parameters["rank"])
        args.use_rslora, args.lora_parameters = False, {**args.lora_parameters, "scale": scale}
    if args.fine_tune_type == "full" and args.resume_adapter_file is not None:
        loading.check_adapter(model, args.resume_adapter_file)
    loss = loss or loss_of(args)
    config, objective, logps = {}, None, None

    def train_from_reference(model, args, optimizer, train_dataset, val_dataset, training_callback):
        nonlocal objective, logps
        loading.check_trainable(model)
        loading.warn_of_rounding(model)
        # Resolved here, so that the file says what the run does.
        config.update(loss.parameters)
        losses = (
            f"{weight:g} {name}".removeprefix("1 ") for name, weight in zip(loss.names, loss.weights, strict=True)
        )
        parameters = loss.parameters.items()
        told = [f"{name} {value}" for name, value in parameters if name == "beta" or value != LOSS_DEFAULTS[name]]
        rprint(f"loss: {', '.join([' + '.join(losses), *told])}")
        objective = objective_of(model, args, loss)
        reference = None
        if loss.needs_reference:
            reference = _reference(command, objective.scorer, tokenizer, [train_dataset, val_dataset, test_set])
            if len(test_set) and not args.check:
                logps = _test_logps(reference, test_set, command)
        train_preference(objective, optimizer, train_dataset, val_dataset, args, reference, training_callback, config)

    command = args
    run_training = rebound(
        _upstream_train_model,
        train=train_from_reference,
        TrainingArgs=lambda adapter_file, **_: training_args(args, adapter_file),
        # The configuration is saved with the first adapters: until then the ones there keep their own.
        # It is the whole run's, so that a resumed one leaves the file of one that was not interrupted.
        save_config=lambda values, _: config.update(values, resume=False, versions=VERSIONS),
        CacheDataset=lambda dataset: dataset,
        **({"Path": NotMade} if args.check else {}),
        linear_to_lora_layers=partial(loading.add_adapters, args.resume_adapter_file),
        print_lora_run_header=_print_header,
    )
    run_training(args, model, train_set, valid_set, training_callback)
    return objective, logps


def _print_header(console, args):
    """Upstream's panel of a run, whose paths may hold what the console takes for markup."""
    named = {key: escape(str(getattr(args, key))) for key in ("model", "data")}
    print_lora_run_header(console, SimpleNamespace(**vars(args) | named))


def _reference(args, scorer, tokenizer, datasets):
    """The `Reference` that a run's configuration asks for, checked against the data that it will score."""
    reference = reference_of(scorer, args, tokenizer, args.trust_remote_code)
    if args.reference_model is not None:
        loading.check_tokens(reference.scorer.model, datasets, "reference_model")
    return reference


def _test_logps(reference, test_set, args):
    """The reference's logps of the test set's rows that will be scored."""
    # Before they are kept for later runs.
    workers.refuse_different_workers({"the reference model": partial(starting_point, reference.scorer.model)})
    return reference.logps(test_set, evaluated_rows(test_set, args.batch_size, args.test_batches), "test")


def evaluate_model(args, model, test_set, objective=None, reference=None, base=None):
    """Print the test set's loss, and with a preference loss what `scores.described` says; write `predictions`.

    Args:
        args, model, test_set: as upstream's.
        objective, reference: with a preference loss, what `train_model` returned.
        base: the reference's `Scorer`, by default the policy without its adapters.
    """
    if not is_preference(args.loss_type):
        return _upstream_evaluate_model(args, model, test_set)
    found = score(objective, test_set, args, reference, base)
    rprint(described(found))
    if args.predictions is not None:
        write_predictions(args.predictions, found)
        rprint(f"What each of the {len(found.places)} pairs was given is in {args.predictions}.")


def run(args, training_callback=None):
    """Run what a configuration, a namespace with CONFIG_DEFAULTS' keys, asks for.

    Raises:
        ConfigError: a user's mistake; nothing saved before is touched.
    """
    loading.adopt_loss(args)
    preference = is_preference(args.loss_type)
    if args.check and not preference:
        raise ConfigError(
            "check is a dry run of preference training, and loss_type is sft; set it, for example to dpo."
        )
    if preference:
        # First of all: joining and checks compute, and MLX reads these settings at its first computation.
        prepare_for_training()
        if on_cuda() and (told := unfit_gpu(mx.device_info())) is not None:
            raise ConfigError(told)
    workers.join(vars(args))
    warn_of_unread_keys(args, CONFIG_DEFAULTS, supervised=not preference)
    if preference:
        loss = check_config(args)
        if (idle_gpu := idle_gpu_hint()) is not None:
            rprint(idle_gpu)
        if not args.train and (slow_blas := slow_blas_hint()) is not None:
            rprint(slow_blas)  # training says it itself
        with handled_signals(), _told_plainly():
            _run(args, loss, training_callback)
    else:
        _run_supervised(args, training_callback)
    workers.leave()


def _run_supervised(args, training_callback):
    try:
        _upstream_run(args, training_callback)
    except ValueError as error:
        if not holds_preferences(args.data):
            raise
        raise ConfigError(
            f"the rows in {args.data} have chosen and rejected, which are for preference training, but loss_type "
            "is sft; set loss_type, for example to dpo."
        ) from error


def _run(args, loss, training_callback):
    np.random.seed(args.seed)
    # The first worker reports for all.
    reports = args.train and mx.distributed.init().rank() == 0
    training_callback = (_callbacks(args) if reports else None) or training_callback
    rprint("Loading pretrained model")
    model, tokenizer = _load_model(args)
    rprint("Loading datasets")
    train_set, valid_set, test_set = load_dataset(args, tokenizer)
    loading.check_tokens(model, [train_set, valid_set, test_set], "model")
    workers.refuse_different_workers({"the test data": partial(check_and_digest, test_set)})
    if args.check:
        describe_data({"train": train_set, "valid": valid_set, "test": test_set}, tokenizer)
    if args.compare:
        _compare(args, loss, model, tokenizer, test_set)
        return
    if args.train:
        rprint("Checking" if args.check else "Training")
        epochs = args.epochs
        scored = train_model(args, model, train_set, valid_set, training_callback, test_set, tokenizer, loss)
    else:
        scored = _adopt_adapters(args, loss, model, tokenizer, test_set)
    if args.test and not args.check:
        rprint("Testing")
        evaluate_model(args, model, test_set, *scored)
    if args.train and not args.check:
        print_closing(args, epochs)


def _compare(args, loss, model, tokenizer, test_set):
    """Test two adapters against one reference, and say whether they differ."""
    found, origin = [], loading.compared_origin(args, loss)
    for path in args.compare:
        model, args.adapter_path = model or _load_model(args)[0], path
        objective, *reference = _adopt_adapters(args, loss, model, tokenizer, test_set, origin)
        if not args.check:
            found.append(score(objective, test_set, args, *reference))
            rprint(f"{path or 'none'}: {described(found[-1])}")
        model = objective = reference = None
    if not args.check:
        rprint(compared([path or "none" for path in args.compare], found, loss))


@contextmanager
def _told_plainly():
    """Within the context, an interruption and an error of the system come with a sentence for the user.

    The latter are errors of files, and memory that does not suffice, for which MLX has no exception of its own, nor for
    macOS ending what keeps it from drawing.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        # A run that was saved at the signal says at which iteration.
        left = f"{error}. This goes on: {resume_command()}" if str(error) else "what was saved before is complete."
        raise Interrupted(getattr(error, "number", SIGINT), f"interrupted; {left}") from None
    except OSError as error:
        raise ConfigError(f"the run stopped ({first_line(error)}); files saved before are complete.") from error
    except (MemoryError, RuntimeError) as error:
        if "Impacting Interactivity" in str(error):
            raise ConfigError(
                f"macOS ended the GPU's work because it held up the screen ({first_line(error)}); turn the screen off "
                "while it trains, or start it with AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment, or take a "
                "smaller batch_size or max_seq_length. Files saved before are complete."
            ) from error
        if isinstance(error, RuntimeError) and not re.search("memory|alloc", str(error), re.IGNORECASE):
            raise
        raise ConfigError(
            f"memory does not suffice ({first_line(error)}); {LESS}. Files saved before are complete."
        ) from error


def _callbacks(args):
    if args.check:
        # Services are told of runs alone; that there are such may be checked.
        for name in filter(None, map(str.strip, (args.report_to or "").lower().split(","))):
            if name not in SUPPORT_CALLBACK or (name != "none" and find_spec(name) is None):
                told = f"report_to is {args.report_to!r}, and {name} is not installed, or none of"
                raise ConfigError(f"{told} {', '.join(SUPPORT_CALLBACK)}.")
        return None
    try:
        found = get_reporting_callbacks(
            args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=vars(args)
        )
        return found and Services(found)
    except Exception as error:
        # A service may refuse in any way.
        told = f"{first_line(error)}; it is a name or names with commas between: {', '.join(SUPPORT_CALLBACK)}"
        raise ConfigError(f"report_to is {args.report_to!r}, which cannot be used: {told}.") from error


def _load_model(args):
    return loading.load_named("model", args.model, args.trust_remote_code)


def _adopt_adapters(args, loss, model, tokenizer, test_set, origin=None):
    """Put the trained adapters on `model` for a test without training; none where `adapter_path` names none.

    Args:
        origin: the configuration of the training whose reference is taken, by default these adapters' own.

    Returns:
        `(objective, logps, base)`: the first two as `train_model`, the reference the policy that the adapters were
        trained from, and that policy's `Scorer`, None where it is the model without its adapters.
    """
    config = {} if loading.is_none(args.adapter_path) else loading.read_adapter_config(args.adapter_path)
    origin = config if origin is None else origin
    start = loading.start_of(args.resume_adapter_file, origin.get("resume_adapter_file"))
    loading.tell_other_loss(args.adapter_path, config, loss, args.batch_size)
    args = SimpleNamespace(**vars(args) | {"reference_model": args.reference_model or origin.get("reference_model")})
    base, logps = model, None
    if args.reference_model is None and (start is not None or config.get("fine_tune_type") == "full"):
        base, _ = _load_model(args)
        if start is not None:
            loading.load_adapter("resume_adapter_file of the training", base, origin, start)
    scorer = Scorer(base, args.share_prompt)
    if loss.needs_reference:
        reference = _reference(args, scorer, tokenizer, [test_set])
        scorer = reference.scorer
        # Of a dry run one pair, which tells whether they are finite; none is kept.
        logps = Reference(scorer).logps(test_set, [0]) if args.check else _test_logps(reference, test_set, args)
    if config:
        path = Path(args.adapter_path)
        loading.load_adapter("adapter_path", model, config, path if path.is_file() else path / ADAPTERS_FILE)
    workers.refuse_different_workers({"the model or the adapter to test": partial(starting_point, model)})
    return objective_of(model, args, loss), logps, None if scorer.model is model else scorer


def main():
    """The command: a user's mistake is told in one sentence, with exit status 2; an interruption ends with 130."""
    _interruption.restore()
    GIVEN[:] = sys.argv[1:]
    try:
        workers.find_others()
        config = build_parser().parse_args().config
        begin = _upstream_main
        if config:
            # Read once: a pipe, such as a shell's <(...), has nothing more to give.
            text = check_file(config, yaml_loader)
            begin = rebound(begin, open=lambda *_: StringIO(text))
        begin()
    except ConfigError as error:
        sys.exit(workers.tell(f"error: {error}", 2))
    except yaml.YAMLError as error:
        sys.exit(workers.tell(f"error: the configuration file cannot be read: {' '.join(str(error).split())}.", 2))
    except KeyboardInterrupt as error:
        sys.exit(workers.tell(str(error) or "interrupted.", getattr(error, "status", 130)))
    except SystemExit as stop:
        if stop.code:
            workers.tell(None, 2)  # the parser has told it
        raise
    except RuntimeError:
        if not workers.is_over():
            raise
        sys.exit(workers.tell("", workers.STATUS))


if __name__ == "__main__":
    main()
