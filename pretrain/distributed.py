"""Processes that train together: how they meet, what they tell each other.

Shapes:
    W: processes; r: the rank of this one, 0..W-1
    n: rows on one process; N = W n: rows of all, in the order of the ranks

Everything here works without a process group too, where W is 1 and nothing is sent. A message that
carries a gradient sends it back the same way.
"""

import hashlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from convert.errors import Stopped, StopRequest, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

STEP_TIMEOUT = timedelta(minutes=30)  # for one message: a checkpoint or a vote may lie between two
GONE = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # SLURM warns with USR
LEAVE_S = 3.0  # how long the process that may hold the store waits for the others to leave
LONGEST_WAIT_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Launch:
    """How this process finds the others: the reference's flags.

    Attributes:
        spawn: start one process a device on this machine (`--multiprocessing-distributed`).
        nodes: machines (`--world-size`); without `spawn`, processes.
        node: which of them this one is (`--rank`).
        url: where they meet, `tcp://HOST:PORT` or `env://`.
        backend: nccl or gloo; empty: what the device has.
        gpu: the device to use; None: the rank's.
        timeout_s: how long to wait for the others, in seconds.
    """

    spawn: bool = False
    nodes: int = -1
    node: int = -1
    url: str = ""
    backend: str = ""
    gpu: int | None = None
    timeout_s: float = 300.0


def rank() -> int:
    """Return r."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def has_place() -> bool:
    """Tell whether torchrun, or our own launcher, has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def say(*words: object, sep: str = " ") -> None:
    """Print, on one process of all."""
    if rank() == 0:
        print(*words, sep=sep, flush=True)


