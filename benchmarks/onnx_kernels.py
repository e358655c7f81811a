"""The kernels that docs/ONNX.md chose from, one by one, at the 2B shape. Run by hand, on a quiet machine:

python benchmarks/onnx_kernels.py                 # a minute and a half
python benchmarks/onnx_kernels.py --cpu-time      # one thread, its processor time: for a machine that is not quiet
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FLOAT, MICROSOFT = TensorProto.FLOAT, "com.microsoft"
RANDOM = np.random.default_rng(0)
Arrays = dict[str, Any]


class Bench:
    """Times one-operator models."""

    def __init__(self, cpu_time: bool) -> None:
        self.threads = 1 if cpu_time else 2
        self.clock = time.process_time if cpu_time else time.perf_counter

    def run(self, nodes: Sequence[Any], feeds: Arrays, weights: Arrays, repeats: int = 7, **config: str) -> float:
        """Median milliseconds."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), None)
            for name, a in feeds.items()
        ]
        stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
        graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", FLOAT, None)], stored)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        for key, value in config.items():
            options.add_session_config_entry(f"session.{key}", value)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        times = []
        for _ in range(repeats):
            begin = self.clock()
            session.run(None, feeds)
            times.append((self.clock() - begin) * 1e3)
        return statistics.median(times)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> Any:
    return helper.make_node(op, inputs, outputs, domain=domain, **attributes)


def products(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[Bench], float]]:
    """Every form of one linear layer."""
    x = {"x": RANDOM.standard_normal((tokens, inputs), dtype=np.float32)}

    def blocks(bits: int, block: int, level: int = 4) -> Callable[[Bench], float]:
        shape = (outputs, inputs // block, block * bits // 8)
        weights = {
            "w": RANDOM.integers(0, 256, shape, np.uint8),
            "s": RANDOM.random(shape[:2], np.float32),
        }
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": level}
        return lambda bench: bench.run([node("MatMulNBits", "xws", "y", MICROSOFT, **attributes)], x, weights)

    def by_token(bench: Bench, **config: str) -> float:
        weights = {
            "w": RANDOM.integers(-127, 128, (inputs, outputs), np.int8),
            "s": RANDOM.random(outputs, np.float32),
            "last": np.array([-1]),
            "one": np.float32(1),
            "step": np.float32(1 / 127),
            "zero": np.uint8(128),
            "bias": RANDOM.random(outputs, np.float32),
        }
        nodes = [
            node("Abs", ["x"], ["a"]),
            node("ReduceMax", ["a", "last"], ["largest"]),
            node("Mul", ["largest", "step"], ["scale"]),
            node("Div", ["x", "scale"], ["scaled"]),
            node("QuantizeLinear", ["scaled", "one", "zero"], ["q"]),
            node("MatMulIntegerToFloat", ["q", "w", "one", "s", "zero"], ["p"], MICROSOFT),
            node("Mul", ["p", "scale"], ["m"]),
            node("Add", ["m", "bias"], ["y"]),
        ]
        return bench.run(nodes, x, weights, **config)

    def whole(bench: Bench) -> float:
        weights = {
            "w": RANDOM.integers(-127, 128, (inputs, outputs), np.int8),
            "s": RANDOM.random(outputs, np.float32),
        }
        return bench.run([node("DynamicQuantizeMatMul", "xws", "y", MICROSOFT)], x, weights)

    def fp32(bench: Bench) -> float:
        weights = {"w": RANDOM.random((outputs, inputs), np.float32)}
        return bench.run([node("Gemm", "xw", "y", transB=1)], x, weights)

    return {
        "Gemm fp32": fp32,
        "int8 by token, MatMulIntegerToFloat": by_token,
        "... with session.x64quantprecision": lambda bench: by_token(bench, x64quantprecision="1"),
        "int8 by whole tensor, DynamicQuantizeMatMul": whole,
        "MatMulNBits int8, block 128, accuracy level 0": blocks(8, 128, 0),
        **{f"MatMulNBits int{b}, block {k}": blocks(b, k) for b in (8, 4) for k in (32, 64, 128, 256)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-time", action="store_true")
    bench = Bench(parser.parse_args().cpu_time)
    for shape in ((1872, 1280, 3840), (507, 1536, 17920), (1, 1536, 151936)):
        print(f"{shape[0]} tokens, {shape[1]} to {shape[2]}; {bench.threads} thread(s)")
        for name, run in products(*shape).items():
            milliseconds = run(bench)
            rate = 2 * shape[0] * shape[1] * shape[2] / milliseconds / 1e6
            print(f"  {name:<48}{milliseconds:8.2f} ms {rate:8.0f} GFLOP/s")
    print("attention over 1872 patches, 16 heads of 80")
    feeds = {each: RANDOM.standard_normal((1, 1872, 1280), dtype=np.float32) for each in "qkv"}
    standard = node("Attention", "qkv", "y", q_num_heads=16, kv_num_heads=16)
    print(f"  {'Attention':<48}{bench.run([standard], feeds, {}):8.1f} ms")
    flash = node("MultiHeadAttention", "qkv", "y", MICROSOFT, num_heads=16)
    print(f"  {'MultiHeadAttention':<48}{bench.run([flash], feeds, {}):8.1f} ms")
    x = {"x": RANDOM.standard_normal((1872, 5120), dtype=np.float32)}
    print("x * sigmoid(1.702 x) of 1872 x 5120")
    print(f"  {'Swish':<48}{bench.run([node('Swish', 'x', 'y', alpha=1.702)], x, {}):8.1f} ms")
    print(f"  {'QuickGelu':<48}{bench.run([node('QuickGelu', 'x', 'y', MICROSOFT, alpha=1.702)], x, {}):8.1f} ms")


if __name__ == "__main__":
    main()
