"""Retrieval: tasks that ask for something in a long text, and their scores."""
