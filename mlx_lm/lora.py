"""Adds to mlx_lm.lora: preference options, their checks, and what a preference run does."""

import json
import sys
from pathlib import Path

from ._blas import hint
from ._upstream import rebound, run_upstream

run_upstream(
    globals(),
    needs=("CONFIG_DEFAULTS", "build_parser", "train_model", "evaluate_model", "run", "main", "load", "load_adapters"),
)

from functools import partial

from .tuner.checkpoint import check_adapter, first_line
from .tuner.config import check_config, known_keys, warn_of_unread_keys
from .tuner.losses import OPTIONS as LOSS_OPTIONS
from .tuner.options import RUN_OPTIONS, ConfigError, is_preference
from .tuner.preference import DEFAULTS, evaluated_rows, loss_of, reference_of

_upstream_build_parser = build_parser
_upstream_train_model, _upstream_evaluate_model = train_model, evaluate_model
_upstream_run, _upstream_main = run, main

CONFIG_DEFAULTS |= DEFAULTS


def build_parser():
    """Upstream's parser with a flag for each preference option."""
    parser = _upstream_build_parser()
    # Upstream's default of this flag would hide the configuration file's value.
    parser.set_defaults(clear_cache_threshold=None)
    group = parser.add_argument_group("preference training", "with a loss_type other than sft")
    for option in LOSS_OPTIONS + RUN_OPTIONS:
        group.add_argument(option.flag, **option.argument())
    return parser


def training_args(args, adapter_file):
    """`TrainingArgs` of a run's configuration.

    Args:
        args: the run's configuration, a namespace with CONFIG_DEFAULTS' keys.
        adapter_file: path of `adapters.safetensors`.
    """
    same = ("batch_size", "iters", "val_batches", "steps_per_report", "steps_per_eval", "max_seq_length", "seed")
    same += ("grad_checkpoint", "grad_accumulation_steps", "clear_cache_threshold")
    options = {option.name: getattr(args, option.name) for option in LOSS_OPTIONS + RUN_OPTIONS}
    return TrainingArgs(
        **{name: getattr(args, name) for name in same},
        steps_per_save=args.save_every,
        adapter_file=adapter_file,
        **options,
    )


def train_model(args, model, train_set, valid_set, training_callback=None, test_set=()):
    """Make the adapters and train them, as upstream's function of this name; with a preference loss, on pairs.

    Args:
        args, model, train_set, valid_set, training_callback: as upstream's.
        test_set: pairs that will be evaluated afterwards: their reference logps are taken before the first update.

    Returns:
        The reference logps of the test set's rows `(n, 2, 2)`, or None.
    """
    if not is_preference(args.loss_type):
        return _upstream_train_model(args, model, train_set, valid_set, training_callback)
    if args.num_layers > len(model.layers):
        raise ConfigError(
            f"num_layers is {args.num_layers}, but the model has {len(model.layers)} layers; -1 takes them all."
        )
    if args.fine_tune_type == "full" and args.resume_adapter_file is not None:
        check_adapter(model, args.resume_adapter_file)
    config, test_logps = {}, None

    def train_from_reference(model, args, optimizer, train_dataset, val_dataset, training_callback):
        nonlocal test_logps
        # Resolved here, so that the file says what the run does.
        config.update(loss_of(args).parameters)
        reference = reference_of(model, args) if loss_of(args).needs_reference else None
        if reference is not None and len(test_set):
            test_logps = reference.logps(test_set, evaluated_rows(test_set, args.batch_size, test_batches))
        train(
            model,
            optimizer,
            train_dataset,
            val_dataset,
            args,
            training_callback=training_callback,
            reference=reference,
            config=config,
        )

    test_batches = args.test_batches
    run_training = rebound(
        _upstream_train_model,
        train=train_from_reference,
        TrainingArgs=lambda adapter_file, **_: training_args(args, adapter_file),
        # The configuration is saved with the first adapters: until then the ones there keep their own.
        save_config=lambda values, _: config.update(values),
        CacheDataset=lambda dataset: dataset,
        linear_to_lora_layers=partial(_add_adapters, args.resume_adapter_file),
    )
    run_training(args, model, train_set, valid_set, training_callback)
    return test_logps


def _add_adapters(resume_adapter_file, model, *args, **kwargs):
    linear_to_lora_layers(model, *args, **kwargs)
    if resume_adapter_file is not None:
        check_adapter(model, resume_adapter_file)


