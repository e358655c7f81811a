"""The model as ONNX: the operators of toolchain/graphs one by one, with weights quantized while they are written."""
