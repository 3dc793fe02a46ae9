"""A Hub on 127.0.0.1: as much of its HTTP API as huggingface_hub's snapshot_download speaks."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves `repos`, folders by repo id, one commit each, at `main` and at the tag `v1`.

    `breaks[(repo, file)]` is a list of faults, one a download in order: "cut" closes the
    connection in the middle of the body, an integer answers with that status. `gated` repos
    answer 403. `log` holds (method, path, Range header) of every request.
    """

    def __init__(self, repos: dict[str, Path], breaks=None, gated=()):
        self.repos, self.breaks, self.gated = repos, breaks or {}, gated
        self.log: list[tuple[str, str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    @staticmethod
    def commit(repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path).strip("/")
        self.log.append((request.command, path, request.headers.get("Range", "")))
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            return self.api(request, "/".join(parts[2:4]), parts[4:])
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.repos and len(rest) == 3 and rest[:2] == ["resolve", self.commit(repo)]:
            return self.file(request, repo, rest[2])
        self.error(request, 404, "EntryNotFound")

    def api(self, request, repo, rest):
        if repo in self.gated:
            return self.error(request, 403, "GatedRepo")
        if repo not in self.repos:
            return self.error(request, 404, "RepoNotFound")
        sha, files = self.commit(repo), sorted(self.repos[repo].iterdir())
        if len(rest) != 2 or rest[1] not in ("main", "v1", sha):
            return self.error(request, 404, "RevisionNotFound")
        if rest[0] == "revision":
            body = {"id": repo, "sha": sha, "siblings": [{"rfilename": f.name} for f in files]}
        else:
            body = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
                for f in files
            ]
        self.send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, request, repo, name):
        file = self.repos[repo] / name
        if not file.is_file():
            return self.error(request, 404, "EntryNotFound")
        body, status, cut = file.read_bytes(), 200, False
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": self.commit(repo)}
        if request.command == "GET":
            if wanted := request.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body, status = body[start:], 206
            if faults := self.breaks.get((repo, name)):
                fault = faults.pop(0)
                if fault != "cut":
                    return self.error(request, fault, "")
                cut = True
        self.send(request, status, body, headers, cut)

    def error(self, request, status: int, code: str):
        self.send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    @staticmethod
    def send(request, status, body, headers, cut=False):
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            request.wfile.flush()
            request.close_connection = True


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
