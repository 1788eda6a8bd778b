"""The doctor sees what is wrong with a machine; each wrong thing is really made wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.cli.main import main
from orchestrator.lint import machine


def found(name, out, *, offline=True):
    return [check for check in machine.examine(str(out), offline=offline) if check.name == name]


@pytest.fixture
def hub(monkeypatch):
    """Serve as a Hub that answers as it is told."""
    answers = {"code": 200, "date": None}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(answers["code"])
            self.send_header("Date", answers["date"] or self.date_time_string())
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_machine_that_runs_these_tests_has_the_versions_it_needs(tmp_path):
    assert [check.level for check in found("torch", tmp_path)] == ["ok"]
    assert [check.level for check in found("ray", tmp_path)] == ["ok"]


def test_a_version_that_is_too_old_is_an_error_with_the_command_that_cures_it(
    tmp_path, monkeypatch
):
    real = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda n: "2.9.0" if n == "ray" else real(n))
    (check,) = found("ray", tmp_path)
    assert check.level == "error"
    assert "pip install 'ray" in check.fix


def test_a_run_directory_that_is_no_directory_is_an_error_and_a_good_one_is_left_empty(tmp_path):
    assert [c.level for c in found("run directory", tmp_path)] == ["ok"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (check,) = found("run directory", tmp_path / "file")
    assert (check.level, "written to" in check.said) == ("error", True)


def test_a_token_that_others_can_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert [c.level for c in found("token", tmp_path)] == ["note"]
    (tmp_path / "token").write_text("t")
    (tmp_path / "token").chmod(0o644)
    (check,) = found("token", tmp_path)
    assert (check.level, check.fix) == ("error", f"chmod 600 {tmp_path / 'token'}")
    (tmp_path / "token").chmod(0o600)
    assert [c.level for c in found("token", tmp_path)] == ["ok"]


def test_a_hub_that_answers_tells_of_login_and_of_the_clock(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    assert [c.level for c in found("Hub", tmp_path, offline=False)] == ["ok"]
    assert [c.level for c in found("clock", tmp_path, offline=False)] == ["ok"]
    hub["code"] = 401
    (check,) = found("Hub", tmp_path, offline=False)
    assert (check.level, check.fix) == ("error", "hf auth login")
    hub["date"] = "Sat, 01 Jan 2000 00:00:00 GMT"
    (check,) = found("clock", tmp_path, offline=False)
    assert check.level == "error"


def test_a_hub_that_does_not_answer_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (check,) = found("Hub", tmp_path, offline=False)
    assert check.level == "warning"


def test_the_command_leaves_with_4_where_something_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    main(["doctor", "--offline", "--out", str(tmp_path), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert all({"level", "name", "said", "fix"} == set(check) for check in checks)
    (tmp_path / "token").write_text("t")
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--offline", "--out", str(tmp_path)])
    assert left.value.code == 4
    assert "chmod 600" in capsys.readouterr().out
