"""GE graphs through the real torchair, on a real or an emulated NPU."""
