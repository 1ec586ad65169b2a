"""Device kernels of dcc, one per file. Each file holds its plain-torch `reference`, which is the meaning of the op."""

if __name__ != "dcc.kernels":
    raise ImportError("import dcc.kernels; a bare `kernels` is another package (Hugging Face's)")
