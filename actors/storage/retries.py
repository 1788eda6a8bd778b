"""Classify failures of a store: retry the transient ones, explain the permanent ones.

``pyarrow`` raises `OSError` for everything, so the text of the message decides.
"""

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from planners.errors import StorageError

ATTEMPTS = 6
CONNECT_ATTEMPTS = 3  # to an address that does not respond: it is more likely wrong than busy
FIRST_DELAY_SECONDS = 0.25  # doubled after each try, times a random factor of 0.5 to 1
MAX_SECONDS = 12.0  # no further try begins after this

_T = TypeVar("_T")
_UNREACHABLE = re.compile(r"curlCode: (7|28)\b.*(connect|Connection timed out)", re.I | re.S)
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT"
    r"|XML_ERROR_PARSING"  # a listing that was cut short
    r"|HTTP status (408|429|5\d\d)|Connection reset|timed out|[Tt]imeout|Response body length"
)
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
# Permanent failures: pattern, message, hint. The first match counts.
_PERMANENT: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(
            r"region is '(?P<given>[^']*)' while the bucket is located in '(?P<right>[^']*)"
        ),
        "the bucket is in region {right}, not in {given}",
        "put ?region={right} at the end of the URI, or set AWS_REGION",
    ),
    (
        re.compile(r"HTTP status 301|PERMANENT_REDIRECT|PermanentRedirect|AuthorizationHeaderMal"),
        "the bucket is in another region",
        "put ?region=... at the end of the URI, or set AWS_REGION",
    ),
    (
        re.compile(r"NO_SUCH_BUCKET|The specified bucket does not exist"),
        "there is no such bucket",
        "check its name, or create it",
    ),
    (
        re.compile(
            r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE"
            r"|SignatureDoesNotMatch|UNRECOGNIZED_CLIENT|INVALID_CLIENT_TOKEN|ExpiredToken"
            r"|EXPIRED_TOKEN|MISSING_AUTHENTICATION"
        ),
        "the store does not accept these credentials",
        _CREDENTIALS,
    ),
    (
        re.compile(r"ACCESS_DENIED|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED"),
        "access is denied",
        f"{_CREDENTIALS}, and check their permissions on this bucket",
    ),
    (
        re.compile(r"curlCode: 6\b|Could not resolve|Name or service not known"),
        "its host name cannot be resolved",
        "check endpoint_override and region, and the network",
    ),
    (
        re.compile(r"curlCode: (35|60)\b"),
        "no secure connection: {reason}",
        "for a store that uses plain HTTP, put ?scheme=http at the end of the URI",
    ),
)


class PassingError(OSError):
    """A transient failure of a store."""


class ShortReadError(PassingError):
    """A store returned fewer bytes than it announced."""


def attempt(action: Callable[[], _T], *, where: str, retry: bool) -> _T:
    """Return the result of an action on a file or object, retrying transient failures.

    Args:
        action: may be called several times.
        where: the file or object, for the message.
        retry: whether to retry: True for stores, whose failures may be transient.

    Raises:
        StorageError: it failed permanently, or too often; the message names the object.
    """
    begun = time.monotonic()
    for tries in range(1, ATTEMPTS + 1):
        try:
            return action()
        except OSError as error:
            seconds = time.monotonic() - begun
            unreachable = bool(_UNREACHABLE.search(str(error)))
            last = tries == (CONNECT_ATTEMPTS if unreachable else ATTEMPTS)
            if not retry or not is_transient(error):
                raise explained(error, where) from error
            if last or seconds > MAX_SECONDS:
                text = f"{where}: {reason(error)}; tried {tries} times in {seconds:.1f} s"
                hint = "check the address, and that the store is running" if unreachable else _AGAIN
                raise StorageError(text, hint=hint) from error
        time.sleep(FIRST_DELAY_SECONDS * 2 ** (tries - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


_AGAIN = "completed work is kept; run the same command again once the store is available"


def is_transient(error: OSError) -> bool:
    """Return whether a failure of a store may be transient."""
    if isinstance(error, PassingError):
        return True
    text = str(error)
    return not any(p.search(text) for p, _, _ in _PERMANENT) and bool(_TRANSIENT.search(text))


def explained(error: Exception, where: str) -> StorageError:
    """Return a clear one-line error for a permanent failure."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{where}: there is no such file")
    text = str(error)
    for pattern, message, hint in _PERMANENT:
        if found := pattern.search(text):
            words = {**found.groupdict(), "reason": reason(error)}
            return StorageError(f"{where}: {message.format(**words)}", hint=hint.format(**words))
    return StorageError(f"{where}: {reason(error)}")


def reason(error: Exception) -> str:
    """Return the cause from a library's message, without its call stack."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "No space left" in text:
        return "no space left on the disk"
    if "Permission denied" in text:
        return "permission denied"
    # Arrow: "When <doing> for key ... : AWS Error CODE during Op operation: <words> (Request ID..."
    found = re.search(r"AWS Error (\S+)(.*?)during \w+ operation: (.*)", text)
    if found is None:
        return text
    code, status, words = found.groups()
    words = words.rpartition("Details: ")[2].partition(" (Request ID")[0].strip()
    status = status.strip(" ()")
    return words or " ".join(filter(None, (code, status)))
