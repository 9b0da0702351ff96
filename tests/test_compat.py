"""Detectron2 versions are played by small packages; one test at the end uses the installed Detectron2.

Everything runs in processes of its own, since what matters is the order of imports.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPAT = Path(__file__).parents[1] / "dcnv2_d2" / "compat.py"
# By its path: dcnv2_d2/__init__.py imports far more than these packages offer.
PRELUDE = f"""
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
spec = spec_from_file_location("compat", {str(COMPAT)!r})
compat = module_from_spec(spec)
spec.loader.exec_module(compat)
"""
BARE_IMPORT = "import torch\n\nfrom detectron2 import _C\n"
GUARDED_IMPORT = "import torch\n\ntry:\n    from detectron2 import _C\nexcept ImportError:\n    _C = None\n"


def run(code, path, *options):
    process = subprocess.run(
        [sys.executable, *options, "-c", PRELUDE + code], cwd=path, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_bare(code, path):
    """Without site-packages: there is no other Detectron2, and touching NumPy or Pillow would be an ImportError."""
    return run(code, path, "-S")


def make_detectron2(path, deform_conv, transform="Image.BILINEAR", compiled=False):
    for name, text in {
        "__init__.py": "",
        "layers/__init__.py": "",
        "layers/deform_conv.py": deform_conv,
        "data/transforms/transform.py": f"def __init__(self, src_rect, interp={transform}): ...\n",
    }.items():
        file = path / "detectron2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if compiled:
        (path / "detectron2" / "_C.py").write_text("def box_iou_rotated(): return 'compiled'\n")


def test_stands_in_for_a_missing_compiled_part(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT)
    run_bare(
        """
assert compat.prepare() is True
assert "detectron2" not in sys.modules, "prepare() must not import Detectron2"
from detectron2 import _C
import detectron2._C as same
assert same is _C is sys.modules["detectron2._C"]
assert find_spec("detectron2._C").origin == "stand-in by dcnv2_d2.compat"
assert not compat.has_compiled_part(), "the stand-in was taken for the real one"
assert not compat.has_fast_coco_eval()
compat.prepare()
assert sys.modules["detectron2._C"] is _C, "replaced by a second call"
""",
        tmp_path,
    )


def test_stands_in_when_detectron2_was_imported_before(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT)
    run_bare("import detectron2; compat.prepare(); from detectron2 import _C; _C.nms_rotated", tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("deform_conv_forward", "build Detectron2 from source"),
        ("_private", "build Detectron2 from source"),
        ("InstanceAnnotation", "use_fast_impl=False"),
        ("COCOevalEvaluateImages", "use_fast_impl=False"),
        ("COCOevalAccumulate", "use_fast_impl=False"),
    ],
)
def test_missing_function_says_so_when_called(tmp_path, name, remedy):
    make_detectron2(tmp_path, BARE_IMPORT)
    message = run_bare(
        f"""
compat.prepare()
from detectron2._C import {name} as function
assert function.__name__ == {name!r}
try:
    function(1, key=2)
except RuntimeError as e:
    print(e)
""",
        tmp_path,
    )
    assert message.startswith(f"detectron2._C.{name} was called") and remedy in message


def test_what_detectron2_logs_about_its_compiled_part_does_not_raise(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT)
    output = run_bare(
        "compat.prepare(); from detectron2 import _C;"
        "print(_C.get_compiler_version(), _C.get_cuda_version(), _C.has_cuda(), sep=', ')",
        tmp_path,
    )
    assert output == "detectron2._C is not built, detectron2._C is not built, False\n"


def test_stand_in_has_no_made_up_special_names(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT)
    run_bare(
        """
import doctest, inspect, pydoc
compat.prepare()
from detectron2 import _C
for name in ("__path__", "__file__", "__all__", "__wrapped__", "__reduce_me__", "__test__"):
    assert not hasattr(_C, name), name
