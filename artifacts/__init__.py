"""The artifact: what a build writes and the runtime reads. Standard library plus the hash."""
