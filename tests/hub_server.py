"""A Hub on this machine: the part of its HTTP API that uploads use, in memory, with faults to plant."""

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
    """What was pushed: files are path -> bytes, commits the messages, lfs the paths that came through LFS."""

    private: bool
    files: dict = field(default_factory=dict)
    commits: list = field(default_factory=list)
    lfs: set = field(default_factory=set)


class HubServer(ThreadingHTTPServer):
    """Serves the Hub's API on a free port; every request is noted in `requests` as `METHOD /path`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.requests, self.faults = {}, {}, [], []
        self.over = threading.Event()
        self.lock = threading.Lock()

    def fail_next(self, number, status=500, path="."):
        """Answer the next requests, of those whose `METHOD /path` the regular expression finds, with a status."""
        page = b"<html>planted</html>"  # of a gateway, which knows no JSON
        self.faults.append(
            [number, path, lambda handler: handler.answer(status, page, Content_Type="text/html")]
        )

    def hang(self, number, seconds=60, path="."):
        """Leave the next requests without an answer for some seconds, then close their connections."""

        def wait(handler):
            self.over.wait(seconds)
            handler.close_connection = True

        self.faults.append([number, path, wait])

    def note(self, request):
        """Note a request and return the fault that is planted for it, or None."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault[0] and re.search(fault[1], request):
                    fault[0] -= 1
                    return fault[2]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # else every answer waits 40 ms for the acknowledgement of its headers
    )

    def log_message(self, *_):
        pass

    def answer(self, status, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in (
            {"Content_Type": "application/json"} | headers | {"Content_Length": len(body)}
        ).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_request(self):
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
        self.answer(
            200 if good else 400,
            {"errors": [] if good else [{"message": "bad metadata"}], "warnings": []},
        )

    def repo(self, name):
        """Return a repository, or answer that there is none and return None."""
        if name not in self.server.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.server.repos.get(name)

    def info(self, body, name):
        if repo := self.repo(name):
            self.answer(
                200, {"id": name, "private": repo.private, "sha": f"{len(repo.commits):040x}"}
            )

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
            actions = {
                action: {"href": f"{self.server.url}/lfs/{action}/{wanted['oid']}"}
                for action in ("upload", "verify")
            }
            objects.append(
                wanted | ({} if wanted["oid"] in self.server.objects else {"actions": actions})
            )
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.server.objects[oid] = body
        self.answer(200 if good else 400)

    def lfs_verify(self, body, oid):
        self.answer(
            200 if len(self.server.objects.get(oid, b"")) == json.loads(body)["size"] else 404
        )

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
ROUTES = (  # (regular expression, whether it asks for no token, action)
    (r"HEAD /?", True, Handler.home),
    (r"POST /api/repos/create", False, Handler.create),
    (r"POST /api/validate-yaml", False, Handler.validate_yaml),
    (rf"GET /api/models/{NAME}(?:/revision/main)?", False, Handler.info),
    (rf"POST /api/models/{NAME}/preupload/main", False, Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", False, Handler.lfs_batch),
    (r"PUT /lfs/upload/(\w+)", True, Handler.lfs_upload),  # its address is the permission
    (r"POST /lfs/verify/(\w+)", False, Handler.lfs_verify),
    (rf"POST /api/models/{NAME}/commit/main", False, Handler.commit),
)


@contextmanager
def serve_hub():
    """Yield a running HubServer; it ends with the body, requests that hang too."""
    with HubServer() as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
