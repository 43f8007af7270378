"""QLoRA fine-tuning of VinAI's PhoGPT with a training loop written by hand in PyTorch."""

import logging
import sys


def in_one_line(kind, error, trace) -> None:
    """Print an uncaught exception. A Ctrl-C during the import of torch prints one line only."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by hand", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = in_one_line

# On import, bitsandbytes may log a warning that an optional CPU kernel is missing. The project
# must not use this kernel, because it repacks frozen weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from phogpt_raw.model.weights import load_base  # noqa: E402

sys.excepthook = sys.__excepthook__

__all__ = ["load_base"]
