"""A local server with the part of the Hub's HTTP API that uploads use. Tests can inject faults.

The repositories are kept in memory.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_good"
USER = "someone"


@dataclass
class Repo:
    """The content of a repository on the server.

    Attributes:
        private: whether it was created as a private repository.
        files: path -> bytes.
        commits: the commit messages.
        lfs: the paths that were uploaded through LFS.
    """

    private: bool
    files: dict = field(default_factory=dict)
    commits: list = field(default_factory=list)
    lfs: set = field(default_factory=set)


class HubServer(ThreadingHTTPServer):
    """Serve the Hub's API on a free port. `requests` records every request as `METHOD /path`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.requests, self.faults = {}, {}, [], []
        self.over = threading.Event()
        self.lock = threading.Lock()

    def fail_next(self, number, status=500, path="."):
        """Answer the next `number` matching requests with an HTTP error.

        Args:
            number: how many requests fail.
            status: the HTTP status.
            path: a regular expression, which is searched in `METHOD /path`.
        """
        page = b"<html>planted</html>"  # gateways answer with HTML instead of JSON

        def fail(handler):
            handler.answer(status, page, Content_Type="text/html")

        self.faults.append([number, path, fail])

    def hang(self, number, seconds=60, path="."):
        """Leave the next `number` matching requests unanswered, then close their connections.

        Args:
            number: how many requests hang.
            seconds: how long each of them hangs.
            path: a regular expression, which is searched in `METHOD /path`.
        """

        def wait(handler):
            self.over.wait(seconds)
            handler.close_connection = True

        self.faults.append([number, path, wait])

    def note(self, request):
        """Record a request and return the fault that was injected for it, or None."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault[0] and re.search(fault[1], request):
                    fault[0] -= 1
                    return fault[2]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # with Nagle's algorithm, each answer would wait 40 ms for the acknowledgement of its headers
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, status, content=None, **headers):
        """Send a status and a body: bytes as they are, anything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        headers = {"Content_Type": "application/json"} | headers | {"Content_Length": len(body)}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self):
        """Return the body of the request."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_request(self):
        """Record a request and answer it: with an injected fault, if any, or from ROUTES."""
        body, path = self.read(), self.path.partition("?")[0]
        if fault := self.server.note(f"{self.command} {path}"):
            return fault(self)
        for pattern, is_open, action in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                if is_open or self.headers.get("Authorization") == f"Bearer {TOKEN}":
                    return action(self, body, *match.groups())
                return self.answer(401, {"error": "Invalid username or password."})
        self.answer(404, {"error": "Sorry, we can't find the page you are looking for."})

    do_HEAD = do_GET = do_POST = do_PUT = handle_request

    def home(self, body):
        self.answer(200)

    def create(self, body):
        wanted = json.loads(body)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        content = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return self.answer(409, content | {"error": "You already created this model repo"})
        self.server.repos[name] = Repo(wanted.get("visibility") == "private")
        self.answer(200, content)

    def validate_yaml(self, body):
        good = not json.loads(body)["content"].startswith("---\nbad")
        errors = [] if good else [{"message": "bad metadata"}]
        self.answer(200 if good else 400, {"errors": errors, "warnings": []})

    def repo(self, name):
        """Return a repository. If it does not exist, answer with an error and return None."""
        if name not in self.server.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.server.repos.get(name)

    def info(self, body, name):
        if repo := self.repo(name):
            sha = f"{len(repo.commits):040x}"
            self.answer(200, {"id": name, "private": repo.private, "sha": sha})

    def preupload(self, body, name):
        if (repo := self.repo(name)) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            path, content, oid = file["path"], repo.files.get(file["path"]), None
            mode = "lfs" if path.endswith((".safetensors", ".bin", ".pt")) else "regular"
            if content is not None and mode == "lfs":
                oid = hashlib.sha256(content).hexdigest()
            elif content is not None:
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, body, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            url, oid = f"{self.server.url}/lfs", wanted["oid"]
            actions = {name: {"href": f"{url}/{name}/{oid}"} for name in ("upload", "verify")}
            is_known = oid in self.server.objects
            objects.append(wanted | ({} if is_known else {"actions": actions}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.server.objects[oid] = body
        self.answer(200 if good else 400)

    def lfs_verify(self, body, oid):
        is_complete = len(self.server.objects.get(oid, b"")) == json.loads(body)["size"]
        self.answer(200 if is_complete else 404)

    def commit(self, body, name):
        if (repo := self.repo(name)) is None:
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.objects[value["oid"]]
                repo.lfs.add(value["path"])
        oid = f"{len(repo.commits):040x}"
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (  # (regular expression for `METHOD /path`, whether it needs no token, action)
    (r"HEAD /?", True, Handler.home),
    (r"POST /api/repos/create", False, Handler.create),
    (r"POST /api/validate-yaml", False, Handler.validate_yaml),
    (rf"GET /api/models/{NAME}(?:/revision/main)?", False, Handler.info),
    (rf"POST /api/models/{NAME}/preupload/main", False, Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", False, Handler.lfs_batch),
    (r"PUT /lfs/upload/(\w+)", True, Handler.lfs_upload),  # the URL contains the permission
    (r"POST /lfs/verify/(\w+)", False, Handler.lfs_verify),
    (rf"POST /api/models/{NAME}/commit/main", False, Handler.commit),
)


@contextmanager
def serve_hub():
    """Yield a running HubServer. The server and all hanging requests end with the `with` block."""
    with HubServer() as server:
        options = {"kwargs": {"poll_interval": 0.05}, "daemon": True}
        threading.Thread(target=server.serve_forever, **options).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
