"""Object storage that stalls, lies and fails: a whole object, or one clear line."""

import io
import random
import time

import pytest

from actors.storage import files, retries, stores
from actors.storage.files import Directory
from planners.errors import StorageError
from tests.stores import KEYS, Fault, uri_of

DATA = random.Random(0).randbytes(100_000)
LARGE = random.Random(1).randbytes(30_000_000)  # three parts of an upload


@pytest.fixture
def quick(monkeypatch):
    """Wait a twentieth of what a run waits, between two tries and for a silent store."""
    monkeypatch.setattr(retries, "FIRST_DELAY_SECONDS", 0.0125)
    monkeypatch.setattr(stores, "SILENT_SECONDS", 1.0)


@pytest.fixture
def held(faulty, quick):  # noqa: ARG001 before the directory is opened
    """A directory on the faulty store with one object in it, no fault yet."""
    directory = Directory(faulty.uri("run"))
    directory.write("object", DATA)
    faulty.requests.clear()
    return directory


def test_a_small_object_is_one_request_and_a_large_one_comes_in_parts(faulty):
    directory = Directory(faulty.uri("run"))
    directory.write("small", DATA)
    assert [m for m, path in faulty.requests] == ["PUT"]
    faulty.requests.clear()
    entry = directory.write("large", LARGE)
    assert faulty.count("PUT", "partNumber") >= 3
    assert faulty.count("POST", "uploads") == 1
    faulty.requests.clear()
    assert directory.sha256("large") == entry.sha256
    assert directory.size("large") == entry.bytes == len(LARGE)
    assert faulty.count("GET") > 5, "read by ranges"
    assert directory.read_range("large", 12_345_678, 1000) == LARGE[12_345_678:][:1000]
    assert directory.names() == ["large", "small"]


PASSING = {
    "500": Fault("status", times=2),
    "503": Fault("status", times=2, code=503, error="ServiceUnavailable"),
    "slow down": Fault("status", times=2, code=503, error="SlowDown"),
    "a reset connection": Fault("reset", times=2),
    "a body that ends early": Fault("cut", times=2),
    "half a body that says it is all": Fault("short", times=2),
    "no word of the size": Fault("status", "HEAD", times=2),
    "a silence": Fault("slow", times=1, seconds=2.5),
}


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("what", ["read", "read_range", "sha256"])
def test_a_fault_that_passes_is_outlived_and_the_bytes_are_right(faulty, held, name, what):
    fault = PASSING[name]
    faulty.faults = [Fault(**{**vars(fault), "path": "object", "seen": 0})]
    if what == "read":
        assert held.read("object") == DATA
    elif what == "read_range":
        assert held.read_range("object", 700, 50_000) == DATA[700:50_700]
    else:
        assert len(held.sha256("object")) == 64
    assert faulty.faults[0].seen > faulty.faults[0].times


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", [Fault("status", "PUT", times=2), Fault("reset", "PUT", times=2)])
def test_a_write_that_fails_twice_is_done_the_third_time(faulty, fault):
    fault.seen = 0
    directory = Directory(faulty.uri("run"))
    faulty.faults = [fault]
    directory.write("new", DATA)
    faulty.faults = []
    assert directory.read("new") == DATA


@pytest.mark.parametrize("kind", ["status", "reset", "cut", "short"])
def test_a_fault_that_stays_is_reported_with_the_object_and_the_tries(faulty, held, kind):
    faulty.faults = [Fault(kind, path="object")]
    with pytest.raises(StorageError) as caught:
        held.read("object")
    assert held.path("object") in str(caught.value)
    assert f"tried {retries.ATTEMPTS} times in" in str(caught.value)
    # The client itself asks once more where a connection that it kept open was broken.
    assert retries.ATTEMPTS <= faulty.count("GET", "object") <= 2 * retries.ATTEMPTS
    assert len(str(caught.value).splitlines()) == 1


FOR_GOOD = {
    "no such bucket": (404, "NoSuchBucket", "no such bucket"),
    "no access": (403, "AccessDenied", "access is denied"),
    "an unknown key": (403, "InvalidAccessKeyId", "does not accept these credentials"),
    "a wrong secret": (403, "SignatureDoesNotMatch", "does not accept these credentials"),
    "an expired token": (400, "ExpiredToken", "does not accept these credentials"),
    "another region": (301, "PermanentRedirect", "another region"),
}


@pytest.mark.parametrize("name", FOR_GOOD)
def test_what_is_wrong_for_good_fails_at_once_with_one_line_and_a_hint(faulty, held, name):
    code, error, words = FOR_GOOD[name]
    faulty.faults = [Fault("status", "PUT", code=code, error=error)]
    begun = time.monotonic()
    with pytest.raises(StorageError, match=words) as caught:
        held.write("new", DATA)
    assert time.monotonic() - begun < 2
    assert faulty.count("PUT") == 1
    assert held.path("new") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.hint
    assert not any(secret in str(caught.value) for secret in KEYS.values())