def evaluate_model(args, model, test_set, reference=None):
    """Print the test set's loss, and with a preference loss rewards, accuracy and margin.

    Args:
        args, model, test_set: as upstream's.
        reference: with a preference loss, a `Reference` or its logps of the test set's rows.
    """
    if not is_preference(args.loss_type):
        return _upstream_evaluate_model(args, model, test_set)
    rows = evaluated_rows(test_set, args.batch_size, args.test_batches)
    figures = evaluate(
        model=model,
        dataset=test_set,
        batch_size=args.batch_size,
        num_batches=args.test_batches,
        args=training_args(args, None),
        reference=reference,
    )
    rprint(
        f"Test loss {figures['loss']:.3f}, reward accuracy {figures['rewards/accuracies']:.3f}, "
        f"margin {figures['rewards/margins']:+.3f}, chosen {figures['rewards/chosen']:+.3f}, "
        f"rejected {figures['rewards/rejected']:+.3f} ({len(rows)} pairs)."
    )
    return figures


def run(args, training_callback=None):
    """Run what a configuration asks for.

    Args:
        args: a namespace with CONFIG_DEFAULTS' keys.
        training_callback: receives the reports, after those that `report_to` names.

    Raises:
        ConfigError: a user's mistake; nothing saved before is touched.
    """
    warn_of_unread_keys(args, known_keys(build_parser(), CONFIG_DEFAULTS))
    if not is_preference(args.loss_type):
        return _upstream_run(args, training_callback)
    check_config(args)
    if (slow_blas := hint()) is not None:
        rprint(slow_blas)
    np.random.seed(args.seed)
    training_callback = _callbacks(args) or training_callback
    rprint("Loading pretrained model")
    model, tokenizer = _load_model(args)
    rprint("Loading datasets")
    train_set, valid_set, test_set = load_dataset(args, tokenizer)
    reference = None
    if args.train:
        rprint("Training")
        reference = train_model(args, model, train_set, valid_set, training_callback, test_set if args.test else ())
    elif args.adapter_path != "":
        reference = _adopt_adapters(args, model, test_set)
    if args.test:
        rprint("Testing")
        evaluate_model(args, model, test_set, reference)


def _callbacks(args):
    try:
        return get_reporting_callbacks(
            args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=vars(args)
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"report_to is {args.report_to!r}: {first_line(error)}") from error


def _load_model(args, adapter_path=None):
    try:
        return load(
            args.model,
            tokenizer_config={"trust_remote_code": args.trust_remote_code},
            trust_remote_code=args.trust_remote_code,
            adapter_path=adapter_path,
        )
    except Exception as error:
        # A folder that is no model fails in as many ways as there are files in it.
        raise ConfigError(
            f"the model {args.model!r} cannot be loaded: {first_line(error)} Give a folder with config.json, "
            "safetensors weights and a tokenizer, or a repo of the Hugging Face hub that is reachable."
        ) from error


def _adopt_adapters(args, model, test_set):
    """Put the trained adapters on `model` for a test without training.

    Returns:
        The reference logps of the test set's rows, taken of the policy that the adapters were trained from.
    """
    saved = Path(args.adapter_path) / "adapter_config.json"
    try:
        config = json.loads(saved.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"adapter_path is {args.adapter_path!r}, but {saved} cannot be read: {error}.") from error
    logps = None
    if loss_of(training_args(args, None)).needs_reference:
        start = args.resume_adapter_file or config.get("resume_adapter_file")
        args.reference_model = args.reference_model or config.get("reference_model")
        base = model
        if start is not None and args.reference_model is None:
            base, _ = _load_model(args)
            _load_adapters(base, args.adapter_path)
            check_adapter(base, start)
            base.load_weights(start, strict=False)
        reference = reference_of(base, training_args(args, None))
        logps = reference.logps(test_set, evaluated_rows(test_set, args.batch_size, args.test_batches))
    _load_adapters(model, args.adapter_path)
    return logps


def _load_adapters(model, adapter_path):
    try:
        load_adapters(model, adapter_path)
    except (FileNotFoundError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"the adapters in {adapter_path} cannot be loaded: {' '.join(str(error).split())}") from error


def main():
    """The command: a user's mistake is told in one sentence, with exit status 2."""
    try:
        _upstream_main()
    except ConfigError as error:
        sys.exit(_told(error))
    except yaml.YAMLError as error:
        sys.exit(_told(f"the configuration file is not YAML: {' '.join(str(error).split())}"))


def _told(error):
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
