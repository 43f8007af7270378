"""A local hub for tests: it answers the upload requests of huggingface_hub and keeps the files."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """The requests that reached the server, as (method, path, headers, body), and the uploaded
    files."""

    url: str = ""
    requests: list[tuple[str, str, dict, bytes]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by their SHA-256
    answers: dict[str, tuple[int, dict]] = field(default_factory=dict)  # {prefix of a path: error}

    def bodies(self, path: str) -> list[dict]:
        return [json.loads(body) for _, asked, _, body in self.requests if asked == path]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        path = path.split("?")[0]
        for beginning, refusal in self.answers.items():
            if path.startswith(beginning):
                return refusal
        if path == "/api/repos/create":
            asked = json.loads(body)
            return 200, {"url": f"{self.url}/{asked['organization']}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [
                {**entry, "actions": {"upload": {"href": f"{self.url}/store/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]]}
        if path.startswith("/store/") and method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/store/")
            self.stored[path.removeprefix("/store/")] = body
            return 200, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.stored[line["value"]["oid"]]
            repo = path.removeprefix("/api/models/").split("/commit/")[0]
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": f"no endpoint {path}"}


@contextmanager
def fake_hub():
    """A Hub that listens on a free port of this machine until the `with` block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            hub.requests.append((self.command, self.path, dict(self.headers), body))
            status, said = hub.answer(self.command, self.path, body)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status >= 400 and "error" in said:
                self.send_header("X-Error-Message", said["error"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
