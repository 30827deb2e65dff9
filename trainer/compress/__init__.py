"""Masks, codebooks, quantizers and entropy coders: tensors in, tensors or bytes out."""
