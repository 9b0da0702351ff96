"""What importing the package gives, in which order, and the types of its public functions."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import dcnv2_d2
import pytest

FOLDER = Path(dcnv2_d2.__file__).parent
MODULES = [
    path
    for path in sorted(FOLDER.rglob("*.py"))
    if (path.stem == "__init__" or not path.stem.startswith("_")) and "__main__" not in path.read_text()
]


def run(program):
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("first", ["detectron2", "detectron2.config", "detectron2.structures", "detectron2.engine"])
def test_detectron2_imported_first(first):
    """0.6 fails by itself beside a current Pillow or without its compiled part; afterwards it works all the same."""
    run(f"""
try:
    import {first}
except (ImportError, AttributeError):
    pass
import dcnv2_d2.engine
import {first}, detectron2.data, detectron2.layers
from detectron2.modeling import META_ARCH_REGISTRY
assert "MimickingRCNN" in META_ARCH_REGISTRY
""")


def test_without_detectron2():
    run("""
import sys
sys.modules["detectron2"] = None
import dcnv2_d2, dcnv2_d2.layers, dcnv2_d2.ops
assert dcnv2_d2.__version__ and "load_config" in dcnv2_d2.__all__
assert not hasattr(dcnv2_d2, "something_else")
try:
    from dcnv2_d2 import load_config
except ImportError as error:
    assert "dcnv2_d2.load_config needs Detectron2, which is not installed. pip install" in str(error), error
else:
    raise AssertionError("imported")
""")


def test_version():
    assert dcnv2_d2.__version__ == importlib.metadata.version("dcnv2-d2")
    assert all(hasattr(dcnv2_d2, name) for name in dcnv2_d2.__all__)


def functions(body, method=False):
    """(name, arguments without self, whether the result is annotated) of what is public in a module or a class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, method=True)
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            yield node.name, arguments[method:], node.returns is not None or node.name == "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_public_functions_are_annotated(path):
    """mypy, which checks that the annotations are true, passes over a function that has none."""
    incomplete = [
        name
        for name, arguments, result in functions(ast.parse(path.read_text()).body)
        if not result or any(argument.annotation is None for argument in arguments)
    ]
    assert not incomplete


def test_the_package_is_typed():
    assert (FOLDER / "py.typed").is_file()
