#!/usr/bin/env python3
"""flowserver that hands each finished file to S3 and then removes it here.

    S3_BUCKET=films python sample/to_s3.py
    S3_BUCKET=films gunicorn --threads 8 'sample.to_s3:create_app()'

Settings come from conf.ini (or FLOWSERVER_CONFIG), address and credentials from where
boto3 looks for them (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE...); S3_PREFIX goes
before each key.  Needs boto3 1.36 or later, and the rights to list the bucket, get and
put objects and abort uploads.

The upload folder is the queue: a file in it has not arrived yet.  So an answer does not
wait for S3, nothing else must be kept, and a crash loses nothing: what is found in the
folder at the start is sent first.  Each part travels with its checksum; what fails is
tried again until it has arrived.  Nothing in the bucket is overwritten: other bytes
under the same name get a key with their hash, the same bytes are not stored twice.

Parts that a crash has left in the bucket are removed by a lifecycle rule
(AbortIncompleteMultipartUpload).  Don't start gunicorn with --preload: the thread that
sends would stay behind in the parent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, BinaryIO, Dict, Iterator, Optional, Tuple

try:
    import flowserver
except ImportError:  # it is one folder above
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import flowserver

LOG = logging.getLogger("flowserver.s3")
PART_SIZE = 16 * 1024 * 1024  # bytes; S3 takes parts from 5 MiB to 5 GiB
MOST_PARTS = 10_000
LONGEST_PAUSE = 60  # seconds


class Courier:
    """Takes files to a bucket, one after the other, in a thread of its own."""

    def __init__(self, client: Any, bucket: str, prefix: str = "") -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._waiting: queue.Queue[str] = queue.Queue()

    def arrived(self, done: flowserver.Done) -> None:
        """Take up a finished file; meant as on_complete."""
        self._waiting.put(done.path)

    def start(self, store: flowserver.Store) -> None:
        """Begin with what is in the folder already."""
        for path in files_in(store.upload_dir, store.temp_dir):
            self._waiting.put(path)
        threading.Thread(target=self._work, args=[store], daemon=True).start()

    def _work(self, store: flowserver.Store) -> None:
        failures = 0
        while True:
            path = self._waiting.get()
            try:
                LOG.info("%r is in the bucket as %r", path, self.deliver(path, store))
                failures = 0
            except FileNotFoundError:
                pass  # another process took it
            except Exception as error:  # whatever it was, the file is still here
                failures += 1
                LOG.warning("%r has not arrived, will be tried again: %s", path, error)
                self._waiting.put(path)
                time.sleep(min(2**failures, LONGEST_PAUSE))

    def deliver(self, path: str, store: flowserver.Store) -> str:
        """Return the key under which the file is in the bucket now; it is removed here.

        Raises what open() and boto3 raise; then the file stays.
        """
        with contextlib.ExitStack() as undo:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno())
                name = os.path.relpath(path, store.upload_dir).replace(os.sep, "/")
                key = self._bring(file, name)
                # Another process may have brought it, too, and removed it: then a newer
                # file can have its name, which must not be removed in its stead.
                undo.enter_context(removing(store))
                if version_of(os.stat(path)) != version_of(found):
                    raise RuntimeError("there is a newer one now")
            os.unlink(path)  # after the end of `with`: Windows removes no open file
        return key

    def _bring(self, file: BinaryIO, name: str) -> str:
        """Return the key under which these bytes are in the bucket now."""
        digest = digest_of(file)
        for key in self._keys(name, digest):
            stored = self._stored(key)
            if stored is None:
                # "Taken" may be said of our own bytes, when an answer was lost.
                is_sent = self._send(file, key, digest)
                stored = digest if is_sent else self._stored(key)
            if stored == digest:
                return key
        raise RuntimeError("its names are taken by other files")

    def _keys(self, name: str, digest: str) -> Tuple[str, str]:
        """Return the key to use, and the one to use when other bytes have that."""
        stem, suffix = os.path.splitext(name)
        return self._prefix + name, f"{self._prefix}{stem} ({digest[:16]}){suffix}"

    def _stored(self, key: str) -> Optional[str]:
        """Return the digest of what has this key, "" without one; None for nothing."""
        try:
            found = self._client.head_object(Bucket=self._bucket, Key=key)
        except self._client.exceptions.ClientError as error:
            if status_of(error) == 404:
                return None
            raise
        return str(found["Metadata"].get("sha256", ""))

    def _send(self, file: BinaryIO, key: str, digest: str) -> bool:
        """Store the file; False when the key has been taken meanwhile."""
        size = os.fstat(file.fileno()).st_size
        target = {"Bucket": self._bucket, "Key": key}
        file.seek(0)
        try:
            if size <= PART_SIZE:
                block = file.read()
                require_same(hashlib.sha256(block), digest)
                self._client.put_object(
                    **target,
                    **checked(block),
                    Body=block,
                    Metadata={"sha256": digest},
                    IfNoneMatch="*",
                )
            else:
                self._send_parts(file, size, target, digest)
        except self._client.exceptions.ClientError as error:
            if status_of(error) == 412:
                return False
            raise
        return True

    def _send_parts(
        self, file: BinaryIO, size: int, target: Dict[str, str], digest: str
    ) -> None:
        begun = self._client.create_multipart_upload(
            **target, ChecksumAlgorithm="SHA256", Metadata={"sha256": digest}
        )
        upload = {**target, "UploadId": begun["UploadId"]}
        part_size = max(PART_SIZE, -(-size // MOST_PARTS))
        parts, sent = [], hashlib.sha256()
        try:
            for number, block in enumerate(blocks_of(file, part_size), 1):
                sent.update(block)
                parts.append(self._send_part(number, block, upload))
            require_same(sent, digest)
            self._client.complete_multipart_upload(
                **upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except BaseException:
            with contextlib.suppress(Exception):
                self._client.abort_multipart_upload(**upload)
            raise

    def _send_part(
        self, number: int, block: bytes, upload: Dict[str, str]
    ) -> Dict[str, object]:
        checksum = checked(block)
        stored = self._client.upload_part(
            **upload, **checksum, PartNumber=number, Body=block
        )
        return {"PartNumber": number, "ETag": stored["ETag"], **checksum}


def files_in(folder: str, temp_dir: str) -> Iterator[str]:
    """Return the finished files of an upload folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if os.path.join(parent, n) != temp_dir]
        for path in (os.path.join(parent, name) for name in names):
            if os.path.isfile(path) and not os.path.islink(path):
                yield path


