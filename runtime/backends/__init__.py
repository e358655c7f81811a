"""The engines that can run an artifact, each importing only what it needs."""
