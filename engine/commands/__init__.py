"""Commands of the engine, and what they share. What needs torch is imported inside them, so that help is instant."""
