"""PASCAL VOC detection with the figures of Deformable ConvNets v1: AP at an IoU of 0.5 and of 0.7."""

import tempfile
from pathlib import Path

import numpy as np
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap, voc_eval
from detectron2.utils import comm


class PascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's evaluator, which also gives AP70, and AP50 and AP70 by both of VOC's definitions."""

    def evaluate(self) -> dict | None:
        """
        Returns:
            {"bbox": AP, AP50, AP75 and AP70 by the definition of the data set's year (2007: precision at 11 recalls,
            2012: area below the curve), and AP50 and AP70 with -11point and -area}, in percent, in the first process.
        """
        results = super().evaluate()
        gathered = comm.gather(self._predictions, dst=0)
        if results is None:
            return None
        found: dict[str, dict[int, list[float]]] = {"11point": {50: [], 70: []}, "area": {50: [], 70: []}}
        with tempfile.TemporaryDirectory() as folder:
            template = str(Path(folder) / "{}.txt")
            for i, name in enumerate(self._class_names):
                lines = [line for predictions in gathered for line in predictions.get(i, ())]
                Path(template.format(name)).write_text("\n".join(lines))
                for threshold in (50, 70):
                    recall, precision, _ = voc_eval(
                        template, self._anno_file_template, self._image_set_path, name, threshold / 100
                    )
                    for definition, by_threshold in found.items():
                        by_threshold[threshold].append(voc_ap(recall, precision, definition == "11point"))
        for definition, by_threshold in found.items():
            for threshold, aps in by_threshold.items():
                results["bbox"][f"AP{threshold}-{definition}"] = 100 * np.mean(aps)
        results["bbox"]["AP70"] = results["bbox"]["AP70-" + ("11point" if self._is_2007 else "area")]
        return results
