"""`sign`: vouch for an artifact as it is, with a private key."""

from pathlib import Path

from ...artifacts.signing import signer
from ...artifacts.staging import amend
from ...artifacts.store import open_artifact


def sign_artifact(path: Path, key_file: Path, *, sync: bool = True) -> None:
    """Put manifest.sig into the artifact at `path`, in place of any that is there; every file is hashed first.

    Raises TargetError for a file that is no private key, ArtifactError for an artifact that is not whole.
    """
    sign = signer(key_file)
    with amend(path, sync=sync) as (staging, manifest):
        with open_artifact(staging.target) as artifact:
            artifact.check_all()
        staging.commit(manifest, sign)
