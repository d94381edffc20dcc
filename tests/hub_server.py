"""A stand-in for the hub's API on loopback: data set repositories in memory.

It has what ``huggingface_hub`` asks for to create, list, read and commit to a repository, answers
as the hub does where a name is unknown, a token is missing or a commit's parent is not the newest,
and keeps the paths of all commits.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_test"
_NAME = r"\w+/[^/]+/[^/]+"


@dataclass
class Repository:
    name: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class HubServer:
    """Repositories by name, such as ``datasets/me/store``."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    refuse: int = 0
    """How many commits are still answered as if another one had been faster."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    address: str = ""

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        serve = partial(self._server.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(rf"/({_NAME})/resolve/[^/]+/(.+)", path):
            if (repository := self.repository(found[1])) is None:
                return
            if (content := repository.files.get(found[2])) is None:
                self.reply(404, {}, {"X-Error-Code": "EntryNotFound"})
                return
            name = sha1(content).hexdigest()
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": repository.head}
            self.reply(200, content, headers)
        elif found := re.fullmatch(rf"/api/({_NAME})/tree/[^/]+/?(.*)", path):
            self.tree(found[1], found[2], "recursive=true" in self.path.lower())
        elif found := re.fullmatch(rf"/api/({_NAME})(/revision/[^/]+)?", path):
            if repository := self.repository(found[1]):
                name = found[1].partition("/")[2]
                self.reply(200, {"id": name, "sha": repository.head, "siblings": []})
        else:
            self.reply(404, {"error": f"the stand-in has no {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = (
                f"{asked.get('type', 'model')}s/{asked.get('organization', 'me')}/{asked['name']}"
            )
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository(name, _is_private(asked)))
            self.reply(409 if known else 200, {"url": f"{self.hub.address}/{name}"})
        elif found := re.fullmatch(
            r"/api/(\w+/[^/]+/[^/]+)/(preupload|paths-info|commit)/.*", path
        ):
            if repository := self.repository(found[1]):
                getattr(self, found[2].replace("-", "_"))(repository, body)
        else:
            self.reply(404, {"error": f"the stand-in has no {path}"})

    def preupload(self, repository: Repository, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def paths_info(self, repository: Repository, body: bytes) -> None:
        paths = parse_qs(body.decode())["paths"]
        self.reply(200, [_entry(p, repository.files[p]) for p in paths if p in repository.files])

    def commit(self, repository: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        with self.hub.lock:
            parent = lines[0]["value"].get("parentCommit", repository.head)
            if parent != repository.head or self.hub.refuse:
                self.hub.refuse = max(self.hub.refuse - 1, 0)
                self.reply(412, {"error": "A commit has happened since."})
                return
            changed = []
            for line in lines[1:]:
                value = line["value"]
                changed.append(value["path"])
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    del repository.files[value["path"]]
            repository.commits.append(changed)
        url = f"{self.hub.address}/{repository.name}/commit/{repository.head}"
        self.reply(200, {"commitUrl": url, "commitOid": repository.head})

    def tree(self, name: str, folder: str, recursive: bool) -> None:
        if (repository := self.repository(name)) is None:
            return
        start = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in repository.files.items():
            if path.startswith(start):
                first, _, deeper = path[len(start) :].partition("/")
                if recursive or not deeper:
                    entries[path] = _entry(path, content)
                else:
                    entries[start + first] = {"type": "directory", "path": start + first, "oid": ""}
        if entries or not folder:
            self.reply(200, list(entries.values()))
        else:
            self.reply(404, {}, {"X-Error-Code": "EntryNotFound"})

    def repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not token):
            headers = {"X-Error-Code": "RepoNotFound"}
            self.reply(404 if token else 401, {"error": "Repository not found"}, headers)
            return None
        return found

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def _is_private(asked: dict[str, Any]) -> bool:
    return bool(asked.get("private")) or asked.get("visibility") == "private"
