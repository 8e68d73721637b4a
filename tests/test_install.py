"""Installing takes precedence over mlx-lm without writing into its files, and uninstalling undoes it.

This happens in a fresh virtual environment. mlx-lm is installed there from a wheel made of the files in use, so that
no network is needed; everything else that it imports is linked from the environment that runs the tests.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WHERE = "from importlib.util import find_spec; print(find_spec('mlx_lm').origin)"
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "adapters", "fused_model")


def run(*command, cwd, variables=None):
    """What a program prints that has none of the surrounding variables which say where Python looks for packages."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLX_LM_DPO")}
    environment.update(variables or {}, PIP_DISABLE_PIP_VERSION_CHECK="1")
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Environment:
    """A virtual environment with mlx-lm installed, and a folder of no meaning to work in."""

    def __init__(self, folder, upstream):
        self.folder, self.elsewhere = folder / "environment", folder / "elsewhere"
        self.elsewhere.mkdir()
        run(sys.executable, "-m", "venv", "--without-pip", self.folder, cwd=folder)
        self.packages = Path(self.say("import sysconfig; print(sysconfig.get_path('purelib'))"))
        (self.packages / "the_rest.pth").write_text(str(link_the_rest(folder / "rest")))
        self.install(upstream)
        self.before = self.upstream_files()
        self.listing = self.list()

    def install(self, *what):
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile", *what)

    def uninstall(self):
        self.pip("uninstall", "-y", "mlx-lm-dpo")

    def pip(self, *arguments):
        # pip comes from the tests' environment, which also has the setuptools that building needs.
        pip = [sys.executable, "-m", "pip", "--python", self.folder / "bin/python", "-q"]
        run(*pip, *arguments, cwd=self.elsewhere)

    def list(self):
        return sorted(set(os.listdir(self.packages)) - {"__pycache__"})

    def upstream_files(self):
        """The hash of each file that mlx-lm installed, its commands among them; Python's own caches aside."""
        commands = [file for file in (self.folder / "bin").glob("mlx_lm*") if not file.name.startswith("mlx_lm_dpo")]
        files = [*(self.packages / "mlx_lm").rglob("*"), *commands]
        files += [file for folder in self.packages.glob("mlx_lm-*.dist-info") for file in folder.rglob("*")]
        files = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def run(self, program, *arguments, **options):
        """What a program of the environment prints, by default from the folder of no meaning."""
        return run(self.folder / "bin" / program, *arguments, **{"cwd": self.elsewhere, **options})

    def say(self, code, *flags, **options):
        return self.run("python", *flags, "-c", code, **options).strip()

    def origin(self, *flags, **options):
        """The folder that mlx_lm would be read from."""
        return Path(self.say(WHERE, *flags, **options)).parent


