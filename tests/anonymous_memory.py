"""Measure the anonymous host memory that the loading of a model or of data needs.

Tests use this module directly, or in scripts that they run as separate processes.

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
    gc.collect()  # frees objects that earlier calls have left
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
