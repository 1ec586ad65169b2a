"""From a graph to a callable for fixed shapes."""
