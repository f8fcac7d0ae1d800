"""Several processes on one model: who does what, and what they hand each other.

    torchrun --nproc-per-node 2 -m lowbit quantize ...

Every rank runs the same road. Calibration batches are dealt out in turn, what they teach is summed, the
rounding of a block is dealt out by cost, and everyone gets the result, so all hold the same model after
every block. The first rank alone reads the text, prints, and writes; what only one can do (training, choosing
schemes, reading back) it does while the others wait.

Here is all of that which is not arithmetic. For one process each function is the identity and costs
nothing, so the road has no second form. A process joins only where it says so (`joined`): lowbit called by
one rank of someone else's program must not wait for the others.

A rank that is lost ends the others: gloo and NCCL raise, or torchrun sends SIGTERM. They raise
`ConnectionError`, which keeps the work folder as a full disk does.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor

from lowbit.errors import INTERRUPTED, LowbitError, Stopped

T = TypeVar("T")
dist: Any = torch.distributed  # its stubs leave out half of what is used here
LOST = "another rank was lost"
TIMEOUT = timedelta(minutes=30)  # for a rank that hangs; one that ends is noticed at once
PATIENCE = 0.2  # seconds between two looks at whether the first rank is done


class _Group(NamedTuple):
    """The processes that were joined. torch's own group stays unset, or libraries would wait in it, too."""

    rank: int
    size: int
    store: Any
    cpu: Any
    gpu: Any = None

    def of(self, tensor: Tensor) -> Any:
        """What hands such a tensor over."""
        return self.gpu if tensor.is_cuda else self.cpu


_group: _Group | None = None
_turn = 0
_sent = 0


def size() -> int:
    """How many processes work on the model."""
    return _group.size if _group else 1


def rank() -> int:
    """The number of this one; 0 is the first."""
    return _group.rank if _group else 0


def is_first() -> bool:
    """Is this the one that writes?"""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Work with the other processes that torchrun started; without torchrun nothing happens.

    What goes wrong on another rank than the first is told by the first, so the others leave with an
    exit code and mostly without a line (`Stopped`).
    """
    global _group, _turn
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    _group, _turn = _meet(), 0
    try:
        yield
    except BaseException as error:
        raise _told_by_the_first(error) from error
    finally:
        _group = None


def _meet() -> _Group:
    """Find the others, by the variables that torchrun sets."""
    cuda = torch.cuda.is_available()
    own, most = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if cuda and own >= most:
        raise LowbitError(f"local rank {own} has no GPU: use --nproc-per-node {most}")
    if cuda:
        torch.cuda.set_device(own)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        cpu = dist.ProcessGroupGloo(dist.PrefixStore("lowbit/cpu", store), rank, size, TIMEOUT)
        gpu = None
        if cuda:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            gpu = dist.ProcessGroupNCCL(dist.PrefixStore("lowbit/gpu", store), rank, size, options)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"the ranks can't be joined: {str(error).splitlines()[0]}") from None
    return _Group(rank, size, store, cpu, gpu)


def _told_by_the_first(error: BaseException) -> BaseException:
    """What this rank leaves with, once the others can know why."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    known = _reason()
    lost = isinstance(error, ConnectionError)
    if known is None and not lost:
        _say(f"rank {rank()}: {line}")
    if is_first():
        if known is None or not isinstance(error, SystemExit):
            return error
        stopped = ConnectionError(known)  # torchrun ends all when one has ended
        stopped.__dict__.update(error.__dict__)
        return stopped
    if not isinstance(error, LowbitError | OSError | KeyboardInterrupt | SystemExit):
        return error
    code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2
    code = int(error.code or 0) if isinstance(error, SystemExit) else code
    return Stopped(f"rank {rank()}: {line}" if lost and known is None else "", code)


def _say(line: str) -> None:
    with suppress(RuntimeError):
        _store().set(f"lowbit/lost/{rank()}", line)


def _store() -> Any:
    assert _group is not None
    return _group.store


def _reason() -> str | None:
    """What a rank that left has said."""
    try:
        for number in range(size()):
            if _store().check([f"lowbit/lost/{number}"]):
                return str(_store().get(f"lowbit/lost/{number}").decode())
    except RuntimeError:  # whoever kept it is gone
        pass
    return None


def _wait(begun: Callable[[_Group], Any]) -> None:
    """Do something together; the others being gone is a `ConnectionError`."""
    assert _group is not None
    try:
        begun(_group).wait()
    except RuntimeError as error:
        raise ConnectionError(_reason() or LOST) from error


