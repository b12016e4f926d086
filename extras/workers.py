"""
The processes that prepare batches. They hand them over in shared memory, of which a container may
have 64 MB: where it is full, PyTorch loses a batch and waits for it for ever.
"""

import os
import shutil
from functools import partial

from torch.utils.data import get_worker_info

SHARED = "/dev/shm"  # on Linux
PATIENCE = 1800  # seconds for one batch


def guard(loader):
    """Yield the batches of a DataLoader. Raises ValueError, one line, where it would hang."""
    loader.collate_fn = partial(collate_if_it_fits, loader.collate_fn)
    loader.timeout = PATIENCE if loader.num_workers else 0
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # then it is of the code in the worker
            raise
        raise ValueError(f"{error}: --workers 0 does without them") from error


def collate_if_it_fits(collate, samples):
    """Raises ValueError where a batch for each worker would not fit into shared memory."""
    batch, worker = collate(samples), get_worker_info()
    if worker and os.path.exists(SHARED):
        size = sum(tensor.nbytes for tensor in batch.values()) / 2**20
        free = shutil.disk_usage(SHARED).free / 2**20
        if worker.num_workers * size > free:
            sizes = f"a batch has {size:.1f} MB, {SHARED} {free:.1f} MB left"
            raise ValueError(f"{sizes}: --workers 0 does without, or make it larger")
    return batch
