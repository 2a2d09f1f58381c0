"""What a process of a group does in a test of fine-tuning: `tuning_processes.py SPEC.json`.

Under torchrun. It trains `three` in one go, and `parts` with a stop that one process hears of.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from convert.backbone import Backbone
from convert.errors import Stopped, StopRequest
from pretrain import distributed
from transfer.classification.finetuning import FinetuneConfig, Tuning, evaluate
from transfer.classification.request import Request

FEW = {"batch_size": 16, "epochs": 1}  # 18 images: in the last step a process has none
STOP_AT = 4  # steps: in the middle of the second epoch


def train(spec: dict[str, Any], name: str, resume: str | None = None, **keys: float) -> None:
    """Fine-tune in float64, with a folder of that name."""
    given = spec["request"] | {"resume": resume}
    folder, output = Path(given.pop("folder")), Path(spec["folder"]) / name
    before, build = torch.get_default_dtype(), Backbone.build
    torch.set_default_dtype(torch.float64)
    Backbone.build = lambda self: build(self).double()  # type: ignore[method-assign]
    try:
        request = Request(**given, folder=folder, output_dir=output, quiet=True)
        evaluate(FinetuneConfig(**spec["config"] | keys), request)
    finally:
        torch.set_default_dtype(before)
        Backbone.build = build  # type: ignore[method-assign]


def stop_the_second_process() -> None:
    """Let a signal reach one process, before a step ends."""
    step = Tuning._take_step
    asked = StopRequest.__enter__
    requests = []

    def enter(self: StopRequest) -> StopRequest:
        requests.append(self)
        return asked(self)

    def take_step(self: Tuning, *args: Any) -> float:
        if self.step + 1 == STOP_AT and distributed.rank() == 1:
            requests[-1].signum = signal.SIGTERM
        return step(self, *args)

    StopRequest.__enter__ = enter  # type: ignore[method-assign]
    Tuning._take_step = take_step  # type: ignore[method-assign]


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    with distributed.group(distributed.Launch(timeout_s=120), "cpu"):
        train(spec, "three")
        train(spec, "three few", **FEW)
        step, enter = Tuning._take_step, StopRequest.__enter__
        stop_the_second_process()
        try:
            train(spec, "parts")
        except Stopped:
            Tuning._take_step, StopRequest.__enter__ = step, enter  # type: ignore[method-assign]
        distributed.agree(0)  # the first process has written what it keeps
        assert not (Path(spec["folder"]) / "parts/results.json").exists()
        train(spec, "parts", resume="auto")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
