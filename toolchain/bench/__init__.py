"""How fast an artifact loads and answers."""
