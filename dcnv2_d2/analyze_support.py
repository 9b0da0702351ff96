"""Shows what nodes of detectors see: sampling locations, effective receptive field, saliency region; one PNG, raw npz.

python -m dcnv2_d2.analyze_support --config-file CONFIG --input a.jpg --at 60,45 --opts MODEL.WEIGHTS model_final.pth
python -m dcnv2_d2.analyze_support --runs regular=output/regular DCNv2=output/quick_start
python -m dcnv2_d2.analyze_support --runs DCNv2=output/quick_start --dilation
python -m dcnv2_d2.analyze_support --runs R-FCN=output/quick_start_rfcn_dconv_dpool --first-paper

Nodes are positions of conv5 (--at) and RoIs (--box), or, without either, chosen by the detections of the last model.
See docs/analysis.md.
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from .analysis import BackboneNode, RoINode, choose_nodes, effective_dilation, find_support
from .analysis.dilation import AREAS
from .analysis.figures import INSTRUMENTS, draw_supports
from .analysis.first_paper import draw_bins, draw_samples, position_sensitive_bins, stacked_samples
from .analysis.locations import LAYERS
from .analysis.saliency import BOUND, LEVELS
from .checkpoint import Checkpointer
from .config import load_config, require_weights
from .data.catalog import get_records
from .modeling.rfcn import RFCNROIHeads

logger = logging.getLogger("dcnv2_d2.analyze_support")


def numbers(count):
    def parse(text):
        values = tuple(map(float, text.split(",")))
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"expected {count} numbers with commas between, got {text!r}")
        return values

    return parse


def image(text):
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return Path(text)


def run(text):
    name, _, folder = text.rpartition("=")
    if not (Path(folder) / "config.yaml").is_file():
        raise argparse.ArgumentTypeError(f"{folder} must hold the config.yaml of a training run")
    return name or Path(folder).name, Path(folder)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--config-file", type=Path, help="of one model; its weights are MODEL.WEIGHTS")
    models.add_argument(
        "--runs", type=run, nargs="+", metavar="NAME=FOLDER",
        help="models side by side: output folders of training runs, with config.yaml and a checkpoint",
    )  # fmt: skip
    parser.add_argument("--input", type=image, nargs="+", help="images; by default one of the first model's test set")
    parser.add_argument("--index", type=int, default=0, help="which of the test set's images, without --input")
    parser.add_argument("--at", type=numbers(2), action="append", metavar="X,Y", help="backbone node; repeatable")
    parser.add_argument(
        "--box", type=numbers(4), action="append", metavar="X1,Y1,X2,Y2", help="node of the RoI head; repeatable"
    )
    parser.add_argument("--feature", help="map of --at; by default the last one of the ResNet")
    parser.add_argument("--score", type=float, default=0.5, help="of detections to choose nodes from")
    parser.add_argument("--layers", default=LAYERS, help="regular expression of the convolutions to locate samples of")
    parser.add_argument("--bound", type=float, default=BOUND, help="relative error of the saliency region")
    parser.add_argument("--cell", type=int, help="finest cells of the saliency region, in input pixels")
    parser.add_argument("--levels", type=int, default=LEVELS, help="from coarse to fine cells")
    parser.add_argument("--batch-size", type=int, default=16, help="of the saliency region's forward passes")
    parser.add_argument(
        "--dilation", type=int, nargs="?", const=100, metavar="IMAGES",
        help="instead of nodes: the effective dilation of deformable layers, over so many images of the test set",
    )  # fmt: skip
    parser.add_argument(
        "--areas", type=float, nargs=2, default=AREAS, help="of the largest small and medium box, for --dilation"
    )
    parser.add_argument(
        "--first-paper", action="store_true",
        help="instead of instruments: samples of three stacked layers and, of R-FCN, bins, as Figures 6 and 7 of v1",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=INSTRUMENTS, default=INSTRUMENTS, help="of the figure")
    parser.add_argument("--output", type=Path, default=Path("output/analysis"))
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config changes for all models")
    return parser.parse_args()


def load(config_file, opts, folder=None):
    """A config and its model, with the last weights of a training run or MODEL.WEIGHTS."""
    cfg = load_config(str(config_file), opts)
    model = build_model(cfg).eval()
    checkpointer = Checkpointer(model, save_dir=str(folder or ""))
    if folder is None:
        require_weights(cfg)
    if folder is not None and not checkpointer.has_checkpoint():
        raise ValueError(f"--runs: {folder} must hold a checkpoint, got none")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=folder is not None)
    return cfg, model


def read(cfg, path):
    """An image as the model takes it, Tensor[3, H, W], and Detectron2's transform that made it."""
    original = read_image(str(path), cfg.INPUT.FORMAT)
    resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST).get_transform(original)
    return torch.from_numpy(resize.apply_image(original).astype("float32").transpose(2, 0, 1)), resize


