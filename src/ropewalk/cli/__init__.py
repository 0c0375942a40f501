"""The `ropewalk` command. What needs torch is imported inside the commands, so that help is instant."""