def _broadcast(tensor: Tensor, by: int) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = by
    _wait(lambda group: group.of(tensor).broadcast([tensor], options))


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: where there are several, each has its own GPU (`joined`).

    Raises:
        LowbitError: all ranks are given one and the same.
    """
    if size() > 1 and device.index is not None:
        raise LowbitError(f"--device {device} is one GPU for all ranks: use cuda, each takes its own")
    return device


class Tally:
    """CPU seconds and bytes sent of every rank, from now on; those before an interruption are added."""

    def __init__(self, before: Sequence[Mapping[str, float]]) -> None:
        self._before, self._start = [dict(one) for one in before], (time.process_time(), _sent)

    def now(self) -> list[dict[str, float]]:
        """By rank; empty for one process."""
        seconds, count = time.process_time() - self._start[0], _sent - self._start[1]
        mine = {"seconds": seconds, "sent": float(count)}
        if size() == 1:
            return self._before
        found = gathered(mine)
        for one, before in zip(found, self._before, strict=False):
            for name in one:
                one[name] += before.get(name, 0.0)
        return found


def share(count: int) -> range:
    """Which of so many batches are this rank's."""
    return range(rank(), count, size())


def owner(number: int) -> int:
    """Whose batch that is."""
    return number % size()


def add(total: Tensor, team: Sequence[int]) -> None:
    """Sum a tensor over all ranks, in place, for those of a team (one rank or all)."""
    if size() == 1:
        return
    _count(total)
    if len(team) > 1:
        _wait(lambda group: group.of(total).allreduce([total], dist.AllreduceOptions()))
        return
    options = dist.ReduceOptions()
    options.rootRank = team[0]
    _wait(lambda group: group.of(total).reduce([total], options))


def highest(values: Tensor) -> None:
    """The elementwise maximum over all ranks, in place."""
    if size() > 1:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        _wait(lambda group: group.of(values).allreduce([values], options))


def told(value: T, by: int = 0) -> T:
    """A plain value, as one rank has it."""
    if size() == 1:
        return value
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    _broadcast(length, by)
    if by != rank():
        data = torch.empty(int(length), dtype=torch.uint8)
    _broadcast(data, by)
    return value if by == rank() else pickle.loads(data.numpy().tobytes())


def gathered(value: T) -> list[T]:
    """A plain value of every rank, by rank; none goes on before all are here."""
    return [told(value, by) for by in range(size())]


def alike(what: str, value: T) -> T:
    """A plain value that must be the same on all ranks; of a mapping, the keys that differ are named.

    Raises:
        LowbitError: it is not.
    """
    for number, other in enumerate(gathered(value)):
        if other != value:
            if isinstance(value, Mapping) and isinstance(other, Mapping):
                what = ", ".join(str(name) for name in value if other.get(name) != value[name])
            raise LowbitError(
                f"rank {number} has another {what} than rank {rank()}: start all with the same options, "
                "files and versions, on machines of one kind"
            )
    return value


def handed(
    tensors: Sequence[Tensor] | None,
    by: int,
    device: torch.device,
    shapes: Sequence[tuple[Sequence[int], torch.dtype]] | None = None,
) -> list[Tensor]:
    """Tensors that one rank has, for all; `shapes` saves telling what they are like."""
    if size() == 1:
        assert tensors is not None
        return list(tensors)
    if shapes is None:
        shapes = told([(t.shape, t.dtype) for t in tensors or []], by)
    if by == rank():
        assert tensors is not None
        mine = [tensor.detach().contiguous() for tensor in tensors]
        _count(*mine)
    else:
        mine = [torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype in shapes]
    for tensor in mine:
        _broadcast(tensor, by)
    return mine


def collected(
    tensors: Mapping[str, Tensor],
    owners: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
) -> Mapping[str, Tensor]:
    """Tensors by name, of each its owner's: on the first rank all of them, the others' on the CPU."""
    if size() == 1:
        return tensors
    found = {}
    for name, whose in owners.items():
        if whose == rank():
            found[name] = tensors[name]
        if whose == rank() != 0:
            _send(tensors[name].detach().cpu().contiguous())
        elif whose != 0 and is_first():
            found[name] = torch.empty(tuple(shapes[name]), dtype=dtype)
            _receive(found[name], whose)
    return found


def _send(tensor: Tensor) -> None:
    _count(tensor)
    _wait(lambda group: group.cpu.send([tensor], 0, 0))


def _receive(tensor: Tensor, by: int) -> None:
    _wait(lambda group: group.cpu.recv([tensor], by, 0))


def first_does(work: Callable[[], T]) -> T:
    """What only the first rank does, however long it takes; the others wait, and get what it returns."""
    global _turn
    if size() == 1:
        return work()
    _turn += 1
    key = f"lowbit/done/{_turn}"
    done = work() if is_first() else None
    try:
        if is_first():
            _store().set(key, "done")
        while not _store().check([key]):
            if _reason() is not None:
                raise ConnectionError(_reason())
            time.sleep(PATIENCE)
    except RuntimeError as error:
        raise ConnectionError(_reason() or LOST) from error
    gathered(None)
    return told(done)  # type: ignore[return-value]


def _count(*tensors: Tensor) -> None:
    global _sent
    _sent += sum(tensor.nbytes for tensor in tensors)
