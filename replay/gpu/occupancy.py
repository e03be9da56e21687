"""Whether GPUs are free, asked before a server is launched on them: energy cannot be told apart by process."""

from collections.abc import Sequence

from replay.gpu.base import Gpus, GpuState
from tracegen.errors import GpuError

# Taken by nobody who can be seen: more than what the driver keeps on a card that nobody uses (a few MiB), its
# persistence daemon and the remains of a context that is just ending; less than any model or CUDA context with work.
_UNSEEN_MIB = 512
_MIB_PER_GIB = 1024


def check_whole(gpus: Gpus, indices: Sequence[int]) -> None:
    """Raises `GpuError` when one of `indices` is split (MIG): nobody's share of its power could be told."""
    for gpu in indices:
        if gpus.state(gpu).mig:
            raise GpuError(
                f"GPU {gpu} is split into instances (MIG), and its power sensors measure the whole card: nobody's "
                f"share could be told; choose another with --gpus, or end MIG with nvidia-smi -i {gpu} -mig 0"
            )


def check_free(gpus: Gpus, indices: Sequence[int], allow_busy: bool, needs_mib: float | None) -> list[str]:
    """Raises `GpuError` when somebody else computes on `indices`, or a server cannot run there.

    `needs_mib`: what its weights take on each GPU; None where that is not known. With `allow_busy` the others are no
    error but the warnings that are returned; a split GPU and a model that does not fit always are errors.
    """
    check_whole(gpus, indices)
    busy = []
    for gpu in indices:
        state = gpus.state(gpu)
        if needs_mib is not None:
            _check_fit(gpu, state, needs_mib)
        who = _occupants(state)
        if who:
            busy.append(f"GPU {gpu} is used by {who}")
    if busy and not allow_busy:
        raise GpuError(
            f"{'; '.join(busy)}: its energy would count as this run's; end it, choose other GPUs with --gpus, "
            "or accept it with --allow-busy"
        )
    return [f"{text}: its energy counts as this run's" for text in busy]


def _occupants(state: GpuState) -> str | None:
    """Who computes on the GPU or holds memory there; None: nobody."""
    if state.processes:
        return ", ".join(
            f"process {process.pid} ({_described(process.name, process.memory_mib)})" for process in state.processes
        )
    used_mib = state.memory_used_mib
    if used_mib is None or used_mib <= _UNSEEN_MIB:
        return None
    return f"a process that cannot be seen from here ({used_mib:,} MiB)"


def _described(name: str | None, memory_mib: int | None) -> str:
    """A process by its name and memory, as far as they are known."""
    shown = "it cannot be seen from here" if name is None else name
    return shown if memory_mib is None else f"{shown}, {memory_mib:,} MiB"


def _check_fit(gpu: int, state: GpuState, needs_mib: float) -> None:
    """Raises `GpuError` when `needs_mib` of weights are more than the GPU has, or has free."""
    total_mib, used_mib = state.memory_total_mib, state.memory_used_mib
    if total_mib is None:
        return
    needs, total = needs_mib / _MIB_PER_GIB, total_mib / _MIB_PER_GIB
    if needs_mib > total_mib:
        raise GpuError(f"model does not fit: needs {needs:.1f} GiB a GPU, GPU {gpu} has {total:.1f}; use a larger --tp")
    if used_mib is not None and needs_mib > total_mib - used_mib:
        free = (total_mib - used_mib) / _MIB_PER_GIB
        raise GpuError(
            f"model does not fit: needs {needs:.1f} GiB a GPU, GPU {gpu} has {free:.1f} of {total:.1f} free; "
            "free its memory, choose other GPUs with --gpus, or use a larger --tp"
        )
