"""Open the file system of a URI, with a timeout on every operation of its client."""

import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from pyarrow import fs

CONNECT_SECONDS = 2.0
SILENT_SECONDS = 20.0  # a transfer that moves no byte for so long has failed
PART_ATTEMPTS = 5  # for one part of an upload, by the client: nobody else still has the bytes
GCS_SECONDS = 12  # of the Google client's own retries
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_QUERY = ("region", "scheme", "endpoint_override")


def open_store(uri: str) -> tuple[Any, Any, str]:
    """Return the file systems to read from and to write to, and the root that a URI names.

    The client tries a read once: `actors.storage.retries` retries it. The client retries the parts
    of a streamed upload itself, and sends one part at a time, so that memory is bounded. A model on
    the Hub is read-only.

    Raises:
        ValueError: the URI is not supported.
        OSError: the region of the bucket cannot be determined.
    """
    parts = urlsplit(uri)
    if parts.scheme == "hf":
        from actors.storage.hub import HubStore  # most runs do not need its client

        root = uri.partition("://")[2].rstrip("/")
        store = HubStore(root)
        return store, store, root
    if parts.scheme == "s3":
        root = parts.netloc + parts.path
        if not root.strip("/"):
            return None, None, ""
        how = _s3_options(parts.netloc, parts.query)
        reading = fs.S3FileSystem(**how, retry_strategy=fs.AwsStandardS3RetryStrategy(1))
        writing = fs.S3FileSystem(
            **how,
            retry_strategy=fs.AwsStandardS3RetryStrategy(PART_ATTEMPTS),
            background_writes=False,
        )
        return reading, writing, root
    if parts.scheme in ("gs", "gcs"):
        query = {"retry_limit_seconds": str(GCS_SECONDS), **dict(parse_qsl(parts.query))}
        uri = f"{uri.partition('?')[0]}?{urlencode(query)}"
    file_system, root = fs.FileSystem.from_uri(uri)
    return file_system, file_system, root


def _s3_options(bucket: str, query: str) -> dict[str, Any]:
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(given.keys() - set(_QUERY))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a store option; known: {', '.join(_QUERY)}")
    if not given.get("region"):
        named = [os.environ[name] for name in _REGIONS if os.environ.get(name)]
        elsewhere = "endpoint_override" in given or "AWS_ENDPOINT_URL" in os.environ
        given["region"] = named[0] if named else "us-east-1" if elsewhere else _region_of(bucket)
    return {
        **given,
        "connect_timeout": CONNECT_SECONDS,
        "request_timeout": SILENT_SECONDS,
        "allow_delayed_open": True,  # a small object is one PUT
    }


def _region_of(bucket: str) -> str:
    """Return the region of a bucket; Amazon's client would wait for 25 s without a network.

    Raises:
        OSError: there is no such bucket, or no response.
    """
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:  # responses 301 and 403 have the region too
        headers = error.headers
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"the region of the bucket cannot be determined: {reason}") from error
    region = headers.get("x-amz-bucket-region")
    if not region:
        raise OSError("AWS Error NO_SUCH_BUCKET")
    return str(region)
