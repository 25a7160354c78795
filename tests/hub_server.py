"""A stand-in of the Hub's API, as much of it as pushing and downloading small files needs."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Repositories in memory: `files[repo][path]` is the content."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.commits, self.tokens = {}, [], set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def sha(self, repo):
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=None, status=200, headers=(), raw=None):
        data = raw if raw is not None else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.answer({"error": "not found"}, 404, {"X-Error-Code": code})

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            made = json.loads(body)
            owner = made.get("organization") or "user"
            repo = f"{owner}/{made['name']}"
            status = 409 if repo in self.server.files else 200
            self.server.files.setdefault(repo, {})
            return self.answer({"url": f"{self.server.address}/{repo}", "id": repo}, status)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        parts = self.path.split("?")[0].split("/")
        repo, what = "/".join(parts[3:5]), parts[5]
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self.answer({"files": modes})
        if what == "commit":
            added = []
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
                    added.append(value["path"])
            self.server.commits.append(sorted(added))
            sha = self.server.sha(repo)
            url = f"{self.server.address}/{repo}/commit/{sha}"
            return self.answer(
                {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}
            )
        return self.missing("EntryNotFound")

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:1] == ["api"]:
            repo = "/".join(parts[2:4])
            if repo not in self.server.files:
                return self.missing("RepoNotFound")
            files = self.server.files[repo]
            if parts[4:5] == ["tree"]:
                rows = [
                    {"type": "file", "path": n, "size": len(d), "oid": oid(d)}
                    for n, d in files.items()
                ]
                return self.answer(rows)
            siblings = [{"rfilename": n, "size": len(d)} for n, d in files.items()]
            return self.answer(
                {"id": repo, "modelId": repo, "sha": self.server.sha(repo), "siblings": siblings}
            )
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        if repo not in self.server.files:
            return self.missing("RepoNotFound")
        if name not in self.server.files[repo]:
            return self.missing("EntryNotFound")
        data = self.server.files[repo][name]
        headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": self.server.sha(repo)}
        return self.answer(headers=headers, raw=data)

    do_HEAD = do_GET
