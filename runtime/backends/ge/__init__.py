"""GE graphs: their protobuf, their operators on CPU, and the calls that both the NPU and the reference share."""
