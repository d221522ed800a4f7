"""Train a bundled model, write its weights and print its COCO AP on pictures that training never saw.

python ckpt/shapes/train.py                        draw the pictures, train on the CPU, write shapes.pth, evaluate
python ckpt/shapes/train.py ckpt/shapes_mask       the same for the model whose config is there: shapes_mask.pth
python ckpt/shapes/train.py --evaluate [FOLDER]    only evaluate the weights that are there
"""

import argparse
from pathlib import Path

import dataset
import mmcv
import torch
from mmcv.runner import load_checkpoint, save_checkpoint
from mmdet.apis import set_random_seed, single_gpu_test, train_detector
from mmdet.datasets import build_dataloader, build_dataset
from mmdet.models import build_detector
from mmdet.utils import build_dp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def read_config(folder):
    """Return the config of a folder, its paths made absolute."""
    cfg = mmcv.Config.fromfile(str(folder / "config.py"))
    for split in (cfg.data.train, cfg.data.val, cfg.data.test):
        split.ann_file = str(ROOT / split.ann_file)
        split.img_prefix = str(ROOT / split.img_prefix)
    if cfg.load_from:
        cfg.load_from = str(ROOT / cfg.load_from)
    return cfg


def train(cfg, weights):
    """Train and write the weights, as float16, and the classes, and nothing else."""
    cfg.work_dir, cfg.device, cfg.gpu_ids = str(HERE / "work" / weights.stem), "cpu", [0]
    set_random_seed(cfg.seed)
    model = build_detector(cfg.model)
    model.init_weights()
    pictures = build_dataset(cfg.data.train)
    train_detector(model, [pictures], cfg, meta={"CLASSES": pictures.CLASSES})
    save_checkpoint(model.half(), str(weights), meta={"CLASSES": pictures.CLASSES})


def evaluate(cfg, weights):
    """Print COCO's twelve numbers of the boxes, and of any masks, on the held-out pictures, by MMDetection."""
    cfg.data.test.test_mode = True
    pictures = build_dataset(cfg.data.test)
    loader = build_dataloader(pictures, samples_per_gpu=1, workers_per_gpu=1, dist=False, shuffle=False)
    model = build_detector(cfg.model)
    load_checkpoint(model, str(weights), map_location="cpu")
    model.CLASSES = pictures.CLASSES
    with torch.no_grad():
        results = single_gpu_test(build_dp(model, "cpu"), loader)
    pictures.evaluate(results, metric=["bbox", "segm"] if model.with_mask else "bbox", classwise=True)


def main():
    """Read the command line, draw what is missing, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="of config.py and of the weights")
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    args = parser.parse_args()
    folder = args.folder.resolve()
    cfg, weights = read_config(folder), folder / f"{folder.name}.pth"
    if not (HERE / "data" / "val.json").exists():
        dataset.main([])
    if not args.evaluate:
        train(cfg, weights)
    evaluate(cfg, weights)


if __name__ == "__main__":
    main()
