"""Measure the converter: seconds and memory, beside the goals.

examples:
  python benchmarks/speed/convert.py
  python benchmarks/speed/convert.py --runs 5 --json

A MoCo v2 ResNet-50 checkpoint in the reference layout, its optimizer state left out (about 260 MB),
is made in a temporary folder and converted in fresh processes. It has just been written, so that
the disk's speed is not in the numbers.
"""

import contextlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import ROOT, environment
from convert.progress import progress

GOAL_CONVERT_S, GOAL_WHOLE_S = 2.0, 15.0  # of a ResNet-50 on 2 cores
MEGABYTE = 10**6
QUEUE = 65536  # K of the reference


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="default: 3; the median")
    parser.add_argument("--small", action="store_true", help="a ResNet-18 and a short queue")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: want 1 or more")
    with tempfile.TemporaryDirectory(prefix="moco-transfer-") as folder:
        checkpoint = Path(folder) / "checkpoint_0199.pth.tar"
        arch, queue = ("resnet18", 256) if args.small else ("resnet50", QUEUE)
        sizes = write_checkpoint(checkpoint, arch, queue)
        runs = progress(range(args.runs), args.runs, "converting", "run", quiet=args.quiet)
        found = summary([measure(checkpoint) for _ in runs])
    record = {"arch": arch, "runs": args.runs} | sizes | found | {"environment": environment()}
    print(json.dumps(record) if args.json else table(record))
    return 0


def write_checkpoint(path: Path, arch: str, queue: int) -> dict[str, int]:
    """Write what the reference's main_moco.py writes for MoCo v2, without its optimizer.

    Returns:
        `file_bytes`, and `backbone_bytes` of one encoder without its head.
    """
    import torch
    from torch import nn

    from convert.resnets import build_network

    state = {"module.queue": torch.randn(128, queue), "module.queue_ptr": torch.zeros(1).long()}
    for encoder in ("encoder_q", "encoder_k"):
        network: Any = build_network(arch, num_classes=128)
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), network.fc)
        state |= {f"module.{encoder}.{k}": v for k, v in network.state_dict().items()}
    torch.save({"epoch": 200, "arch": arch, "state_dict": state}, path)
    backbone = [v for k, v in network.state_dict().items() if not k.startswith("fc.")]
    sizes = sum(v.numel() * v.element_size() for v in backbone)
    return {"file_bytes": path.stat().st_size, "backbone_bytes": sizes}


def measure(checkpoint: Path) -> dict[str, float]:
    """Convert a checkpoint in three fresh processes: bare, as a user does, and with the proof."""
    bare = {f"convert_{k}": v for k, v in _child(checkpoint, proof=False).items()}
    started, cpu = time.perf_counter(), _children_cpu_s()
    script = ROOT / "convert" / "to_detectron2.py"
    output = checkpoint.with_name("whole.pkl")
    certificate = _run([str(script), str(checkpoint), str(output), "--force", "--json"], checkpoint)
    whole = {"whole_s": time.perf_counter() - started, "whole_cpu_s": _children_cpu_s() - cpu}
    proved = bool(certificate["proof"]["ran"])
    peak = _child(checkpoint, proof=True)["peak"] if proved else 0
    return bare | whole | {"proved_peak": peak, "proved": proved}


def child(checkpoint: str, *, proof: bool) -> None:
    """Convert a checkpoint in this process, and print seconds and bytes beyond the imports."""
    from convert import certificate

    if proof:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("detectron2.modeling")  # what the proof imports when it runs
    else:
        vars(certificate)["can_prove"] = lambda: False
    _forget_peak()
    before = _memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    certificate.convert(Path(checkpoint), Path(checkpoint).with_name("child.pkl"), force=True)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"s": seconds, "cpu_s": cpu_s, "peak": _memory("VmHWM") - before}))


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the median of every number, and all of them."""
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return medians | {"proved": bool(runs[0]["proved"]), "all": runs}


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    file, backbone = record["file_bytes"], record["backbone_bytes"]
    rows = [
        ("recognise and convert, s (*)", record["convert_s"], GOAL_CONVERT_S),
        ("  of the CPU, s (*)", record["convert_cpu_s"], None),
        ("  peak memory, MB (*)", record["convert_peak"] / MEGABYTE, 2 * file / MEGABYTE),
    ]
    if record["proved"]:
        peak, goal = record["proved_peak"] / MEGABYTE, 2 * (file + backbone) / MEGABYTE
        rows += [
            ("whole process with the proof, s", record["whole_s"], GOAL_WHOLE_S),
            ("  of the CPU, s", record["whole_cpu_s"], None),
            ("  peak memory, MB (*)", peak, goal),
        ]
    lines = [
        f"MoCo v2 {record['arch']}, {file / MEGABYTE:.0f} MB, optimizer left out; median of "
        f"{record['runs']} runs",
        f"{'':34}{'found':>8}{'goal':>8}",
        *(
            f"{name:34}{value:8.2f}" + (f"{goal:8.1f}" if goal else "")
            for name, value, goal in rows
        ),
    ]
    if not record["proved"]:
        lines.append("the proof did not run: Detectron2 is not installed")
    lines.append("(*) beyond what the imports took")
    if record["arch"] != "resnet50":
        lines.append("the seconds' goals are a ResNet-50's")
    return "\n".join([*lines, *_where(record["environment"])])


def _where(environment: dict[str, Any]) -> list[str]:
    hardware = environment["hardware"]
    versions = environment["versions"]
    names = ("torch", "torchvision", "numpy")
    said = ", ".join(f"{name} {versions[name]}" for name in names)
    return [
        f"on {hardware['cpu']}, {hardware['cores']} cores, load {os.getloadavg()[0]:.1f}",
        f"Python {environment['python']}, {said}, {versions['detectron2'] or 'no detectron2'}, "
        f"commit {environment['commit']}",
    ]


def _child(checkpoint: Path, *, proof: bool) -> dict[str, float]:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        f"from benchmarks.speed.convert import child; child({str(checkpoint)!r}, proof={proof})"
    )
    return _run(["-c", code], checkpoint)


def _run(words: list[str], checkpoint: Path) -> dict[str, Any]:
    """Run Python in the checkpoint's folder, where the converter leaves its link."""
    done = subprocess.run(
        [sys.executable, *words], cwd=checkpoint.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"the converter failed: {done.stderr.strip() or done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(field: str) -> int:
    """Return this process's memory in bytes: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the peak only, which the imports may have set
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(ln for ln in status.read_text().splitlines() if ln.startswith(field))
    return 1024 * int(line.split()[1])


def _forget_peak() -> None:
    """Have Linux count the peak from now on, where it lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    run_script(main)
