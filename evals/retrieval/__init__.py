"""Retrieval: tasks that ask for something in a long text, and the scores of their answers."""
