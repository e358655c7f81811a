"""GE graphs as files: their protobuf, what their operators count as, and what their inputs are bound to."""
