"""As much of the Hugging Face hub as `huggingface_hub` asks for, on this machine and in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


class Hub:
    """`repositories` by name: whether private, commits (id: {path: content}) and branches (name: id)."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.asked: list[str] = []
        self.endpoint = ""

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch, as an upload does; returns the commit's id."""
        here = self.repositories.setdefault(name, {"private": True, "commits": {"0" * 40: {}}, "refs": {}})
        content = here["commits"][here["refs"].get(branch, "0" * 40)] | files
        commit = hashlib.sha1(repr((sorted(content.items()), len(here["commits"]))).encode()).hexdigest()
        here["commits"][commit] = content
        here["refs"][branch] = commit
        return commit


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else ("", "")
        here = self.hub.repositories.get(name)
        if here is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = here["refs"].get(revision, revision)
        content = here["commits"].get(commit)
        if content is None:
            return self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        if api and api[2] == "revision":
            return self.answer(200, {"id": name, "modelId": name, "sha": commit, "private": here["private"],
                                     "siblings": [{"rfilename": path} for path in content]})
        if api:
            return self.answer(200, [{"type": "file", "path": path, "size": len(data),
                                      "oid": hashlib.sha1(data).hexdigest()} for path, data in content.items()])
        if file[3] not in content:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data = content[file[3]]
        return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name not in self.hub.repositories:
                self.hub.commit(name, {".gitattributes": b""})
                self.hub.repositories[name]["private"] = asked.get("visibility") == "private"
            return self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})
        name, what, branch = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path).groups()
        if what == "preupload":
            return self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                               for file in json.loads(body)["files"]]})
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                 for line in lines if line["key"] == "file"}
        commit = self.hub.commit(name, files, branch)
        return self.answer(200, {"success": True, "commitOid": commit,
                                 "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"})


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
