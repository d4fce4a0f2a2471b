"""A Hub on 127.0.0.1: a real HTTP server with the endpoints that huggingface_hub calls.

It keeps repositories of models in memory, with commits, branches, files in LFS, private and gated
access, and tokens. It answers as the Hub does, with the same status codes, headers and error codes.
It knows nothing of atp_patch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository of a model.

    Attributes:
        private: whether only its owner may read it.
        gated: whether readers must have been let in by its owner.
        commits: for each commit its files.
        branches: for each branch its newest commit.
        messages: for each commit its message, in the order of the commits.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files, message: str) -> str:
        """Make a commit, and return its name of 40 hexadecimal digits."""
        parent = self.branches.get(branch, "")
        said = [parent, message, str(len(self.commits))]
        said += [f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in files.items()]
        name = hashlib.sha1("\n".join(said).encode()).hexdigest()
        self.commits[name], self.branches[branch], self.messages[name] = dict(files), name, message
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit's name stands for."""
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """The server and what it keeps.

    Attributes:
        url: its address.
        storage: the address of the files in LFS.
        users: for each token its user and whether it may write.
        repositories: the repositories by name.
        requests: what was asked, as "METHOD /path", in order.
        before: for the beginning of a "METHOD /path" what happens once, before it is answered.
        large: the least size in bytes of a file that goes into LFS; None: none does.
    """

    def __init__(self) -> None:
        self.users: dict[str, tuple[str, bool]] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.before: dict[str, Callable[[], object]] = {}
        self.large: int | None = None
        self.lock = threading.RLock()
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        # Files in LFS lie on another host, which the client shows no token.
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads = True
        self.url, self.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    @contextmanager
    def running(self) -> Iterator[LoopbackHub]:
        """Serve in threads inside this context."""
        threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            for server in self.servers
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip(self.servers, threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()

    def add(
        self,
        name: str,
        files: Files,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Put files into a repository, which is made if it is new; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault(name, Repository())
            repository.private, repository.gated = private, gated
            return repository.commit(branch, files, "added")

    def files(self, name: str, revision: str = "main") -> Files:
        """The files of a revision."""
        repository = self.repositories[name]
        return repository.commits[repository.branches.get(revision, revision)]

    def cut(self, request: str, after: int = 0, times: int = 1, status: int | None = None) -> Fault:
        """Break the connection while a request is answered.

        Args:
            request: a regular expression for "METHOD /path".
            after: how many bytes of the answer's body are sent before.
            times: how often.
            status: answer with this status of an error instead.
        """
        fault = Fault(re.compile(request), after, times, status)
        self.faults.append(fault)
        return fault


@dataclass
class Fault:
    """A connection that breaks.

    Attributes:
        request: for which requests.
        after: how many bytes of the body are sent before.
        times: how often it still happens.
        status: the status that is answered instead, or None.
        happened: how often it has happened.
    """

    request: re.Pattern[str]
    after: int
    times: int
    status: int | None = None
    happened: int = 0


def git_oid(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    """The class of handlers for one hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            path = unquote(urlsplit(self.path).path)
            asked = f"{self.command} {path}"
            with hub.lock:
                hub.requests.append(asked)
                fault = next((f for f in hub.faults if f.times and f.request.search(asked)), None)
                if fault is not None:
                    fault.times -= 1
                    fault.happened += 1
                first = [start for start in hub.before if asked.startswith(start)]
                for start in first:
                    hub.before.pop(start)()
            try:
                if fault is not None and fault.status is not None:
                    raise RefusalError(fault.status, None, "out of order")
                if fault is not None and not fault.after:
                    self.close_connection = True
                    return
                status, headers, answer = self._route(path, body)
            except RefusalError as refusal:
                status, answer = refusal.status, json.dumps({"error": refusal.message}).encode()
                headers = {"X-Error-Message": refusal.message, "Content-Type": "application/json"}
                if refusal.code is not None:
                    headers["X-Error-Code"] = refusal.code
            self._send(status, headers, answer, fault)

        def _send(
            self, status: int, headers: dict[str, str], answer: bytes, fault: Fault | None
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is not None and fault.status is None:
                self.wfile.write(answer[: fault.after])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(answer)

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
            user = _user(hub, self.headers)
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    with hub.lock:
                        return answer(Call(hub, user, self.headers, body), **found.groupdict())
            raise RefusalError(404, None, f"no such endpoint: {self.command} {path}")

    return Handler


@dataclass
class Call:
    """What an endpoint is given: the hub, who asks (None: no token), headers and body."""

    hub: LoopbackHub
    user: tuple[str, bool] | None
    headers: Message
    body: bytes

    def json(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)

    def repository(self, repo: str, write: bool = False, content: bool = False) -> Repository:
        """A repository that the user may read, or write to.

        Args:
            content: whether files are read, which a gated repository refuses to strangers.
        """
        found = self.hub.repositories.get(repo)
        owner = self.user is not None and self.user[0] == repo.partition("/")[0]
        if found is None or (found.private and not owner):
            # Without a token the Hub answers 401 for what does not exist and for what is private.
            if self.user is None:
                raise RefusalError(401, "RepoNotFound", "Invalid username or password.")
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        if found.gated and content and not owner:
            status = 401 if self.user is None else 403
            raise RefusalError(status, "GatedRepo", f"Access to model {repo} is restricted.")
        if write and self.user is None:
            raise RefusalError(401, None, "Invalid username or password.")
        if write and not (owner and self.user is not None and self.user[1]):
            raise RefusalError(403, None, "you do not have the right to write to this repository")
        return found

    def commit(self, repository: Repository, revision: str) -> str:
        """The commit of a revision."""
        name = repository.resolve(revision)
        if name is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name

    def in_lfs(self, path: str, size: int) -> bool:
        """Whether a file goes into LFS."""
        large = self.hub.large
        return large is not None and (size >= large or path.endswith(".safetensors"))


Answer = tuple[int, dict[str, str], bytes]


def _user(hub: LoopbackHub, headers: Message) -> tuple[str, bool] | None:
    given = headers.get("Authorization")
    if given is None:
        return None
    token = given.removeprefix("Bearer ")
    if token not in hub.users:
        raise RefusalError(401, None, "Invalid credentials in Authorization header")
    return hub.users[token]


def _json(data: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(data).encode()


def _whoami(call: Call) -> Answer:
    if call.user is None:
        raise RefusalError(401, None, "Invalid username or password.")
    return _json({"type": "user", "name": call.user[0], "auth": {"type": "access_token"}})


def _create(call: Call) -> Answer:
    if call.user is None:
        raise RefusalError(401, None, "Invalid username or password.")
    asked = call.json()
    owner = asked.get("organization") or call.user[0]
    name = f"{owner}/{asked['name']}"
    if owner != call.user[0] or not call.user[1]:
        raise RefusalError(403, None, f"You don't have the rights to create a model under {owner}")
    url = {"url": f"{call.hub.url}/{name}", "name": name}
    if name in call.hub.repositories:
        return _json({"error": "You already created this model repo", **url}, 409)
    repository = Repository(private=asked.get("visibility") == "private")
    repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
    call.hub.repositories[name] = repository
    return _json(url)


def _validate(call: Call) -> Answer:
    """Check the metadata at the head of a card."""
    text = call.json()["content"]
    found = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    wrong = [
        {"message": f'"{name}" must be {kind.__name__}'}
        for name, kind in (("license", str), ("pipeline_tag", str), ("tags", list))
        if name in data and not isinstance(data[name], kind)
    ]
    return _json({"errors": wrong, "warnings": []}, 400 if wrong else 200)


def _info(call: Call, repo: str, revision: str = "main") -> Answer:
    repository = call.repository(repo)
    name = call.commit(repository, revision)
    siblings = [{"rfilename": path} for path in sorted(repository.commits[name])]
    data = {"id": repo, "modelId": repo, "sha": name, "private": repository.private}
    return _json({**data, "gated": repository.gated, "siblings": siblings, "tags": []})


def _tree(call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo)
    files = repository.commits[call.commit(repository, revision)]
    return _json([_entry(call, path, data) for path, data in sorted(files.items())])


def _entry(call: Call, path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if call.in_lfs(path, len(data)):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
    return entry


def _paths_info(call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo)
    files = repository.commits[call.commit(repository, revision)]
    wanted = call.json()["paths"]
    return _json([_entry(call, path, files[path]) for path in wanted if path in files])


def _resolve(call: Call, repo: str, revision: str, path: str) -> Answer:
    repository = call.repository(repo, content=True)
    name = call.commit(repository, revision)
    headers = {"X-Repo-Commit": name}
    if path not in repository.commits[name]:
        message = json.dumps({"error": "Entry not found"}).encode()
        return 404, {**headers, "X-Error-Code": "EntryNotFound"}, message
    data = repository.commits[name][path]
    headers |= {"ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
    if call.in_lfs(path, len(data)):
        sha = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        call.hub.stored[sha] = data
        return 302, {**headers, "Location": f"{call.hub.storage}/lfs/{sha}"}, b""
    return _ranged(call, data, headers)


def _ranged(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if asked is None:
        return 200, headers, data
    start, end = int(asked[1]), int(asked[2] or len(data) - 1)
    said = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return 206, headers | said, data[start : end + 1]


def _preupload(call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo, write=True)
    files = repository.commits[call.commit(repository, revision)]
    answers = []
    for entry in call.json()["files"]:
        path = entry["path"]
        mode = "lfs" if call.in_lfs(path, entry["size"]) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in files:
            data = files[path]
            answer["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else git_oid(data)
        answers.append(answer)
    return _json({"files": answers})


def _lfs_batch(call: Call, repo: str) -> Answer:
    call.repository(repo, write=True)
    objects = []
    for wanted in call.json()["objects"]:
        entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.stored:
            entry["actions"] = {"upload": {"href": f"{call.hub.storage}/lfs/{wanted['oid']}"}}
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


def _lfs_put(call: Call, sha: str) -> Answer:
    _without_token(call)
    if hashlib.sha256(call.body).hexdigest() != sha:
        raise RefusalError(400, None, "the content is not what its name says")
    call.hub.stored[sha] = call.body
    return 200, {}, b""


def _lfs_get(call: Call, sha: str) -> Answer:
    _without_token(call)
    return _ranged(call, call.hub.stored[sha], {"ETag": f'"{sha}"'})


def _without_token(call: Call) -> None:
    if call.user is not None:
        raise RefusalError(400, None, "a token of the Hub was sent to the storage")


def _commit(call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo, write=True)
    parent = call.commit(repository, revision)
    if revision not in repository.branches:
        raise RefusalError(400, None, "a commit must go to a branch")
    files, message = dict(repository.commits[parent]), ""
    for line in call.body.decode().splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            message = value["summary"]
            if value.get("parentCommit", parent) != parent:
                raise RefusalError(
                    412, None, "A commit has happened since. Please refresh and try again."
                )
        elif entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            if value["oid"] not in call.hub.stored:
                raise RefusalError(400, None, f"LFS pointer {value['path']} points to no file")
            files[value["path"]] = call.hub.stored[value["oid"]]
        elif entry["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise RefusalError(400, None, f"unknown operation {entry['key']}")
    name = repository.commit(revision, files, message)
    url = f"{call.hub.url}/{repo}/commit/{name}"
    return _json({"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})


def _branch(call: Call, repo: str, branch: str) -> Answer:
    repository = call.repository(repo, write=True)
    if branch in repository.branches:
        raise RefusalError(409, None, f"Reference already exists: {branch}")
    start = call.json().get("startingPoint", "main") if call.body else "main"
    repository.branches[branch] = call.commit(repository, start)
    return _json({})


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., Answer]], ...] = (
    (("GET",), "/api/whoami-v2", _whoami),
    (("POST",), "/api/repos/create", _create),
    (("POST",), "/api/validate-yaml", _validate),
    (("GET",), f"/api/models/{_REPO}", _info),
    (("GET",), f"/api/models/{_REPO}/revision/{_REV}", _info),
    (("GET",), f"/api/models/{_REPO}/tree/{_REV}", _tree),
    (("POST",), f"/api/models/{_REPO}/paths-info/{_REV}", _paths_info),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REV}", _preupload),
    (("POST",), f"/api/models/{_REPO}/commit/{_REV}", _commit),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _branch),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", _resolve),
    (("POST",), f"/{_REPO}.git/info/lfs/objects/batch", _lfs_batch),
    (("PUT",), "/lfs/(?P<sha>[0-9a-f]{64})", _lfs_put),
    (("GET", "HEAD"), "/lfs/(?P<sha>[0-9a-f]{64})", _lfs_get),
)
