"""Measure anonymous host memory during a load, for scripts of tests. Pages mapped
from a file can be dropped at any time and are not counted."""

import gc
import threading
import time


def rss_anon() -> int:
    """Bytes of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def growth(load):
    """(the result of load(), the largest increase of memory in bytes while it ran)."""
    gc.collect()  # what was loaded before may still wait for it
    before, highest, loading = rss_anon(), 0, True

    def watch():
        nonlocal highest
        while loading:
            highest = max(highest, rss_anon())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load()
    loading = False
    watcher.join()
    return loaded, highest - before
