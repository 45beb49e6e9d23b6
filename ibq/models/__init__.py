"""Networks: the VQGAN autoencoder, the tokenizer that joins it to a quantizer, and the autoregressive transformer over
its indices."""
