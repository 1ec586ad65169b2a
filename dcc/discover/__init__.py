"""Every value of a captured graph that may be cached."""
