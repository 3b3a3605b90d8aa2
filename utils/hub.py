"""Push folders to the Hugging Face Hub while the training runs, unharmed by failures of the Hub.

This file imports no other file of the project and can be copied along with a script.
"""

import concurrent.futures.thread
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
import threading
import time
from json import JSONDecodeError
from pathlib import Path

from httpx2 import NetworkError, RemoteProtocolError, TimeoutException
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

SIGN_OF_LIFE = 10  # seconds in which the Hub must answer a first request
SILENCE = 60  # seconds that may pass between two bytes of an upload
# hf_xet raises ConnectionError; a gateway that fails may answer with a page that is not JSON
TEMPORARY = (TimeoutException, NetworkError, RemoteProtocolError, ConnectionError, JSONDecodeError)


class HubPusher:
    """Sends folders to one repository of the Hub, from a thread of its own.

    A failure is a line on stderr and no exception. After a time-out, a lost connection, HTTP 429 or
    5xx the push is tried again; if it still fails, the next push is tried. Any other failure, such
    as a missing token, ends the pusher: later pushes are only listed by finish().

    Args:
        repo_id: the repository; without a namespace it belongs to the owner of the token.
        private: whether a new repository is private. An existing one stays as it is.
        retries: how often one push is tried again.
        wait: seconds before the first retry, doubled before each further one.
    """

    def __init__(self, repo_id, private, retries=3, wait=5.0):
        self.repo_id, self.private, self.retries, self.wait = repo_id, private, retries, wait
        self.url = None  # of the repository, once it exists
        self.reason = None  # of the last failure
        self.waiting = {}  # path_in_repo -> snapshot and message of a push that has not begun
        self.ignored = {}  # path_in_repo -> patterns of files that are not pushed
        self.missing = {}  # path_in_repo -> folder and snapshot of a push that has not arrived
        self.sending = self.closed = False
        self.changed = threading.Condition()
        self.snapshots = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        threading.Thread(target=self._work, daemon=True).start()

    def push(self, folder, message, path_in_repo="", ignore=()):
        """Copy the folder as it is now, without hidden files, and queue the copy as one commit.

        An older push to the same path_in_repo that has not begun is dropped.

        Args:
            folder: on this machine.
            message: of the commit.
            path_in_repo: folder of the repository; "" for its root.
            ignore: patterns of files that are not pushed.
        """
        snapshot = f"{self.snapshots.name}/{time.time_ns()}"
        try:
            if not self.closed:
                shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns(".*", *ignore))
        except OSError as error:  # the disk is full, or the folder is gone
            shutil.rmtree(snapshot, ignore_errors=True)
            self._fail(error)
        with self.changed:
            self.missing[path_in_repo], self.ignored[path_in_repo] = (folder, snapshot), ignore
            if os.path.isdir(snapshot):
                older, _ = self.waiting.pop(path_in_repo, ("", ""))
                shutil.rmtree(older, ignore_errors=True)
                self.waiting[path_in_repo] = snapshot, message
                self.changed.notify_all()

    def finish(self, timeout=600.0):
        """Wait for the queued pushes; print where they are, or what is missing and why.

        Returns whether the newest push to every path_in_repo arrived. Never raises. Later pushes
        are not sent.

        Args:
            timeout: seconds to wait at most.
        """
        with self.changed:
            in_time = self.changed.wait_for(
                lambda: self.closed or not (self.waiting or self.sending), timeout
            )
            self.closed = True
            self.changed.notify_all()
        self.snapshots.cleanup()
        if not self.missing:
            if self.url:  # else there was nothing to push
                print(f"hub: pushed to {self.url}", flush=True)
            return True
        if not in_time:
            earlier = f" [{self.reason}]" if self.reason else ""
            self.reason = f"not done after {timeout:g} seconds{earlier}"
            # else Python waits at its end for the threads of our uploads
            queues = concurrent.futures.thread._threads_queues
            for thread in [one for one in queues if one.daemon]:
                del queues[thread]
        self._say(f"{self.reason}; `{self._commands()}` does it later")
        return False

    def _commands(self):
        """Return the shell commands that push what is missing."""
        commands = []
        for path, (folder, _) in self.missing.items():
            words = ["hf", "upload", self.repo_id, str(folder)]
            words += [path] if path else []
            words += ["--private"] if self.private else []
            words += [f"--exclude={pattern}" for pattern in self.ignored[path]]
            commands.append(shlex.join(words))
        return " && ".join(commands)

    def _work(self):
        """Send one push after the other, until the pusher is closed. Runs in the thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                path = next(iter(self.waiting))
                snapshot, message = self.waiting.pop(path)
                self.sending = True
            arrived = self._send(path, snapshot, message)
            shutil.rmtree(snapshot, ignore_errors=True)
            with self.changed:
                if arrived and self.missing[path][1] == snapshot:
                    del self.missing[path]
                self.sending = False
                self.changed.notify_all()

    def _send(self, path, snapshot, message):
        """Upload a snapshot, with retries where they may help; return whether it arrived."""
        for attempt in range(self.retries + 1):
            try:
                api = HfApi(token=True)
                get_session().timeout = SILENCE  # huggingface_hub itself would wait forever
                # upload_folder would try for minutes to reach a Hub that is down
                headers = build_hf_headers(token=True)
                get_session().head(api.endpoint, headers=headers, timeout=SIGN_OF_LIFE)
                if self.url is None:
                    self.url = api.create_repo(self.repo_id, private=self.private, exist_ok=True)
                    self.repo_id = self.url.repo_id
                with disable_progress_bars():
                    api.upload_folder(
                        repo_id=self.repo_id,
                        folder_path=snapshot,
                        path_in_repo=path,
                        commit_message=message,
                    )
                return True
            except BaseException as caught:  # hf_xet's panics are no Exception
                error = caught
                if type(caught) is RuntimeError and caught.__cause__:  # of a file in LFS
                    error = caught.__cause__
            last = attempt == self.retries or not may_pass(error)
            self._fail(error, spoken=last and not self.closed)
            self.closed = self.closed or not may_pass(error)
            if last or self.closed:
                return False
            time.sleep(self.wait * 2**attempt)

    def _fail(self, error, spoken=True):
        """Remember why a push failed, and print it if `spoken`."""
        self.reason = textwrap.shorten(str(error), 300).rstrip(".") or type(error).__name__
        if spoken:
            self._say(self.reason)

    def _say(self, text):
        """Print a line on stderr."""
        print(f"hub: not pushed to {self.repo_id}: {text}", file=sys.stderr, flush=True)


def may_pass(error):
    """Return whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, TEMPORARY) and not isinstance(error, OfflineModeIsEnabled)


def start_pusher(config):
    """Return a `HubPusher` for the repository that the settings name; None without --push_to_hub.

    Args:
        config: read are push_to_hub, hub_model_id, hub_private_repo and output_dir.
    """
    if not config.push_to_hub:
        return None
    return HubPusher(config.hub_model_id or Path(config.output_dir).name, config.hub_private_repo)


def push_checkpoint(hub, strategy, folder):
    """Queue what --hub_strategy says of a checkpoint: its weights, or all of it, too.

    Args:
        hub: a `HubPusher`, or None, which pushes nothing.
        strategy: "end" pushes nothing yet; "every_save" the weights into the root of the
            repository; "checkpoint" also the checkpoint, into last-checkpoint; "all_checkpoints"
            each checkpoint into a folder of its own name.
        folder: the checkpoint, named checkpoint-<update>.
    """
    if hub is None or strategy == "end":
        return
    step = folder.name.removeprefix("checkpoint-")
    hub.push(folder, f"Update {step}", ignore=("process-*", "state.json"))
    if strategy != "every_save":
        name = "last-checkpoint" if strategy == "checkpoint" else folder.name
        hub.push(folder, f"Checkpoint of update {step}", path_in_repo=name)
