"""A real server for tests: `generate.py --serve` in a process of its own, on a free port."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


class Served:
    """The process; port; key: its API key; lines: what it has said."""

    def __init__(self, *flags):
        flags = [str(flag) for flag in flags]
        self.key = flags[flags.index("--api-key") + 1] if "--api-key" in flags else "none"
        self.process = subprocess.Popen(
            [sys.executable, "generate.py", "--serve", "0", *flags], cwd=ROOT, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"at http://.*:(\d+) ", line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(self.lines))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

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
        """Bytes of anonymous memory, without mapped files."""
        info = psutil.Process(self.process.pid).memory_full_info()
        return info.rss - info.shared

    def end(self, number=signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(60)
        self.reader.join()
        return status


@contextmanager
def served(*flags):
    found = Served(*flags)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.wait()
