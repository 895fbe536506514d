"""The recipe of the shipped demo checkpoint: corpus, tokenizer, model, optimiser, export."""
