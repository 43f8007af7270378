"""A real server for tests: its answers to clients, and its output and memory."""

import http.client
import json

import psutil

from bench.server import Server


class served(Server):
    """`generate.py --serve` with these flags; key: its API key."""

    def __init__(self, *flags):
        self.key = flags[flags.index("--api-key") + 1] if "--api-key" in flags else "none"
        super().__init__(*flags, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        assert "Traceback" not in "".join(self.lines), "".join(self.lines)

    def client(self, **how):
        """The protocol's official client."""
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1",
                             **{"api_key": self.key, "max_retries": 0, "timeout": 120, **how})

    def send(self, method: str, path: str, body=None, **headers) -> tuple[int, dict | str]:
        """(status, JSON or text) of a request with exactly these headers, Host by default."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if not isinstance(body, bytes | None):
            body = json.dumps(body).encode()
        link.request(method, path, body, headers)
        reply = link.getresponse()
        content = reply.read().decode()
        link.close()
        is_json = "json" in reply.headers.get("content-type", "")
        return reply.status, json.loads(content) if is_json else content

    def health(self) -> dict:
        return self.send("GET", "/health")[1]

    def rss(self) -> int:
        """Bytes of memory without mapped files."""
        info = psutil.Process(self.process.pid).memory_info()
        return info.rss - info.shared
