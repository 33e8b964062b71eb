"""The few S3 requests the cluster's set-up needs, signed with version 4, on the standard library alone."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import http.client
from urllib.parse import quote

from e2e.cluster.layout import ClusterError

REGION = "us-east-1"


def request(host: str, port: int, method: str, path: str, access_key: str, secret_key: str) -> int:
    """Sends one request without a body and returns the reply's status.

    Raises:
        OSError: the server cannot be reached.
    """
    now = dt.datetime.now(dt.UTC)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": f"{host}:{port}", "x-amz-content-sha256": empty, "x-amz-date": stamp}
    signed = ";".join(headers)
    canonical = "\n".join(
        [method, quote(path), "", *(f"{name}:{value}" for name, value in headers.items()), "", signed, empty]
    )
    scope = f"{day}/{REGION}/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
    )
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, quote(path), headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def ensure_bucket(host: str, port: int, name: str, access_key: str, secret_key: str) -> None:
    """Creates the bucket unless it is there.

    Raises:
        ClusterError: the server cannot be reached or refuses.
    """
    try:
        status = request(host, port, "HEAD", f"/{name}", access_key, secret_key)
        if status == http.client.NOT_FOUND:
            status = request(host, port, "PUT", f"/{name}", access_key, secret_key)
    except OSError as error:
        raise ClusterError(
            f"the S3 server at {host}:{port} cannot be reached ({error}): see `kubectl --namespace s3 logs deploy/s3`"
        ) from None
    if status != http.client.OK:
        raise ClusterError(
            f"the S3 server at {host}:{port} answered {status} to a request for the bucket {name}: "
            "see `kubectl --namespace s3 logs deploy/s3`"
        )
