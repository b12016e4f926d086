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
    """-> an iterator over the batches of these lists of indices"""
    options = {"num_workers": workers, "timeout": PATIENCE if workers else 0}
    loader = DataLoader(samples, batch_sampler=indices, collate_fn=collate, **options)
    return iter(loader)


def collate(samples):
    """data.collate. Raises ValueError where the batch does not fit into shared memory."""
    batch = data.collate(samples)
    if get_worker_info() and os.path.exists(SHARED):
        size = sum(tensor.nbytes for tensor in batch.values())
        free = shutil.disk_usage(SHARED).free
        if size > free:
            sizes = f"a batch has {size / 2**20:.0f} MB, {SHARED} {free / 2**20:.0f} MB left"
            raise ValueError(f"{sizes}: --workers 0 does without, or make it larger")
    return batch
