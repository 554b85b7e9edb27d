"""Devices: one process, or as many as torchrun or SLURM have started, by Lightning Fabric."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weakspot.models.specs import find_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PATIENCE = timedelta(days=1)  # of processes for the one that finds backgrounds


def make_fabric(device: str, precision: str) -> Fabric:
    """One process on the device, or this one of many.

    Raises:
        ValueError: when Lightning Fabric is not installed or there is no such device.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise ValueError("training needs Lightning Fabric: pip install 'weakspot[train]'") from None
    where = find_device(device)
    if where.type not in {"cpu", "cuda", "mps"}:
        raise ValueError(f"device is {device!r}; accepted for training: cpu, cuda, cuda:NUMBER, mps")
    nodes, processes = _started()
    many = nodes * processes > 1
    devices: Any = [where.index or 0] if where.type == "cuda" and not many else processes
    fabric = Fabric(
        accelerator=where.type,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=PATIENCE, find_unused_parameters=True) if many else "auto",
        # Else it finds out by itself that it runs under SLURM, and wants as many processes as a batch script asked for.
        plugins=None if many else [LightningEnvironment()],
        precision=precision,  # type: ignore[arg-type]  # checked by Settings
    )
    fabric.launch()
    if many:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """End the connection while Python is still whole: threads of it that outlive Python abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _started() -> tuple[int, int]:
    """Nodes, and processes on each, that torchrun or SLURM's srun have started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // here, here
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        return nodes, tasks // nodes
    return 1, 1
