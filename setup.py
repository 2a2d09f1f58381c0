"""Install MoCo Transfer: `pip install -e .`. Settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "convert/__init__.py").read_text("utf-8"))[1]

setup(
    name="moco-transfer",
    version=VERSION,
    description="Pretrain MoCo, convert any self-supervised checkpoint, measure how it transfers",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "benchmarks",
        "benchmarks.speed",
        "convert",
        "pretrain",
        "transfer",
        "transfer.classification",
        "transfer.detection",
        "transfer.segmentation",
    ],
    package_data={"benchmarks": ["data.yaml", "suites/*.yaml", "published/*.yaml"]},
    install_requires=[
        # Below 2.10 weights_only loading has known holes: CVE-2025-32434, CVE-2026-24747.
        "torch>=2.10,<2.12",
        "torchvision>=0.25,<0.27",
        "numpy>=2.0",
        "Pillow>=11",
        "scikit-learn>=1.6",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tqdm>=4.60",
        "matplotlib>=3.9",
        "opencv-python-headless>=4.11",
    ],
    extras_require={
        # What Detectron2 needs; itself it has no release on the index: see README, "Install".
        "detection": [
            "cloudpickle",
            "faster-coco-eval>=1.8",
            "fvcore>=0.1.5.post20221221",
            "hydra-core>=1.1",
            "iopath>=0.1.9,<0.1.10",
            "omegaconf>=2.1",
            "packaging",
            "pycocotools>=2.0.8",
            "setuptools<81",
            "tabulate",
            "tensorboard",
            "termcolor",
            "yacs",
        ],
        # benchmarks/suite.py --on slurm
        "slurm": ["submitit>=1.5.2"],
        "dev": [
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "submitit>=1.5.2",
            "types-PyYAML",
            "types-tqdm",
            # Their own code writes checkpoints that the tests read.
            "lightly>=1.6",
            "timm>=1.0",
            "transformers>=5",
        ],
    },
)
