"""Measure the anonymous host memory that a load needs, in scripts that tests run.

Pages mapped from a file are not counted, because the system can drop them at any time.
"""

import gc
import threading
import time


def rss_anon() -> int:
    """The anonymous memory of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def growth(load):
    """Run load(); return (its result, the largest increase of anonymous memory in bytes)."""
    gc.collect()  # frees the objects of earlier loads
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
