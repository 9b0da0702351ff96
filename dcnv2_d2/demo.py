"""Runs a detector on images, folders of images and videos; writes pictures, videos and a COCO-format file.

python -m dcnv2_d2.demo --config-file CONFIG --input photo.jpg folder film.mp4 --opts MODEL.WEIGHTS model_final.pth
"""

import argparse
import json
from pathlib import Path

import cv2
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from .config import load_config, require_weights
from .data.catalog import get_records
from .engine import plain_errors

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}


def find_files(inputs):
    """(path, name, picture) of each file, the latter below the output folder; a folder's in alphabetical order."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES | VIDEOS)
            files += [(p, p.relative_to(path)) for p in found]
        elif path.is_file():
            files.append((path, Path(path.name)))
        else:
            raise SystemExit(f"--input must be files and folders, got {path}")
    if not files:
        raise SystemExit(f"--input must have images or videos in it, got none in {', '.join(inputs)}")
    pictures = {}
    for path, name in files:
        picture = name.with_suffix(".mp4" if path.suffix.lower() in VIDEOS else ".jpg")
        count = pictures[picture] = pictures.get(picture, 0) + 1
        yield path, name.as_posix(), picture if count == 1 else picture.with_stem(f"{picture.stem}_{count}")


class Results:
    """A COCO data set of what was found: images, annotations with scores, categories."""

    def __init__(self, metadata):
        names = metadata.thing_classes
        ids = {index: i for i, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        self.ids = [ids.get(index, index + 1) for index in range(len(names))]
        categories = [{"id": i, "name": name} for i, name in zip(self.ids, names, strict=True)]
        self.content = {"images": [], "annotations": [], "categories": categories}

    def add(self, name, frame, instances):
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = frame.shape[:2]
        images.append({"id": len(images) + 1, "file_name": name, "height": height, "width": width})
        for found in instances_to_coco_json(instances, len(images)):
            area = found["bbox"][2] * found["bbox"][3]
            found["category_id"] = self.ids[found["category_id"]]
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, "area": area} | found)


def detect(predictor, frame):
    output = predictor(frame)
    if "instances" not in output:
        raise SystemExit(f"the model must find instances, got one that gives {', '.join(output)}")
    return output["instances"].to("cpu")


def run_on_image(predictor, path, target, name, results):
    try:
        image = read_image(str(path), "BGR")
    except OSError as error:
        print(f"{path} is left out: {error}")
        return
    instances = detect(predictor, image)
    picture = Visualizer(image[:, :, ::-1], predictor.metadata).draw_instance_predictions(instances)
    picture.save(str(target))
    results.add(name, image, instances)


def run_on_video(predictor, path, target, name, results, progress):
    video = cv2.VideoCapture(str(path))
    progress.total += max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)) - 1, 0)
    visualizer, writer = VideoVisualizer(predictor.metadata), None
    index = 0
    while True:
        there, frame = video.read()
        if not there:
            break
        instances = detect(predictor, frame)
        picture = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances).get_image()[:, :, ::-1]
        if writer is None:
            size, rate = picture.shape[1::-1], video.get(cv2.CAP_PROP_FPS) or 25.0
            writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
        writer.write(picture)
        results.add(f"{name}/{index:06d}", frame, instances)
        index += 1
        progress.update()
    video.release()
    if writer is None:
        print(f"{path} is left out: no frame can be read")
    else:
        writer.release()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--input", nargs="+", required=True, help="images, folders of images or videos, videos")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the results")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="least score of a detection")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config changes")
    args = parser.parse_args()

    with plain_errors():
        cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.confidence_threshold
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = args.confidence_threshold
    files = list(find_files(args.input))
    with plain_errors():
        require_weights(cfg)
    predictor = DefaultPredictor(cfg)
    if not predictor.metadata.get("thing_classes"):
        with plain_errors():
            get_records(cfg.DATASETS.TEST[0])  # a COCO data set has its class names in its annotations
    results = Results(predictor.metadata)
    with tqdm(total=len(files), unit="frame") as progress:
        for path, name, picture in files:
            progress.set_postfix_str(path.name)
            target = args.output / picture
            target.parent.mkdir(parents=True, exist_ok=True)
            if picture.suffix == ".mp4":
                run_on_video(predictor, path, target, name, results, progress)
            else:
                run_on_image(predictor, path, target, name, results)
                progress.update()
    found = args.output / "detections.json"
    found.write_text(json.dumps(results.content))
    images, annotations = (len(results.content[key]) for key in ("images", "annotations"))
    print(f"{annotations} detections in {images} images: {found}")


if __name__ == "__main__":
    main()
