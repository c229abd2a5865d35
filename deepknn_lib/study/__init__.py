"""The comparison: which runs there are, how they are executed, and what their results say."""