def restarts() -> int:
    """Return how often torchrun has started this group again after a worker was lost.

    A machine counts its own failures only: the largest count is the group's.
    """
    return agree(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def devices_here(device: str) -> int:
    """Return how many processes the reference's launcher starts here: one a GPU, one on a CPU."""
    return torch.cuda.device_count() if device == "cuda" else 1


def run_children(command: Sequence[str], count: int, launch: Launch) -> int:
    """Start this machine's processes, as torchrun would, and wait for them.

    Args:
        command: what each one runs.
        count: processes on this machine.
        launch: `nodes` and `node` say where they stand among all.

    Returns:
        The exit status of the first that failed, else 0. The others are ended with it; SIGINT,
        SIGTERM, SIGUSR1 and SIGUSR2 are handed on.
    """
    nodes, node = max(launch.nodes, 1), max(launch.node, 0)
    with StopRequest(STOPS) as stop:
        children = []
        for local in range(count):
            place = {"RANK": node * count + local, "WORLD_SIZE": nodes * count}
            place |= {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
            environment = os.environ | {key: str(value) for key, value in place.items()}
            children.append(subprocess.Popen(command, env=environment))
        try:
            return _wait(children, stop)
        finally:
            for child in children:
                child.kill()
                child.wait()


def _wait(children: list["subprocess.Popen[bytes]"], stop: StopRequest) -> int:
    told = False
    while True:
        for child in children:
            try:
                child.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            if child.returncode < 0:
                print(_killed(child.args, -child.returncode), file=sys.stderr, flush=True)
                return 128 - child.returncode
            if child.returncode:
                return child.returncode
        if all(child.returncode == 0 for child in children):
            return 0
        if stop.signum is not None and not told:
            told = True
            for child in children:
                child.send_signal(stop.signum)


def _killed(command: Any, signum: int) -> str:
    cause = "; memory may have run out" if signum == signal.SIGKILL else ""
    name = Path(command[1] if len(command) > 1 else command[0]).name
    return f"{name}: a process was ended by {signal.Signals(signum).name}{cause}; --resume auto"


@contextmanager
def group(launch: Launch, device: str) -> Iterator[None]:
    """Join the processes that this one belongs to, if any, and leave them at the end.

    Args:
        launch: the flags; torchrun's environment comes before them.
        device: cpu or cuda.

    Raises:
        UserError: the group does not form within `launch.timeout_s`, or another process is lost.
    """
    url, place, count = _place(launch)
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0")) if launch.gpu is None else launch.gpu
        if not 0 <= local < torch.cuda.device_count():
            raise UserError(
                f"GPU {local}: this machine has {torch.cuda.device_count()}; start fewer processes "
                "or name another with --gpu"
            )
        torch.cuda.set_device(local)
    backend = choose_backend(launch.backend, device, place)
    if count == 1:
        yield
        return
    store = _meet(url, place, count, backend, launch.timeout_s)
    try:
        yield
    except (UserError, Stopped) as error:
        _leave(store, place, count, error, str(error))
    except RuntimeError as error:
        if not any(sign in str(error) for sign in GONE):
            raise
        lost = UserError(
            f"process {place} of {count}: another process of this run ended or hangs; its own "
            "lines say why; go on with --resume auto"
        )
        lost.__cause__ = error
        _leave(store, place, count, lost, "")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _leave(
    store: "Store", place: int, count: int, error: UserError | Stopped, words: str
) -> NoReturn:
    """End this process with its group; what all of them have to say is said once.

    Args:
        store: of the group.
        place: r.
        count: W.
        error: why this process ends.
        words: what tells errors apart; empty where the cause is another process, which may have
            said it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the others when one has ended
    key = f"said {hashlib.sha256(words.encode()).hexdigest()}" if words else "said"
    try:
        first = store.add(key, 1) == 1
        if words:
            store.add("said", 1)
        store.add("left", 1)
        dist.destroy_process_group()  # the others notice
        end = time.monotonic() + LEAVE_S
        while place == 0 and store.add("left", 0) < count and time.monotonic() < end:
            time.sleep(0.02)
    except RuntimeError:  # the store went with the process that held it
        first = True
    if first:
        raise error
    raise SystemExit(error.status if isinstance(error, Stopped) else 2) from error


def choose_backend(wanted: str, device: str, place: int = 0) -> str:
    """Choose what carries the messages; on a CPU nccl becomes gloo, said in one line."""
    if wanted not in {"", "nccl", "gloo"}:
        raise UserError(f"--dist-backend {wanted}: want nccl or gloo")
    if device != "cuda":
        if wanted == "nccl" and place == 0:
            print("dist-backend nccl -> gloo: this run is on a CPU", flush=True)
        return "gloo"
    # Tensors of the CPU, such as who asked to stop, go through gloo beside it.
    return "gloo" if wanted == "gloo" else "cpu:gloo,cuda:nccl"


def _place(launch: Launch) -> tuple[str, int, int]:
    """Return where the processes meet, r and W."""
    if not 0 < launch.timeout_s <= LONGEST_WAIT_S:
        raise UserError(
            f"--dist-timeout {launch.timeout_s:g}: want seconds above 0, 30 days at most"
        )
    given = launch.url or "env://"
    if has_place():
        place, count = (os.environ[name] for name in ("RANK", "WORLD_SIZE"))
        if not (place.isdecimal() and count.isdecimal() and int(place) < int(count)):
            raise UserError(
                f"RANK={place} WORLD_SIZE={count} in the environment: want whole numbers, the rank "
                "from 0 to the size less 1; start with torchrun, or unset both"
            )
        return ("env://" if "MASTER_ADDR" in os.environ else given), int(place), int(count)
    if launch.nodes <= 1:
        return given, 0, 1
    if not 0 <= launch.node < launch.nodes:
        raise UserError(
            f"--rank {launch.node}: want 0 to {launch.nodes - 1}, as --world-size is {launch.nodes}"
        )
    return given, launch.node, launch.nodes


def _meet(url: str, place: int, count: int, backend: str, timeout_s: float) -> "Store":
    """Form the process group, or say in one line who is missing; return the group's own store."""
    end = time.monotonic() + timeout_s
    found: list[int] = []
    try:
        with _ended_by_signals():
            wait = timedelta(seconds=timeout_s)
            shared, _, _ = next(rendezvous(url, place, count, timeout=wait))
        store = _handshake(shared, place, count, end, found)
        left = timedelta(seconds=max(1.0, end - time.monotonic()))
        with _ended_by_signals():
            dist.init_process_group(
                backend, store=store, rank=place, world_size=count, timeout=left
            )
        # A step's messages may take longer than the processes may take to find each other.
        dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT)
    except (RuntimeError, ValueError, OSError, TimeoutError) as error:
        came = (
            f"{len(found)} of {count} processes came" if found else f"no group of {count} processes"
        )
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"process group at {url}: {came} within {timeout_s:g} s ({reason}); start all of them, "
            "with one --dist-url and ranks 0 to W - 1, or wait longer with --dist-timeout"
        ) from error
    return store


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end the process at once: Python's handlers wait while the transport does."""
    before = [signal.signal(signum, signal.SIG_DFL) for signum in STOPS]
    try:
        yield
    finally:
        for signum, handler in zip(STOPS, before, strict=True):
            signal.signal(signum, handler)


