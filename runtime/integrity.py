"""Checking the weights beside the work: gigabytes of hashing overlap graph loading and prefill."""

import os
import threading
from collections.abc import Sequence

from ..artifacts.errors import ArtifactError, TargetError, ToolchainError
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
        self._error: BaseException | None = None
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
            # `wait` raises an ArtifactError again; after any other (there may be no threads for blake3) it hashes
            self._error = error

    def _hash(self) -> None:
        for entry in self._files:
            self._artifact.check(entry)
        self._passed = True

    def wait(self) -> None:
        """Block until all weights are hashed: here, if the thread did not get to the end of it.

        Raises ArtifactError if a file is not what the manifest says, and TargetError, OSError or MemoryError for what
        keeps the hashing from its end.
        """
        if self._passed:
            return
        if self._owner != os.getpid():
            # a fork took the thread away, and perhaps left its lock held
            self._owner, self._again = os.getpid(), threading.Lock()
        elif self._thread.ident is not None:
            self._thread.join()
        with self._again:
            if isinstance(self._error, ArtifactError):
                raise self._error
            if not self._passed:
                self._hash_here()

    def _hash_here(self) -> None:
        hash_without_threads()
        try:
            self._hash()
        except (ToolchainError, OSError, MemoryError):
            raise
        except BaseException as error:
            # the waiting thread's own: Ctrl-C, or an exit that a signal's handler asks for. What ended the hashing
            # before is neither, and must not end the process as if all were well.
            if isinstance(error, KeyboardInterrupt | SystemExit) and type(error) is not type(self._error):
                raise
            raise TargetError(f"the weights cannot be hashed: {type(error).__name__}: {error}") from error
