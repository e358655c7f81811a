"""Pictures and clips: from where they lie to patches."""
