"""Checking the weights beside the work: gigabytes of hashing overlap graph loading and prefill."""

import threading
from collections.abc import Sequence

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
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weight-check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for entry in self._files:
                self._artifact.check(entry)
        except Exception as error:  # whatever stopped the check, what it did not see is not to be trusted
            self._error = error

    def wait(self) -> None:
        """Block until all weights are hashed. Raises ArtifactError if a file is not what the manifest says, and what
        stopped the check if it did not come to its end."""
        self._thread.join()
        if self._error is not None:
            raise self._error
