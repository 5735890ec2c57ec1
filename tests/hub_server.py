"""A hub on this machine with the part of the Hugging Face hub's API that uploads and downloads need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

from local_server import LocalServer, QuietHandler

TOKEN = "hf_right"
XET_TOKEN = "for_xet"
COMMIT = "d" * 40


class Hub(LocalServer):
    """Repositories in memory.

    Large files come through LFS, or through Xet: then a file's content here is its SHA-256, because the blocks that Xet
    sends are not put together again.

    Attributes:
        files: repository -> name -> content after the last commit.
        private: repository -> whether it was created as private.
        faults: part of a path -> status of the response to every request with it; 0 closes the connection.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.faults: dict[str, int] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256, as LFS keeps them
        self.xorbs: dict[str, bytes] = {}  # by hash: blocks of content that came through Xet
        self.shards: list[bytes] = []  # Xet's lists of the blocks of each file
        self.commits = 0
        super().__init__(_handler(self))


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(QuietHandler):
        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def say(self, content: Any = None, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refused(self) -> bool:
            fault = next((status for part, status in hub.faults.items() if part in self.path), None)
            if fault == 0:
                self.close_connection = True
                return True
            token = XET_TOKEN if self.path.startswith(("/v1/", "/v2/")) else TOKEN
            writes = self.command == "POST" and self.headers.get("Authorization") != f"Bearer {token}"
            if fault is not None or writes:
                self.body()
                self.say({"error": "not today"}, fault or 401)
                return True
            return False

        def do_POST(self) -> None:
            if not self.refused():
                self.post()

        def post(self) -> None:
            body = self.body()
            if self.path.startswith("/v1/xorbs/"):
                hub.xorbs[self.path.rpartition("/")[2]] = body
                return self.say({"was_inserted": True})
            if self.path == "/v1/shards":
                hub.shards.append(body)
                return self.say({"result": 1})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.files:
                    return self.say({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
                hub.files[name], hub.private[name] = {}, asked.get("visibility") == "private"
                return self.say({"url": f"{hub.url}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            if self.path.endswith("/info/lfs/objects/batch"):
                upload = [{**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                          for o in json.loads(body)["objects"]]  # fmt: skip
                return self.say({"transfer": "basic", "objects": upload})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main.*", self.path)
            if found is None or found[1] not in hub.files:
                return self.say({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if found[2] == "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                files = [{"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False}
                         for n in names]  # fmt: skip
                return self.say({"files": files})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    known = hub.large.get(value["oid"])
                    hub.files[found[1]][value["path"]] = value["oid"].encode() if known is None else known
            hub.commits += 1
            return self.say({"commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_PUT(self) -> None:
            if self.refused():
                return
            content = self.body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.say({}, ETag='"x"')

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if not self.refused():
                self.get()

        def get(self) -> None:
            if "/xet-write-token/" in self.path:
                expires = int(time.time()) + 3600
                return self.say({"accessToken": XET_TOKEN, "exp": expires, "casUrl": hub.url})
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
            if found is None or found[1] not in hub.files:
                return self.say({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            content = hub.files[found[1]].get(found[2])
            if content is None:
                return self.say(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.say(content, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

    return Handler
