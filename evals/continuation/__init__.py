"""Ways of going on from a prompt that is cut off anywhere, compared."""
