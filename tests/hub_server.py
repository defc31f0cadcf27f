# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback: repositories with branches and commits, large files, private repositories, and faults on demand.

It speaks the part of the Hub's HTTP protocol that pushing and loading models take, as huggingface_hub's client expects
it: large files go to an address of their own, in parts from a certain size on, and come from one on another host.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote


OWNER_TOKEN, READER_TOKEN = "hf_owner", "hf_reader"


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        """As git has it: of the content, or of the pointer that stands for a large file."""
        content = self.content
        if self.is_large:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Commit:
    """A commit: its files, and what the client said about it."""

    oid: str
    files: dict[str, Blob]
    parent: str | None = None
    summary: str = ""
    description: str = ""


class Repository:
    """A repository: its commits by id, and the id that each branch and each pull request is at."""

    def __init__(self, name: str, private: bool):
        self.name = name
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, None, "initial commit")

    def commit(self, ref: str, files: dict[str, Blob], parent: str | None, summary: str, description: str = "") -> str:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, parent, summary, description)
        self.refs[ref] = oid
        return oid

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests whose line, such as `"POST /api/repos/create"`, matches `pattern`.

    `status` is the answer instead of the right one. 0 drops the connection before anything is done, -1 after it, in
    place of the answer, -2 leaves the client waiting, and -3 drops the connection in the middle of the answer.
    """

    pattern: str
    status: int
    times: int = 1


class HubServer(http.server.ThreadingHTTPServer):
    """The Hub.

    Args:
        large (`int`): From which size in bytes on a file is a large one; safetensors are in any case.
        part (`int`): The size of the parts that large files are sent in, where they are longer than one.
    """

    daemon_threads = True

    def __init__(self, large: int = 1 << 20, part: int = 1 << 17):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.large, self.part = large, part
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files that have arrived, by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[tuple[str, str]] = []  # the address and the range of every request for a part of a file
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files come from: another host, which never gets to see a token."""
        return f"http://localhost:{self.server_address[1]}"

    def environment(self, home: Any, token: str | None = OWNER_TOKEN) -> dict[str, str | None]:
        """The environment of a process that takes this for the Hub, with its caches in `home`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

    def files(self, name: str, revision: str = "main") -> dict[str, Blob]:
        """The files of a repository."""
        return self.repositories[name].at(revision).files

    def handle_error(self, request, client_address):
        pass  # connections that are dropped on purpose


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers the client's requests: one method for each address, found in `_ROUTES`."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:  # the client is gone
            return self._drop()
        line = f"{self.command} {self.path}"
        with self.server.lock:
            self.server.requests.append(line)
            fault = self._next_fault(line)
        self.fault = fault
        if fault == -2:
            self.rfile.read(1)  # until the client is gone
        if fault in (0, -2):
            return self._drop()
        if fault is not None and fault > 0:
            return self._error(fault, "a fault that was asked for")
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, line):
                with self.server.lock:
                    return answer(self, *map(unquote, match.groups()))
        return self._error(404, f"no such address: {line}")

    def _next_fault(self, line: str) -> int | None:
        fault = next((fault for fault in self.server.faults if re.search(fault.pattern, line)), None)
        if fault is None:
            return None
        fault.times -= 1
        if fault.times == 0:
            self.server.faults.remove(fault)
        return fault.status

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _drop(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, body: bytes = b"", **headers: str):
        if self.fault == -1:
            return self._drop()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if self.fault != -3 else body[: len(body) // 2])
        if self.fault == -3:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _json(self, content: object, status: int = 200, **headers: str):
        self._answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _error(self, status: int, message: str, code: str | None = None, **headers: str):
        headers |= {"X_Error_Message": message} | ({} if code is None else {"X_Error_Code": code})
        self._json({"error": message}, status, **headers)

    # Who may do what

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token == OWNER_TOKEN:
            return True
        if self._token:
            self._error(403, "You have no right to write here.")
        else:
            self._error(401, "Invalid username or password.")
        return False

    def _repository(self, name: str) -> Repository | None:
        """Returns a repository that the client may read, or answers that there is none."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self._token not in (OWNER_TOKEN, READER_TOKEN)):
            self._error(404 if self._token else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def _commit_of(self, name: str, revision: str) -> tuple[Repository | None, Commit | None]:
        repository = self._repository(name)
        commit = repository and repository.at(revision)
        if repository is not None and commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    # Repositories

    def create(self):
        asked = json.loads(self.body)
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        answer = {"url": f"{self.server.url}/{name}", "id": name, "name": name}
        if not self._may_write():
            return None
        if name in self.server.repositories:
            return self._json({"error": "You already created this model repo", **answer}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(name, private)
        return self._json(answer)

    def create_branch(self, name: str, branch: str):
        start = json.loads(self.body).get("startingPoint", "main")
        repository, commit = self._commit_of(name, start)
        if commit is None or not self._may_write():
            return None
        if branch in repository.refs:
            return self._error(409, "Reference already exists")
        repository.refs[branch] = commit.oid
        return self._json({})

    def info(self, name: str, revision: str = "main"):
        repository, commit = self._commit_of(name, revision)
        if commit is not None:
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            self._json({"id": name, "sha": commit.oid, "siblings": siblings, "private": repository.private, "tags": []})

    def tree(self, name: str, revision: str, folder: str = ""):
        _, commit = self._commit_of(name, revision)
        if commit is None:
            return None
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
        if prefix and not inside:
            return self._error(404, f"{folder} does not exist", "EntryNotFound", X_Repo_Commit=commit.oid)
        deep = self.query.get("recursive", "").lower() == "true"
        return self._json([_entry(p, blob) for p, blob in inside.items() if deep or "/" not in p[len(prefix) :]])

    def paths_info(self, name: str, revision: str):
        _, commit = self._commit_of(name, revision)
        if commit is not None:
            paths = parse_qs(self.body.decode())["paths"]
            self._json([_entry(path, commit.files[path]) for path in paths if path in commit.files])

    # Commits

    def preupload(self, name: str, revision: str):
        _, commit = self._commit_of(name, revision)
        if commit is None or not self._may_write():
            return
        asked = json.loads(self.body)
        ignored = asked.get("gitIgnore", commit.files.get(".gitignore", Blob(b"")).content.decode()).split()
        answer = []
        for file in asked["files"]:
            path, held = file["path"], commit.files.get(file["path"])
            is_large = path.endswith(".safetensors") or file["size"] >= self.server.large
            oid = held and (held.sha256 if held.is_large else held.git_oid)
            mode = "lfs" if is_large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": oid})
        self._json({"files": answer})

    def commit(self, name: str, revision: str):
        repository, head = self._commit_of(name, revision)
        if head is None or not self._may_write():
            return None
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif value["oid"] not in self.server.objects:
                return self._error(400, f"LFS pointer points to a file that does not exist: {value['path']}")
            else:
                files[value["path"]] = Blob(self.server.objects[value["oid"]], is_large=True)
        requests = sum(ref.startswith("refs/pr/") for ref in repository.refs)
        ref = f"refs/pr/{requests + 1}" if self.query.get("create_pr") else revision
        said = header["value"]
        oid = repository.commit(ref, files, head.oid, said["summary"], said.get("description", ""))
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
        if self.query.get("create_pr"):
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{requests + 1}"
        return self._json(answer)

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    # Large files

    def batch(self, name: str):
        if self._repository(name) is None or not self._may_write():
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                upload: dict[str, Any] = {"href": f"{self.server.storage_url}/large/{oid}"}
                if size > self.server.part:
                    count = -(-size // self.server.part)
                    parts = {str(n + 1): f"{upload['href']}/{n + 1}" for n in range(count)}
                    upload |= {"href": f"{self.server.url}/complete/{oid}"}
                    upload |= {"header": {"chunk_size": str(self.server.part), **parts}}
                verify = {"href": f"{self.server.url}/verify/{oid}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str, part: str | None = None):
        if self._token:
            return self._error(400, "A token has no place in a request to the storage.")
        if part is None:
            self.server.objects[oid] = self.body
        else:
            self.server.parts.setdefault(oid, {})[int(part)] = self.body
        return self._answer(200, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, oid: str):
        parts = self.server.parts.pop(oid)
        asked = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.server.objects[oid] = b"".join(parts[number] for number in asked)
        self._json({})

    def verify(self, oid: str):
        content = self.server.objects.get(oid, b"")
        arrived = hashlib.sha256(content).hexdigest() == oid and len(content) == json.loads(self.body)["size"]
        if arrived:
            self._json({})
        else:
            self._error(422, "What has arrived is not what was announced.")

    # Files

    def resolve(self, name: str, revision: str, path: str):
        _, commit = self._commit_of(name, revision)
        if commit is None:
            return None
        blob = commit.files.get(path)
        if blob is None:
            return self._error(404, f"{path} does not exist", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{blob.git_oid}"'}
        if not blob.is_large:
            return self._content(blob.content, **headers)
        headers |= {"X_Linked_Etag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.content))}
        return self._answer(302, Location=f"{self.server.storage_url}/large/{blob.sha256}", **headers)

    def download(self, oid: str):
        if self._token:
            return self._error(400, "A token has no place in a request to the storage.")
        return self._content(self.server.objects[oid], ETag=f'"{oid}"')

    def _content(self, content: bytes, **headers: str):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, Accept_Ranges="bytes", **headers)
        self.server.ranges.append((self.path, wanted[0]))
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
        return self._answer(206, content[first : last + 1], **headers)

    # For the processes of the tests

    def plan_fault(self):
        """Takes a fault, as JSON."""
        self.server.faults.append(Fault(**json.loads(self.body)))
        self._json({})

    def planned_faults(self):
        """Tells which have not happened yet."""
        self._json([fault.pattern for fault in self.server.faults])


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    large = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 128}
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
    return entry | ({"lfs": large} if blob.is_large else {})


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable]] = [
    (r"POST /faults", HubHandler.plan_fault),
    (r"GET /faults", HubHandler.planned_faults),
    (r"POST /api/repos/create", HubHandler.create),
    (r"POST /api/validate-yaml", HubHandler.validate_yaml),
    (rf"GET /api/models/{_NAME}", HubHandler.info),
    (rf"GET /api/models/{_NAME}/revision/([^/]+)", HubHandler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", HubHandler.tree),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)/(.+)", HubHandler.tree),
    (rf"POST /api/models/{_NAME}/paths-info/([^/]+)", HubHandler.paths_info),
    (rf"POST /api/models/{_NAME}/branch/([^/]+)", HubHandler.create_branch),
    (rf"POST /api/models/{_NAME}/preupload/([^/]+)", HubHandler.preupload),
    (rf"POST /api/models/{_NAME}/commit/([^/]+)", HubHandler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", HubHandler.batch),
    (r"PUT /large/(\w+)", HubHandler.upload),
    (r"PUT /large/(\w+)/(\d+)", HubHandler.upload),
    (r"POST /complete/(\w+)", HubHandler.complete),
    (r"POST /verify/(\w+)", HubHandler.verify),
    (r"(?:GET|HEAD) /large/(\w+)", HubHandler.download),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", HubHandler.resolve),
]
