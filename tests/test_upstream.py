"""The overlay's machinery: one identity for every upstream name, clear refusals, upstream's own tests.

Most tests lay a small overlay (the real `_upstream.py` with modules made here) over a small package that plays
upstream, so that a case takes a tenth of a second and versions that do not exist can be tried.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mlx_lm
import mlx_lm.lora
from mlx_lm import _upstream

ROOT = Path(__file__).resolve().parent.parent

UPSTREAM = {
    "__init__.py": "from .utils import load\nfrom .caller import generate\n",
    "_version.py": '__version__ = "0.32.1"\n',
    "utils.py": (
        "def load():\n    return 'upstream'\n\n\ndef call_load():\n    return load()\n\n\nclass Kept:\n    pass\n"
    ),
    "caller.py": "from .utils import load, Kept\n\n\ndef generate():\n    return load()\n",
    "lora.py": (
        "from .utils import Kept\n\n\ndef build_parser():\n    pass\n\n\n"
        "if __name__ == '__main__':\n    print('upstream ran')\n"
    ),
    "__main__.py": "from .lora import build_parser\nprint('package ran')\n",
    "tuner/__init__.py": "from .parts import part\n",
    "tuner/parts.py": "def part():\n    return 'upstream part'\n",
    "tuner/other.py": "from .parts import part\n",
}

OVERLAY = {
    "__init__.py": "from ._upstream import run_upstream\n\nrun_upstream(globals(), needs=('load', 'generate'))\n",
    "utils.py": (
        "from ._upstream import run_upstream\n\nrun_upstream(globals(), needs=('load', 'Kept'))\n\n\n"
        "def load():\n    return 'ours'\n\n\ndef added():\n    return 'added'\n"
    ),
    "lora.py": (
        "import sys\n\nfrom ._upstream import run_upstream\n\nrun_upstream(globals(), needs=('build_parser',))\n\n"
        "if __name__ == '__main__':\n    print('ours ran', sys.modules['mlx_lm.lora'] is sys.modules['__main__'])\n"
    ),
    "tuner/__init__.py": "from .._upstream import run_upstream\n\nrun_upstream(globals(), needs=('part',))\n",
    "tuner/parts.py": (
        "from .._upstream import run_upstream\n\nrun_upstream(globals())\n\n\ndef part():\n    return 'our part'\n"
    ),
}


class House:
    """An overlay and an upstream, each in a folder of its own, and a Python that has them on its path."""

    def __init__(self, folder):
        self.overlay, self.upstream, self.elsewhere = (folder / name for name in ("overlay", "upstream", "elsewhere"))
        self.elsewhere.mkdir()
        self.variables = {}
        for place, files in ((self.overlay, OVERLAY), (self.upstream, UPSTREAM)):
            for name, text in files.items():
                self.write(place, name, text)
        shutil.copy(ROOT / "mlx_lm/_upstream.py", self.overlay / "mlx_lm")

    def write(self, place, name, text):
        file = place / "mlx_lm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(self, *arguments, path=None):
        """Run Python, without the path files of the environment, with the folders of `path` on its path."""
        path = [self.overlay, self.upstream] if path is None else path
        environment = {**os.environ, **self.variables, "PYTHONPATH": os.pathsep.join(map(str, path))}
        return subprocess.run(
            [sys.executable, "-S", *arguments], cwd=self.elsewhere, env=environment, capture_output=True, text=True
        )

    def say(self, code, **options):
        """What a program prints, without its last line's end."""
        done = self.run("-c", code, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def test_what_we_do_not_have_is_upstreams(house):
    assert house.say("import mlx_lm.caller; print(mlx_lm.caller.__file__)").startswith(str(house.upstream))
    assert house.say("import mlx_lm.tuner.other as m; print(m.__file__)").startswith(str(house.upstream))
    assert house.say("from mlx_lm.utils import added; print(added())") == "added"


@pytest.mark.parametrize(
    "code, expected",
    [
        ("import mlx_lm; print(mlx_lm.generate())", "ours"),  # another module of upstream's that imports the name
        ("from mlx_lm.utils import call_load; print(call_load())", "ours"),  # a caller in the module itself
        ("import mlx_lm; print(mlx_lm.load())", "ours"),  # upstream's package
        ("import mlx_lm.tuner.other as m; print(m.part())", "our part"),
        ("import mlx_lm.tuner as m; print(m.part())", "our part"),
        ("import mlx_lm.utils as u, mlx_lm.caller as c, mlx_lm.lora as l; print(u.Kept is c.Kept is l.Kept)", "True"),
    ],
)
def test_a_name_is_one_object_wherever_it_is_read(house, code, expected):
    assert house.say(code) == expected


def test_a_module_run_as_program_is_the_one_that_others_import(house):
    done = house.run("-m", "mlx_lm.lora")
    assert (done.stdout, done.returncode) == ("ours ran True\n", 0)
    assert house.run("-m", "mlx_lm").stdout == "package ran\n"


def test_the_overlay_stands_aside_where_it_is_told_to(house):
    """As in a checkout's folder, which Python looks in before all others."""
    file = house.overlay / "mlx_lm/__init__.py"
    aside = (
        "import os\nif os.environ.get('ASIDE'):\n    from ._upstream import stand_aside\n    stand_aside(globals())\n"
    )
    file.write_text(f"{aside}else:\n    " + OVERLAY["__init__.py"].replace("\n\n", "\n    ").strip() + "\n")
    assert house.say("import mlx_lm.utils; print(mlx_lm.generate())") == "ours"
    house.variables = {"ASIDE": "1"}
    code = (
        "import mlx_lm, mlx_lm.utils, mlx_lm.tuner, sys; print(mlx_lm.generate(), mlx_lm.tuner.part(), mlx_lm.__path__)"
    )
    assert house.say(code) == f"upstream upstream part ['{house.upstream}/mlx_lm']"
    files = "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('mlx_lm')))"
    assert str(house.overlay) not in house.say(f"{code}; {files}")
    assert house.run("-m", "mlx_lm.lora").stdout == "upstream ran\n"
    assert house.run("-m", "mlx_lm", "lora").stdout == "package ran\n"


def test_an_upstream_that_an_import_hook_alone_knows_is_found(house):
    """As setuptools' editable installation of mlx-lm provides it."""
    hook = f"""
import sys
from importlib.util import spec_from_file_location

class Hook:
    def find_spec(name, path=None, target=None):
        if name == "mlx_lm":
            return spec_from_file_location(name, {str(house.upstream / "mlx_lm/__init__.py")!r})

sys.meta_path.append(Hook)
import mlx_lm.tuner.other
print(mlx_lm.generate(), mlx_lm.tuner.other.part())
"""
    assert house.say(hook, path=[house.overlay]) == "ours our part"


def refuse_old(house):
    house.write(house.upstream, "_version.py", '__version__ = "0.31.3"\n')


def lack_a_name(house):
    house.write(house.upstream, "_version.py", '__version__ = "0.33.0"\n')
    house.write(house.upstream, "lora.py", "")


def lack_a_module(house):
    house.write(house.upstream, "_version.py", '__version__ = "0.33.0"\n')
    house.write(house.upstream, "lora.py", "from .gone import name\n")


def lack_everything(house):
    shutil.rmtree(house.upstream)


def lack_a_library(house, name):
    error = f"ImportError('{name}: cannot open', name='core', path='/somewhere/mlx/core.so')"
    house.write(house.upstream, "__init__.py", f"raise {error}\n")


def lack_a_backend(house):
    lack_a_library(house, "libmlx.so")


def lack_a_driver(house):
    lack_a_library(house, "libcuda.so.1")


def lose_a_name(house):
    """A release that is known to have the name, and files that do not."""
    house.write(house.upstream, "lora.py", "")


REFUSALS = [
    (lose_a_name, "the installed mlx-lm 0.32.1 lacks build_parser in mlx_lm.lora. The releases"),
    (refuse_old, "the installed mlx-lm 0.31.3 is too old"),
    (lack_a_name, "the installed mlx-lm 0.33.0 lacks build_parser in mlx_lm.lora"),
    (lack_a_module, "the installed mlx-lm 0.33.0 could not be imported (No module named 'mlx_lm.gone')"),
    (lack_everything, "mlx-lm is not installed"),
    *(
        pytest.param(
            fault,
            reason,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="a backend is a package of its own on Linux only"),
        )
        for fault, reason in (
            (lack_a_backend, "MLX could not be imported (libmlx.so: cannot open): on Linux it needs a backend"),
            (lack_a_driver, "MLX could not be imported (libcuda.so.1: cannot open): its CUDA package needs NVIDIA's"),
        )
    ),
]


