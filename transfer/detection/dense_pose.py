"""DensePose, a project beside Detectron2: its recipes build here and train with its own script.

Its annotations, its mapper and its measure, which reads distances on a body's surface from files
that it downloads, are the project's own. A recipe of ours is plain Detectron2 YAML, so that the
project's train_net.py takes it as it is.
"""

import importlib.util
from pathlib import Path

from detectron2.config import CfgNode

from convert.errors import UserError

KEY = "DENSEPOSE_ON"  # of MODEL; the project switches it on with its keys
GET = (
    "pip install av, and then pip install --no-deps --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git#subdirectory=projects/DensePose'"
)


def add_keys(cfg: CfgNode, where: str) -> None:
    """Add the project's keys, with their defaults, to a config that has none of them.

    Args:
        cfg: Detectron2's, and ours.
        where: whose keys they are, for the line that misses the project.

    Raises:
        UserError: the project is not installed.
    """
    if KEY in cfg.MODEL:
        return
    if importlib.util.find_spec("densepose") is None:
        raise UserError(f"{where}: wants Detectron2's DensePose project, not installed: {GET}")
    from densepose import add_densepose_config

    add_densepose_config(cfg)


def refuse_to_train(cfg: CfgNode, recipe: Path | None) -> None:
    """Send a DensePose recipe to the script that trains and measures it.

    Raises:
        UserError: it is one.
    """
    if KEY in cfg.MODEL:
        raise UserError(
            f"recipe {recipe}: DensePose is trained and measured by its project's own script: "
            f"python projects/DensePose/train_net.py --config-file {recipe} --num-gpus 8, in a "
            "checkout of Detectron2"
        )
