"""The commands that make, verify and sign an artifact."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.errors import ConfigError, TargetError
from .console import fail
from .errors import FAILED
from .options import Artifact, Dtype, Json, NoSync, OptionalArtifact, Src, TrustedKeys
from .target import GivenTarget, Mode
from .values import check_mode, check_source, config_file

CONVERT_EXAMPLES = (
    "qwen2vl-tc convert --src Qwen2-VL-7B-Instruct",
    "qwen2vl-tc convert --src Qwen2-VL-7B-Instruct --out qwen2-vl-7b.artifact --dtype bf16",
)
COMPILE_EXAMPLES = (
    "qwen2vl-tc compile",
    "qwen2vl-tc compile qwen2-vl-7b.artifact --mode dynamo --soc Ascend910B2 --max-length 8192 --batch 1,4",
    "qwen2vl-tc compile --config Qwen2-VL-72B-Instruct/config.json --out qwen2-vl-72b.artifact",
    "qwen2vl-tc compile qwen2-vl-7b.artifact --cann 9.0,9.1",
    "qwen2vl-tc compile qwen2-vl-7b.artifact --mode air",
    "qwen2vl-tc compile qwen2-vl-7b.artifact --mode onnx --weights int4",
)
BUILD_EXAMPLES = (
    "qwen2vl-tc build --src Qwen2-VL-7B-Instruct --out qwen2-vl-7b.artifact",
    "qwen2vl-tc build --src Qwen2-VL-2B-Instruct --out qwen2-vl-2b.artifact --dtype fp16 --batch 1,4 --no-verify",
)
VERIFY_EXAMPLES = ("qwen2vl-tc verify qwen2-vl-7b.artifact --against Qwen2-VL-7B-Instruct",)
SIGN_EXAMPLES = ("qwen2vl-tc sign qwen2-vl-7b.artifact --key key.pem",)

Weights = Annotated[
    str,
    typer.Option("--weights", metavar="int8|int4|fp32|fp16", help="With --mode onnx: how weights are stored."),
]
StandardOnly = Annotated[
    bool, typer.Option("--standard-only", help="With --mode onnx: no operator outside the ONNX standard.")
]


def convert(
    src: Src,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="ARTIFACT", help="Default: ./<name of DIR>.artifact. Its graphs are kept."),
    ] = None,
    dtype: Dtype = None,
    no_sync: NoSync = False,
) -> None:
    """Write a checkpoint's weights and tokenizer into an artifact, restructured for the graphs.

    Streams: memory stays small whatever the model's size. A run that was stopped resumes.
    """
    from ...artifacts.store import read_manifest
    from ..weights.convert import convert as convert_weights
    from .console import bytes_progress
    from .locate import default_artifact
    from .output import print_converted, warn_signed

    check_source(src)
    target = out or default_artifact(src)
    warn_signed(target)
    with bytes_progress("convert") as progress:
        converted = convert_weights(src, target, dtype, progress=progress, sync=not no_sync)
    print_converted(converted, target, has_graphs=read_manifest(target).ge is not None)


def compile(
    artifact: OptionalArtifact = None,
    *,
    mode: Mode = "dynamo",
    given: GivenTarget,
    weights: Weights = "int8",
    standard_only: StandardOnly = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Compile from a config.json alone, without any weights."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="ARTIFACT", help="With --config: the artifact to make.")
    ] = None,
) -> None:
    """Trace the graphs for a target and put them into an artifact; its weights stay as they are.

    Needs neither an NPU nor CANN.
    """
    from ..build.air import export_air
    from ..build.compile import CompileOptions, compile_artifact, compile_config
    from ..build.onnx import OnnxOptions, export_onnx
    from .console import step_progress
    from .locate import find_artifact
    from .output import print_admitted, print_compiled, print_exported, print_onnx, print_written, warn_signed

    check_mode(mode)
    options = given.parsed()
    if (config is None) != (out is None) or (config is not None and artifact is not None):
        raise ConfigError("give either an artifact, or --config and --out together")
    target = out or artifact or find_artifact(Path())
    warn_signed(target)
    onnx_options = OnnxOptions(weights, standard_only, options.max_length)
    if mode == "onnx":
        if options != CompileOptions(max_length=options.max_length) or config is not None:
            raise TargetError(
                "--mode onnx takes an artifact, --weights, --standard-only and --max-length, nothing else"
            )
        with step_progress("compile") as progress:
            manifest = export_onnx(target, onnx_options, progress)
        print_onnx(manifest)
        print_written(manifest, target)
        return
    if onnx_options != OnnxOptions(max_length=options.max_length):
        raise TargetError("--weights and --standard-only are for --mode onnx")
    if mode == "air":
        if options != CompileOptions() or config is not None:
            raise TargetError("--mode air exports the graphs that are there: it takes no option but the artifact")
        with step_progress("compile") as progress:
            manifest = export_air(target, progress)
        print_exported(manifest, target)
        return
    with step_progress("compile") as progress:
        if config is None:
            manifest = compile_artifact(target, options, progress)
        else:
            manifest = compile_config(config_file(config), target, options, progress)
    print_compiled(manifest)
    print_admitted(manifest)
    print_written(manifest, target)


def build(
    src: Src,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="ARTIFACT", help="Replaced as a whole, at the very end.")],
    mode: Mode = "dynamo",
    given: GivenTarget,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare with transformers; the manifest records that.")
    ] = False,
    no_sync: NoSync = False,
) -> None:
    """Convert, compile and verify: the one offline command.

    An artifact that fails verification is not written, and the exit code is 1. A run that was stopped resumes.
    """
    from ..build.build import build as build_artifact
    from ..progress import Displays
    from .console import bytes_progress, stdout, step_progress
    from .output import print_admitted, print_compiled, print_written, warn_notes, warn_signed

    check_mode(mode)
    if mode == "air":
        raise TargetError("--mode air: build the graphs first, then run `qwen2vl-tc compile ARTIFACT --mode air`")
    if mode == "onnx":
        raise TargetError("--mode onnx: build, or convert, first, then run `qwen2vl-tc compile ARTIFACT --mode onnx`")
    check_source(src)
    options = given.parsed()
    warn_signed(out)
    displays = Displays(bytes_progress, step_progress)
    built = build_artifact(src, out, options=options, verify=not no_verify, sync=not no_sync, displays=displays)
    warn_notes(built.converted)
    print_compiled(built.manifest)
    if built.report is not None:
        from ..verify.render import render

        render(built.report, stdout())
    if not built.committed:
        fail(f"verification failed: {out} was not written")
        raise typer.Exit(FAILED)
    print_admitted(built.manifest)
    print_written(built.manifest, out)


def verify(
    artifact: Artifact,
    against: Annotated[
        Path, typer.Option("--against", metavar="DIR", help="The checkpoint that the artifact was made from.")
    ],
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Compare an artifact with the original model, run by transformers in fp32, and record the result in it.

    The exit code is 1 if it differs by more than the stated tolerance.
    """
    from ...artifacts.store import read_manifest
    from ..verify.render import render
    from ..verify.subjects import parts_of
    from ..verify.verify import verify_artifact
    from .console import result_json, stdout, step_progress
    from .output import warn_signed

    check_source(against)
    warn_signed(artifact)
    reports = []
    for part in parts_of(read_manifest(artifact)):
        with step_progress("verify" if part == "ge" else "verify ONNX") as progress:
            reports.append(
                verify_artifact(artifact, against, part, progress=progress, trusted_keys=trusted_key or None)
            )
    if as_json:
        # the first is that of the GE graphs, where there are any
        first, *second = (dataclasses.asdict(report) for report in reports)
        result_json({**first, "onnx": second[0]} if second else first)
    else:
        for report in reports:
            render(report, stdout())
    if not all(report.passed for report in reports):
        fail(f"{artifact} differs from {against} by more than the tolerance")
        raise typer.Exit(FAILED)


def sign(
    artifact: Artifact,
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="PEM", help="An ed25519 private key: openssl genpkey -algorithm ed25519 -out key.pem"
        ),
    ],
) -> None:
    """Sign an artifact, so that `generate --trusted-key` and load(trusted_keys=...) can tell whose it is.

    The public half: openssl pkey -in key.pem -pubout -out key.pub. What changes the artifact drops its signature.
    """
    from ..build.sign import sign_artifact
    from .console import result

    sign_artifact(artifact, key)
    result(f"signed {artifact}")
