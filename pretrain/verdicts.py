"""Plain verdicts on a run, from the lines of its log: what holds, since when, until when.

A verdict begins when some lines in a row show it, and ends when as many do not; it says so once
each. Everything it remembers comes from the lines, so that a resumed run which reads its log again
is where it was.

What is behind the thresholds stands under "Facts" in each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

Line = Mapping[str, Any]

NEAR_CHANCE = 0.02  # of log(K + 1)
SURE = 99.9  # percent of queries that find their key
KNN_FALL = 1.0  # points
COLLAPSED = -0.002  # uniformity
WAIT = 25.0  # percent of the time


@dataclass
class Verdict:
    """One thing that can be said of a run, and since when it holds.

    Attributes:
        holds_now: whether it has begun and not ended.
        since: the step and epoch that it began at.
    """

    name: ClassVar[str]
    patience: ClassVar[int] = 3  # lines in a row: one line may be noise

    holds_now: bool = False
    since: tuple[int, float] = (0, 0.0)
    contrary: list[tuple[int, float]] = field(default_factory=list)

    def holds(self, line: Line) -> bool | None:
        """Say whether a line shows it; None: the line is about something else."""
        raise NotImplementedError

    def begin(self, line: Line) -> str:
        """Say in words what holds and what to do."""
        raise NotImplementedError

    def end(self, line: Line) -> str:
        """Say in words that it is over."""
        raise NotImplementedError

    def hear(self, line: Line) -> str | None:
        """Take a line; return what is to be said, where it begins or ends."""
        now = self.holds(line)
        if now is None:
            return None
        if now == self.holds_now:
            self.contrary.clear()
            return None
        self.contrary.append((int(line["step"]), float(line.get("epoch", 0.0))))
        if len(self.contrary) < self.patience:
            return None
        if now:
            self.since = self.contrary[0]
            words = self.begin(line)
        else:
            words = f"over after {self.lasted(*self.contrary[0])}: {self.end(line)}"
        self.holds_now = now
        self.contrary.clear()
        return f"{self.name}: {words}"

    def lasted(self, step: int, epoch: float) -> str:
        """Say how long it had held at a step."""
        return f"{step - self.since[0]} steps ({epoch - self.since[1]:.3g} epochs)"


class Chance(Verdict):
    """The loss says no more than a guess among the positive and K negatives.

    Facts: MoCo on CIFAR-10 is 16% under log(K + 1) after its first epoch, and no logged epoch comes
    nearer than 12%; one line's mean of 10 steps strays by less than 1%. So 2% is neither. The time
    in which the random queue is replaced does not count, see `Rise`.
    """

    name = "chance"

    def holds(self, line: Line) -> bool | None:
        """Hold a line's loss against log(K + 1)."""
        if "chance_loss" not in line or line.get("queue_random", 0.0) > 0:
            return None
        return bool(line["loss"] > (1 - NEAR_CHANCE) * line["chance_loss"])

    def begin(self, line: Line) -> str:
        """Name the loss, chance, and how images of one batch are told apart."""
        return (
            f"the loss has been {line['loss']:.3f} or so since step {self.since[0]}, and a guess "
            f"has log(K + 1) = {line['chance_loss']:.3f}; {line['batch_top1']:.1f}% of queries are "
            "nearest to their own key in the batch. Normal in the first epoch; if it lasts, try "
            "another --lr or weaker augmentation"
        )

    def end(self, line: Line) -> str:
        """Say how far under chance the loss is."""
        under = 100 * (1 - line["loss"] / line["chance_loss"])
        return f"the loss is {line['loss']:.3f}, {under:.1f}% under log(K + 1)"


@dataclass
class Rise(Verdict):
    """The loss rises while random keys are replaced by real ones: nothing is wrong.

    Facts: random keys are nearly orthogonal to a query, so the loss starts low; it rises for K / N
    steps (256 at the papers' 65536 and 256), then falls (the reference's issues 9 and 43).
    """

    name: ClassVar[str] = "rise"
    patience: ClassVar[int] = 1  # the time is short: 16 steps in the CIFAR-10 recipe

    lowest: float = math.inf
    random: float = 100.0  # percent of the keys before the line's steps

    def holds(self, line: Line) -> bool | None:
        """Look for a loss above the lowest so far while keys were random."""
        if "chance_loss" not in line:
            return None
        random, self.random = self.random, line.get("queue_random", 0.0)
        self.lowest = min(self.lowest, line["loss"])
        risen = line["loss"] - self.lowest > NEAR_CHANCE * line["chance_loss"]
        return random > 0 and (risen or self.holds_now)

    def begin(self, line: Line) -> str:
        """Say that it is normal, and how long it will last."""
        return (
            f"the loss went from {self.lowest:.3f} to {line['loss']:.3f} while the random keys of "
            f"the start are replaced by real ones ({line.get('queue_random', 0.0):.0f}% are left): "
            "normal, real keys are harder negatives"
        )

    def end(self, line: Line) -> str:
        """Say what is expected from here on."""
        return f"all keys are real; from {line['loss']:.3f} the loss should fall"


