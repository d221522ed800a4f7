"""Train the bundled model, write shapes.pth and print its COCO AP on pictures that training never saw.

python ckpt/shapes/train.py                draw the pictures, train on the CPU, evaluate
python ckpt/shapes/train.py --evaluate     only evaluate the shapes.pth that is there
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


def read_config():
    """Return the config beside this file, its paths made absolute."""
    cfg = mmcv.Config.fromfile(str(HERE / "config.py"))
    for split in (cfg.data.train, cfg.data.val, cfg.data.test):
        split.ann_file = str(HERE.parents[1] / split.ann_file)
        split.img_prefix = str(HERE.parents[1] / split.img_prefix)
    return cfg


def train(cfg):
    """Train from scratch and write shapes.pth: the weights, the classes and nothing else."""
    cfg.work_dir, cfg.device, cfg.gpu_ids = str(HERE / "work"), "cpu", [0]
    set_random_seed(cfg.seed)
    model = build_detector(cfg.model)
    model.init_weights()
    pictures = build_dataset(cfg.data.train)
    train_detector(model, [pictures], cfg, meta={"CLASSES": pictures.CLASSES})
    save_checkpoint(model, str(HERE / "shapes.pth"), meta={"CLASSES": pictures.CLASSES})


def evaluate(cfg):
    """Print COCO's twelve numbers on the held-out pictures, by MMDetection and pycocotools."""
    cfg.data.test.test_mode = True
    pictures = build_dataset(cfg.data.test)
    loader = build_dataloader(pictures, samples_per_gpu=1, workers_per_gpu=1, dist=False, shuffle=False)
    model = build_detector(cfg.model)
    load_checkpoint(model, str(HERE / "shapes.pth"), map_location="cpu")
    model.CLASSES = pictures.CLASSES
    with torch.no_grad():
        results = single_gpu_test(build_dp(model, "cpu"), loader)
    pictures.evaluate(results, metric="bbox", classwise=True)


def main():
    """Read the command line, draw what is missing, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    args = parser.parse_args()
    cfg = read_config()
    if not (HERE / "data" / "val.json").exists():
        dataset.main([])
    if not args.evaluate:
        train(cfg)
    evaluate(cfg)


if __name__ == "__main__":
    main()