def test_image(cfg, index):
    """The file of an image of the test set, counting those with objects."""
    annotated = [record for record in get_records(cfg.DATASETS.TEST[0]) if record["annotations"]]
    if not 0 <= index < len(annotated):
        raise ValueError(f"--index must be below {len(annotated)}, got {index}")
    return Path(annotated[index]["file_name"])


def given_nodes(args, resize):
    """Title -> node, from --at and --box, which are in pixels of the original image."""
    nodes = {}
    for at in args.at or ():
        # A pixel's middle, as apply_coords moves points of the plane.
        (x, y), = resize.apply_coords(torch.tensor([at]).numpy() + 0.5) - 0.5  # fmt: skip
        nodes[f"conv5 at {at[0]:g}, {at[1]:g}"] = BackboneNode(float(x), float(y), args.feature)
    for box in args.box or ():
        nodes[f"RoI {', '.join(f'{v:g}' for v in box)}"] = RoINode(*resize.apply_box([box])[0].tolist())
    return nodes


def analyze(args, models, path):
    """Draws the figures of one image."""
    search = {"bound": args.bound, "cell": args.cell, "levels": args.levels, "batch_size": args.batch_size}
    inputs = {name: read(cfg, path) for name, (cfg, _) in models.items()}
    if args.at or args.box:
        kinds = {"nodes": {name: given_nodes(args, resize) for name, (_, resize) in inputs.items()}}
    else:
        # One choice for all, so that the models can be compared; they must agree on the size of the image.
        chooser = list(models)[-1]
        chosen = choose_nodes(models[chooser][1], inputs[chooser][0], args.score)
        kinds = {
            kind: {name: {title: pair[i] for title, pair in chosen.items()} for name in models}
            for i, kind in enumerate(("backbone", "roi"))
        }
    for kind, nodes_of in kinds.items():
        supports = {}
        for name, (_, model) in models.items():
            for title, node in nodes_of[name].items():
                start = time.perf_counter()
                support = find_support(model, inputs[name][0], node, title, layers=args.layers, progress=True, **search)
                supports.setdefault(name, []).append(support)
                support.save(args.output / f"{path.stem}_{kind}_{name}_{title.replace(' ', '_').replace(',', '')}.npz")
                logger.info(
                    "%s, %s, %s: saliency region %.1f%% of the image, error %.4f < %g, %d forward passes, %.1f s",
                    name, kind, title, 100 * support.saliency.area, support.saliency.error, args.bound,
                    support.saliency.evaluations, time.perf_counter() - start,
                )  # fmt: skip
        figure = args.output / f"{path.stem}_{kind}.png"
        draw_supports(figure, supports, args.rows)
        logger.info("Picture: %s", figure)


def first_paper(args, models, path):
    for name, (cfg, model) in models.items():
        image, _ = read(cfg, path)
        picture = convert_image_to_rgb(image.permute(1, 2, 0), cfg.INPUT.FORMAT)
        nodes = {title: pair[0] for title, pair in choose_nodes(model, image, args.score).items()}
        written = args.output / f"{path.stem}_samples_{name}.png"
        draw_samples(written, picture, nodes, stacked_samples(model, image, nodes))
        logger.info("Picture: %s", written)
        if isinstance(getattr(model, "roi_heads", None), RFCNROIHeads):
            found = detect(model, image, args.score)
            names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
            titles = [f"{names[c]} {s:.0%}" for c, s in zip(found.pred_classes, found.scores, strict=True)]
            bins = position_sensitive_bins(model, image, found.pred_boxes.tensor, found.pred_classes)
            written = args.output / f"{path.stem}_bins_{name}.png"
            draw_bins(written, picture, titles, *bins)
            logger.info("Picture: %s", written)


def detect(model, image, score, most=4):
    """The instances of an image as the model takes it, in its own pixels, with at least a score; the best `most`."""
    with torch.no_grad():
        found = model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])[0]["instances"]
    return found[found.scores >= score][:most]


def dilation(args, models):
    for name, (cfg, model) in models.items():
        records = get_records(cfg.DATASETS.TEST[0])[: args.dilation]
        mapper = DatasetMapper(cfg, is_train=False)
        inputs = (record | mapper(dict(record)) | {"annotations": record["annotations"]} for record in tqdm(records))
        table = effective_dilation(model, inputs, args.areas)
        text = f"{name}, {len(records)} images of {cfg.DATASETS.TEST[0]}\n\n{table}\n"
        (args.output / f"dilation_{name}.md").write_text(text)
        print(text)


def main():
    args = parse_args()
    setup_logger(name="dcnv2_d2")
    try:
        if args.config_file:
            models = {args.config_file.stem: load(args.config_file, args.opts)}
        else:
            models = {name: load(folder / "config.yaml", args.opts, folder) for name, folder in args.runs}
        args.output.mkdir(parents=True, exist_ok=True)
        if args.dilation is not None:
            dilation(args, models)
            return
        for path in args.input or [test_image(next(iter(models.values()))[0], args.index)]:
            (first_paper if args.first_paper else analyze)(args, models, path)
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
