"""A web server on this machine for tests: files in memory, ranges, and faults on demand."""

import contextlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What the server has and how it behaves. `log` is [(path, first byte, last byte), ...]."""

    def __init__(self):
        self.files = {}
        self.etags = {}
        self.headers = {}  # path -> more headers
        self.redirects = {}  # path -> address
        self.log = []
        self.requests = []  # headers of every request
        self.faults = []  # each a function(handler, path) -> whether it answered
        self.ranges = True
        self.cut = None  # bytes after which every connection breaks
        self.pause = 0.0  # seconds before every 64 KiB
        self.sent = 0


@contextlib.contextmanager
def serving():
    """Yields (the files, the server's address)."""
    site = Files()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            path = self.path
            site.requests.append((path, dict(self.headers)))
            if site.faults and site.faults[0](self, path):
                return
            if path in site.redirects:
                self.send_response(302)
                for name, value in site.headers.get(path, {}).items():
                    self.send_header(name, value)
                self.send_header("Location", site.redirects[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = site.files.get(path.partition("?")[0])
            if data is None:
                self.send_error(404)
                return
            self.answer(path, data)

        def answer(self, path, data):
            first, last = 0, len(data) - 1
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            ranged = site.ranges and asked
            if ranged:
                first, last = int(asked[1]), min(int(asked[2]), last)
            if ranged and first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if ranged else 200)
            if ranged:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("ETag", f'"{site.etags.get(path, "1")}"')
            for name, value in site.headers.get(path, {}).items():
                self.send_header(name, value)
            self.end_headers()
            site.log.append((path, first, last))
            self.send(data[first : last + 1])

        def send(self, body):
            for at in range(0, len(body), 1 << 16):
                piece = body[at : at + (1 << 16)]
                if site.pause:
                    time.sleep(site.pause)
                if site.cut is not None and at + len(piece) > site.cut:
                    self.wfile.write(piece[: max(0, site.cut - at)])
                    self.close_connection = True
                    return
                with contextlib.suppress(OSError):
                    self.wfile.write(piece)
                    site.sent += len(piece)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            """Clients that go away are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
