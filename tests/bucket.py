"""An object store without a network: a directory that is both `gs://` for epath (through fsspec) and a Cloud Storage
server on localhost for TensorStore.

  python -m tests.bucket DIRECTORY MODULE [flags]     runs a command of ours with the directory as all of gs://

Objects cannot be appended to and there are no directories without them, as in a bucket. Unlike there, requests never
fail, and nobody is asked who they are.
"""

import hashlib
import http.server
import json
import os
import pathlib
import runpy
import sys
import threading
import urllib.parse

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Objects(DirFileSystem):
  """gs://BUCKET/KEY is the file DIRECTORY/BUCKET/KEY."""

  protocol = ("gs", "gcs")
  root = ""

  def __init__(self, **options):
    del options
    super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True))

  def open(self, path, mode="rb", **options):
    """No object can be appended to."""
    if "a" in mode:
      raise NotImplementedError(f"{path} cannot be appended to: it is an object")
    return super().open(path, mode=mode, **options)

  def mkdir(self, path, **options):
    """Does nothing: there are no directories."""

  def makedirs(self, path, **options):
    """Does nothing."""

  def rmdir(self, path):
    """Does nothing."""

  def rm(self, path, **options):
    """Removes objects; a directory is gone with the last one in it."""
    super().rm(path, **options)
    prune(self._join(path))

  def rm_file(self, path):
    """Removes an object."""
    super().rm_file(path)
    prune(self._join(path))

  def mv(self, path1, path2, **options):
    """Objects are copied and removed."""
    super().mv(path1, path2, **options)
    prune(self._join(path1))


def prune(path) -> None:
  """Removes the directories around `path` that have no object left."""
  for parent in pathlib.Path(path).parents:
    if str(parent) == Objects.root or (parent.exists() and any(parent.iterdir())):
      return
    if parent.exists():
      parent.rmdir()


class Server(http.server.BaseHTTPRequestHandler):
  """The part of the JSON API that TensorStore uses: read a range, write under a condition, list, delete."""

  protocol_version = "HTTP/1.1"
  lock = threading.Lock()

  def log_message(self, *_):
    pass

  def _parts(self):
    """(bucket, key, query) of the request."""
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    bucket, _, key = url.path.partition("/b/")[2].partition("/o")
    return bucket, urllib.parse.unquote(key.removeprefix("/")), query

  def _file(self, bucket, key):
    return pathlib.Path(Objects.root) / bucket / key

  def _generation(self, file):
    return str(file.stat().st_mtime_ns) if file.is_file() else "0"

  def _answer(self, code, body=b"", headers=()):
    self.send_response(code)
    for name, value in headers:
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _json(self, value):
    self._answer(200, json.dumps(value).encode(), [("Content-Type", "application/json")])

  def _about(self, bucket, file):
    key = file.relative_to(pathlib.Path(Objects.root) / bucket).as_posix()
    number = self._generation(file)
    return dict(kind="storage#object", name=key, bucket=bucket, generation=number, size=str(file.stat().st_size))

  def do_GET(self):
    bucket, key, query = self._parts()
    file = self._file(bucket, key)
    if not key:
      prefix = query.get("prefix", "")
      names = sorted(file.rglob("*")) if file.exists() else []
      found = [self._about(bucket, name) for name in names if name.is_file()]
      return self._json(dict(kind="storage#objects", items=[item for item in found if item["name"].startswith(prefix)]))
    if not file.is_file():
      return self._answer(404)
    number = self._generation(file)
    if query.get("ifGenerationNotMatch") == number:
      return self._answer(304)
    if query.get("ifGenerationMatch", number) != number:
      return self._answer(412)
    if query.get("alt") != "media":
      return self._json(self._about(bucket, file))
    data, headers = file.read_bytes(), [("x-goog-generation", number), ("ETag", number)]
    span = self.headers.get("Range")
    if span is None:
      return self._answer(200, data, headers)
    first, _, last = span.removeprefix("bytes=").partition("-")
    start = int(first) if first else len(data) - int(last)
    stop = int(last) + 1 if first and last else len(data)
    stop = min(stop, len(data))
    return self._answer(206, data[start:stop], [*headers, ("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")])

  def do_POST(self):
    bucket, _, query = self._parts()
    data = self.rfile.read(int(self.headers["Content-Length"]))
    file = self._file(bucket, query["name"])
    with self.lock:
      if query.get("ifGenerationMatch", self._generation(file)) != self._generation(file):
        return self._answer(412)
      file.parent.mkdir(parents=True, exist_ok=True)
      new = file.with_name(f".{file.name}.{hashlib.sha256(data).hexdigest()[:8]}")
      new.write_bytes(data)
      new.replace(file)
    return self._json(self._about(bucket, file))

  def do_DELETE(self):
    bucket, key, _ = self._parts()
    file = self._file(bucket, key)
    if not file.is_file():
      return self._answer(404)
    file.unlink()
    prune(file)
    return self._answer(204)


def open_bucket(directory: str) -> None:
  """From here on, gs:// of this process is `directory`."""
  Objects.root = os.path.abspath(directory)
  for name in Objects.protocol:
    fsspec.register_implementation(name, Objects, clobber=True)
  server = http.server.ThreadingHTTPServer(("localhost", 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://localhost:{server.server_port}"
  os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "nobody"


if __name__ == "__main__":
  open_bucket(sys.argv[1])
  sys.argv[1:] = sys.argv[2:]
  module = sys.argv.pop(1)
  runpy.run_module(module, run_name="__main__", alter_sys=True)
