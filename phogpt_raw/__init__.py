"""PhoGPT raw: QLoRA fine-tuning of VinAI's PhoGPT by a training loop written by hand."""

import logging
import sys


def in_one_line(kind, error, trace) -> None:
    """Report an uncaught exception; a Ctrl-C while torch is imported is not an error."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by hand", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = in_one_line

# bitsandbytes asks for an optional CPU kernel, which would repack frozen weights, on import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from phogpt_raw.model.weights import load_base  # noqa: E402

sys.excepthook = sys.__excepthook__

__all__ = ["load_base"]