@pytest.mark.parametrize(("code", "words"), [(403, "access is denied"), (301, "another region")])
def test_a_refusal_without_a_body_is_understood(faulty, held, code, words):
    faulty.faults = [Fault("status", "HEAD", code=code, error="")]
    with pytest.raises(StorageError, match=words):
        held.size("object")
    assert faulty.count("HEAD") == 1


def test_an_object_that_is_not_there_is_asked_for_once(faulty, held):
    with pytest.raises(StorageError, match="no such file"):
        held.read("nothing")
    assert held.size("nothing") is None
    assert faulty.count("GET") <= 1


def test_a_bucket_that_is_not_there_is_told_from_a_file(s3, s3_port):
    s3("x")
    assert Directory(s3("x")).has_bucket()
    assert not Directory(uri_of(s3_port, "no-such-bucket/x")).has_bucket()


@pytest.mark.parametrize(
    ("host", "words"),
    [("127.0.0.1:9", "tried 3 times in"), ("no-such-host.invalid", "host name cannot be resolved")],
)
def test_an_address_where_nobody_is_fails_in_seconds(monkeypatch, host, words):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://bucket/x?scheme=http&region=us-east-1&endpoint_override={host}"
    begun = time.monotonic()
    with pytest.raises(StorageError, match=words):
        Directory(uri).size("file")
    assert time.monotonic() - begun < 5


def test_a_wrong_option_in_a_uri_is_named():
    with pytest.raises(StorageError, match=r"'regoin' is not a store option; known: region"):
        Directory("s3://bucket/x?regoin=us-east-1")


class LostThePlotError(Exception):
    pass


def interrupted(directory, name, data):
    with directory.writing(name) as stream:
        stream.write(data)
        raise LostThePlotError


@pytest.mark.parametrize("data", [DATA, LARGE], ids=["small", "large"])
def test_a_writer_that_fails_in_the_middle_leaves_no_object(faulty, data):
    directory = Directory(faulty.uri("run"))
    with pytest.raises(LostThePlotError):
        interrupted(directory, "new", data)
    assert directory.size("new") is None
    assert directory.names() == []


@pytest.mark.parametrize("after", [0, 1])
def test_an_upload_whose_parts_fail_leaves_no_object(faulty, monkeypatch, after):
    monkeypatch.setattr("actors.storage.stores.PART_ATTEMPTS", 2)
    directory = Directory(faulty.uri("run"))
    faulty.faults = [Fault("status", "PUT", "partNumber", after=after)]
    with pytest.raises(StorageError, match="run/new"):
        directory.write("new", LARGE)
    faulty.faults = []
    assert directory.names() == []


def test_a_part_of_an_upload_that_fails_once_is_sent_again(faulty):
    directory = Directory(faulty.uri("run"))
    faulty.faults = [Fault("status", "PUT", "partNumber=2", times=1)]
    entry = directory.write("new", LARGE)
    assert directory.sha256("new") == entry.sha256
    assert faulty.faults[0].seen == 2


def test_what_is_held_back_of_an_upload_is_bounded(s3, monkeypatch):
    monkeypatch.setattr(files, "BUFFER_BYTES", 6_000_000)
    directory = Directory(s3("run"))
    with directory.writing("new") as stream:
        for start in range(0, len(LARGE), 1_000_000):
            stream.write(LARGE[start : start + 1_000_000])
            assert len(stream._stream._held) <= files.BUFFER_BYTES + 1_000_000
    assert directory.read("new") == LARGE


class ShortFile(io.BytesIO):
    """Says that it read everything, and leaves the end of the memory as it was."""

    def __init__(self, data, given):
        super().__init__(data)
        self._given = given

    def readinto(self, memory):
        start = self.tell()
        data = self.getvalue()[start : start + min(self._given, len(memory))]
        memory[: len(data)] = data
        return len(memory)


@pytest.mark.parametrize("last", [0x00, 0x55, 0xAA, 0xFF])
@pytest.mark.parametrize("size", [1, 8, 40])
def test_an_answer_is_whole_or_an_error_whatever_its_last_byte(size, last):
    data = bytes([last]) * size
    found = bytearray(size)
    files._fill(ShortFile(data, size), memoryview(found))
    assert found == data
    for given in range(size):
        with pytest.raises(retries.ShortReadError):
            files._fill(ShortFile(data, given), memoryview(bytearray(size)))