@pytest.mark.parametrize("fault, reason", REFUSALS)
def test_an_upstream_that_does_not_fit_is_refused_in_one_sentence(house, fault, reason):
    fault(house)
    program = house.elsewhere / "mlx_lm.lora"
    program.write_text("import mlx_lm.lora\n")
    for command in (["-m", "mlx_lm.lora"], ["-m", "mlx_lm", "lora"], [str(program)]):
        done = house.run(*command)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        assert reason in done.stderr
        assert fault in (lack_a_backend, lack_a_driver) or _upstream.SUPPORTED in done.stderr
        if fault in (lose_a_name, lack_a_name, lack_a_module):
            told = f"The releases {', '.join(_upstream.TRIED)}, as published, have all that is needed: install one"
            assert told in done.stderr


def test_a_program_that_imports_us_can_catch_the_refusal(house):
    refuse_old(house)
    assert house.say("try:\n    import mlx_lm\nexcept ImportError as e:\n    print(e)").endswith(
        "install one of those."
    )


def test_a_newer_upstream_with_every_name_runs(house):
    house.write(house.upstream, "_version.py", '__version__ = "1.0.0.dev3"\n')
    assert house.say("import mlx_lm.lora; print(mlx_lm.generate())") == "ours"


@pytest.mark.parametrize("name", ["no_such_package", "mlx_lm.no_such_module"])
def test_an_import_error_within_the_range_stays_as_it_is(house, name):
    house.write(house.upstream, "utils.py", f"import {name}\n")
    done = house.run("-m", "mlx_lm.lora")
    assert done.stderr.rstrip().endswith(f"ModuleNotFoundError: No module named '{name}'")


