"""Methods that continue a prompt which is cut at any place, compared."""
