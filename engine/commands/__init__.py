"""Commands of the engine that have a file each, and options that they share."""
