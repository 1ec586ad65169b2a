"""Which sites are computed or forecast at which step, and how: data, and the host arithmetic on it."""
