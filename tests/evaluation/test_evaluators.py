"""Which evaluator the trainer takes for a kind of data set."""

import pytest
from dcnv2_d2 import add_dcnv2_config
from dcnv2_d2.engine import Trainer
from dcnv2_d2.evaluation import PascalVOCEvaluator
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

NAME = "data_set_of_some_kind"


@pytest.fixture
def register(tmp_path):
    def register(**metadata):
        DatasetCatalog.register(NAME, lambda: [{"file_name": "a.jpg", "sem_seg_file_name": "a.png"}])
        MetadataCatalog.get(NAME).set(dirname=str(tmp_path), split="test", year=2007, thing_classes=["cat"], **metadata)

    (tmp_path / "Annotations").mkdir()
    yield register
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.parametrize(
    "kind, evaluator",
    [("pascal_voc", PascalVOCEvaluator), ("cityscapes_sem_seg", SemSegEvaluator), ("sem_seg", SemSegEvaluator)],
)
def test_kinds(kind, evaluator, register):
    register(evaluator_type=kind, stuff_classes=["road"], ignore_label=255)
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    (found,) = Trainer.build_evaluator(cfg, NAME)._evaluators
    assert type(found) is evaluator


def test_unknown_kind(register):
    register(evaluator_type="lvis")
    cfg = get_cfg()
    add_dcnv2_config(cfg)
    with pytest.raises(NotImplementedError, match="evaluator_type coco, pascal_voc, .* got 'lvis'"):
        Trainer.build_evaluator(cfg, NAME)
