"""`tune`: find the best scaler for a model and a length by measuring."""
