"""The denoiser as one functional graph, from torch.export or from disk."""
