"""What is in an artifact, and what running it costs: from its files alone, without an engine."""
