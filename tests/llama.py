"""Run llama.cpp for tests, as a server in its own process.

    python tests/llama.py MODEL.gguf [ADAPTER.gguf]    prints its address, runs until it is killed

xllamacpp has no function for tokenising, and its threads block a normal exit. So tests use the
server over HTTP and kill its process. The key-value cache is fp32 and flash attention is off. With
these settings only GELU differs from this project: llama.cpp reads GELU from a table of the tanh
approximation.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.request

FULL_STOP = 17  # the id of "." in nano's vocabulary


class Llama:
    """A llama.cpp server with a model and, if given, an adapter. `log` holds its log messages."""

    def __init__(self, model, adapter=None):
        command = [sys.executable, __file__, str(model), *([str(adapter)] if adapter else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, errors="replace")
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        for line in self.process.stdout:
            if line.startswith("address "):
                self.address = line.split()[1]
                return
        raise RuntimeError("llama.cpp did not start:\n" + "".join(self.log[-20:]))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.process.kill()
        self.process.wait()

    def ask(self, path: str, **body) -> dict:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, parse_special=False)["tokens"]

    def answer(self, prompt: list[int], count: int) -> dict:
        """The greedy answer: a dict with `tokens` and `stop_type`.

        `stop_type` is "eos" if the model itself ended the answer.
        """
        return self.ask("/completion", prompt=prompt, n_predict=count, temperature=0,
                        return_tokens=True, cache_prompt=False)

    def log_probability(self, ids: list[int], token: int) -> float:
        """The log-probability of `token` after `ids`; `token` must be one of the 20 most likely.

        llama.cpp returns no probabilities for a token that ends inside a character. So a logit bias
        forces the answer to be a full stop. llama.cpp computes the returned probabilities before it
        adds the bias.
        """
        found = self.ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=20,
                         logit_bias=[[FULL_STOP, 1000]])
        [place] = found["completion_probabilities"]
        return {p["id"]: p["logprob"] for p in place["top_logprobs"]}[token]

    def warnings(self) -> list[str]:
        """The lines of the log that llama.cpp marks as warnings or errors."""
        time.sleep(0.2)  # waits for log lines that are still in the pipe
        return [line.rstrip() for line in self.log if line[:24].split()[1:2] in (["W"], ["E"])]


def serve(model: str, adapter: str | None = None) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, 10
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    print("address", server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    serve(*sys.argv[1:])
