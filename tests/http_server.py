"""A real HTTP server on this machine that makes errors on purpose, one script entry per request."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from local_server import LocalServer, QuietHandler


@dataclasses.dataclass
class Answer:
    """How to answer one request; the defaults are those of a correct server.

    Attributes:
        status: 0 closes the connection without a response; None is 200, or 206 if a range is requested.
        cut: close the connection after this number of bytes of the body.
        stall: pause before the body, in seconds.
        pace: pause after each 64 KiB of the body, in seconds.
        body: send this instead of the file.
        headers: additional headers; an empty value removes a header.
    """

    status: int | None = None
    cut: int | None = None
    stall: float = 0
    pace: float = 0
    body: bytes | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Request:
    """A request, and the number of bytes of the body that were sent."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int


class Server(LocalServer):
    """Serves `files` (path -> bytes), first following `script`, and remembers every request.

    Attributes:
        ranges: support range requests.
        etags: send an ETag, which is the SHA-256 of the file as on the Hugging Face hub.
        hub: send the headers that huggingface_hub needs.
        always: the answer after the end of the script.
    """

    def __init__(self, **files: bytes) -> None:
        self.files = {f"/{path}": content for path, content in files.items()}
        self.script: list[Answer] = []
        self.always = Answer()
        self.ranges = self.etags = True
        self.hub = False
        self._done: list[Request] = []
        self._under_way = 0
        self._changed = threading.Condition()
        super().__init__(self._handler())

    @property
    def requests(self) -> list[Request]:
        """All requests so far, after their responses were sent."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._under_way == 0, timeout=30)
            return list(self._done)

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]

    def sent(self) -> int:
        """The number of bytes of bodies that were sent."""
        return sum(request.sent for request in self.requests)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(QuietHandler):
            def do_HEAD(self) -> None:
                self.answer(Answer())

            def do_GET(self) -> None:
                with server._changed:
                    answer = server.script.pop(0) if server.script else server.always
                self.answer(answer)

            def answer(self, answer: Answer) -> None:
                sent = 0
                with server._changed:
                    server._under_way += 1
                try:
                    sent = self.write(answer)
                except OSError:
                    pass  # the client closed the connection
                finally:
                    self.close_connection = True
                    with server._changed:
                        server._under_way -= 1
                        server._done.append(Request(self.command, self.path, dict(self.headers), sent))
                        server._changed.notify_all()

            def write(self, answer: Answer) -> int:
                content = answer.body
                if content is None:  # an error is short: a client that is late would let all of the file be sent
                    error = (answer.status or 0) >= 400
                    content = b"" if error else server.files.get(urlsplit(self.path).path)
                status = answer.status
                if content is None and status is None:
                    status = 404
                if status == 0:
                    return 0
                content = content or b""
                etag = f'"{hashlib.sha256(content).hexdigest()}"' if server.etags else ""
                headers = {"Content-Type": "application/octet-stream", "ETag": etag}
                if server.hub:
                    headers |= {"X-Repo-Commit": "c" * 40, "X-Error-Code": "EntryNotFound" if status == 404 else ""}
                first = self.first_byte(etag, len(content)) if status is None else 0
                if first:
                    status = 206
                    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                body = content[first:]
                if status == 416:
                    body = b""
                headers = {**headers, "Content-Length": str(len(body)), **answer.headers}
                self.send_response(status or 200)
                for name, value in headers.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return 0
                time.sleep(answer.stall)
                body, sent = body[: answer.cut], 0
                for start in range(0, len(body), 1 << 16):
                    self.wfile.write(body[start : start + (1 << 16)])
                    sent += len(body[start : start + (1 << 16)])
                    time.sleep(answer.pace)
                return sent

            def first_byte(self, etag: str, size: int) -> int:
                asked, condition = self.headers.get("Range", ""), self.headers.get("If-Range", etag)
                if not (server.ranges and asked.startswith("bytes=") and condition == etag):
                    return 0
                return min(int(asked.removeprefix("bytes=").partition("-")[0]), size)

        return Handler
