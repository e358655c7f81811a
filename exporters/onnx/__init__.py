"""The traced GE graphs as ONNX models, operator by operator, with weights quantized while they are written."""
