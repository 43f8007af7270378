"""A real server for tests, with functions that send requests and read its memory."""

import http.client
import json

import psutil

from bench.server import Server


class served(Server):
    """A process that runs `generate.py --serve` with these flags. `key`: the server's API key."""

    def __init__(self, *flags):
        self.key = flags[flags.index("--api-key") + 1] if "--api-key" in flags else "none"
        super().__init__(*flags, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        assert "Traceback" not in "".join(self.lines), "".join(self.lines)

    def client(self, **how):
        """OpenAI's own client, connected to this server."""
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1",
                             **{"api_key": self.key, "max_retries": 0, "timeout": 120, **how})

    def send(self, method: str, path: str, body=None, **headers) -> tuple[int, dict | str]:
        """Send a request with these headers; return (status, parsed JSON or text).

        If `headers` has no `Host`, the request has the usual Host header.
        """
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
        """The memory of the server's process in bytes, without mapped files."""
        info = psutil.Process(self.process.pid).memory_info()
        return info.rss - info.shared
