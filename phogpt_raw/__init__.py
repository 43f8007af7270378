"""PhoGPT raw: QLoRA fine-tuning of VinAI's PhoGPT by a training loop written by hand."""

import logging

# bitsandbytes asks for an optional CPU kernel, which would repack frozen weights, on import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from phogpt_raw.model.weights import load_base  # noqa: E402

__all__ = ["load_base"]
