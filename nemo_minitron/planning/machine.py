"""The machine that this runs on: its GPUs or its CPU, the memory that a rank may take, and how fast it is assumed."""

import contextlib
import dataclasses
import os
from pathlib import Path

from nemo_minitron.packages.versions import has_module

#: Of what is free, the share that a plan may take: interpreter, libraries, contexts and fragments are not in the plan
#: (a flow on SmolLM2-135M took 8.9 GB on a CPU, where its plan says 7.1).
USABLE = 0.75
#: TFLOP/s that training is assumed to achieve: a core in fp32, and GPUs in bf16 by their CUDA capability.
CORE_TFLOPS = 0.05
GPU_TFLOPS = {7: 30.0, 8: 100.0, 9: 300.0, 10: 500.0}
OTHER_GPU_TFLOPS = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine offers.

    Attributes:
        gpus: how many; 0: its CPU is what there is.
        cores: of the CPU, that this process may use.
        free_bytes: free on each GPU, or of the main memory; None: not known.
        capability: major number of the GPUs' CUDA capability.
    """

    gpus: int
    cores: int
    free_bytes: float | None
    capability: int = 0

    @property
    def rank_bytes(self) -> float | None:
        """What a plan for a rank may take."""
        return None if self.free_bytes is None else USABLE * self.free_bytes


def this_machine(accelerator: str = "auto") -> Machine:
    """This machine; its GPUs count unless `accelerator` is cpu."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = min(cores, int(threads)) if threads.isdigit() and int(threads) else cores
    gpus, free, capability = (0, None, 0) if accelerator == "cpu" else _gpus()
    return Machine(gpus=gpus, cores=cores, free_bytes=free if gpus else free_memory(), capability=capability)


def _gpus() -> tuple[int, float | None, int]:
    """GPUs, bytes of the smallest, and its capability. torch is imported only where a driver is."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()) or not has_module("torch"):
        return 0, None, 0
    import torch

    if not torch.cuda.is_available():
        return 0, None, 0
    count = torch.cuda.device_count()
    smallest = min((torch.cuda.get_device_properties(index) for index in range(count)), key=lambda p: p.total_memory)
    return count, float(smallest.total_memory), int(smallest.major)


def free_memory(root: str | os.PathLike = "/") -> float | None:
    """Bytes of main memory that are free or can be freed, within the limit of the control group; None: not known.

    Args:
        root: where proc/ and sys/ are.
    """
    amounts: list[float] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (Path(root) / "proc/meminfo").read_text().splitlines()
        amounts.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for folder, limit, used, cached in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # `max` is no limit
            group = Path(root) / folder
            left = int((group / limit).read_text()) - int((group / used).read_text())
            entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            amounts.append(float(max(left, 0) + next((int(count) for name, count in entries if name == cached), 0)))
    if not amounts and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        amounts.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return min(amounts, default=None)


def assumed_tflops(machine: Machine, cuda: bool, ranks: int) -> tuple[float, str]:
    """TFLOP/s that all ranks together are assumed to achieve in training, and why."""
    if cuda:
        each = GPU_TFLOPS.get(machine.capability, OTHER_GPU_TFLOPS)
        return ranks * each, f"assumed, {each:g} a GPU"
    return CORE_TFLOPS * machine.cores, f"assumed, {CORE_TFLOPS:g} for each of {machine.cores} cores"
