"""What the page says: a suite's findings as a document, for a reader who opens it cold."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import plots
from benchmarks.document import (
    Commands,
    Document,
    Line,
    Picture,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from benchmarks.findings import ENDED_WELL, LEARNED, Curve, Findings
from benchmarks.records import RANDOM
from benchmarks.standings import Standing
from benchmarks.tables import (
    card_blocks,
    command_blocks,
    curve_blocks,
    number,
    row_name,
    seeds_blocks,
    signed,
    table_blocks,
    trained,
)
from benchmarks.titles import metric_name, recipe_title, task_title

V2 = "--mlp --moco-t 0.2 --aug-plus --cos"


def build(findings: Findings) -> Document:
    """Write the document of one suite."""
    sections = [
        Section("The table", table_blocks(findings.standings)),
        Section("Rows of the papers", _paper_rows(findings)),
        Section("What the seeds can say", seeds_blocks(findings.standings)),
        Section("What these numbers are worth", _worth(findings)),
        Section("Curves", curve_blocks(findings.standings)),
        Section("The checkpoints", card_blocks(_starts(findings))),
        Section("Pretraining", _pretraining(findings)),
        Section("Conversion", _conversion(findings)),
        Section("Detector training", _detectors(findings)),
        Section("Class by class", _classes(findings)),
        Section("Detections beside the ground truth", _pictures(findings)),
        Section("Next: your own checkpoint and images", _next(findings)),
        Section("How this was run", _record(findings)),
    ]
    kept = [section for section in sections if section.blocks]
    return Document(f"MoCo Transfer: what {_name(findings)} is worth", _opening(findings), kept)


def _opening(findings: Findings) -> list[Any]:
    standings = findings.standings
    first = _made(findings)
    if standings.recipes:
        ways = "; ".join(recipe_title(recipe) for recipe in standings.recipes)
        first += f" Measured: {ways}."
    if len(standings.rows) > 1 and standings.rows[-1].key == RANDOM:
        first += (
            " Where random initialisation was measured too, it had the same data, schedule and "
            "budget."
        )
    notes = [Text(text, "hole") for text in ("; ".join(findings.holes), _reduced(findings)) if text]
    tiles = list(_tiles(standings.rows, findings))
    return [Text(first, "lede"), *notes, *([Tiles(tiles)] if tiles else [])]


def _reduced(findings: Findings) -> str:
    """Say that settings were overridden, if they were: nothing then compares with a paper."""
    jobs = [job for job in findings.suite["jobs"] if job.get("reduced")]
    if not jobs:
        return ""
    settings = dict.fromkeys(f"{k} {v}" for job in jobs for k, v in job["reduced"].items())
    shown = ", ".join(list(settings)[:4])
    more = f" and {len(settings) - 4} more" if len(settings) > 4 else ""
    return (
        f"Reduced: {len(jobs)} of {len(findings.suite['jobs'])} jobs ran with settings of their "
        f"recipes overridden ({shown}{more}), or from what such a job made. Their numbers compare "
        "with no printed number."
    )


def _paper_rows(findings: Findings) -> list[Any]:
    """Say which rows of a paper's tables this suite fills, and what the others want."""
    rows = findings.suite.get("tables") or []
    states: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in findings.suite["jobs"]:
        if "/" in str(job["name"]):
            task, init, _ = findings.place(job["name"])
            states.setdefault((task, init), []).append(job)
    lines = []
    for row in rows:
        facts = ", ".join(f"{key} {value}" for key, value in row["wants"].items())
        own = [
            job
            for (task, init), jobs in states.items()
            for job in jobs
            if init == row["by"]
            and any(task == t or task.startswith(f"{t}-") for t in row["task"].split(", "))
        ]
        lines.append(Line([f"{row['table']}, {row['row']}", row["task"], _filled(own), facts]))
    return [Table(["row", "tasks", "here", "wants"], lines)] if lines else []