def blocks_of(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Return the file in blocks of this size, the last one shorter."""
    return iter(lambda: file.read(size), b"")


def digest_of(file: BinaryIO) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    for block in blocks_of(file, 1024 * 1024):
        digest.update(block)
    return digest.hexdigest()


def require_same(sent: Any, digest: str) -> None:
    """Raise RuntimeError when a file has had two contents while it was read twice."""
    if sent.hexdigest() != digest:
        raise RuntimeError("it was changed meanwhile")


def version_of(found: os.stat_result) -> Tuple[int, ...]:
    """Return what tells a file from others of its name, and from its past."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def removing(store: flowserver.Store) -> Iterator[None]:
    """Be the only one of all processes that removes a file here."""
    with open(os.path.join(store.temp_dir, "to_s3.lock"), "ab") as file:
        store.disk.lock(file.fileno())
        try:
            yield
        finally:
            store.disk.unlock(file.fileno())


def checked(block: bytes) -> Dict[str, str]:
    """Return the checksum that S3 holds the block against when it arrives."""
    digest = hashlib.sha256(block).digest()
    return {"ChecksumSHA256": base64.b64encode(digest).decode()}


def status_of(error: Any) -> int:
    """Return the HTTP status of an error of boto3."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def s3_client() -> Any:
    """Return boto3's client, which repeats what failed in passing."""
    import boto3
    from botocore.config import Config

    retries: Any = {"mode": "standard", "total_max_attempts": 5}
    return boto3.client("s3", config=Config(retries=retries))


def create_app() -> flowserver.UploadApp:
    """Return flowserver's application with a courier to S3_BUCKET."""
    settings = flowserver.load_settings(flowserver.find_config(None), {})
    if settings.on_conflict == "replace":
        # A newer file of the same name could come while the older one is on its way,
        # and would be removed in its stead.
        raise SystemExit("to_s3.py needs on_conflict = rename or refuse.")
    if not os.environ.get("S3_BUCKET"):
        raise SystemExit("Name the bucket: S3_BUCKET=films.")
    prefix = os.environ.get("S3_PREFIX", "")
    courier = Courier(s3_client(), os.environ["S3_BUCKET"], prefix)
    app = flowserver.UploadApp(settings, on_complete=courier.arrived, any_path=False)
    courier.start(app.store)
    return app


def main() -> int:
    """Serve until Ctrl-C or SIGTERM."""
    if len(sys.argv) > 1:
        print(__doc__, file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        server = flowserver.FlowServer(create_app())
    except (flowserver.FlowError, OSError) as error:
        print(f"to_s3.py: {error}", file=sys.stderr)
        return 1
    # An Event would wait for ever when the signal comes while wait() holds its lock.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: signals.put(number))
    with server:
        print(f"open {server.url}/ in a browser", flush=True)
        while True:
            with contextlib.suppress(queue.Empty):
                signals.get(timeout=0.5)
                return 0


if __name__ == "__main__":
    sys.exit(main())
