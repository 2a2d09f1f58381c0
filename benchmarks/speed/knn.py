"""Measure the search for nearest neighbours beside the bare product and top-k, and other libraries.

examples:
  python benchmarks/speed/knn.py
  python benchmarks/speed/knn.py --bank 50000 --queries 10000 --widths 128,2048 -k 200 --runs 3

Features are drawn. "bare" is one matrix product of unit features and torch.topk on all of it;
scikit-learn's brute force and, where it is installed, faiss's flat index search the same features.
Each run times all of them one after another, in wall-clock seconds and in the CPU's, which another
job beside this one disturbs less; the ratio is theirs to ours, above 1 where ours is faster.
"""

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: our root, not this folder, comes first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from convert.errors import Parser, UserError, run_script
from convert.files import environment

SLOWEST = 1.5  # goal: at most so many times the bare product and top-k


def main(argv: list[str] | None = None) -> int:
    """Measure and print; a goal that is missed is a number and no failure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--bank", type=int, default=50_000, metavar="M", help="default: 50000")
    add("--queries", type=int, default=10_000, metavar="Q", help="default: 10000")
    add("--widths", default="128,2048", metavar="D,D", help="default: 128,2048")
    add("-k", type=int, default=200, help="default: 200")
    add("--runs", type=int, default=3, metavar="N", help="default: 3; the median")
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(argv)
    if not 1 <= args.k <= args.bank or min(args.queries, args.runs) < 1:
        raise UserError("want 1 <= -k <= --bank, and 1 or more of --queries and --runs")
    widths = [int(word) for word in args.widths.split(",")]
    record = {
        "bank": args.bank,
        "queries": args.queries,
        "k": args.k,
        "widths": {
            width: measure(args.bank, args.queries, width, args.k, args.runs) for width in widths
        },
        "load": os.getloadavg()[0],
        "environment": environment(),
    }
    print(json.dumps(record) if args.json else table(record))
    return 0


def measure(bank: int, queries: int, width: int, k: int, runs: int) -> dict[str, dict[str, float]]:
    """Return the median wall-clock and CPU seconds of each search."""
    import torch

    draw = torch.Generator().manual_seed(0)
    values, asked = (torch.randn(n, width, generator=draw) for n in (bank, queries))
    ways = searches()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    found = {}
    for _ in range(runs):
        for name, search in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = search(values, asked, k)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, places in found.items():  # rounding may swap neighbours that are equally near
        same = sum(len(set(a) & set(b)) for a, b in zip(found["bare"], places, strict=True))
        if same < 0.999 * k * queries:
            raise RuntimeError(f"{name} found other neighbours than the bare search")
    medians = {}
    for name, each in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*each, strict=True))
        medians[name] = {"wall_s": wall, "cpu_s": cpu}
    return medians


def searches() -> dict[str, Callable[[Any, Any, int], Any]]:
    """Return each search: bank (M, D), queries (Q, D), k -> places (Q, k), as a list."""
    from torch.nn.functional import normalize

    from transfer.classification.neighbors import nearest

    def bare(bank: Any, queries: Any, k: int) -> Any:
        similarity = normalize(queries, dim=1) @ normalize(bank, dim=1).T
        return similarity.topk(k, dim=1).indices.tolist()

    def ours(bank: Any, queries: Any, k: int) -> Any:
        return nearest(bank, queries, k)[1].tolist()

    def sklearn(bank: Any, queries: Any, k: int) -> Any:
        from sklearn.neighbors import NearestNeighbors

        index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(normalize(bank, dim=1))
        return index.kneighbors(normalize(queries, dim=1), return_distance=False).tolist()

    def faiss(bank: Any, queries: Any, k: int) -> Any:
        import faiss as library

        index = library.IndexFlatIP(bank.shape[1])
        index.add(normalize(bank, dim=1).numpy())
        return index.search(normalize(queries, dim=1).numpy(), k)[1].tolist()

    ways = {"bare": bare, "ours": ours, "scikit-learn": sklearn}
    return ways | ({"faiss": faiss} if importlib.util.find_spec("faiss") else {})


def table(record: dict[str, Any]) -> str:
    """Say the numbers in lines for a terminal."""
    lines = [f"{record['queries']} queries, {record['bank']} in the bank, k = {record['k']}"]
    for width, found in record["widths"].items():
        ours = found["ours"]
        for name, their in found.items():
            ratio = their["cpu_s"] / ours["cpu_s"], their["wall_s"] / ours["wall_s"]
            lines.append(
                f"{width:>6} dims {name:14} {their['wall_s']:7.2f} s, CPU {their['cpu_s']:7.2f} s; "
                f"to ours: {ratio[1]:.2f}, CPU {ratio[0]:.2f}"
            )
        slower = ours["cpu_s"] / found["bare"]["cpu_s"]
        lines.append(f"{width:>6} dims ours to bare: CPU {slower:.2f}, goal at most {SLOWEST}")
    hardware, versions = record["environment"]["hardware"], record["environment"]["versions"]
    lines.append(
        f"on {hardware['cpu']}, {hardware['cores']} cores, load {record['load']:.1f}, torch "
        f"{versions['torch']}, scikit-learn {versions['scikit-learn']}, commit "
        f"{record['environment']['commit']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
