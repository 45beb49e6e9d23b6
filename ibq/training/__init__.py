"""Training loops of tokenizer and transformer, with optimizer, state, checkpoints, interventions and logging."""
