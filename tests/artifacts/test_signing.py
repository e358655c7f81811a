"""Signed artifacts: only what a trusted key vouched for is loaded, and a change is never vouched for by accident."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from helpers.released import REQUESTS, unpack
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.errors import ArtifactError, TargetError
from qwen2vl_tc.artifacts.signing import public_keys, signer
from qwen2vl_tc.artifacts.staging import stage
from qwen2vl_tc.artifacts.store import open_artifact
from qwen2vl_tc.runtime import load
from qwen2vl_tc.toolchain.build.sign import sign_artifact
from qwen2vl_tc.toolchain.cli.main import app


def write_key(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key in the PEM files that OpenSSL writes."""
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return unpack(tmp_path / "artifact")


def test_a_signed_artifact_is_loaded_with_its_key_and_refused_with_others(artifact: Path, tmp_path: Path) -> None:
    mine, mine_public = write_key(tmp_path, "mine")
    _, other_public = write_key(tmp_path, "other")
    sign_artifact(artifact, mine, sync=False)
    messages, pictures, tokens = REQUESTS[1]
    model = load(artifact, trusted_keys=[other_public, mine_public])
    assert model.generate(messages, pictures, max_new_tokens=4).token_ids == tokens[:4]
    with pytest.raises(ArtifactError, match=r"is signed with the key [0-9a-f]{16}\.\.\., which is none of the 1"):
        load(artifact, trusted_keys=[other_public])
    with pytest.raises(ArtifactError, match="none of the 0 trusted ones"):
        load(artifact, trusted_keys=[])
    load(artifact)  # who asks for no key may load a signed artifact


def test_an_unsigned_artifact_is_refused_where_keys_are_trusted(artifact: Path, tmp_path: Path) -> None:
    _, public = write_key(tmp_path, "mine")
    with pytest.raises(ArtifactError, match="is not signed, and only signed artifacts are trusted here"):
        load(artifact, trusted_keys=[public])


def test_what_was_altered_after_signing_is_refused(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    sign_artifact(artifact, private, sync=False)
    manifest = (artifact / "manifest.json").read_bytes()
    (artifact / "manifest.json").write_bytes(manifest.replace(b'"name": "tiny"', b'"name": "tony"'))
    with pytest.raises(ArtifactError, match=r"manifest\.json was altered after it was signed"):
        load(artifact, trusted_keys=[public])


Change = Callable[[dict[str, str]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: {**fields, "algorithm": "none"}, "algorithm 'none', expected 'ed25519'"),
        (lambda fields: {**fields, "signature": "00" * 64}, "altered after it was signed"),
        (lambda fields: {**fields, "signature": "00"}, "128 hexadecimal digits"),
        (lambda fields: {**fields, "signature": "zz" * 64}, "must be hexadecimal"),
        (lambda fields: {**fields, "key": fields["key"].upper() + " "}, "hexadecimal digits"),
        (lambda fields: {**fields, "more": ""}, "unknown field more"),
        (lambda fields: [], "expected an object"),
        (lambda fields: {**fields, "key": "0" * 5000}, "larger than 4096 bytes"),
    ],
)
def test_a_forged_signature_file_is_refused_by_name(
    artifact: Path, tmp_path: Path, change: Change, message: str
) -> None:
    private, public = write_key(tmp_path, "mine")
    sign_artifact(artifact, private, sync=False)
    file = artifact / "manifest.sig"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ArtifactError, match=message):
        load(artifact, trusted_keys=[public])