assert inspect.unwrap(_C) is _C
assert inspect.getdoc(_C) == _C.__doc__ != None
inspect.getmembers(_C)
pydoc.render_doc(_C)
doctest.DocTestFinder().find(_C)
try:
    import detectron2._C.sub
except ModuleNotFoundError as e:
    assert "not a package" in str(e), e
else:
    raise AssertionError("imported a submodule of nothing")
""",
        tmp_path,
    )


@pytest.mark.parametrize("deform_conv", [BARE_IMPORT, GUARDED_IMPORT])
def test_own_compiled_part_is_left_alone(tmp_path, deform_conv):
    make_detectron2(tmp_path, deform_conv, compiled=True)
    run_bare(
        """
modules = set(sys.modules)
assert compat.prepare() is True
assert set(sys.modules) == modules
assert compat.has_compiled_part() and compat.has_fast_coco_eval()
from detectron2 import _C
assert _C.box_iou_rotated() == "compiled"
""",
        tmp_path,
    )


def test_main_without_compiled_part_falls_back_by_itself(tmp_path):
    make_detectron2(tmp_path, GUARDED_IMPORT)
    run_bare(
        """
modules = set(sys.modules)
assert compat.prepare() is True
assert set(sys.modules) == modules
assert not compat.has_compiled_part() and not compat.has_fast_coco_eval()
try:
    from detectron2 import _C
except ImportError:
    pass
else:
    raise AssertionError("something stands in for _C")
""",
        tmp_path,
    )


def test_unknown_layout_is_left_alone(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").touch()
    run_bare("assert compat.prepare() is True; assert 'detectron2._C' not in sys.modules", tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_detectron2_not_installed(tmp_path, folder):
    if folder:  # a clone of Detectron2's repository beside the script is importable, as an empty namespace package
        (tmp_path / "detectron2").mkdir()
    run_bare(
        f"""
assert (find_spec("detectron2") is not None) is {folder}
assert compat.find_detectron2() is None
assert compat.prepare() is False
assert not compat.has_compiled_part() and not compat.has_fast_coco_eval()
assert "detectron2._C" not in sys.modules
""",
        tmp_path,
    )


def test_removed_aliases_are_restored(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT, transform="Image.LINEAR")
    run(
        """
import numpy as np
from PIL import Image
for module, names in (np, ("bool", "int", "float", "str")), (Image, ("LINEAR",)):
    for name in names:
        vars(module).pop(name, None)
compat.prepare()
assert (np.bool, np.int, np.float, np.str) == (bool, int, float, str)
assert Image.LINEAR == Image.BILINEAR
""",
        tmp_path,
        "-Werror::FutureWarning",
    )


def test_existing_aliases_are_kept(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT, transform="Image.LINEAR")
    run(
        """
import numpy as np
from PIL import Image
np.bool, np.int, np.float, np.str, Image.LINEAR = "bifsL"
compat.prepare()
assert [np.bool, np.int, np.float, np.str, Image.LINEAR] == list("bifsL")
""",
        tmp_path,
    )


def test_aliases_are_for_the_detectron2_that_uses_them(tmp_path):
    make_detectron2(tmp_path, BARE_IMPORT)
    run(
        """
import numpy as np
from PIL import Image
before = dict(vars(np)), dict(vars(Image))
compat.prepare()
assert before == (vars(np), vars(Image))
""",
        tmp_path,
    )


@pytest.mark.skipif(find_spec("detectron2") is None, reason="Detectron2 is not installed")
def test_installed_detectron2(tmp_path):
    run(
        """
compat.prepare()
import detectron2.data.transforms, detectron2.engine, detectron2.evaluation, detectron2.layers, detectron2.modeling
from detectron2.data import build
from detectron2.utils.collect_env import collect_env_info
stands_in = getattr(sys.modules.get("detectron2._C"), "__file__", None) is None
assert stands_in != compat.has_compiled_part()
assert "numpy" in collect_env_info()
build.print_instances_class_histogram([{"annotations": [{"category_id": 1}]}], ["a", "b"])
""",
        tmp_path,
    )
