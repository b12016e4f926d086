"""
One function on many items, on all cores, with a line that tells how long it will take.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def begin(work, items):
    global WORK, ITEMS
    WORK, ITEMS = work, items


def work_on(index):
    return WORK(ITEMS[index])


def spread(work, items, what):
    """Yield work(item) of every item, in order. All cores share the work. Raises ValueError where a
    process is killed.

    Processes get all items when they begin, which costs a fork nothing, and then indices alone.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores, 61)  # Windows waits for no more processes
    began = time.time()
    chunk = max(1, min(500, len(items) // (4 * cores)))
    try:
        with ProcessPoolExecutor(cores, initializer=begin, initargs=(work, items)) as pool:
            results = pool.map(work_on, range(len(items)), chunksize=chunk)
            for done, result in enumerate(results, 1):
                if done % chunk == 0 or done == len(items):
                    left = (time.time() - began) / done * (len(items) - done)
                    line = f"\r{done:,} of {len(items):,} {what}, {left:.0f} s left  "
                    end = "\n" if done == len(items) else ""
                    print(line, end=end, file=sys.stderr, flush=True)
                yield result
    except BrokenProcessPool as error:
        why = "a process of the check was killed: is the memory too small for the largest pictures?"
        raise ValueError(why) from error