def test_a_signature_behind_a_link_is_refused(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    sign_artifact(artifact, private, sync=False)
    (artifact / "manifest.sig").rename(tmp_path / "elsewhere")
    (artifact / "manifest.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"manifest\.sig is, or lies below, a symbolic link"):
        load(artifact, trusted_keys=[public])


def test_a_damaged_artifact_is_not_signed(artifact: Path, tmp_path: Path) -> None:
    private, _ = write_key(tmp_path, "mine")
    (weights,) = (artifact / "weights").iterdir()
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="altered or damaged"):
        sign_artifact(artifact, private, sync=False)
    assert not (artifact / "manifest.sig").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_commit_drops_the_signature_if_and_only_if_the_manifest_changes(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    sign_artifact(artifact, private, sync=False)
    for changed in (False, True):
        with stage(artifact, sync=False) as staging:
            assert staging.base is not None
            staging.commit(replace(staging.base, name="another") if changed else staging.base)
        assert (artifact / "manifest.sig").exists() != changed
    with pytest.raises(ArtifactError, match="is not signed"):
        open_artifact(artifact, trusted_keys=[public])


def test_signing_again_replaces_the_signature(artifact: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        private, public = write_key(tmp_path, name)
        sign_artifact(artifact, private, sync=False)
        open_artifact(artifact, trusted_keys=[public]).close()


def test_keys_of_another_kind_are_refused_by_name(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    curve = ec.generate_private_key(ec.SECP256R1())
    elliptic = tmp_path / "ec.pem"
    elliptic.write_bytes(
        curve.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    for file, message in (
        (public, "not a private key"),
        (elliptic, "is no ed25519 key"),
        (locked, "without a password"),
        (tmp_path / "absent", "openssl genpkey -algorithm ed25519"),
    ):
        with pytest.raises(TargetError, match=message):
            signer(file)
    with pytest.raises(TargetError, match="not a public key"):
        load(artifact, trusted_keys=[private])
    with pytest.raises(TargetError, match="expected a list of files"):
        load(artifact, trusted_keys=str(public))


def test_the_commands_sign_and_ask_for_keys_made_by_openssl(artifact: Path, tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)

    def run(*words: "str | Path") -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, result.stdout + result.stderr

    question = ("generate", artifact, "--prompt", "Hi", "--max-new-tokens", "2", "--trusted-key", public)
    code, said = run(*question)
    assert code == 2 and "is not signed" in said
    assert run("sign", artifact, "--key", private) == (0, f"signed {artifact}\n")
    assert run(*question)[0] == 0
    # what openssl verifies is the manifest's bytes, with no format of ours around them
    fields = json.loads((artifact / "manifest.sig").read_text())
    (tmp_path / "raw").write_bytes(bytes.fromhex(fields["signature"]))
    words = ["-verify", "-pubin", "-inkey", public, "-rawin", "-in", artifact / "manifest.json"]
    done = subprocess.run(["openssl", "pkeyutl", *words, "-sigfile", tmp_path / "raw"], capture_output=True, text=True)
    assert "Verified Successfully" in done.stdout


def said(*words: "str | Path") -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout + result.stderr


def inspected(artifact: Path, *words: "str | Path") -> dict[str, object] | None:
    """What the report says; with keys, the exit code says whether one of them signed the artifact."""
    result = CliRunner().invoke(app, [str(word) for word in ("inspect", artifact, "--json", *words)])
    found: dict[str, object] | None = json.loads(result.stdout)["signed"]
    refused = bool(words) and not (found and found["trusted"])
    assert result.exit_code == (1 if refused else 0), result.output
    assert ("not signed by a trusted key" in result.stderr) == refused
    return found


def test_inspect_says_whether_and_by_whom_an_artifact_is_signed(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    _, other = write_key(tmp_path, "other")
    key = next(iter(public_keys([public])))
    assert inspected(artifact) is None
    assert inspected(artifact, "--trusted-key", public) is None
    code, printed = said("inspect", artifact, "--trusted-key", public)
    assert code == 1 and "not signed by a trusted key" in printed
    sign_artifact(artifact, private, sync=False)
    signed = {"key": key, "valid": True, "trusted": None, "trusted_key": None, "problem": None}
    assert inspected(artifact) == signed
    mine = {**signed, "trusted": True, "trusted_key": str(public)}
    assert inspected(artifact, "--trusted-key", other, "--trusted-key", public) == mine
    assert inspected(artifact, "--trusted-key", other) == {**signed, "trusted": False}
    code, printed = said("inspect", artifact, "--trusted-key", other)
    assert code == 1
    assert said("inspect", artifact, "--trusted-key", public)[0] == 0
    drawing = ("--graph", "decode", "--dot", tmp_path / "layer.dot", "--trusted-key", other)
    code, drawn = said("inspect", artifact, *drawing)
    assert code == 2 and "no --trusted-key" in drawn
    assert "NOT one of the trusted keys" in " ".join(printed.split())
    manifest = (artifact / "manifest.json").read_bytes()
    (artifact / "manifest.json").write_bytes(manifest.replace(b'"name": "tiny"', b'"name": "tony"'))
    found = inspected(artifact, "--trusted-key", public)
    assert found is not None and (found["valid"], found["trusted"]) == (False, False)
    assert "altered after it was signed" in str(found["problem"])
    assert said("inspect", artifact, "--trusted-key", public)[0] == 1
    code, printed = said("inspect", artifact)
    assert code == 0 and "INVALID" in printed
    (artifact / "manifest.sig").write_text("[]")
    found = inspected(artifact)
    assert found is not None and (found["key"], found["valid"]) == (None, False)


def test_without_the_library_inspect_says_that_a_signature_was_not_checked(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = write_key(tmp_path, "mine")
    sign_artifact(artifact, private, sync=False)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    found = inspected(artifact)
    assert found is not None and found["valid"] is None
    assert "pip install 'qwen2vl-tc[sign]'" in str(found["problem"])


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "Hi"],
        ["chat"],
        ["bench", "--runs", "1"],
        ["bench cold-start", "--runs", "1"],
        ["verify", "--against", "."],
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_runs_an_artifact_asks_for_the_signature(
    words: list[str], artifact: Path, tmp_path: Path
) -> None:
    _, public = write_key(tmp_path, "mine")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    words = [str(tmp_path) if word == "." else word for word in words]
    code, printed = said(*words[0].split(), artifact, *words[1:], "--trusted-key", public)
    assert (code, "is not signed, and only signed artifacts are trusted here" in printed) == (2, True), printed


def test_a_key_is_read_from_a_regular_file_of_a_keys_size(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"-" * (1 << 20))
    for file, message in (
        (tmp_path / "pipe", "is no regular file"),
        (tmp_path, "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "large", "larger than 65536 bytes"),
        (tmp_path / "absent", "cannot read the key"),
    ):
        for words in (["sign", artifact, "--key", file], ["inspect", artifact, "--trusted-key", file]):
            code, printed = said(*words)
            assert code == 2 and f"{file}: {message}" in printed
    (tmp_path / "link").symlink_to(private)
    sign_artifact(artifact, tmp_path / "link", sync=False)
    open_artifact(artifact, trusted_keys=[public]).close()
