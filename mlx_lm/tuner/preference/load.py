"""Loading the models and adapters that a configuration names, with every failure told in one sentence."""

import json
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..._backend import is_linux_cpu
from ...cli_ui import rprint
from ..utils import linear_to_lora_layers
from .check import check_is_file, check_lora, holds_preferences
from .files import ADAPTERS_FILE, CONFIG_FILE, read_config
from .intercept import evaluating
from .layers import is_float32
from .loss_table import ALIASES, LOSS_DEFAULTS, LOSS_OPTIONS
from .options import ConfigError, first_line, is_preference, nearest, printable

TRAINED_WITH = "use the fine_tune_type, num_layers and lora_parameters that it was trained with"
HOLDS = "a model's folder holds config.json, weights in model*.safetensors, and a tokenizer"
NOT_THERE = "there is no such folder, and the hub's repo of this name cannot be had"


def load_named(key, name, trust_remote_code=False):
    """`(model, tokenizer)` of the model that the configuration's `key` names.

    On a Linux CPU a half-precision model comes in float32: MLX's half-precision products are ten times slower
    there, and more on long sequences.

    Raises:
        ConfigError: whatever is wrong with the folder or the repo.
    """
    from ...utils import load

    trusted = {"trust_remote_code": trust_remote_code}
    try:
        model, tokenizer = load(name, tokenizer_config=dict(trusted), **trusted)
        if is_linux_cpu() and not is_float32(model):
            rprint(f"{name} is computed in float32 on this CPU, which is slow in half precision.")
            model.set_dtype(mx.float32)
        if tokenizer is not None:
            tokenizer.encode("a")
        mx.eval(model(mx.zeros((1, 1), mx.int32)))
    except Exception as error:
        # A folder that is no model fails in as many ways as there are files in it.
        expected = HOLDS if Path(name).exists() else NOT_THERE
        raise ConfigError(f"{key} is {name!r}, which cannot be loaded: {expected} ({_told(error)}).") from error
    return model, tokenizer


def _told(error):
    """An exception's message on one line, without a full stop."""
    told = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
    return f"{told} is missing" if isinstance(error, KeyError) else told


def check_tokens(model, datasets, key):
    """Check that the model that `key` names knows every token of the data; warn of pairs longer than it was made for.

    Raises:
        ConfigError: a token id is beyond the model's vocabulary: MLX would read some other memory there.
    """
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    rows = max((module.weight.shape[0] for module in model.modules() if isinstance(module, kinds)), default=None)
    highest = max(max(map(max, pair[:3])) for dataset in datasets for pair in dataset)
    if rows is not None and highest >= rows:
        raise ConfigError(
            f"the data's tokens go up to id {highest}, but the model that {key} names has {rows}: "
            "the tokenizer is another model's."
        )
    longest = max(len(pair[0]) + max(map(len, pair[1:3])) for dataset in datasets for pair in dataset)
    most = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        rprint(
            f"[WARNING] Pairs are up to {longest} tokens long, and the model that {key} names was made for {most}; "
            "lower max_seq_length.",
            file=sys.stderr,
        )


def check_same_tokens(tokenizer, other, name):
    """Raise `ConfigError` where a token has another id in a reference model's tokenizer, `other`."""
    ids, theirs = tokenizer.get_vocab(), other.get_vocab()
    if differing := [token for token, number in ids.items() if theirs.get(token, number) != number]:
        # Vocabularies come in no order: the first by its number is the same at every run.
        token = min(differing, key=ids.get)
        raise ConfigError(
            f"reference_model is {name!r}, where the token {token!r} is {theirs[token]}; in the model it is "
            f"{ids[token]}: reference and model must share one vocabulary."
        )


def add_adapters(resume_adapter_file, model, num_layers, parameters, use_dora=False):
    """As upstream's `linear_to_lora_layers`, with what it takes and what `resume_adapter_file` holds checked.

    Raises:
        ConfigError: a key of the parameters names no layer, an adapter cannot be where it is to be, or the file does
            not fit.
    """
    names = {name for layer in model.layers for name, _ in layer.named_modules()}
    names |= {name for name, _ in model.named_modules()}
    for key in parameters.get("keys") or ():
        if key not in names:
            raise ConfigError(
                f"lora_parameters.keys has {key}{nearest(key, names)}, and this model has no module of that name."
            )
    try:
        linear_to_lora_layers(model, num_layers, parameters, use_dora)
        # A layer whose weight a model reads without calling it, and DoRA of a packed embedding, fail only then.
        with evaluating(model):
            model(mx.zeros((1, 1), mx.int32))
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        kind = "DoRA" if use_dora else "LoRA"
        at = next((f" ({name})" for name, module in model.named_modules() if module is getattr(error, "obj", None)), "")
        raise ConfigError(
            f"this model cannot be given {kind} adapters with these lora_parameters: {_told(error)}{at}; "
            "name layers that can have one in lora_parameters.keys."
        ) from error
    if resume_adapter_file is not None:
        check_adapter(model, resume_adapter_file)
        _warn_of_scale(Path(resume_adapter_file), parameters["scale"])


