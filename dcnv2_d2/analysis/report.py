"""The pictures at the end of a training run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.structures import BoxMode

from .drawing import draw_curves, draw_predictions, draw_sampling
from .nodes import Model, evaluation
from .sampling import record_sampling, sampling_points

NUM_IMAGES = 6
SCORE_THRESHOLD = 0.5
LEVELS = 3  # of stacked deformable layers, as in the paper's figures: 9, 81, 729 points for 3x3 kernels


@torch.no_grad()
def write_report(cfg: CfgNode, model: Model) -> list[Path]:
    """Draws predictions, sampling points and training curves into cfg.OUTPUT_DIR.

    Args:
        cfg: the run's config; the pictures show images of its first test set.
        model: a Detectron2 model. Without instances in its output, deformable layers in its backbone or a metrics.json,
            the picture that needs them is left out.

    Returns:
        The paths of the pictures.
    """
    folder = Path(cfg.OUTPUT_DIR)
    written = []
    predictions, nodes = list[Any](), list[Any]()
    if cfg.DATASETS.TEST:
        with evaluation(model):
            predictions, nodes = _run(cfg, model)
    if predictions:
        written.append(folder / "predictions.png")
        draw_predictions(written[-1], predictions, MetadataCatalog.get(cfg.DATASETS.TEST[0]))
    if nodes:
        written.append(folder / "sampling_points.png")
        draw_sampling(written[-1], nodes)
    if (folder / "metrics.json").is_file():
        written.append(folder / "training_curves.png")
        draw_curves(written[-1], folder / "metrics.json")
    return written


def _run(cfg: CfgNode, model: Model) -> tuple[list, list]:
    """Runs the model on a few images spread over the test set; returns what draw_predictions and draw_sampling want."""
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    annotated = [record for record in DatasetCatalog.get(name) if record.get("annotations")]
    chosen = np.linspace(0, len(annotated) - 1, min(NUM_IMAGES, len(annotated))).astype(int)
    mapper = DatasetMapper(cfg, is_train=False)
    predictions, nodes = [], []
    for i, record in enumerate(annotated[c] for c in chosen):
        inputs = mapper(dict(record))
        with record_sampling(model.backbone) as records:
            output = model([inputs])[0]
        if "instances" in output:
            instances = output["instances"]
            image = read_image(record["file_name"], "RGB")
            predictions.append((image, record, instances[instances.scores > SCORE_THRESHOLD]))
        if records:
            padded = model.preprocess_image([inputs]).tensor.shape[-2:]
            image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
            annotation = record["annotations"][i % len(record["annotations"])]
            scale = image.shape[0] / record["height"]
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            node = ((y0 + y1) / 2 * scale, (x0 + x1) / 2 * scale)
            points, modulation = sampling_points(records[-LEVELS:], node, padded)
            title = metadata.thing_classes[annotation["category_id"]]
            nodes.append((image, title, node, points, modulation))
    return predictions, nodes
