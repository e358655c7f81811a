"""What makes an artifact: convert, compile and verify in one, graphs, ONNX and offline models, signatures."""