def check_adapter(model, path, key="resume_adapter_file", advice=TRAINED_WITH):
    """Raise `ConfigError` where the file at `path`, which `key` names, is missing, damaged or not the model's."""
    check_is_file(path, key)
    try:
        weights = mx.load(str(path))
        if not isinstance(weights, dict) or not weights:
            raise ValueError("it holds no named weights")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{key} {path} cannot be read: {first_line(error)}.") from error
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    for name, value in weights.items():
        if shapes.get(name) != value.shape:
            raise ConfigError(
                f"{key} {path} has {name} of shape {value.shape}, where this model has {shapes.get(name, 'none')}; "
                f"{advice}."
            )


def _warn_of_scale(file, scale):
    """LoRA's scale is not in its weights: an adapter with another one acts more or less than it was trained to."""
    parameters = read_config(file.parent).get("lora_parameters")
    was = parameters.get("scale", scale) if isinstance(parameters, dict) else scale
    if was != scale:
        rprint(
            f"[WARNING] resume_adapter_file {file} was trained with a scale of {printable(str(was))}, and "
            f"lora_parameters.scale is {scale}: the adapter's effect is not what it was.",
            file=sys.stderr,
        )


def check_trainable(model):
    """Raise `ConfigError` where a model has nothing to train, or quantized weights, which have no gradient."""
    trainable = [value for _, value in tree_flatten(model.trainable_parameters())]
    if not trainable:
        raise ConfigError(
            "there is nothing to train in the model's layers: the last ones, which num_layers counts, have no module "
            "for an adapter, or none that lora_parameters.keys names; raise num_layers or name others (in Python "
            "freeze, then linear_to_lora_layers)."
        )
    if not all(mx.issubdtype(value.dtype, mx.floating) for value in trainable):
        raise ConfigError(
            "the weights to train are quantized, which cannot be trained; use fine_tune_type lora or dora (in Python "
            "freeze, then linear_to_lora_layers), or a model that is not quantized."
        )


def warn_of_rounding(model):
    """Say so where what is trained is in half precision, which rounds small updates away."""
    halves = {x.dtype for _, x in tree_flatten(model.trainable_parameters())} & {mx.bfloat16, mx.float16}
    for dtype in sorted(str(dtype).rpartition(".")[2] for dtype in halves):
        rprint(
            f"[WARNING] The weights to train are {dtype}: an update that is smaller than some "
            f"1/{256 if dtype == 'bfloat16' else 2048} of its weight is rounded away, as are most at the usual "
            "learning rates. Train float32 ones: with fine_tune_type full convert the model (mlx_lm convert --dtype "
            "float32) or use lora, with an adapter convert resume_adapter_file.",
            file=sys.stderr,
        )


def is_none(path):
    """Whether a path names nothing: no adapters but the model itself, or no cache."""
    return path in (None, "", "none", "None")


def read_adapter_config(adapter_path, key="adapter_path"):
    """The `adapter_config.json` in a folder, or beside a file, that `key` names; `ConfigError` where there is none."""
    path = (Path(adapter_path).parent if Path(adapter_path).is_file() else Path(adapter_path)) / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not {"num_layers", "lora_parameters"} <= set(config):
            raise ValueError("it does not hold num_layers and lora_parameters")
        if config.get("fine_tune_type") != "full":
            check_lora(config["lora_parameters"])
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(
            f"{key} is {str(adapter_path)!r}, whose {path.name} cannot be used ({reason}); give a folder with "
            f"{ADAPTERS_FILE} and the {CONFIG_FILE} of its training, a file beside such a configuration, or "
            "none for the model itself."
        ) from error
    return config


