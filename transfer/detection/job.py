"""One call of train_net: checked, trained, measured, recorded.

What can be refused is refused in this order: recipe, folder, weights, data, memory; nothing is
written before the last of these.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from convert import released
from convert.allocator import keep_freed_memory
from convert.errors import Stopped, UserError
from convert.facts import EXTRA_KEY
from convert.files import output_folder, write_text
from transfer.detection import (
    checkpoint,
    data_check,
    datasets,
    dense_pose,
    keypoints,
    memory,
    recipes,
)
from transfer.detection.album import take_pictures
from transfer.detection.evaluation import SCORE, Outcome, check_measurable, evaluate, find_task
from transfer.detection.pictures import draw_curves, draw_detections
from transfer.detection.trainer import METRICS_FILE, Trainer
from transfer.detection.weights import (
    FINAL_FILE,
    build_detector,
    fill_backbone,
    load_detector,
    start_facts,
)
from transfer.results import FILE_NAME, format_metrics, write_results

CONFIG_FILE = "config.yaml"
PICTURE_FILE = "detections.png"
CURVES_FILE = "curves.png"
STOPPED = 128  # a process that a signal ended, after saving, exits with this and its number


@dataclass(frozen=True)
class Job:
    """One call of train_net.

    Attributes:
        cfg: the recipe, fitted to the machine.
        resume: go on from this checkpoint, or from the run's newest (`auto`); None: a new run.
        eval_only: measure a trained detector, train nothing.
        quiet: print results and errors only.
        processes: how many train together, over all machines.
        local_processes: how many of them on this machine.
        recipe: the recipe's file; None where there is none.
    """

    cfg: CfgNode
    resume: str | None = None
    eval_only: bool = False
    quiet: bool = False
    processes: int = 1
    local_processes: int = 1
    recipe: Path | None = None

    @property
    def output(self) -> Path:
        """The folder of everything that this job writes."""
        return Path(self.cfg.OUTPUT_DIR)

    def say(self, text: str) -> None:
        """Print a line, from the main process and unless asked to be quiet."""
        if comm.is_main_process() and not self.quiet:
            print(text, flush=True)


def prepare(
    cfg: CfgNode,
    *,
    resume: str | None,
    eval_only: bool,
    quiet: bool,
    num_gpus: int,
    num_machines: int,
    scale_to_gpus: bool = False,
    recipe: Path | None = None,
) -> Job:
    """Check everything that can be checked in a second, and say what will be done.

    Raises:
        UserError: weights or data are missing, the output folder holds another run, the batch does
            not divide over the processes.
    """
    dense_pose.refuse_to_train(cfg, recipe)
    processes = num_gpus * num_machines
    said = recipes.scale_to_gpus(cfg, processes) if scale_to_gpus else []
    recipes.images_at_once(cfg, processes)
    said += recipes.fit_to_machine(cfg, processes)
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus: found {torch.cuda.device_count()} devices, want {num_gpus}")
    if resume not in (None, checkpoint.AUTO) and not Path(str(resume)).is_file():
        raise UserError(f"--resume {resume}: no such checkpoint; without it the last is taken")
    job = Job(cfg, resume, eval_only, quiet, processes, num_gpus, recipe)
    for line in said:
        job.say(line)
    names = cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    missing = [*_missing_weights(job), *datasets.missing_files(names)]
    if missing:
        raise UserError("; ".join(missing))
    _check_folder(job)
    return job


def launch(job: Job, *, num_machines: int, machine_rank: int, dist_url: str) -> int:
    """Run a job in as many processes as it asks for and return the exit status.

    Raises:
        Stopped: a signal came, and the processes have ended after saving.
    """
    # Says which process it ends when another has failed: the line of the failure is enough.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    if job.local_processes > 1:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, _pass_on)
    try:
        launch_processes(
            _work_or_say,
            job.local_processes,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
            args=(job,),
        )
    except ProcessExitedException as error:
        status = int(error.exit_code)
        if status < 0:  # ended by a signal, before it could be heard
            raise Stopped(-status) from error
        if status > STOPPED:
            raise Stopped(status - STOPPED) from error
        return status
    return 0


def _pass_on(signum: int, frame: FrameType | None) -> None:
    """Let the processes of a job, which have something to save, end first."""
    for process in multiprocessing.active_children():
        if process.pid is not None:
            os.kill(process.pid, signum)


def _work_or_say(job: Job) -> None:
    """Do the work; in a process of its own, say a user's error as the script would."""
    if job.processes == 1:
        work(job)
        return
    try:
        work(job)
    except Stopped as stop:
        sys.exit(stop.status)
    except UserError as error:
        if not comm.is_main_process():
            time.sleep(5)  # the main process says it, if it has failed too, and ends this one
        print(f"train_net.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def work(job: Job) -> None:
    """Train and evaluate, or only evaluate, in this process."""
    started = time.time()
    keep_freed_memory()
    finished = _finished_record(job)
    if finished is not None:
        job.say(f"output: {job.output} (finished before)")
        _say_results(job, finished)
        return
    cfg = job.cfg
    seed_all_rng(cfg.SEED + comm.get_rank())
    test = datasets.load(cfg.DATASETS.TEST, training=False)
    _check_classes(cfg, test)
    check_measurable(cfg, test)
    if job.eval_only:
        joints = _keypoints(cfg, test.names)
        _check_data(job, test)
        model = build_detector(cfg)
        facts = load_detector(model, _detector_file(job), cfg)
        trained_on, learnt = facts.pop("classes", None), facts.pop("keypoints", None)
        if learnt and joints:
            keypoints.check_same(str(_detector_file(job)), learnt, test.names[0], joints)
        if trained_on is not None:
            datasets.check_classes(
                str(_detector_file(job)), trained_on, test.names[0], test.classes
            )
        job.say(f"detector: {_describe(facts)}")
        job.say(f"output: {job.output}")
        _begin_logs(job)
        data = {"test": test.record()}
    else:
        train = datasets.load(
            cfg.DATASETS.TRAIN,
            training=True,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=_least_keypoints(cfg),
            fraction=cfg.MOCO.TRAIN_FRACTION,
            split_seed=cfg.MOCO.SPLIT_SEED,
        )
        _check_classes(cfg, train)
        datasets.check_classes(train.names[0], train.classes, test.names[0], test.classes)
        joints = _keypoints(cfg, (*train.names, *test.names))
        _check_data(job, test, train)
        model, facts = _train(job, train, joints)
        data = {"train": train.record(), "test": test.record()}
    outcome = evaluate(cfg, model, test, job.quiet)
    if comm.is_main_process():
        _draw(job, model, test, outcome)
        record = write_results(
            job.output,
            task=find_task(cfg)[0],
            per_seed=[outcome.metrics],
            protocol=recipes.protocol(cfg, job.processes),
            config=recipes.as_dict(cfg),
            checkpoint=facts,
            data=data,
            details=outcome.details,
            recipe=recipes.named(job.recipe, cfg, job.processes),
            started=started,
        )
        if cfg.MOCO.KEEP == 1:  # more are kept for their own sake
            checkpoint.forget_states(job.output)
        _say_results(job, record)


def _keypoints(cfg: CfgNode, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the keypoints that a recipe's detector finds; none: it finds none."""
    return keypoints.prepare(cfg, names) if cfg.MODEL.KEYPOINT_ON else ()


def _keypoint_count(cfg: CfgNode) -> int:
    """Return how many keypoints an object has for a recipe's detector; 0: it finds none."""
    return int(cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) if cfg.MODEL.KEYPOINT_ON else 0


def _least_keypoints(cfg: CfgNode) -> int:
    """Return how many an image is trained on with, as Detectron2 filters images."""
    head = cfg.MODEL.ROI_KEYPOINT_HEAD
    return int(head.MIN_KEYPOINTS_PER_IMAGE) if cfg.MODEL.KEYPOINT_ON else 0


def _train(
    job: Job, train: datasets.Loaded, joints: Sequence[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """Bring a detector from its start, or from where it stopped, to its end."""
    cfg = job.cfg
    model = build_detector(cfg)
    facts = fill_backbone(model, cfg)
    state = _resume_state(job, facts)
    memory.check(cfg, train.dicts, model, job.processes, job.local_processes)
    job.say(f"weights: {_describe(facts)}")
    job.say(_plan(cfg, train, job, state))
    job.say(f"output: {job.output}")
    _begin_logs(job)
    if comm.is_main_process():
        write_text(job.output / CONFIG_FILE, cfg.dump())
    learnt = {"classes": list(train.classes)} | ({"keypoints": list(joints)} if joints else {})
    trainer = Trainer(cfg, model, train, facts | learnt, job.quiet)
    trainer.train_from(state)
    trainer.recompute_statistics()
    if comm.is_main_process():
        trainer.save(job.output / FINAL_FILE)
    return model, facts


def check_data(cfg: CfgNode, *, quiet: bool) -> int:
    """Look at every set that a recipe names, whole, and say what is wrong with it.

    Returns:
        0: nothing stops a run.

    Raises:
        UserError: something does.
    """
    sets = dict.fromkeys(cfg.DATASETS.TRAIN, True) | dict.fromkeys(cfg.DATASETS.TEST, False)
    missing = datasets.missing_files(list(sets))
    if missing:
        raise UserError("; ".join(missing))
    readings = {name: datasets.read(name) for name in sets}
    findings = []
    for name, training in sets.items():
        found = data_check.look(
            readings[name],
            training=training,
            decode=True,
            keypoints=_keypoint_count(cfg),
            quiet=quiet,
        )
        findings.append(found)
        print("\n".join(found.lines()), flush=True)
    data_check.refuse(findings)
    first = next(iter(readings.values()))
    for reading in readings.values():
        datasets.check_classes(first.name, first.classes, reading.name, reading.classes)
    _keypoints(cfg, list(sets))
    print("data: nothing stops a run")
    return 0


def _check_data(job: Job, test: datasets.Loaded, train: datasets.Loaded | None = None) -> None:
    """Look at the heads of all images, in the main process; the others wait for it later."""
    if not comm.is_main_process():
        return
    trained = () if train is None else train.readings
    pairs = [*((reading, True) for reading in trained), *((r, False) for r in test.readings)]
    points = _keypoint_count(job.cfg)
    findings = [
        data_check.look(r, training=training, keypoints=points, quiet=job.quiet)
        for r, training in pairs
    ]
    for found in findings:
        if found.notes:
            job.say("\n".join(found.lines()))
    data_check.refuse(findings)


def _draw(job: Job, model: nn.Module, test: datasets.Loaded, outcome: Outcome) -> None:
    """Draw what a reader looks at first: some images, and the curves."""
    shown = take_pictures(job.cfg, model, test, outcome.worth)
    draw_detections(job.output / PICTURE_FILE, shown, SCORE)
    losses = job.output / METRICS_FILE
    per_class = outcome.details["per_class"]
    draw_curves(job.output / CURVES_FILE, losses, outcome.curves, per_class)


def _say_results(job: Job, record: Mapping[str, Any]) -> None:
    if comm.is_main_process():
        print(f"results: {job.output / FILE_NAME}: {format_metrics(record)}", flush=True)


def _missing_weights(job: Job) -> list[str]:
    weights = job.cfg.MODEL.WEIGHTS
    if job.eval_only:
        file = _detector_file(job)
        lost = f"detector {file}: no such file; name one as MODEL.WEIGHTS"
        return [] if file.is_file() else [lost]
    if not weights or Path(weights).is_file() or released.find(weights):
        return []
    if "://" in weights:
        tail = f"/{weights.partition('://')[2]}"
        known = [release.name for release in released.RELEASES if release.address.endswith(tail)]
        raise UserError(
            f"MODEL.WEIGHTS {weights}: addresses are not fetched here; want a checkpoint's file, "
            f"or {'its name' if known else 'one of'} {', '.join(known or released.names())}"
        )
    return [
        f"MODEL.WEIGHTS {weights}: no such file; make it with python convert/to_detectron2.py "
        "ckpt.pth, or ask for random init with MODEL.WEIGHTS ''"
    ]


def _detector_file(job: Job) -> Path:
    """Return what --eval-only measures: the run's own detector with --resume, else the named."""
    return job.output / FINAL_FILE if job.resume is not None else Path(job.cfg.MODEL.WEIGHTS)


def _check_folder(job: Job) -> None:
    """Refuse a folder that another run has written to."""
    files = (CONFIG_FILE, FINAL_FILE, FILE_NAME)
    kept = [file for file in files if (job.output / file).exists()]
    kept += [path.name for path in checkpoint.list_states(job.output)]
    if kept and job.resume is None:
        raise UserError(
            f"output folder {job.output}: holds another run ({kept[0]}); go on with it by --resume,"
            " or name another folder: OUTPUT_DIR x"
        )
    if CONFIG_FILE in kept:
        before, now = recipes.read_saved(job.output / CONFIG_FILE), recipes.flatten(job.cfg)
        changed = [k for k in (*recipes.number_keys(now), "SEED") if before.get(k) != now[k]]
        if changed:
            key = changed[0]
            raise UserError(
                f"output folder {job.output}: its run has other settings ({len(changed)}; first "
                f"{key}: {before.get(key)}, now {now[key]}); name another folder: OUTPUT_DIR x"
            )
    # Proved on what exists, so that a later refusal leaves no empty folder behind.
    output_folder(next(f for f in (job.output, *job.output.absolute().parents) if f.exists()))


def _finished_record(job: Job) -> dict[str, Any] | None:
    file = job.output / FILE_NAME
    if job.resume is None or job.eval_only or not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    _check_same_start(record["checkpoint"], start_facts(job.cfg), file)
    return record


def _check_classes(cfg: CfgNode, data: datasets.Loaded) -> None:
    if len(data.classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES: found {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, "
            f"{', '.join(data.names)} has {len(data.classes)}; set it to that"
        )


def _describe(facts: Mapping[str, Any]) -> str:
    """Say in a line what a detector starts from."""
    if facts["name"] == "random":
        return f"random init, seed {facts['seed']} (MODEL.WEIGHTS is '')"
    epoch = "" if facts.get("epoch") is None else f", epoch {facts['epoch']}"
    hashed = facts.get("sha256") or facts.get("detector_sha256", "")
    landed = facts.get("tensors_landed")
    count = "" if landed is None else f", {landed} of {landed} backbone tensors landed"
    place = facts.get("detector") or facts.get("file")
    file = f"{place}: " if place else ""
    return f"{file}{facts['method']}{epoch}, {facts['name']} (sha256 {hashed[:12]}){count}"


def _resume_state(job: Job, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint to go on from, if there is one and it is of this very run."""
    if job.resume is None:
        return None
    state = checkpoint.read_state(job.resume, job.output, job.say)
    if state is None:
        return None
    where = Path(job.resume) if job.resume != checkpoint.AUTO else job.output
    _check_same_start(state[EXTRA_KEY]["facts"], facts, where)
    now = job.processes * job.cfg.MOCO.ACCUMULATE
    if state["streams"] != now:
        raise UserError(
            f"{where}: its run took a batch in {state['streams']} parts (processes times "
            f"MOCO.ACCUMULATE), now {now}; choose them so that it is {state['streams']} again"
        )
    return state


def _check_same_start(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    if before["sha256"] != now["sha256"]:
        raise UserError(
            f"{where}: began from {_describe(before)}; MODEL.WEIGHTS is now {_describe(now)}; "
            "name another folder: OUTPUT_DIR x"
        )


def _plan(cfg: CfgNode, data: datasets.Loaded, job: Job, state: Mapping[str, Any] | None) -> str:
    """Say in two lines what will be trained, and how."""
    start = "" if state is None else f" from {state['next_iteration']} on"
    protocol = recipes.protocol(cfg, job.processes)
    at_once, parts = recipes.images_at_once(cfg, job.processes), cfg.MOCO.ACCUMULATE
    what = (
        f"training: {', '.join(data.names)} ({len(data.dicts)} images)",
        f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images{start}",
        f"LR {cfg.SOLVER.BASE_LR:g} after {cfg.SOLVER.WARMUP_ITERS} of warm-up",
        f"x {cfg.SOLVER.GAMMA:g} at {', '.join(map(str, cfg.SOLVER.STEPS))}",
    )
    how = (
        f"on: {job.processes} x {cfg.MODEL.DEVICE} {cfg.MOCO.PRECISION}",
        f"{at_once} images each at once" + (f", {parts} times an iteration" if parts > 1 else ""),
        f"{protocol['norm']} over {protocol['norm_group_images']} images",
        str(protocol["detectron2"]),
    )
    return f"{', '.join(what)}\n{', '.join(how)}"


def _begin_logs(job: Job) -> None:
    """Send what Detectron2 says, and every warning, to log.txt and not to the terminal."""
    rank = comm.get_rank()
    for name in ("detectron2", "fvcore", "py.warnings"):
        setup_logger(str(job.output), rank, name=name, configure_stdout=False)
    logging.captureWarnings(True)
    # Warns, whatever Python's filters say, about a function that Detectron2 imports from torch.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
