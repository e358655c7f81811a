"""`sign`: vouch for an artifact as it is, with a private key."""

from pathlib import Path

from ...artifacts.errors import ArtifactError
from ...artifacts.signing import signer
from ...artifacts.staging import stage


def sign_artifact(path: Path, key_file: Path, *, sync: bool = True) -> None:
    """Put manifest.sig into the artifact at `path`, in place of any that is there; every file is hashed first.

    Raises TargetError for a file that is no private key, ArtifactError for an artifact that is not whole.
    """
    sign = signer(key_file)
    with stage(path, sync=sync, resumes=False) as staging:
        if staging.base is None:
            raise ArtifactError(
                f"{path}: no artifact there; make one with `qwen2vl-tc build --src <hf_dir> --out {path}`"
            )
        staging.keep(staging.base.files())
        staging.write_manifest(staging.base)
        with staging.open() as staged:
            staged.check_all()
        staging.commit(staging.base, sign)
