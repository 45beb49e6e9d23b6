"""Networks: the VQGAN autoencoder and the tokenizer that joins it to a quantizer."""
