"""What tests/loopback_hub.py stands on: HTTP on the loopback device that remembers what it hears and fails on demand.

wire = Wire()
wire.fail("PUT /photo", "cut", after_bytes=100)
server = serve(lambda request: as_json({"path": request.path}), wire)
"""

import http
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked; the path is still quoted, names of headers are in any case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Response:
    """What it gets; a HEAD request gets no content, but its length."""

    status: int
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that says why not: clients turn the code, where there is one, into their own exceptions."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        reason = {"X-Error-Code": code, "X-Error-Message": message}
        self.response = Response(status, json.dumps({"error": message}).encode(), reason | dict(headers or {}))


def as_json(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """Answers with a value."""
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))


def as_file(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """Answers with a file, or with the part of it that the request asks for to go on with a broken download."""
    headers = {"Accept-Ranges": "bytes"} | dict(headers)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Response(200, content, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return Response(206, content[first : last + 1], headers | part)


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind; Wire.fail says how."""

    pattern: str
    status: int | Literal["cut", "lost"]
    times: int
    after_bytes: int | None


class Wire:
    """What several servers share: the memory of all that they received, and the faults to come.

    Attributes:
        requests: What was asked so far, as "METHOD path".
        heard: Every byte received but the Authorization headers, piece by piece; paths also unquoted.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.heard: list[bytes] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def fail(
        self, pattern: str, status: int | Literal["cut", "lost"] = 500, times: int = 1, after_bytes: int | None = None
    ) -> None:
        """Makes the next requests fail that a pattern is found in.

        Args:
            pattern: A regular expression, searched for in "METHOD path".
            status: An HTTP status to answer with, nothing being carried out; "cut" to close the connection before
                anything is carried out; or "lost" to carry the request out and to close the connection then.
            times: How many requests fail; clients try some again by themselves.
            after_bytes: Close the connection as soon as so much of the body has come; otherwise it is read to its end.

        Raises:
            ValueError: after_bytes is of no use but to "cut".
        """
        if after_bytes is not None and status != "cut":
            raise ValueError(f'after_bytes {after_bytes} with status {status!r}: only "cut" may come in the middle.')
        self._faults.append(Fault(pattern, status, times, after_bytes))

    def mend(self) -> None:
        """Lets everything go well again."""
        self._faults.clear()

    def fault_of(self, asked: str) -> Fault | None:
        """Remembers a request and returns what shall go wrong with it, once less from now on."""
        with self._lock:
            self.requests.append(asked)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, asked):
                    fault.times -= 1
                    return fault
        return None


def serve(answer: Callable[[Request], Response], wire: Wire) -> ThreadingHTTPServer:
    """Returns a server on a free port of the loopback device, with a thread for each connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_request(self) -> None:
            url = urlsplit(self.path)
            fault = wire.fault_of(f"{self.command} {url.path}")
            wire.heard += [self.path.encode(), unquote(self.path).encode()]
            wire.heard += [
                f"{name}: {value}".encode() for name, value in self.headers.items() if name.lower() != "authorization"
            ]
            body = b"".join(self.pieces_of_body(fault.after_bytes if fault else None))
            wire.heard.append(body)
            if fault and fault.status == "cut":
                return self.cut()
            request = Request(self.command, url.path, parse_qs(url.query), self.headers, body)
            try:
                if fault and isinstance(fault.status, int):
                    raise Refusal(fault.status, "", http.HTTPStatus(fault.status).phrase)
                response = answer(request)
            except Refusal as refusal:
                response = refusal.response
            if fault and fault.status == "lost":
                return self.cut()
            return self.respond(response)

        def respond(self, response: Response) -> None:
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.content)

        def pieces_of_body(self, limit: int | None) -> list[bytes]:
            """Reads the body, of known length or in chunks, or so many bytes of it."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                length = int(self.headers.get("Content-Length", 0))
                return [self.rfile.read(length if limit is None else min(length, limit))]
            pieces: list[bytes] = []
            while (size := int(self.rfile.readline(), 16)) and (limit is None or sum(map(len, pieces)) < limit):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            if size == 0:
                self.rfile.readline()
            return pieces

        def cut(self) -> None:
            """Closes the connection; what was sent and not read makes it a reset."""
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815 - names of the base class

        def log_message(self, *_: object) -> None:
            """Prints nothing: what was asked is in Wire.requests."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients may go away in the middle; all else is a bug of the server, and printed."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    return Server(("127.0.0.1", 0), Handler)
