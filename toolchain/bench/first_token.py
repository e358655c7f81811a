"""The process that `bench cold-start` times: loads an artifact, makes one token, and prints where the time went.

Run as a module, with one argument of JSON: begin_ns (time.monotonic_ns just before the process was started; that clock
is one for the whole machine), artifact, backend, execute_mode, trusted_keys,
messages.
"""

import time

_STARTED_NS = time.monotonic_ns()

import json  # noqa: E402  # the clock is read before anything is imported
import sys  # noqa: E402


def main() -> None:
    request = json.loads(sys.argv[1])
    from ...runtime import load
    from ..host.execute_mode import engine

    imported_ns = time.monotonic_ns()
    chosen = engine(request["execute_mode"], request["backend"])
    model = load(request["artifact"], chosen, trusted_keys=request["trusted_keys"])
    stamps: list[int] = []
    answer = model.generate(
        request["messages"],
        max_new_tokens=1,
        ignore_eos=True,
        on_token=lambda token: stamps.append(time.monotonic_ns()),
    )
    # only now: what the measurement itself imports is not part of it
    from ..host.machine import device_name, engine_versions

    loading = dict(model.load_ms)
    answering = answer.timings_ms
    phases = {
        "start": (_STARTED_NS - request["begin_ns"]) / 1e6,
        "imports": (imported_ns - _STARTED_NS) / 1e6 + loading.pop("imports"),
        **{name: loading.get(name, 0.0) for name in ("manifest", "weights", "graphs", "device", "processor")},
        **{name: answering.get(name, 0.0) for name in ("preprocess", "visual", "prefill")},
        "weight_check": loading.get("weight_check", 0.0) + answering["weight_check"],
    }
    total_ms = (stamps[0] - request["begin_ns"]) / 1e6
    computing = sum(answering.get(name, 0.0) for name in ("visual", "prefill", "weight_check"))
    print(
        json.dumps(
            {
                "phases_ms": {name: round(value, 3) for name, value in phases.items()},
                "before_visual_ms": round(total_ms - computing, 3),
                "first_token_ms": round(total_ms, 3),
                "backend": model.backend.name,
                "device_name": device_name(model.backend),
                "versions": engine_versions(model.backend),
            }
        )
    )


if __name__ == "__main__":
    from ...artifacts.errors import ToolchainError

    try:
        main()
    except ToolchainError as error:
        sys.exit(str(error))