def test_rebound_hands_a_part_to_one_copy_alone():
    def part():
        return "theirs"

    namespace = {"part": part}
    exec("def whole(*, times=2):\n    return part() * times", namespace)
    copy = _upstream.rebound(namespace["whole"], part=lambda: "ours")
    assert (copy(), namespace["whole"]()) == ("oursours", "theirstheirs")
    with pytest.raises(ImportError, match="lacks piece in .*whole"):
        _upstream.rebound(namespace["whole"], piece=None)


def test_the_range_is_the_one_that_installers_are_told():
    line = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("mlx-lm"))
    assert line.replace(" ", "") == _upstream.SUPPORTED.replace(" ", "")
    assert _upstream.SUPPORTED.startswith("mlx-lm >= {}.{}.0,".format(*_upstream.OLDEST))
    assert _upstream.SUPPORTED.startswith(f"mlx-lm >= {_upstream.TRIED[0]},")


def test_every_class_of_the_real_package_is_one_object():
    assert Path(mlx_lm.__file__).parent == ROOT / "mlx_lm"
    homes = {}
    for module in [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "mlx_lm"]:
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__.partition(".")[0] == "mlx_lm":
                homes.setdefault((value.__module__, value.__qualname__), set()).add(value)
    assert ("mlx_lm.tuner.trainer", "TrainingArgs") in homes and ("mlx_lm.tokenizer_utils", "TokenizerWrapper") in homes
    assert [name for name, objects in homes.items() if len(objects) > 1] == []
    assert mlx_lm.load is sys.modules["mlx_lm.utils"].load is mlx_lm.lora.load


def outcomes(tests, report, overlay):
    """Each of upstream's tests with its outcome, run in a process of its own from a folder outside the repository."""
    environment = {**os.environ, "MLX_LM_DPO": str(int(overlay)), "PYTHONPATH": str(ROOT) if overlay else ""}
    where = "import importlib.util as u; print(u.find_spec('mlx_lm').origin)"
    options = {"cwd": tests, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    found = subprocess.run([sys.executable, "-c", where], **options).stdout.strip()
    assert (Path(found) == ROOT / "mlx_lm/__init__.py") == overlay, found
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = subprocess.run([sys.executable, *command, f"--junitxml={report}"], **options)
    assert report.exists(), done.stdout
    print(done.stdout.splitlines()[-1])
    cases = ElementTree.parse(report).iter("testcase")
    return Counter(
        (case.get("classname"), case.get("name"), *sorted({part.tag for part in case} - {"system-out", "system-err"}))
        for case in cases
    )


@pytest.mark.skipif("UPSTREAM_TESTS" not in os.environ, reason="UPSTREAM_TESTS names no folder of mlx-lm's tests")
def test_upstreams_own_tests_end_as_without_us(tmp_path):
    tests = tmp_path / "tests"
    shutil.copytree(os.environ["UPSTREAM_TESTS"], tests)
    plain = outcomes(tests, tmp_path / "plain.xml", overlay=False)
    ours = outcomes(tests, tmp_path / "ours.xml", overlay=True)
    assert sum(len(key) == 2 for key in plain) > 0, "not one of upstream's tests passed without us"
    assert {"without us": plain - ours, "with us": ours - plain} == {"without us": Counter(), "with us": Counter()}