def _handshake(shared: "Store", place: int, count: int, end: float, found: list[int]) -> "Store":
    """Agree on a name that no group before this one had, and return the part of the store below it.

    torchrun keeps its store when it starts the processes again, and machines do not count its
    restarts alike: what an earlier group left there must not be read by this one. So each process
    shows a word that is new, and takes only a name that answers it.

    Args:
        shared: a store that all of them see.
        place: r.
        count: W.
        end: until when to wait, by the monotonic clock.
        found: is filled with the ranks that came, on the first process.
    """
    word = secrets.token_hex(8)
    store = dist.PrefixStore("group", shared)  # type: ignore[attr-defined]
    store.set(f"word {place}", word)

    def value(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    answered: dict[int, str] = {}
    name = word  # the first process's word names the group
    while True:
        if place == 0:
            for other in range(count):
                theirs = value(f"word {other}")
                if theirs and answered.get(other) != theirs:
                    store.set(f"answer {other}", f"{theirs} {name}")
                    answered[other] = theirs
            found[:] = [r for r in range(count) if value(f"agreed {r}") == name or r == place]
            if len(found) == count:
                store.set("complete", name)
                break
        else:
            theirs, _, name = value(f"answer {place}").partition(" ")
            if theirs == word:
                store.set(f"agreed {place}", name)
                if value("complete") == name:
                    break
        if time.monotonic() > end:
            raise TimeoutError("the others did not answer")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def agree(value: int) -> int:
    """Return the largest of the processes' values, which lie on the CPU: nobody's GPU waits."""
    if size() == 1:
        return value
    told = torch.tensor([value])
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def differing(values: Mapping[str, object]) -> list[str]:
    """Name those of the values, the same ones everywhere, that differ between processes."""
    hashes = [hashlib.sha256(repr(value).encode()).digest()[:7] for value in values.values()]
    own = torch.tensor([int.from_bytes(h, "big") for h in hashes])
    rows = gather(own[None])
    return [
        key for key, same in zip(values, (rows == rows[:1]).all(dim=0), strict=True) if not same
    ]


def share(value: Any) -> Any:
    """Return the first process's value, whatever it is, on all of them."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def collect(value: Any) -> list[Any]:
    """Return the processes' values, whatever they are, in the order of the ranks."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def average(x: Tensor) -> Tensor:
    """Replace x, of one shape everywhere, by its mean over the processes."""
    if size() > 1:
        dist.all_reduce(x)
        x /= size()
    return x


def gather(x: Tensor) -> Tensor:
    """Return all processes' rows: (n, ...) -> (N, ...), with a gradient."""
    return x if size() == 1 else _Gather.apply(x)


def add_up(x: Tensor) -> Tensor:
    """Return the sum of the processes' x, with a gradient."""
    return x if size() == 1 else _AddUp.apply(x)


def exchange(x: Tensor, order: Tensor) -> Tensor:
    """Permute the rows of all processes, each row sent once, to the process that needs it.

    Args:
        x: (n, ...) this process's rows.
        order: (N,) a permutation on the CPU, the same everywhere.

    Returns:
        (n, ...) rows r n to (r + 1) n of the permuted whole, with a gradient.
    """
    if size() == 1:
        return x[order.to(x.device)]
    blocks = order.view(size(), -1)
    n, me = blocks.shape[1], rank()
    mine = [block[block // n == me] - me * n for block in blocks]  # for each process, its rows
    wanted = blocks[me]
    sources = wanted // n
    # Rows arrive by source, each source's in the order in which they are wanted.
    place = torch.argsort(torch.argsort(sources, stable=True))
    sent = [len(rows) for rows in mine]
    received = torch.bincount(sources, minlength=size()).tolist()
    route = _Route(torch.cat(mine).to(x.device), sent, received, place.to(x.device))
    permuted: Tensor = _Exchange.apply(x, route)
    return permuted


@dataclass(frozen=True)
class _Route:
    """Which rows leave in which order, how many to and from each process, where they belong."""

    leaving: Tensor
    sent: list[int]
    received: list[int]
    place: Tensor


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        arrived = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(arrived, x[route.leaving].contiguous(), route.received, route.sent)
        return arrived[route.place]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        arrived = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        back = gradient[torch.argsort(route.place)].contiguous()
        dist.all_to_all_single(arrived, back, route.sent, route.received)
        return arrived[torch.argsort(route.leaving)], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every process's loss may depend on every row: a row's owner adds them up. Gloo has no
        # reduce-scatter; sending each owner its rows is the same with one message.
        arrived = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(arrived, gradient.contiguous())
        return arrived.view(size(), -1, *gradient.shape[1:]).sum(dim=0)


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class Averages:
    """Gradients and running statistics, averaged over the processes with one message a step.

    The gradients live in one flat tensor, each where its parameter lies in memory, so that nothing
    is copied before the message. DistributedDataParallel would overlap it with the backward pass,
    but forms its buckets anew after the first step: sums would be taken in another order by a run
    that was resumed, and its checkpoint would not be the unbroken run's to the last bit.

    Args:
        parameters: what is trained.
        statistics: tensors to average beside the gradients.
    """

    def __init__(self, parameters: Sequence[Tensor], statistics: Sequence[Tensor]) -> None:
        self.statistics = list(statistics)
        counts = [_padded(p.numel()) for p in parameters]
        self.count = sum(counts)
        self.sizes = [t.numel() for t in self.statistics]
        self.flat = parameters[0].new_zeros(self.count + sum(self.sizes))
        first = 0
        for parameter, count in zip(parameters, counts, strict=True):
            parameter.grad = self.flat.as_strided(parameter.shape, parameter.stride(), first)
            first += count

    def clear(self) -> None:
        """Set every gradient to zero, and leave it where it is."""
        self.flat[: self.count].zero_()

    @torch.no_grad()
    def average(self) -> None:
        """Replace gradients and statistics by their means over the processes."""
        if self.statistics:
            torch.cat(self.statistics, out=self.flat[self.count :])
        average(self.flat)
        if self.statistics:
            parts = self.flat[self.count :].split(self.sizes)
            torch._foreach_copy_(self.statistics, list(parts))


def _padded(count: int) -> int:
    return -(-count // 64) * 64  # kernels want aligned addresses
