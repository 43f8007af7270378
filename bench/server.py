"""For serve.py and the tests: run `generate.py --serve` in a separate process, on a free port."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from phogpt_raw.refusal import Refusal

ROOT = Path(__file__).parents[1]


class Server:
    """The server's process, as a context manager. port: the port on which the server listens.
    lines: the lines that the process has written to stderr."""

    def __init__(self, *flags, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "generate.py", "--serve", "0", *map(str, flags)], cwd=ROOT, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment})
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"at http://.*:(\d+) ", line):
                self.port = int(found[1])
                break
        else:
            raise Refusal("the server did not start: " + " ".join(self.lines))
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.reader.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end of the process, and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(60)
        self.reader.join()
        return status
