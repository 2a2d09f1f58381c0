"""What the tests share: checkpoints in the reference's layout, scripts run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from tests.small_sets import write_images, write_resnet18

ROOT = Path(__file__).resolve().parents[1]
Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a run, and not the user's."""
    given = os.environ.get("MOCO_TRANSFER_TEST_CACHE")
    folder = Path(given) if given else tmp_path_factory.getbasetemp().parent / "cache"
    os.environ["MOCO_TRANSFER_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 as torchvision saves one, whose batch norms have seen images."""
    return write_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.pth")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures in three classes, eight of each to train on and four to judge."""
    return write_images(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run a script in an empty folder, as typed: `script("convert/to_detectron2.py", "a.pth")`."""

    def run(name: str, *words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / name), *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


def moco_state(arch: str = "resnet50", *, mlp: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """A model's state dict with the names that the reference writes, from torchvision alone."""
    torch.manual_seed(seed)
    state = {
        "module.queue": torch.nn.functional.normalize(torch.randn(128, 256), dim=0),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    for encoder in ("encoder_q", "encoder_k"):
        network = getattr(torchvision.models, arch)(num_classes=128)
        if mlp:
            width = network.fc.in_features
            head = [torch.nn.Linear(width, width), torch.nn.ReLU(), network.fc]
            network.fc = torch.nn.Sequential(*head)
        network.train()
        with torch.no_grad():  # batch norm's statistics move away from 0 and 1
            network(torch.randn(4, 3, 64, 64))
        values = network.state_dict().items()
        state |= {f"module.{encoder}.{name}": value for name, value in values}
    return state


@pytest.fixture(scope="session")
def moco_v2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoCo v2 ResNet-50 checkpoint as the reference's main_moco.py saves it."""
    path = tmp_path_factory.mktemp("moco_v2") / "checkpoint_0199.pth.tar"
    content = {"epoch": 200, "arch": "resnet50", "state_dict": moco_state(mlp=True)}
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}}, path)
    return path
