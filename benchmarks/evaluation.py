"""A suite in one output folder: where its data and its jobs' places are, and one call of it."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import needs
from benchmarks.jobs import Step, Suite, plan
from benchmarks.local import Local
from benchmarks.rows import OWN, Row, close, describe, filled, spread
from benchmarks.runner import Board, Place, Runner
from convert.errors import UserError


@dataclass
class LaidOut:
    """A suite for certain checkpoints.

    Attributes:
        suite: with the checkpoints' jobs.
        steps: its jobs in order.
        given: files of the command line by name.
        rows: the checkpoints.
        table: rows of the papers, and who fills each; see `rows.filled`.
    """

    suite: Suite
    steps: list[Step]
    given: Mapping[str, Path]
    rows: Sequence[Row]
    table: list[dict[str, Any]]


@dataclass
class Evaluation:
    """A suite in one output folder.

    Attributes:
        suite: as its file says it.
        root: the output folder.
        roots: folders of data by name.
        place: where jobs run.
    """

    suite: Suite
    root: Path
    roots: Mapping[str, Path]
    place: Place
    facts: dict[Path, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def prepare(cls, suite: Suite, root: Path, args: argparse.Namespace) -> "Evaluation":
        """Read what the command line says of data and place.

        Raises:
            UserError: it makes no sense, or SLURM is not at hand.
        """
        if args.seeds is not None and args.seeds < 1:
            raise UserError(f"--seeds {args.seeds}: want a whole number from 1")
        if args.processes is not None and args.processes < 1:
            raise UserError(f"--processes {args.processes}: want a whole number from 1")
        if args.slurm and args.on != "slurm":
            raise UserError(f"--slurm {args.slurm[0]}: is for --on slurm")
        roots = needs.find_roots(suite.sets, args.data)
        variables = {}
        if needs.DETECTION in roots:
            variables[needs.DETECTION_VARIABLE] = str(roots[needs.DETECTION])
        if args.on == "slurm":
            from benchmarks.slurm import Slurm

            place: Place = Slurm.connect(root, args.slurm, args.processes, variables)
        else:
            place = Local(suite.parallel, args.processes, variables)
        return cls(suite, root, roots, place)

    def lay_out(self, rows: Sequence[Row]) -> LaidOut:
        """Lay the suite out for checkpoints.

        Raises:
            UserError: the graph does not close, or a checkpoint is none.
        """
        suite, given = spread(self.suite, rows)
        steps = plan(suite, given, self.root, self.roots)
        known = self._known(rows)
        close(steps, rows, known)
        return LaidOut(suite, steps, given, rows, filled(suite, known))

    def run(self, laid: LaidOut, board: Board) -> int:
        """Run what is not done yet, write the report, return the exit status.

        Raises:
            UserError: nothing can be run here, or another suite is at work in the folder.
            Stopped: a signal ended it.
        """
        if all(step.state == "open" for step in laid.steps):
            raise UserError(
                f"suite {self.suite.name}: nothing of it can be run here; first, "
                f"{laid.steps[0].name}: {laid.steps[0].reason}"
            )
        notes: dict[str, Any] = {"tables": laid.table} if laid.table else {}
        if len(laid.rows) > 1 or (laid.rows and laid.rows[0].name != OWN):
            notes["checkpoints"] = {row.name: str(row.path) for row in laid.rows}
        runner = Runner(
            laid.suite, laid.steps, laid.given, self.root, board, self.place, notes=notes
        )
        status = runner.run()

        from benchmarks.report import write_report  # matplotlib waits until the numbers are there

        print(f"report: {write_report(self.root)}", flush=True)
        return status

    def _known(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Return each checkpoint's facts, if anything asks for them."""
        if not self.suite.tables and not any(job.wants for job in self.suite.jobs):
            return {}
        for row in rows:
            if row.path not in self.facts:
                self.facts[row.path] = describe(row.path)
        return {row.name: self.facts[row.path] for row in rows}
