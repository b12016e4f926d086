"""
The processes that prepare batches. They hand them over in shared memory, of which a container may
have 64 MB: where it is full, PyTorch loses a batch and waits for it for ever.
"""

import os
import shutil

from torch.utils.data import DataLoader, get_worker_info

import data

SHARED = "/dev/shm"  # on Linux
PATIENCE = 1800  # seconds for one batch


def batches(samples, indices, workers):
    """Yield the batches of these lists of indices. Raises ValueError where a worker fails."""
    options = {"num_workers": workers, "timeout": PATIENCE if workers else 0}
    try:
        yield from DataLoader(samples, batch_sampler=indices, collate_fn=collate, **options)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # then it is of the code in the worker
            raise
        raise ValueError(f"{error}: --workers 0 does without them") from error


def collate(samples):
    """data.collate. Raises ValueError where each worker's batch would not fit into the memory."""
    batch, worker = data.collate(samples), get_worker_info()
    if worker and os.path.exists(SHARED):
        size = sum(tensor.nbytes for tensor in batch.values()) / 2**20
        free = shutil.disk_usage(SHARED).free / 2**20
        if worker.num_workers * size > free:
            sizes = f"a batch has {size:.1f} MB, {SHARED} {free:.1f} MB left"
            raise ValueError(f"{sizes}: --workers 0 does without, or make it larger")
    return batch
