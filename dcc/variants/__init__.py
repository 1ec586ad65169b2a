"""From a plan and a captured graph to the rewritten graphs of its rows, and what they cost."""