def adopt_loss(args):
    """Give a test without training the loss that the adapters were trained with, as far as `args` name no other.

    The options of the loss are changed in place, before their check.
    """
    # What is given to compare in another form is told by its check.
    paths = args.compare if isinstance(args.compare, list) else [] if args.compare else [args.adapter_path]
    if (args.train and not args.compare) or not (args.test or args.compare):
        return
    configs, key = {}, "compare" if args.compare else "adapter_path"
    for path in paths:
        try:
            configs[path] = {} if is_none(path) else read_adapter_config(os.path.expanduser(str(path)), key)
        except ConfigError:
            # Without preferences it is upstream's to tell.
            if args.compare or (args.loss_type is None and holds_preferences(str(args.data))):
                raise
    path, config = next(((p, c) for p, c in configs.items() if is_preference(c.get("loss_type"))), (None, {}))
    if not config or (args.loss_type is not None and _names(args.loss_type) != _names(config["loss_type"])):
        return
    names = [option.name for option in LOSS_OPTIONS if getattr(args, option.name) is None]
    adopted = {name: config[name] for name in names if config.get(name) is not None}
    vars(args).update(adopted)
    if told := [f"{name} {value}" for name, value in adopted.items() if value != LOSS_DEFAULTS.get(name)]:
        rprint(printable(f"As the adapters {path} were trained: {', '.join(told)}."))


def tell_other_loss(path, config, loss, batch_size):
    """Say so where the adapters at `path`, trained with `config`, are tested with another loss or other parameters.

    So is a `batch_size`, in pairs, of a loss whose values depend on the batch.
    """
    trained = _names(config.get("loss_type"))
    told = [f"loss_type {', '.join(map(str, trained))}"] if trained not in ([None], _names(list(loss.names))) else []
    told += [f"{name} {config[name]}" for name, own in loss.parameters.items() if config.get(name) not in (None, own)]
    if loss.reads_batch and config.get("batch_size") not in (None, batch_size):
        told.append(f"batch_size {config['batch_size']}")
    if told:
        rprint(printable(f"The adapters {path} were trained with {', '.join(told)}, and are tested otherwise."))


def compared_origin(args, loss):
    """The `adapter_config.json` of the training whose reference the two adapters in `args.compare` are scored against.

    It is that of the first one that was trained on preferences, or else of the first one with any: figures against two
    references do not compare. Said where the other one was trained against another reference.
    """
    configs = {path: read_adapter_config(path, "compare") for path in args.compare if not is_none(path)}
    trained = [path for path, config in configs.items() if is_preference(config.get("loss_type"))]
    path = next(iter([*trained, *configs]), None)
    origin = configs.get(path, {})
    differ = len({_reference_of(configs.get(other, {})) for other in args.compare}) > 1
    if differ and loss.needs_reference and args.reference_model is None:
        against = _reference_of(origin) or "the model itself"
        rprint(printable(f"Both are scored against the reference of {path}: {against}."))
    return origin


def _reference_of(config):
    """What a training took as its reference besides the model itself: a model, or adapters, by name; or None."""
    return config.get("reference_model") or config.get("resume_adapter_file")


def _names(loss_type):
    names = loss_type if isinstance(loss_type, list) else [loss_type]
    return [ALIASES.get(name, name) if isinstance(name, str) else name for name in names]


def start_of(given, start):
    """The adapters that a test's training began with: `start`, or what is given where that has moved; None for none.

    Raises:
        ConfigError: a file is given, and the training began with none.
    """
    if given is None or (start is not None and Path(given).resolve() == Path(start).resolve()):
        return start
    if start is None:
        raise ConfigError(
            f"resume_adapter_file is {given}, and a test trains nothing that could go on from it; to test that file, "
            "give it as adapter_path."
        )
    if Path(start).is_file():
        rprint(printable(f"resume_adapter_file {given} is not read in a test: the training began with {start}."))
        return start
    told = f"The training began with {start}, which is not there: resume_adapter_file {given} is taken for it."
    rprint(printable(told))
    return given


def load_adapter(key, model, config, file):
    """Put a file's adapters or weights on `model` by their `config`; `ConfigError` names `key` if they do not fit."""
    kind = config.get("fine_tune_type")
    if kind != "full":
        try:
            add_adapters(None, model, config["num_layers"], config["lora_parameters"], kind == "dora")
        except ConfigError as error:
            raise ConfigError(f"{key} is {str(file)!r}, and by its adapter_config.json {error}") from error
    check_adapter(model, file, key, "the model, or what the adapter_config.json beside it says, is another one")
    model.load_weights(str(file), strict=False)
