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
        self._upload_dir = ""
        self._waiting: queue.Queue[str] = queue.Queue()

    def arrived(self, done: flowserver.Done) -> None:
        """Take up a finished file; meant as on_complete."""
        self._waiting.put(done.path)

    def start(self, upload_dir: str, temp_dir: str) -> None:
        """Begin with what is in the folder already."""
        self._upload_dir = upload_dir
        for path in files_in(upload_dir, temp_dir):
            self._waiting.put(path)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        failures = 0
        while True:
            path = self._waiting.get()
            try:
                LOG.info("%r is in the bucket as %r", path, self.deliver(path))
                failures = 0
            except FileNotFoundError:
                pass  # another process took it
            except Exception as error:  # whatever it was, the file is still here
                failures += 1
                LOG.warning("%r has not arrived, will be tried again: %s", path, error)
                self._waiting.put(path)
                time.sleep(min(2**failures, LONGEST_PAUSE))

    def deliver(self, path: str) -> str:
        """Return the key under which the file is in the bucket now; it is removed here.

        Raises what open() and boto3 raise; then the file stays.
        """
        with open(path, "rb") as file:
            digest = digest_of(file)
            for key in self._keys(path, digest):
                stored = self._stored(key)
                if stored == digest:
                    break
                if stored is None and self._send(file, key, digest):
                    break
            else:
                raise RuntimeError("its names are taken by other files")
        os.unlink(path)
        return key

    def _keys(self, path: str, digest: str) -> Tuple[str, str]:
        """Return the key to use, and the one to use when other bytes have that."""
        name = os.path.relpath(path, self._upload_dir).replace(os.sep, "/")
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
        try:
            parts = [
                self._send_part(number, block, upload)
                for number, block in enumerate(blocks_of(file, part_size), 1)
            ]
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
    courier.start(app.store.upload_dir, app.store.temp_dir)
    return app


def main() -> int:
    """Serve until Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with flowserver.FlowServer(create_app()) as server:
        print(f"open {server.url}/ in a browser", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while not stop.wait(1):
                pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
