"""Find the model to export, from flags and the run's record: a base, with or without an adapter.

No function of this module reads weights, so errors are found before the slow steps.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.data.chat_template import choose_template
from phogpt_raw.export import gguf
from phogpt_raw.export.merge import Merger
from phogpt_raw.files import expanded
from phogpt_raw.model.adapter_config import Origin, check_not_merged, chosen_base, read_origin
from phogpt_raw.model.weights import WITHOUT_WEIGHTS, find_folder, read_tokenizer


@dataclass(frozen=True)
class Source:
    """The model to export: a base, with or without an adapter, and settings of the training."""

    base: str
    revision: str | None
    nf4: bool  # whether a merged checkpoint is compared with the adapter over NF4 weights
    dtype: str  # the dtype in which the adapter's run computed, or auto
    name: str
    template: str
    tokenizer: object
    merger: Merger
    base_weights: str | None  # hash of the base that the adapter was trained over, if known


def find_source(options) -> Source:
    """The model to export, without its weights.

    Raises Refusal for all errors that can be found without reading weights.
    """
    made = read_origin(options.adapter) if options.adapter else Origin(options.run)
    base, revision, named = chosen_base(options.adapter, made, options.model, options.revision)
    folder = find_folder(base, revision, WITHOUT_WEIGHTS, named)
    merger = Merger(folder, options.adapter)
    if options.adapter:
        check_not_merged(folder, options.adapter)
    if options.lora_gguf:
        gguf.check_plain(merger)
    tokenizer = read_tokenizer(folder, merger.config)
    if options.gguf:
        gguf.check_model(merger)
    template, _reason = choose_template(tokenizer, options.template, made.template)
    name = expanded(base).resolve().name
    if options.adapter:
        name += f" + {run_name(options.adapter)}"
    nf4 = made.nf4 if options.base_nf4 is None else options.base_nf4
    return Source(base, revision, nf4, made.dtype, name, template, tokenizer, merger,
                  made.base_weights)


def run_name(adapter: Path) -> str:
    """The name of an adapter's folder, such as "nano-001" or "nano-001 checkpoint-30"."""
    folder = adapter.resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name)
    return f"{folder.parent.name} {folder.name}" if is_checkpoint else folder.name
