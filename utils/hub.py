"""Push folders to the Hugging Face Hub while the training goes on, which no failure of the Hub stops or slows.

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

from httpx2 import NetworkError, RemoteProtocolError, TimeoutException
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

SIGN_OF_LIFE, SILENCE = (
    10,
    60,
)  # seconds that the Hub has to answer at all, and between two bytes of an upload
# hf_xet raises ConnectionError, and a gateway that fails may answer with a page that is no JSON
TEMPORARY = (TimeoutException, NetworkError, RemoteProtocolError, ConnectionError, JSONDecodeError)


class HubPusher:
    """Sends folders to one repository of the Hub from a thread of its own; what fails is a line on stderr, no error.

    Time-outs, lost connections, HTTP 429 and 5xx are tried again, and after them the next push is. Whatever else
    fails, as for want of a token, ends the pusher: later pushes are only remembered until finish().

    Args:
        repo_id: the repository; without a namespace it is that of the token's owner.
        private: whether the repository is private where it is new; one that is there stays as it is.
        retries: how often one push is tried again.
        wait: seconds before the first of these, doubled before each further one.
    """

    def __init__(self, repo_id, private, retries=3, wait=5.0):
        self.repo_id, self.private, self.retries, self.wait = repo_id, private, retries, wait
        self.url = self.reason = None  # of the repository, once it is there; of the last failure
        self.waiting = {}  # path_in_repo -> snapshot and message, of pushes that are not begun
        self.ignored = {}  # path_in_repo -> patterns that the push leaves out
        self.missing = {}  # path_in_repo -> folder and snapshot, of pushes that have not arrived
        self.sending = self.closed = False
        self.changed = threading.Condition()
        self.snapshots = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        threading.Thread(target=self._work, daemon=True).start()

    def push(self, folder, message, path_in_repo="", ignore=()):
        """Copy the folder as it is now, without hidden files, and queue the copy as one commit.

        It takes the place of an older push to the same path_in_repo, a folder of the repository, that is not begun.
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
        """Wait for what is queued, for `timeout` seconds at most, and print where it is, or what is missing and why.

        Returns whether the newest push to every path_in_repo arrived. Never raises; later pushes are not sent.
        """
        with self.changed:
            in_time = self.changed.wait_for(
                lambda: self.closed or not (self.waiting or self.sending), timeout
            )
            self.closed = True
            self.changed.notify_all()
        self.snapshots.cleanup()
        if not self.missing:
            if self.url:  # else nothing was to be pushed
                print(f"hub: pushed to {self.url}", flush=True)
            return True
        if not in_time:
            self.reason = f"not done after {timeout:g} seconds" + (
                f" [{self.reason}]" if self.reason else ""
            )
            for thread in [one for one in concurrent.futures.thread._threads_queues if one.daemon]:
                del concurrent.futures.thread._threads_queues[
                    thread
                ]  # uploads of ours, or Python's end awaits them
        private, commands = ["--private"] * self.private, []
        for path, (folder, _) in self.missing.items():
            words = ["hf", "upload", self.repo_id, str(folder), *filter(None, [path]), *private]
            commands.append(
                shlex.join([*words, *(f"--exclude={pattern}" for pattern in self.ignored[path])])
            )
        commands = " && ".join(commands)
        self._say(f"{self.reason}; `{commands}` does it later")
        return False

    def _work(self):
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
        """Upload a snapshot, again where that may help, and return whether it arrived."""
        for attempt in range(self.retries + 1):
            try:
                api = HfApi(token=True)
                get_session().timeout = SILENCE  # huggingface_hub itself would wait for ever
                # asked first, for upload_folder tries for minutes to reach a Hub that is down
                get_session().head(
                    api.endpoint, headers=build_hf_headers(token=True), timeout=SIGN_OF_LIFE
                )
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
                wrapped = (
                    type(caught) is RuntimeError and caught.__cause__
                )  # what happened to a file in LFS
                error = wrapped or caught
            last = attempt == self.retries or not may_pass(error)
            self._fail(error, spoken=last and not self.closed)
            self.closed = self.closed or not may_pass(error)
            if last or self.closed:
                return False
            time.sleep(self.wait * 2**attempt)

    def _fail(self, error, spoken=True):
        self.reason = textwrap.shorten(str(error), 300).rstrip(".") or type(error).__name__
        if spoken:
            self._say(self.reason)

    def _say(self, text):
        print(f"hub: not pushed to {self.repo_id}: {text}", file=sys.stderr, flush=True)


def may_pass(error):
    """Return whether the same request may succeed a little later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, TEMPORARY) and not isinstance(error, OfflineModeIsEnabled)
