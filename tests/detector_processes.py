"""What the processes of a detection test do: `python tests/detector_processes.py SPEC.json`.

The spec has a folder to write to and a number of processes, which are started as train_net.py does.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from detectron2.engine import HookBase, launch
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import Tensor, nn

from convert.backbone import weights_digest
from tests.detectors import COCO, VOC, narrow
from transfer.detection import datasets, weights
from transfer.detection.trainer import Trainer, parallel

IMAGES, BOXES = 4, 3  # of a step over all processes; of an image


class Digests(HookBase):
    """Notes a hash of all weights and statistics of every process after every iteration."""

    def __init__(self, found: list[list[str]]) -> None:
        self.found = found

    def after_step(self) -> None:
        self.found.append(comm.all_gather(weights_digest(self.trainer.detector.state_dict())))


def train(folder: Path) -> list[list[str]]:
    """Train a few iterations; return every process's hash after each."""
    pairs = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "5", "OUTPUT_DIR", str(folder / "out")]
    cfg = narrow(COCO, *pairs, "MODEL.RESNETS.NORM", "naiveSyncBN")
    torch.manual_seed(cfg.SEED)
    data = datasets.load(cfg.DATASETS.TRAIN, training=True)
    trainer = Trainer(cfg, weights.build_detector(cfg), data, {}, quiet=True)
    found: list[list[str]] = []
    trainer.register_hooks([Digests(found)])
    trainer.train_from(None)
    return found


class Regions(nn.Module):
    """Backbone, res5 and extra norm of a detector, on given boxes: images -> a loss."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.heads = detector.backbone, detector.roi_heads

    def forward(self, images: Tensor, boxes: list[Boxes], target: Tensor) -> Tensor:
        """Return how far the regions' means (N * BOXES, C) are from a target of that shape."""
        features = self.backbone(images)["res4"]
        found = self.heads._shared_roi_transform([features], boxes).mean((2, 3))
        return (found - target).square().mean()


def regress() -> dict[str, Any]:
    """Take five steps on fixed images and boxes; return losses and parameters."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # the same start in every process
    detector = weights.build_detector(narrow(VOC, "MODEL.RESNETS.NORM", "naiveSyncBN"))
    images = torch.randn(IMAGES, 3, 64, 64)
    corners = 24 * torch.rand(IMAGES, BOXES, 2)
    boxes = [Boxes(torch.cat([each, each + 30], dim=1)) for each in corners]
    target = torch.randn(IMAGES, BOXES, detector.roi_heads.res5.norm.num_features)
    share = IMAGES // comm.get_world_size()
    mine = slice(comm.get_rank() * share, (comm.get_rank() + 1) * share)
    regions = Regions(detector).double().train()
    for layer in (detector.proposal_generator, detector.roi_heads.box_predictor):
        layer.requires_grad_(False)
    model = parallel(regions, "cpu")
    optimizer = torch.optim.SGD(
        [p for p in regions.parameters() if p.requires_grad], 0.01, momentum=0.9
    )
    losses = []
    for _ in range(5):
        loss = model(images[mine], boxes[mine], target[mine].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(sum(comm.all_gather(loss.item())) / comm.get_world_size())
    return {"losses": losses, "parameters": dict(regions.named_parameters())}


def work(folder: Path) -> None:
    """Do both in a process and write down what was found."""
    torch.set_num_threads(1)
    found = {"digests": train(folder)} | regress()
    if comm.is_main_process():
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (folder := Path(spec["folder"])).mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)
    launch(work, spec["processes"], dist_url="auto", args=(folder,))
