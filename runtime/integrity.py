"""Checking the weights beside the work: gigabytes of hashing overlap graph loading and prefill."""

import os
import threading
from collections.abc import Sequence

from ..artifacts.errors import ArtifactError
from ..artifacts.integrity import hash_without_threads
from ..artifacts.manifest import FileEntry
from ..artifacts.store import Artifact


class WeightCheck:
    """Hashes the files that hold weights in a thread; `wait` must return before a result is given out."""

    def __init__(self, artifact: Artifact, files: Sequence[FileEntry] | None = None) -> None:
        """files: those to hash; None takes weights/, mapped."""
        self._artifact = artifact
        part = artifact.manifest.weights
        self._files = (part.files if part else ()) if files is None else files
        for entry in self._files if files is None else ():
            # mapped here, so that closing the artifact does not take the files from under the thread
            artifact.map(entry, check=False)
        # set at the very end: a thread that did not start, was lost in a fork or raised anything leaves it unset
        self._passed = False
        self._error: Exception | None = None
        self._again = threading.Lock()
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._run, name="weight-check", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            # no more threads for this user: `wait` finds nothing passed, and hashes
            return

    def _run(self) -> None:
        try:
            self._hash()
        except BaseException as error:
            # `wait` raises the first kind again; after any other (blake3 panics where it gets no threads) it hashes
            self._error = error if isinstance(error, ArtifactError) else None

    def _hash(self) -> None:
        for entry in self._files:
            self._artifact.check(entry)
        self._passed = True

    def wait(self) -> None:
        """Block until all weights are hashed: here, if the thread did not get to the end of it.

        Raises ArtifactError if a file is not what the manifest says, and whatever keeps the hashing from its end.
        """
        if self._passed:
            return
        if self._owner != os.getpid():
            # a fork took the thread away, and perhaps left its lock held
            self._owner, self._again = os.getpid(), threading.Lock()
        elif self._thread.ident is not None:
            self._thread.join()
        with self._again:
            if self._error is not None:
                raise self._error
            if not self._passed:
                hash_without_threads()
                self._hash()
