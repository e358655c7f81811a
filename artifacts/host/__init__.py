"""What must happen to a process before vendor packages are imported."""
