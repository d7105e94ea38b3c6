"""An S3-like store on the loopback, for the tests of what is published."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

SECRET = "a-secret-that-nothing-repeats"


class ObjectStore:
    """A bucket on a server of this process.

    Args:
        port: Of the server.

    Attributes:
        client: Of boto3: a second opinion on what lies there.
    """

    bucket = "bucket"

    def __init__(self, port: int) -> None:
        import boto3

        self.port = port
        self.client: Any = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=self.bucket)

    def url(self, path: str, bucket: str = bucket, port: int | None = None) -> str:
        """Of a place in a bucket, as a configuration has it."""
        address = f"127.0.0.1:{port or self.port}"
        return f"s3://{bucket}/{path}?endpoint_override={address}&scheme=http&region=us-east-1"

    def objects(self, path: str) -> dict[str, bytes]:
        """Key below `path` -> content; the empty objects that stand for folders are left out."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{path}/"
        )
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {
            key.removeprefix(f"{path}/"): self.read(key) for key in keys if not key.endswith("/")
        }

    def read(self, key: str) -> bytes:
        """One object."""
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        """One object."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def deny(self, action: str) -> None:
        """Let nobody do this to the bucket; "" takes it back."""
        if not action:
            self.client.delete_bucket_policy(Bucket=self.bucket)
            return
        rule = {
            "Effect": "Deny", "Principal": "*", "Action": [f"s3:{action}"],
            "Resource": f"arn:aws:s3:::{self.bucket}/*",
        }  # fmt: skip
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        self.client.put_bucket_policy(Bucket=self.bucket, Policy=policy)


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """One for the whole run: give every test a path of its own."""
    from moto.server import ThreadedMotoServer  # seconds that most tests need not wait

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield ObjectStore(server.get_host_and_port()[1])
        server.stop()
