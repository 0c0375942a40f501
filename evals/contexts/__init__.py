"""Beyond the trained length without scaling: many contexts pooled, and texts without an end."""
