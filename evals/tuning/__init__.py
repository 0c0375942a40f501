"""`tune`: the scaler that carries a model to a length, found by measuring."""
