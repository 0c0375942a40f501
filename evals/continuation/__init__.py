"""A comparison of methods that continue a prompt which may end inside a token."""
