"""Lowers variants to programs: callables for fixed shapes."""