def _filled(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Say how far a row of a paper is filled by its jobs."""
    if not jobs:
        return "open: wants another checkpoint"
    done = [job for job in jobs if job["state"] in ENDED_WELL]
    if not done:
        return f"open: {jobs[0].get('reason') or jobs[0]['state']}"
    marks = ["reduced"] if any(job.get("reduced") for job in done) else []
    marks += [f"{len(done)} of {len(jobs)} tasks"] if len(done) < len(jobs) else []
    return ", ".join(["filled", *marks])


def _starts(findings: Findings) -> dict[str, Mapping[str, Any]]:
    """Return the facts of each checkpoint that was measured, or at least converted."""
    found = {row_name(record): record.start for record in findings.records.values()}
    certificate = findings.certificate or {}
    facts = certificate.get("facts")
    if isinstance(facts, dict):
        found.setdefault(str(facts.get("name")), facts)
    return found


def _tiles(rows: list[Standing], findings: Findings) -> Iterator[Tile]:
    """Show the headline numbers of the first checkpoint beside random initialisation."""
    if len(rows) < 2 or rows[-1].key != RANDOM:
        return
    for column in findings.standings.headlines():
        ours, random = (row.cells.get(column) for row in (rows[0], rows[-1]))
        if ours is not None and random is not None:
            difference = ours.spread.mean - random.spread.mean
            beside = f"random init {_one_line(number(random))}, difference {signed(difference)}"
            name = task_title(column.metric, column.recipe)
            mark = " (reduced)" if ours.why_not or random.why_not else ""
            label = f"{name}, {metric_name(column.metric)}{mark}"
            yield Tile(label, _one_line(number(ours)), beside)


def _made(findings: Findings) -> str:
    """Say in a sentence where the checkpoint came from."""
    found = findings.pretraining
    if found is None:
        converted = " and converted for Detectron2" if findings.certificate else ""
        several = len(findings.suite.get("checkpoints") or {}) > 1
        return f"{_name(findings)} {'were' if several else 'was'} given{converted}."
    facts = found.facts
    images = f"{facts['images']:,} images" if isinstance(facts.get("images"), int) else "images"
    took = f" for {_minutes(facts['seconds'])}" if facts.get("seconds") else ""
    method, arch = facts.get("method", "MoCo"), _arch(facts.get("arch"))
    where = facts.get("set", "the embedded set")
    return f"A {method} {arch} was pretrained on {images} ({where}){took} on this machine."


def _worth(findings: Findings) -> list[Any]:
    if not any("embedded" in recipe for recipe in findings.standings.recipes):
        return []
    took = findings.pretraining and findings.pretraining.facts.get("seconds")
    budget = f"{_minutes(took)} of pretraining on a CPU" if took else "These measurements"
    return [
        Text(
            f"{budget} {'stand' if took else 'take minutes on a CPU and stand'} against 53 hours "
            "on 8 V100 GPUs in the papers (MoCo v2, Table 3). Features after minutes need not beat "
            "random initialisation: the table shows what came out. What counts on this page is the "
            "road: whether the loss falls, every tensor arrives and the detectors learn. The same "
            "commands then take a budget that counts."
        ),
        Text("An honest budget: ImageNet-1k, 200 epochs of MoCo v2, then its published detectors."),
        Commands(
            [
                f"python pretrain/main_moco.py /path/to/imagenet {V2} --epochs 200",
                "python convert/to_detectron2.py ckpt.pth",
                "python transfer/train_net.py --config configs/coco_R50_C4_1x_moco.yaml",
                "python transfer/train_net.py --config configs/voc_R50_C4_24k_moco.yaml",
            ]
        ),
    ]


def _pretraining(findings: Findings) -> list[Any]:
    found = findings.pretraining
    if found is None:
        given = findings.suite.get("given") or {}
        files = ", ".join(f"`{path}`" for path in given.values())
        what = "checkpoints were" if len(given) > 1 else "checkpoint was"
        if files:
            return [Text(f"not run: the {what} given ({files})", "note")]
        return [Text("not run", "hole")]
    blocks: list[Any] = []
    if found.under_chance is not None:
        verdict = "it learns" if found.under_chance >= LEARNED else "less than wanted"
        blocks.append(
            Text(
                f"Check: mean loss of the last tenth is {found.last_tenth:.2f}, "
                f"{found.under_chance:.1f}% under log(K+1) = {found.chance:.2f}; wanted: at least "
                f"{LEARNED:g}%: {verdict}.{_told_apart(found.facts)}"
            )
        )
    figure = plots.pretraining_figure(found)
    if figure is None:
        blocks.append(Text("not run: the log holds no step yet", "hole"))
    else:
        caption = (
            "The contrastive loss may rise first, while random queue entries are replaced; chance "
            "is a guess among the positive and K negatives."
            + (" The kNN vote on frozen features is not what it asks for." if found.knn else "")
        )
        blocks.append(Picture(figure, "figures/pretraining.svg", caption))
    return [*blocks, Text(_settings(found.facts), "note")]


def _told_apart(facts: dict[str, Any]) -> str:
    """Say how well images of one batch are told apart; older records do not know it."""
    share, batch = facts.get("batch_top1_last_tenth"), facts.get("batch_size")
    if share is None or not batch:
        return ""
    return (
        f" {share:.1f}% of queries are nearest to their own key among the batch's {batch} "
        f"(chance {100 / batch:.1f}%): this the age of the queue's keys cannot fake."
    )


def _settings(facts: dict[str, Any]) -> str:
    """Say a pretraining's settings in a line; what its record lacks is left out."""
    parts = [str(facts[key]) for key in ("method", "set") if key in facts]
    parts += [_arch(facts["arch"])] if "arch" in facts else []
    parts += [words] if (words := trained((facts.get("config") or {}) | facts)) else []
    parts += [_minutes(facts["seconds"])] if facts.get("seconds") else []
    return ", ".join(parts)


def _conversion(findings: Findings) -> list[Any]:
    found = findings.certificate
    if found is None and not _has_job(findings, "convert"):
        return []
    if found is None:
        return [Text("not run: there is no certificate", "hole")]
    tensors, proof, pixels = (found.get(key) or {} for key in ("tensors", "proof", "pixels"))
    lines = [
        Line(["source", f"{found.get('source')}, sha256 `{found.get('sha256')}`"]),
        Line(["network", f"{_arch(found.get('arch'))}, {_method(found)}"]),
        Line(["layout", f"{found.get('layout')}, {found.get('branch')} encoder"]),
        Line(
            [
                "tensors landed",
                f"{tensors.get('landed')} of {tensors.get('expected')} in Detectron2's model, "
                f"beside {tensors.get('counters')} batch counters; {tensors.get('dropped')} "
                "dropped (heads, other encoder, queue)",
            ],
            "strong",
        ),
    ]
    for target in ("c4", "fpn"):
        if target in proof:
            gap, scale = proof[target]["largest_difference"], proof[target]["scale"]
            size = f"{gap:.1e} at most" if gap else "0, equal to the last bit"
            text = f"{size}, of features up to {scale:.3g} (res2 to res5, one image)"
            lines.append(Line([f"feature difference, R50-{target.upper()}", text], "strong"))
    if not proof.get("ran"):
        lines.append(Line(["features compared", f"not run: {proof.get('reason')}"]))
    lines += [
        Line(["Detectron2 that ran", str(proof.get("detectron2") or "none")]),
        Line(
            [
                "pixels it expects",
                f"{pixels.get('channel_order')}, mean {pixels.get('mean')}, "
                f"std {pixels.get('std')} of 0..1; stride in the 1x1 convolution: "
                f"{found.get('stride_in_1x1')}",
            ]
        ),
        Line(["output", f"`{found.get('output')}`"]),
    ]
    return [Table(["certificate", ""], lines)]


def _detectors(findings: Findings) -> list[Any]:
    tasks: dict[str, dict[str, list[Curve]]] = {}
    for name, curve in findings.curves.items():
        task, init, _ = findings.place(name)
        tasks.setdefault(_task(findings, task), {}).setdefault(init, []).append(curve)
    figure = plots.detector_figure(tasks)
    if figure is None:
        return [Text("not run: no detector has written a training curve", "hole")] * (
            _has_job(findings, "train_net") or bool(findings.curves)
        )
    caption = (
        "Total training loss of the detectors (thin: each logged iteration, thick: moving mean; a "
        "line a trial), by what they start from, same schedule."
    )
    return [Picture(figure, "figures/detectors.svg", caption)]


def _task(findings: Findings, task: str) -> str:
    """Name a task by the recipe that its records have followed."""
    records = findings.records.items()
    recipes = [record.recipe for name, record in records if findings.place(name)[0] == task]
    return recipe_title(recipes[0]) if recipes else recipe_title(task)


def _has_job(findings: Findings, word: str) -> bool:
    """Say whether a job of the suite has a word in its command."""
    return any(word in str(job.get("command")) for job in findings.suite["jobs"])


def _classes(findings: Findings) -> list[Any]:
    """Draw each task's numbers by class, a bar a checkpoint, where the records have them."""
    tasks: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for record in findings.records.values():
        per_class = (record.content.get("details") or {}).get("per_class") or {}
        for measure, values in list(per_class.items())[:1]:
            tasks.setdefault((record.recipe, measure), {})[row_name(record)] = values
    blocks: list[Any] = []
    for (recipe, measure), rows in tasks.items():
        figure = plots.class_figure(rows, measure)
        if figure is not None and len(next(iter(rows.values()))) > 1:
            caption = f"{recipe_title(recipe)}: {measure} of each class."
            blocks.append(Picture(figure, f"figures/classes_{recipe}.svg", caption))
    return blocks


def _pictures(findings: Findings) -> list[Any]:
    blocks = []
    shown: set[tuple[str, str]] = set()
    for name, path in findings.pictures.items():
        task, init, seed = findings.place(name)
        if (task, init) in shown:
            continue  # one trial stands for the others
        shown.add((task, init))
        starts = {"random": "random initialisation", "moco": _name(findings)}
        trial = f" (seed {seed})" if ".seed" in name else ""
        caption = (
            f"{_task(findings, task)}, from {starts.get(init, init)}{trial}: validation images, "
            "ground truth beside detections."
        )
        blocks.append(Picture(path.read_bytes(), str(path.relative_to(findings.root)), caption))
    if blocks or not _has_job(findings, "train_net"):
        return blocks
    return [Text("not run: no detector has drawn its detections", "hole")]


def _next(findings: Findings) -> list[Any]:
    return [
        Text(
            "This page for a checkpoint of your own, in any layout that the converter recognises:"
        ),
        Commands([f"python benchmarks/suite.py ckpt.pth --suite {findings.suite.get('typed')}"]),
        Text(
            "Pretrain MoCo v2 on a folder of your own (images in `train/CLASS/`), convert, "
            "fine-tune on COCO under `DETECTRON2_DATASETS`, and probe its features on your classes:"
        ),
        Commands(
            [
                f"python pretrain/main_moco.py /path/to/images {V2}",
                "python convert/to_detectron2.py ckpt.pth",
                "python transfer/train_net.py --config configs/coco_R50_C4_1x_moco.yaml",
                "python transfer/main_lincls.py /path/to/images --pretrained ckpt.pth",
                "python transfer/knn.py /path/to/images --pretrained ckpt.pth",
            ]
        ),
    ]


def _record(findings: Findings) -> list[Any]:
    suite = findings.suite
    jobs = [
        Line(
            [
                str(job.get("name")),
                f"{job.get('state')}" + (f": {job['reason']}" if job.get("reason") else ""),
                f"{job.get('seconds') or 0:.0f}",
                f"`{job.get('command')}`",
            ]
        )
        for job in suite["jobs"]
    ]
    work = sum(job.get("seconds") or 0 for job in suite["jobs"])
    call = (
        f"Suite `{suite.get('suite')}`, up to {suite.get('parallel')} jobs at once on "
        f"{suite.get('cores')} cores: the last call took {_minutes(suite.get('seconds') or 0)}; "
        f"the jobs took {_minutes(work)} together. Finished jobs are reused, not run again."
    )
    return [
        Text(call),
        Table(["job", "state", "seconds", "command"], jobs),
        Text("Two numbers compare only if the fingerprints of their protocols are equal."),
        *command_blocks(findings.records.values()),
        Table(["environment", ""], _environment(findings)),
    ]


def _environment(findings: Findings) -> list[Line]:
    found = findings.suite.get("environment") or {}
    hardware, versions = found.get("hardware") or {}, found.get("versions") or {}
    gpus = ", ".join(hardware.get("gpus") or []) or "none used"
    named = ", ".join(f"{name} {v}" for name, v in versions.items() if v and name != "detectron2")
    return [
        Line(["MoCo Transfer", f"{found.get('moco_transfer')}, commit {found.get('commit')}"]),
        Line(["Detectron2", str(versions.get("detectron2") or "not installed")]),
        Line(["libraries", f"Python {found.get('python')}, {named}"]),
        Line(["hardware", f"{hardware.get('cpu')}, {hardware.get('cores')} cores; GPUs: {gpus}"]),
        Line(["system", str(found.get("platform"))]),
    ]


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _name(findings: Findings) -> str:
    found = findings.certificate
    several = findings.suite.get("checkpoints") or {}
    if len(several) > 1:
        return f"{len(several)} checkpoints"
    if found is None:
        return findings.standings.rows[0].label if findings.standings.rows else "a checkpoint"
    return f"{found.get('source')} ({_method(found)})"


def _method(certificate: dict[str, Any]) -> str:
    epoch = certificate.get("epoch")
    return f"{certificate.get('method')}" + ("" if epoch is None else f", epoch {epoch}")


def _arch(name: object) -> str:
    return {"resnet50": "ResNet-50", "resnet18": "ResNet-18"}.get(str(name), str(name))


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
