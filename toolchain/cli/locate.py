"""Which artifact is meant where the user names none."""

from pathlib import Path

from ...artifacts.errors import ArtifactError, ConfigError
from ...artifacts.manifest import MANIFEST_NAME
from ...artifacts.store import read_manifest

SUFFIX = ".artifact"
_LISTED = 12


def default_artifact(src: Path) -> Path:
    """`./<name of src>.artifact`. Raises ConfigError where the folder has no name."""
    name = src.resolve().name
    if not name:
        raise ConfigError(f"{src}: has no name to call the artifact by; give --out")
    return Path(name + SUFFIX)


def find_artifact(folder: Path) -> Path:
    """The only artifact in `folder`. Raises ArtifactError, listing what was seen, if there are several or none."""
    artifacts, seen = [], []
    for path in sorted(folder.iterdir()):
        # hidden folders are what builds stage beside an artifact
        if path.name.startswith(".") or not path.is_dir():
            continue
        if not (path / MANIFEST_NAME).is_file():
            is_checkpoint = (path / "config.json").is_file()
            seen.append(
                f"{path.name} (a checkpoint: run `qwen2vl-tc convert --src {path.name}`)" * is_checkpoint or path.name
            )
            continue
        try:
            read_manifest(path)
        except ArtifactError as error:
            seen.append(f"{path.name} ({error})")
        else:
            artifacts.append(path)
    if len(artifacts) == 1:
        return Path(artifacts[0].name) if folder == Path() else artifacts[0]
    if artifacts:
        raise ArtifactError(
            f"{folder.resolve()}: has several artifacts: {', '.join(path.name for path in artifacts)}; say which one"
        )
    listed = ", ".join(seen[:_LISTED]) + (f" and {len(seen) - _LISTED} more" if len(seen) > _LISTED else "")
    here = "; it is an artifact itself: give its path" if (folder / MANIFEST_NAME).is_file() else ""
    raise ArtifactError(
        f"{folder.resolve()}: no artifact in it (no folder with a {MANIFEST_NAME}); "
        f"folders there: {listed or 'none'}{here}"
    )
