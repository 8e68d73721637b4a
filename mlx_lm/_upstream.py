"""Run upstream mlx-lm's module of the same name in the caller's namespace.

This folder is laid over the installed mlx-lm: a module that stands here first runs upstream's module
of its name, so that upstream's names exist once, here, and then adds to them. Nothing of upstream is
copied, and nothing relies on its source text or line positions.
"""

import re
import sys
import types
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

SUPPORTED = "mlx-lm >= 0.32.0, < 0.33"
OLDEST, TOO_NEW = (0, 32), (0, 33)
# Releases that have every name that is asked for here.
TRIED = ("0.32.0", "0.32.1", "0.32.2")


class UpstreamError(ImportError):
    """mlx-lm, or what it runs on, is missing, too old, or lacks a name that this project builds on."""


def run_upstream(namespace, needs=()):
    """Execute upstream's module of the caller's name in `namespace`, the caller's `globals()`.

    For a package it also joins upstream's folder to the caller's, so that a module which does not
    stand here is upstream's.

    Args:
        namespace: the calling module's `globals()`; upstream's names are defined in it.
        needs: names that the caller builds on; an upstream version without one of them is refused.

    Raises:
        UpstreamError: mlx-lm is not installed, or is a version that is too old or lacks the module or a needed name. A
            command ends with the sentence instead.
    """
    spec = namespace["__spec__"]
    upstream = _find_upstream(spec.name)
    if upstream is None:
        _refuse(f"has no module {spec.name}")
    if "__path__" in namespace:
        namespace["__path__"] = [*namespace["__path__"], *upstream.submodule_search_locations]
    if spec.name == "mlx_lm" and _release(_version()) < OLDEST:
        _refuse()
    code = upstream.loader.get_code(spec.name)
    # `python -m mlx_lm.lora` runs the caller as __main__: upstream's own __main__ guard must stay shut,
    # and whoever imports the module by its name must get this very one.
    name, namespace["__name__"] = namespace["__name__"], spec.name
    sys.modules.setdefault(spec.name, sys.modules[name])
    try:
        exec(code, namespace)
    except UpstreamError:
        raise
    except ImportError as error:
        _explain(error)
        raise
    finally:
        namespace["__name__"] = name
    missing = [need for need in needs if need not in namespace]
    if missing:
        _refuse(f"lacks {', '.join(missing)} in {spec.name}")


def stand_aside(namespace):
    """Make the calling package upstream's, without the overlay; `UpstreamError` where mlx-lm is not installed."""
    spec = _find_upstream("mlx_lm")
    if spec is None:
        _refuse()
    namespace["__path__"] = list(spec.submodule_search_locations)
    namespace.update(__spec__=spec, __file__=spec.origin)
    sys.modules.pop(__name__, None)
    exec(spec.loader.get_code("mlx_lm"), namespace)


def rebound(function, **names):
    """A copy of `function` that reads `names` in place of its module's globals of those names.

    It hands our parts to an upstream function that looks its own up in its module, and leaves the
    function itself as it is for everyone else.
    """
    unknown = set(names) - set(function.__code__.co_names)
    if unknown:
        _refuse(f"lacks {', '.join(sorted(unknown))} in {function.__module__}.{function.__name__}")
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _find_upstream(name):
    """The import spec of upstream's module of this name, or None."""
    package = name.rpartition(".")[0]
    if package:
        package = sys.modules[package]
        folders = [folder for folder in package.__path__ if folder not in package.__spec__.submodule_search_locations]
    else:
        # A checkout's overlay and an installed one may both be on the path: neither is upstream.
        folders = [entry for entry in sys.path if not _is_overlay(Path(entry, name))]
    spec = PathFinder.find_spec(name, folders)
    if _has_code(spec):
        return spec
    # An editable installation of mlx-lm may be known to an import hook alone.
    hooks = [] if package else [hook for hook in sys.meta_path if hook is not PathFinder and hasattr(hook, "find_spec")]
    for spec in (hook.find_spec(name, None) for hook in hooks):
        if _has_code(spec) and not _is_overlay(Path(spec.origin).parent):
            return spec
    return None


def _is_overlay(package):
    return Path(package, "_upstream.py").is_file()


def _has_code(spec):
    return spec is not None and hasattr(spec.loader, "get_code")


def _version():
    """The version that upstream's own files state (its metadata may be another's), or None."""
    try:
        return import_module("mlx_lm._version").__version__
    except (ImportError, AttributeError):
        return None


def _release(version):
    """Major and minor number; of a version that cannot be read, those of one too new, where names decide."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return tuple(map(int, numbers.groups())) if numbers else TOO_NEW


def _explain(error):
    """Say what to install where that is what an import error of upstream's comes down to."""
    package = (error.name or "").partition(".")[0]
    if package == "mlx_lm" and _release(_version()) >= TOO_NEW:
        _refuse(f"could not be imported ({error})", error)
    if sys.platform == "linux" and "mlx" in (package, Path(error.path or "").parent.name):
        if "libcuda.so" in str(error):
            _stop(
                f"MLX could not be imported ({error}): its CUDA package needs NVIDIA's driver, 580 or later for cuda13 "
                "and 550 for cuda12; without such a GPU, uninstall that package and install mlx[cpu].",
                error,
            )
        _stop(
            f"MLX could not be imported ({error}): on Linux it needs a backend, which mlx[cpu] installs, "
            "or mlx[cuda13] or mlx[cuda12] for an NVIDIA GPU.",
            error,
        )


def _refuse(lacks="", cause=None):
    """Say what the installed mlx-lm lacks, and which releases have it; by default, that it is missing or too old."""
    found = _version()
    if found is None and _find_upstream("mlx_lm") is None:
        _stop(f"mlx-lm is not installed: this project adds preference training to {SUPPORTED}; install one of those.")
    told = f"This project adds preference training to {SUPPORTED}; the installed mlx-lm {found or ''}".rstrip()
    if not lacks:
        _stop(f"{told} is too old: install one of those.")
    published = f"The releases {', '.join(TRIED)}, as published, have all that is needed"
    _stop(f"{told} {lacks}. {published}: install one of those, with --force-reinstall.", cause)


def _stop(sentence, cause=None):
    """End a command with the sentence alone; elsewhere raise it."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = Path(next(iter(getattr(sys, "argv", [])), "")).name
    if program.startswith("mlx_lm") or (main is not None and main.name.partition(".")[0] == "mlx_lm"):
        sys.exit(sentence)
    # `python -m mlx_lm.lora` imports the package before it becomes the program: given this name, runpy
    # prints the sentence without a traceback.
    raise UpstreamError(sentence, name="mlx_lm") from cause
