"""The rules of the house: who imports whom, what scripts promise, what stands where."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

ORDER = ("convert", "pretrain", "transfer", "benchmarks")
FILES = [path for folder in ORDER for path in sorted((ROOT / folder).rglob("*.py"))]
SCRIPTS = [path for path in FILES if "run_script(main)" in path.read_text(encoding="utf-8")]
LIGHT = {"__init__.py", "datasets.py"}  # of the detection folder: work without Detectron2
DETECTION = {p for p in FILES if p.parent.name == "detection" and p.name not in LIGHT}
LATE = {"train_net.py", "datasets.py", "proof.py", "speed/detection.py"}  # import it when they run


def imported(path):
    """Yield (module, whether at the top of the file) for every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        yield from ((name, node in top) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_from_folders_to_its_left(path):
    own = ORDER.index(path.relative_to(ROOT).parts[0])
    for name, _ in imported(path):
        first = name.split(".")[0]
        assert first not in ORDER[own + 1 :], f"{path} imports {name}"
        assert first not in {"tests", "configs"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_ours_is_called_utils(path):
    assert path.stem not in {"utils", "common", "misc", "helpers"}


def test_no_folder_of_ours_shadows_a_library():
    installed = importlib.metadata.packages_distributions()
    for name in [*ORDER, "tests", "configs"]:
        assert name not in sys.stdlib_module_names
        assert not [d for d in installed.get(name, []) if d != "moco-transfer"], name


def test_there_are_scripts_for_every_stage():
    names = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    assert names >= {
        "convert/to_detectron2.py",
        "convert/to_torchvision.py",
        "pretrain/main_moco.py",
        "transfer/train_net.py",
        "transfer/main_lincls.py",
        "transfer/knn.py",
        "benchmarks/suite.py",
        "benchmarks/report.py",
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_answers_within_a_second_and_shows_an_example(path, tmp_path):
    seconds = []
    for _ in range(3):  # a busy machine may delay one of them
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        seconds.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1
    name = f"python {path.relative_to(ROOT)}"
    assert done.stdout.count(name) >= 1, "no example"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_finds_our_code_from_any_folder_and_as_a_module(path, tmp_path):
    relative = path.relative_to(ROOT).with_suffix("")
    module = ".".join(relative.parts)
    for command, folder in (([path], tmp_path), (["-m", module], ROOT)):
        done = subprocess.run(
            [sys.executable, *command, "--version"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("MoCo Transfer ")


def test_only_the_detection_files_and_the_proof_name_detectron2():
    for path in FILES:
        uses = any(name.split(".")[0] == "detectron2" for name, _ in imported(path))
        late = path.name in LATE or f"{path.parent.name}/{path.name}" in LATE
        assert not uses or path in DETECTION or late, path


def test_everything_but_detection_imports_without_detectron2(tmp_path):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path not in DETECTION and path.stem != "__init__"
    ]
    code = "import sys, importlib\nsys.modules['detectron2'] = None\n"
    code += f"for name in {modules!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installing_makes_no_package_of_tests_and_configs():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    packages = re.findall(r'"(.+)"', re.search(r"packages=\[(.*?)\]", text, re.DOTALL)[1])
    assert packages == sorted({".".join(path.relative_to(ROOT).parent.parts) for path in FILES})


def test_the_docs_table_has_every_layout_and_every_released_name():
    from convert.layouts import LAYOUTS
    from convert.released import names

    text = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        assert f"| `{layout.name}` |" in text
    for name in names():
        assert f"`{name.removesuffix('_v2')}" in text
