"""Exports a RetinaNet, Faster or Mask R-CNN for images of any size, and compares it with the model on an image.

python -m dcnv2_d2.export_model --config-file CONFIG --output model.onnx --image a.jpg --opts MODEL.WEIGHTS model.pth
"""

import argparse
from pathlib import Path

import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model

from .checkpoint import Checkpointer
from .config import load_config, require_weights
from .engine import plain_errors
from .export import MIN_OPSET, Detector, export_detector, export_onnx


def read_input(cfg, path):
    """Tensor[3, H, W], as Detectron2's DefaultPredictor makes it."""
    image = read_image(path, cfg.INPUT.FORMAT)
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
    return torch.from_numpy(resize.apply_image(image).astype("float32").transpose(2, 0, 1).copy())


def run(path, image):
    """The results of an exported file for an image."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(image)
    import onnxruntime

    return [torch.from_numpy(r) for r in onnxruntime.InferenceSession(path).run(None, {"image": image.numpy()})]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .onnx file, or a .pt2 file of torch.export")
    parser.add_argument(
        "--opset", type=int, default=MIN_OPSET, help="of ONNX; ONNX Runtime's CPU knows all of 19 to 21"
    )
    parser.add_argument("--image", help="a picture on which the file is compared with the model")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config changes")
    args = parser.parse_args()
    if args.output.suffix not in (".onnx", ".pt2"):
        parser.error(f"--output must end in .onnx or .pt2, got {args.output}")
    if args.opset < MIN_OPSET:
        parser.error(f"--opset must be {MIN_OPSET} or later, the first with DeformConv, got {args.opset}")

    with plain_errors():
        cfg = load_config(args.config_file, args.opts)
        require_weights(cfg)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        program = export_detector(model)
        if args.output.suffix == ".onnx":
            export_onnx(program, args.output, args.opset)
        else:
            torch.export.save(program, args.output)
    except (ValueError, ImportError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.output}: {args.output.stat().st_size / 2**20:.0f} MiB")

    if args.image:
        image = read_input(cfg, args.image)
        with torch.no_grad():
            expected = Detector(model)(image)
        actual = run(args.output, image)
        print(
            f"{len(expected[0])} detections in an image of {image.shape[2]} x {image.shape[1]}; greatest differences:"
        )
        for name, a, e in zip(("boxes", "scores", "classes", "masks"), actual, expected, strict=False):
            difference = f"{(a.double() - e.double()).abs().max():.1e}" if a.shape == e.shape and len(e) else "-"
            print(f"  {name:<8}{difference if a.shape == e.shape else f'{len(a)} instead of {len(e)}'}")


if __name__ == "__main__":
    main()