def link_the_rest(folder):
    """A folder with everything that the tests' environment has but mlx-lm and this project."""
    folder.mkdir()
    for packages in [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]:
        for entry in packages.iterdir():
            if "mlx_lm" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A wheel of the mlx-lm in use."""
    installed = distribution("mlx-lm")
    root = Path(installed.locate_file(""))
    files = [file for file in installed.files if ".." not in file.parts and "__pycache__" not in file.parts]
    files = [file for file in files if file.name not in ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD")]
    wheel = tmp_path_factory.mktemp("upstream") / f"mlx_lm-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.write(root / file, file.as_posix())
        record = f"mlx_lm-{installed.version}.dist-info/RECORD"
        archive.writestr(record, "".join(f"{name},,\n" for name in [*map(str, files), record]))
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository: building writes into the source tree."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "checkout", ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def build(source, kind, target):
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def fresh(upstream, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("fresh"), upstream)


@pytest.fixture
def environment(fresh):
    """The environment, which a test leaves as it was: that is what uninstalling promises."""
    yield fresh
    if fresh.list() != fresh.listing:
        fresh.uninstall()
    assert fresh.list() == fresh.listing
    assert fresh.upstream_files() == fresh.before
    assert fresh.origin() == fresh.packages / "mlx_lm"


def test_an_installation_takes_precedence_and_leaves_upstreams_files_alone(environment, wheel):
    assert environment.origin() == environment.packages / "mlx_lm"
    environment.install(wheel)
    overlay = environment.packages / "mlx_lm_dpo/mlx_lm"
    assert environment.upstream_files() == environment.before
    code = "from mlx_lm.utils import dpo_loss, load; import mlx_lm; print(mlx_lm.__file__, mlx_lm.load is load)"
    assert environment.say(code) == f"{overlay}/__init__.py True"
    told = {
        command: environment.run(*command.split(), "--help")
        for command in ("mlx_lm.lora", "python -m mlx_lm lora", "python -m mlx_lm.lora", "mlx_lm_dpo lora")
    }
    assert all("--loss-type" in text for text in told.values()) and "mlx_lm_dpo " in told["mlx_lm_dpo lora"]
    assert (environment.folder / "bin/mlx_lm_dpo.lora").is_file()
    assert environment.upstream_files() == environment.before
    environment.uninstall()
    assert not list((environment.folder / "bin").glob("mlx_lm_dpo*"))


def test_what_comes_before_the_installation_and_what_switches_it_off(environment, wheel, source, tmp_path):
    plain = environment.packages / "mlx_lm"
    environment.install(wheel)
    overlay = environment.packages / "mlx_lm_dpo/mlx_lm"
    for flags in ([], ["-I"]):
        assert environment.origin(*flags) == overlay
        assert environment.origin(*flags, variables={"MLX_LM_DPO": "1"}) == overlay
        assert environment.origin(*flags, variables={"MLX_LM_DPO": "0"}) == plain
    # In a checkout too, where Python looks before it reads any path file.
    say = "import mlx_lm.lora; print(mlx_lm.lora.__file__, mlx_lm.__file__)"
    for variables, folder in (({}, source / "mlx_lm"), ({"MLX_LM_DPO": "0"}, plain)):
        assert environment.say(say, cwd=source, variables=variables) == f"{folder}/lora.py {folder}/__init__.py"
    # A checkout wins where one works in it, or names it: and nothing of the installed overlay mixes in.
    assert environment.origin(cwd=source) == source / "mlx_lm"
    assert environment.origin(variables={"PYTHONPATH": str(source)}) == source / "mlx_lm"
    joined = environment.say("import mlx_lm; print(*mlx_lm.__path__)", cwd=source)
    assert joined == f"{source}/mlx_lm {plain}"
    # Environments may read another's packages after their own, as `uv run --with` makes them.
    layer = tmp_path / "layer/site-packages"
    (layer / "mlx_lm").mkdir(parents=True)
    (layer / "mlx_lm/__init__.py").write_text("")
    layered = f"import site; site.addsitedir({str(layer)!r}); site.addsitedir({str(environment.packages)!r}); {WHERE}"
    assert environment.say(layered, "-S") == f"{overlay}/__init__.py"


def test_a_folder_without_path_files_needs_an_import(environment, wheel, upstream, tmp_path):
    """`pip install --target`: nothing reads path files there, so that importing mlx_lm_dpo first is what counts."""
    target = tmp_path / "target"
    environment.install("--target", target, wheel)
    variables = {"PYTHONPATH": str(target)}
    first = f"import mlx_lm_dpo; {WHERE}"
    for plain in (environment.packages / "mlx_lm", target / "mlx_lm"):
        assert environment.origin(variables=variables) == plain
        assert environment.say(first, variables=variables) == f"{target}/mlx_lm_dpo/mlx_lm/__init__.py"
        environment.install("--target", target, upstream)


def test_upgrading_upstream_keeps_it_working(environment, wheel, upstream):
    environment.install(wheel)
    environment.install("--force-reinstall", upstream)
    assert environment.upstream_files() == environment.before
    assert environment.origin() == environment.packages / "mlx_lm_dpo/mlx_lm"


@pytest.mark.parametrize("mode", ["lenient", "strict"])
@pytest.mark.usefixtures("wheel")  # building it has left its traces in the checkout, as a user's builds do
def test_an_editable_installation_reads_the_checkout(environment, source, mode):
    environment.install("--config-settings", f"editable_mode={mode}", "-e", source)
    assert environment.origin(variables={"MLX_LM_DPO": "0"}) == environment.packages / "mlx_lm"
    ours, theirs = environment.say("from mlx_lm import utils as o, gguf as t; print(o.__file__, t.__file__)").split()
    assert Path(ours).resolve() == source / "mlx_lm/utils.py"
    assert Path(theirs) == environment.packages / "mlx_lm/gguf.py"


def test_a_wheel_holds_the_overlay_and_nothing_at_upstreams_place(source, wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "mlx_lm_dpo.pth",
        "mlx_lm_dpo",
        "-".join(wheel.name.split("-")[:2]) + ".dist-info",
    }
    files = [path.relative_to(source) for path in (source / "mlx_lm").rglob("*") if path.is_file()]
    assert {f"mlx_lm_dpo/{path.as_posix()}" for path in files} <= set(names)
    assert "mlx_lm_dpo/mlx_lm/examples/lora_config.yaml" in names
    assert not [name for name in names if name.endswith(".pyc")]

    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(build(source, "sdist", tmp_path), unpacked)
    (inner,) = unpacked.iterdir()
    assert sorted(zipfile.ZipFile(build(inner, "wheel", tmp_path)).namelist()) == sorted(names)
    assert (inner / "tests/test_install.py").exists() and (inner / "requirements.txt").exists()


def test_a_module_that_is_gone_since_the_last_build_is_not_installed(source, wheel, tmp_path):
    (module,) = (source / "build").glob("lib*/mlx_lm_dpo/mlx_lm/utils.py")
    module.with_name("gone.py").touch()
    assert zipfile.ZipFile(build(source, "wheel", tmp_path)).namelist() == zipfile.ZipFile(wheel).namelist()


def test_the_wheel_asks_for_what_requirements_list(wheel):
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    asked = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist")]
    listed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    backend = [line for line in listed if "[cpu]" in line]
    assert len(backend) == 1

    def normal(requirement):
        name = requirement.split(";")[0]
        cut = min([name.find(sign) for sign in "<>=" if sign in name] or [len(name)])
        return name[:cut].strip(), tuple(sorted(name[cut:].replace(" ", "").split(",")))

    always = {normal(line) for line in asked if "extra ==" not in line}
    assert always == {normal(line.replace("[cpu]", "")) for line in listed}
    extras = {line.partition("extra == ")[2].strip("\"'"): normal(line) for line in asked if "mlx[" in line}
    assert extras == {name: normal(backend[0].replace("cpu", name)) for name in ("cpu", "cuda12", "cuda13")}
    assert "Requires-Python: >=3.11" in lines
    # MLX's package for CUDA 12 alone leaves the headers that its kernels are compiled with to the system.
    headers = [line for line in asked if "cuda-runtime" in line]
    assert len(headers) == 1 and normal(headers[0]) == ("nvidia-cuda-runtime-cu12", ("==12.9.*",))
    assert "cuda12" in headers[0] and "Linux" in headers[0]
