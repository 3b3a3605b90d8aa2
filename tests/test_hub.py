"""Pushes arrive at the Hub complete, and a failure is one line: real uploads to a local server."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT
from hub_server import TOKEN, serve_hub

LIMIT = 120  # seconds after which a process counts as hanging
NOWHERE = "http://127.0.0.1:9"  # where nobody listens
PUSH = """
    pusher = HubPusher("run", True, retries=2, wait=0.05)
    pusher.push("run", "the end")
    print("finish", pusher.finish(100))
"""


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


@pytest.fixture
def files(tmp_path):
    """The files of a run in a folder named run, beside hidden ones: path -> bytes."""
    weights = {f"weights-{number}.safetensors": os.urandom(200_000) for number in (1, 2)}
    files = weights | {
        "README.md": b"---\n---\n",
        "config.json": b"{}",
        "empty.txt": b"",
        "deep/down.json": b"[1]",
    }
    for name, content in (files | {".hidden": b"x", "deep/.cache/hidden": b"x"}).items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    return files


@pytest.fixture
def run(environment, hub, files, tmp_path):
    """Run lines of Python beside the folder `run`, with the Hub set; return the output.

    The process must end well, within LIMIT seconds, and leave no temporary folder.
    """

    def run(lines, **extra):
        (tmp_path / "tmp").mkdir(exist_ok=True)
        known = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        known |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp"), **extra}
        code = "import shutil, time\nfrom utils import hub\n"
        code += "from utils.hub import HubPusher\n"
        code += textwrap.dedent(lines)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment | known,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
        assert list((tmp_path / "tmp").iterdir()) == []
        return done.stdout

    return run


def failures(output):
    """The lines that say what was not pushed."""
    return re.findall("^hub: not pushed .*", output, re.MULTILINE)


def test_a_push_arrives_whole_though_its_folder_is_gone(run, hub, files):
    output = run("""
        pusher = HubPusher("run", True)
        pusher.push("run", "the end")
        shutil.rmtree("run")
        print("finish", pusher.finish(100))
    """)
    assert output == f"hub: pushed to {hub.url}/someone/run\nfinish True\n"  # and no progress bar
    repo = hub.repos["someone/run"]
    assert repo.files == files
    assert repo.private
    assert repo.commits == ["the end"]
    assert repo.lfs == {"weights-1.safetensors", "weights-2.safetensors"}


def test_every_push_is_a_commit_but_one_that_waits_gives_way(run, hub, files):
    hub.hang(1, 1, "HEAD")
    output = run("""
        pusher = HubPusher("other/name", False, wait=0.05)
        for message in ("first", "second", "third"):
            open("run/config.json", "w").write(message)
            pusher.push("run", message)
            pusher.push("run", f"{message}, elsewhere", f"at/{message}")
            while not pusher.sending:
                time.sleep(0.01)
        print("finish", pusher.finish(100))
    """)
    assert output == f"hub: pushed to {hub.url}/other/name\nfinish True\n"
    repo = hub.repos["other/name"]
    assert repo.commits == [
        "first",
        "first, elsewhere",
        "second, elsewhere",
        "third",
        "third, elsewhere",
    ]
    assert (
        repo.files["config.json"] == b"third" and repo.files["at/second/config.json"] == b"second"
    )
    assert not repo.private
    assert hub.requests.count("POST /api/repos/create") == 1


@pytest.mark.parametrize(
    "number, status, path", [(2, 500, "create"), (2, 429, "create"), (1, 503, "yaml")]
)
def test_failures_of_a_moment_are_tried_again(run, hub, files, number, status, path):
    hub.fail_next(number, status, path)
    output = run(PUSH)
    assert "finish True" in output and failures(output) == []
    assert hub.repos["someone/run"].files == files
    assert len([request for request in hub.requests if path in request]) > number


def test_after_too_many_failures_the_next_push_is_tried(run, hub, files):
    hub.fail_next(2, 500, "create")
    output = run("""
        pusher = HubPusher("run", True, retries=1, wait=0.05)
        pusher.push("run", "first")
        while pusher.waiting or pusher.sending:
            time.sleep(0.01)
        pusher.push("run", "second")
        print("finish", pusher.finish(100))
    """)
    [line] = failures(output)
    assert "run: Server error '500 Internal Server Error'" in line
    assert "finish True" in output
    assert hub.repos["someone/run"].commits == ["second"]


@pytest.mark.parametrize(
    "name, extra, reason, requests",
    [
        ("run", {"HF_TOKEN": "hf_bad"}, "401 Unauthorized", 1),
        ("run", {"HF_TOKEN": ""}, "no token found", 0),
        ("run", {"HF_HUB_OFFLINE": "1"}, "offline mode is enabled", 0),
        ("a/run/too", {}, "Repo id must be in the form", 0),
    ],
    ids=["bad token", "no token", "offline", "bad name"],
)
def test_what_will_not_pass_is_said_once_and_at_once(run, hub, name, extra, reason, requests):
    output = run(
        f"""
        pusher = HubPusher("{name}", True, wait=1000)
        pusher.push("run", "first")
        while not pusher.closed:
            time.sleep(0.01)
        pusher.push("run", "second")
        pusher.push("run", "elsewhere", "at/run")
        assert not pusher.waiting
        print("finishing", flush=True)
        start = time.monotonic()
        print("finish", pusher.finish(1000), time.monotonic() - start < 100)
        """,
        **extra,
    )
    [line, later] = failures(output)
    assert reason in line and reason in later
    commands = f"`hf upload {name} run --private && hf upload {name} run at/run --private`"
    assert output.index(line) < output.index("finishing") < output.index(commands)
    assert "finish False True" in output
    assert hub.requests.count("POST /api/repos/create") == requests


def test_a_file_that_is_refused_says_why_and_ends_what_waits(run, hub):
    hub.fail_next(9, 403, "PUT")
    [line, later] = failures(
        run("""
            pusher = HubPusher("run", True)
            pusher.push("run", "the end")
            pusher.push("run", "another", "another")
            pusher.finish(60)
        """)
    )
    assert "403 Forbidden" in line and "/lfs/upload/" in line
    assert later.endswith(
        "run --private && hf upload someone/run run another --private` does it later"
    )


@pytest.mark.parametrize("path", ["HEAD", "create"])
def test_a_hub_that_hangs_is_asked_again(run, hub, files, path):
    hub.hang(1, path=path)
    output = run(f"hub.SIGN_OF_LIFE = hub.SILENCE = 2\n{textwrap.dedent(PUSH)}")
    assert "finish True" in output and failures(output) == []
    assert hub.repos["someone/run"].files == files


@pytest.mark.parametrize("path", ["HEAD", "PUT", "xet"])
def test_a_hub_that_hangs_holds_up_neither_finish_nor_the_end(run, hub, path):
    hub.hang(100, seconds=1000, path=path)
    output = run(
        """
        hub.SIGN_OF_LIFE = hub.SILENCE = 1000
        pusher = HubPusher("run", False)
        pusher.push("run", "the end")
        pusher.push("run", "another", "another")
        start = time.monotonic()
        print("finish", pusher.finish(1), time.monotonic() - start < 100)
        """,
        HF_HUB_DISABLE_XET=str(int(path != "xet")),
    )
    assert "finish False True" in output
    assert any(path in request for request in hub.requests)
    [line] = failures(output)
    assert "not done after 1 seconds" in line and "run run && hf upload" in line


def test_an_end_without_finish_waits_for_nothing(run, hub):
    hub.hang(100, seconds=1000)
    patient = "hub.SIGN_OF_LIFE = hub.SILENCE = 1000"
    assert run(f'{patient}\nHubPusher("run", True).push("run", "the end")') == ""


def test_a_hub_that_is_not_there(run):
    output = run(PUSH, HF_ENDPOINT=NOWHERE)
    [line, later] = failures(output)
    assert "Connection refused" in line and "`hf upload run run --private`" in later
    assert "finish False" in output


def test_a_server_without_xet_is_named(run):
    output = run(PUSH.replace("retries=2", "retries=0"), HF_HUB_DISABLE_XET="0")
    [line, _] = failures(output)
    assert "404" in line and "xet-write-token" in line


def test_a_folder_that_is_not_there(run):
    output = run("""
        pusher = HubPusher("run", True)
        pusher.push("absent folder", "the end")
        print("finish", pusher.finish(100))
    """)
    [line, later] = failures(output)
    assert (
        "No such file or directory" in line and "`hf upload run 'absent folder' --private`" in later
    )
    assert "finish False" in output
