"""An S3 server of this machine (moto's), which can be made to fail as S3 does."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    create_backend_app,
)
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUSY = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"


class S3:
    """With `fails`, each request that stores bytes fails once before it is taken; with
    `forgets`, once after it was."""

    def __init__(self, bucket: str = "") -> None:
        self.is_down = False
        self.fails = False
        self.forgets = False  # to answer
        self.failures = 0
        self.parts = 0
        self.unchecked = 0  # requests whose checksum was missing or wrong
        self._failed: set[tuple[str, str, str]] = set()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.surroundings = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id="nobody",
            aws_secret_access_key="nothing",
        )
        # All servers of moto in one process have the same buckets.
        self.bucket = bucket or f"test-{secrets.token_hex(8)}"
        self.client.create_bucket(Bucket=self.bucket)

    def __enter__(self) -> S3:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(
        self, environ: dict[str, Any], start: Callable[..., Any]
    ) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if self.is_down or self._fails_now(environ, self.fails):
            self.failures += 1
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [BUSY]
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].count("/") > 1:
            self.parts += "partNumber" in environ["QUERY_STRING"]
            self._check(environ, body)
        if self._fails_now(environ, self.forgets):
            self.failures += 1
            list(self._app(environ, lambda *_: None))
            start("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [BUSY]
        answer: Iterable[bytes] = self._app(environ, start)
        return answer

    def _fails_now(self, environ: dict[str, Any], fails: bool) -> bool:
        names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING")
        request = (environ[names[0]], environ[names[1]], environ[names[2]])
        if not fails or request[0] == "HEAD" or request in self._failed:
            return False
        self._failed.add(request)
        return True

    def _check(self, environ: dict[str, Any], body: bytes) -> None:
        right = base64.b64encode(hashlib.sha256(body).digest()).decode()
        self.unchecked += environ.get("HTTP_X_AMZ_CHECKSUM_SHA256") != right

    def objects(self) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        keys = [one["Key"] for one in listed]
        return {key: self.read(key) for key in keys}

    def read(self, key: str) -> bytes:
        found = self.client.get_object(Bucket=self.bucket, Key=key)
        content: bytes = found["Body"].read()
        return content

    def unfinished(self) -> list[Any]:
        listed = self.client.list_multipart_uploads(Bucket=self.bucket)
        found: list[Any] = listed.get("Uploads", [])
        return found
