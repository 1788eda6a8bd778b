"""What a store's failure means: worth another try, or one clear line at once.

``pyarrow`` raises `OSError` for everything, so the words of the message decide.
"""

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from planners.errors import StorageError

ATTEMPTS = 6
CONNECT_ATTEMPTS = 3  # of an address that does not answer: it is more likely wrong than busy
FIRST_DELAY_SECONDS = 0.25  # doubled after each try; each wait is half of it to all of it
MAX_SECONDS = 12.0  # no further try begins after so long

_T = TypeVar("_T")
_UNREACHABLE = re.compile(r"curlCode: (7|28)\b.*(connect|Connection timed out)", re.I | re.S)
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT"
    r"|XML_ERROR_PARSING"  # a listing that was cut short
    r"|HTTP status (408|429|5\d\d)|Connection reset|timed out|[Tt]imeout|Response body length"
)
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
# What is wrong for good -> what to say, and what would be right. The first that matches counts.
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
        f"{_CREDENTIALS}, and see what they may do with this bucket",
    ),
    (
        re.compile(r"curlCode: 6\b|Could not resolve|Name or service not known"),
        "its host is not known",
        "check endpoint_override and region, and the network",
    ),
    (
        re.compile(r"curlCode: (35|60)\b"),
        "no safe connection: {reason}",
        "a store that speaks plain HTTP needs ?scheme=http in the URI",
    ),
)


class PassingError(OSError):
    """A store failed in a way that may pass by itself."""


class ShortReadError(PassingError):
    """A store gave fewer bytes than it had said."""


def attempt(action: Callable[[], _T], *, where: str, retry: bool) -> _T:
    """Return what an action on a file or object gives, tried again where that may help.

    Args:
        action: may be called several times.
        where: the file or object, for the message.
        retry: it is a store, whose failures may pass.

    Raises:
        StorageError: it failed for good, or too often; the message names the object.
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
                said = f"{where}: {reason(error)}; tried {tries} times in {seconds:.1f} s"
                hint = "check the address, and that the store runs" if unreachable else _AGAIN
                raise StorageError(said, hint=hint) from error
        time.sleep(FIRST_DELAY_SECONDS * 2 ** (tries - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


_AGAIN = "what is done is kept; run the same command again when the store is well"


def is_transient(error: OSError) -> bool:
    """Return whether a failure of a store may pass by itself."""
    if isinstance(error, PassingError):
        return True
    text = str(error)
    return not any(p.search(text) for p, _, _ in _PERMANENT) and bool(_TRANSIENT.search(text))


def explained(error: Exception, where: str) -> StorageError:
    """Return one clear line about a failure that no further try would mend."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{where}: there is no such file")
    text = str(error)
    for pattern, said, hint in _PERMANENT:
        if found := pattern.search(text):
            words = {**found.groupdict(), "reason": reason(error)}
            return StorageError(f"{where}: {said.format(**words)}", hint=hint.format(**words))
    return StorageError(f"{where}: {reason(error)}")


def reason(error: Exception) -> str:
    """Return the last clause of a library's message: the cause, without its call stack."""
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
