"""What people read of a run: sentences, tables, plots, and the report of one file."""