@dataclass
class Leak(Verdict):
    """The pretext task is solved and the features get worse, or nobody looks at them.

    Facts: with shuffling BN the pretext accuracy is 96 to 97% at epoch 80; without, above 99.9%,
    while the kNN vote falls from 28 to 23% (arXiv:1911.05722, Figure A.1). A vote on 10,000 images
    strays by half a point, so a fall is a whole one.
    """

    name: ClassVar[str] = "leak"

    best: float = -math.inf
    knn: float = math.nan
    sure: bool = False
    meter: tuple[float, float] | None = None

    def holds(self, line: Line) -> bool | None:
        """Look for an accuracy near 100% and a vote below its best."""
        if "leak_apart" in line:
            self.meter = (line["leak_shuffled"], line["leak_apart"])
        if "knn_top1" in line:
            self.knn, self.best = line["knn_top1"], max(self.best, line["knn_top1"])
            return None
        if "top1" not in line or line.get("queue_random", 0.0) > 0:
            return None  # random keys are easily told from a positive
        self.sure = line["top1"] > SURE
        falls = math.isnan(self.knn) or self.best - self.knn > KNN_FALL
        return self.sure and falls

    def begin(self, line: Line) -> str:
        """Name the two causes, and what tells them apart."""
        voted = (
            "no kNN vote says whether the features get worse (--knn-dir)"
            if math.isnan(self.knn)
            else f"the kNN vote fell from {self.best:.1f} to {self.knn:.1f}%"
        )
        return (
            f"{line['top1']:.2f}% of queries find their key since step {self.since[0]}, and "
            f"{voted}: batch norm leaks which key it is, or the augmentation is too weak. "
            f"{self.measured()}: against the one, more --bn-groups; against the other, "
            "--aug-plus or a smaller crop_scale"
        )

    def measured(self) -> str:
        """Say what the leak meter last found, or that there is one."""
        if self.meter is None:
            return "--leak-meter tells which"
        return (
            f"The leak meter finds {self.meter[0]:.1f}% of keys encoded as this run does it and "
            f"{self.meter[1]:.1f}% of those encoded among any images, which differ where it leaks"
        )

    def end(self, line: Line) -> str:
        """Say which of the two it is that ended."""
        voted = "" if math.isnan(self.knn) else f", the kNN vote is {self.knn:.1f}%"
        return f"{line['top1']:.2f}% of queries find their key{voted}"


class Collapse(Verdict):
    """All images have one embedding.

    Facts: embeddings are near each other when a run begins. The nearest seen in a run that learned,
    a ResNet-18 in its first epoch, had a uniformity of -0.008: pairs 0.004 apart, squared.
    """

    name = "collapse"

    def holds(self, line: Line) -> bool | None:
        """Look for pairs that are no distance apart."""
        if "uniformity" not in line:
            return None
        return bool(line["uniformity"] > COLLAPSED)

    def begin(self, line: Line) -> str:
        """Say how near each other embeddings are."""
        apart = -line["uniformity"] / 2
        return (
            f"the embeddings of all images are one since step {self.since[0]}: pairs are "
            f"{apart:.2g} apart (squared; random ones: 2), in {line['effective_rank']:.1f} "
            "directions. Features do not tell images apart: lower --lr or --wd, warm up, look at "
            "the images"
        )

    def end(self, line: Line) -> str:
        """Say how far apart they are again."""
        return (
            f"embeddings are apart again, uniformity {line['uniformity']:.3f} in "
            f"{line['effective_rank']:.1f} directions"
        )


class Starved(Verdict):
    """The device waits for images: what it costs is the share of the time that it waits."""

    name = "starved"

    def holds(self, line: Line) -> bool | None:
        """Look at the share of the time."""
        return bool(line["data_wait"] > WAIT) if "data_wait" in line else None

    def begin(self, line: Line) -> str:
        """Name the share and the ways out."""
        return (
            f"{line['data_wait']:.0f}% of the time the device waits for images, at "
            f"{line['images_per_s']:.0f} images/s: raise --workers, or store smaller images on a "
            "faster disk"
        )

    def end(self, line: Line) -> str:
        """Name the share."""
        return f"{line['data_wait']:.0f}% of the time the device waits for images"


class NotFinite(Verdict):
    """The loss, or a weight, is NaN or infinite; the run stops at once."""

    name = "not finite"
    patience = 1

    def holds(self, line: Line) -> bool | None:
        """Look at the loss, and at the weights where a checkpoint was refused for them."""
        seen = [line[key] for key in ("loss", "weights") if key in line]
        return not all(map(math.isfinite, seen)) if seen else None

    def begin(self, line: Line) -> str:
        """Name the step."""
        what = "a weight after" if "weights" in line else "the loss of"
        return f"{what} step {line['step']} is no number; lower --lr, and resume"

    def end(self, line: Line) -> str:
        """Name the loss."""
        return f"the loss is {line['loss']:.3f}"


VERDICTS = (Chance, Rise, Leak, Collapse, Starved, NotFinite)


class Judge:
    """All verdicts on one run."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = [verdict() for verdict in VERDICTS]

    def hear(self, line: Line) -> list[str]:
        """Take a line of the log; return what is to be said now."""
        return [words for verdict in self.verdicts if (words := verdict.hear(line))]

    def still(self, step: int, epoch: float) -> list[str]:
        """Say at the end of a run what holds until now, and for how long."""
        return [
            f"{verdict.name}: still holds after {verdict.lasted(step, epoch)}"
            for verdict in self.verdicts
            if verdict.holds_now
        ]
